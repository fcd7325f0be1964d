"""On one CUDA GPU: tokens and accuracy against transformers, launches, streaming, planted faults, refusals."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import tri_mpk
from decoders import prompt, tiny_config
from profiles import assert_sound
from tri_mpk import CausalLM, DeviceError, MegakernelTimeout
from tri_mpk.account import Queues, edited
from tri_mpk.benchmark import decode_at, fill_cache, logits_at
from tri_mpk.geometries import geometry
from tri_mpk.loading import memory_bytes, random_model
from tri_mpk.model import PAGE_SIZE
from tri_mpk.models import describe
from tri_mpk.program import kernel_constants
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler.descriptor import EVENT_STRIDE

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).resolve().parents[2] / "demos" / "tiny"
CUDA = torch.device("cuda", 0)
MAX_SEQ_LEN = 2048

SMALL: dict[str, PreTrainedConfig] = {
    "llama": tiny_config(
        "llama", vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    ),
    "llama, odd sizes": tiny_config(
        "llama", vocab_size=1001, hidden_size=510, intermediate_size=701, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=34, max_position_embeddings=4096,
    ),
    "mistral, head size 80": tiny_config(
        "mistral", vocab_size=777, hidden_size=320, intermediate_size=1000, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=80, max_position_embeddings=4096,
    ),
    "qwen2, 7 to 1": tiny_config(
        "qwen2", vocab_size=2000, hidden_size=896, intermediate_size=2432, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
    "qwen3": tiny_config(
        "qwen3", vocab_size=1500, hidden_size=640, intermediate_size=1920, num_hidden_layers=3, num_attention_heads=10,
        num_key_value_heads=5, head_dim=128, max_position_embeddings=4096,
    ),
}  # fmt: skip
LARGE = ["Llama-3.2-1B", "Qwen3-0.6B"]


@pytest.fixture(scope="module")
def small() -> CausalLM:
    """A model for what does not depend on the model."""
    return random(SMALL["llama"], torch.bfloat16)[0]


def random(config: PreTrainedConfig, dtype: torch.dtype, **parameters: object) -> tuple[CausalLM, PreTrainedModel]:
    """Ours and transformers', which share their weights."""
    theirs = random_model(copy.deepcopy(config), 0, dtype, CUDA)
    theirs.generation_config.eos_token_id = None
    return tri_mpk.from_model(theirs, max_seq_len=MAX_SEQ_LEN, progress=False, **parameters), theirs


def tokens(length: int, vocab_size: int = 1000) -> torch.Tensor:
    return prompt(length, vocab_size).to(CUDA)


@contextmanager
def exact_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def fp32_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The definition of correct: transformers, fp32, eager attention."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    with exact_fp32():
        return exact(input_ids).logits[0]


def distances(logits: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Relative L2 and mean KL divergence."""
    logits = logits[0].double()
    exact = exact.double()
    l2 = (logits - exact).norm() / exact.norm()
    kl = kl_div(logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
    return float(l2), float(kl)


# ---- tokens and accuracy ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["Four score and seven", "Humpty Dumpty sat"])
def test_the_demo_recites_as_transformers_in_fp32(text, dtype):
    """Its margins are far above the noise of bf16 (tests/demos), so all tokens must be equal, EOS included."""
    input_ids = AutoTokenizer.from_pretrained(DEMO)(text, return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model = tri_mpk.from_pretrained(DEMO, dtype=dtype, progress=False)
    assert model.dtype == dtype and model.device == CUDA
    result = model.generate(input_ids)
    assert result.device.type == "cpu"
    assert torch.equal(result, theirs.generate(input_ids))
    assert model.generate(input_ids.to(CUDA), max_new_tokens=1).device == CUDA


def check_accuracy(config: PreTrainedConfig, length: int) -> None:
    ours, theirs = random(config, torch.bfloat16)
    input_ids = tokens(length, config.vocab_size)
    exact = fp32_logits(theirs, input_ids)
    with torch.no_grad():
        bf16 = theirs(input_ids).logits
    actual = ours(input_ids).logits
    (our_l2, our_kl), (their_l2, their_kl) = distances(actual, exact), distances(bf16, exact)
    print(f"relative L2 {our_l2:.2e} (transformers {their_l2:.2e}), KL {our_kl:.2e} (transformers {their_kl:.2e})")
    assert 0 < our_l2 <= their_l2 and 0 < our_kl <= their_kl

    best, second = exact.topk(2, -1).values.unbind(-1)
    clear = best - second > 4 * (bf16[0].float() - exact).abs().amax(-1)
    assert bool(clear.any())
    assert torch.equal(actual[0].argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("name", SMALL)
def test_bf16_is_as_close_to_fp32_as_transformers_bf16(name):
    check_accuracy(SMALL[name], length=150)  # beyond a page


@pytest.mark.parametrize("name", LARGE)
def test_bf16_of_published_geometries(name):
    check_accuracy(geometry(name), length=64)


@pytest.mark.parametrize("name", SMALL)
def test_fp32_equals_transformers(name):
    ours, theirs = random(SMALL[name], torch.float32)
    input_ids = tokens(140, 700)
    torch.testing.assert_close(ours(input_ids).logits[0], fp32_logits(theirs, input_ids), rtol=2e-4, atol=2e-4)
    with exact_fp32():
        expected = theirs.generate(input_ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(input_ids, max_new_tokens=8), expected)


def test_fp16_equals_fp32_within_its_rounding():
    ours, theirs = random(SMALL["llama"], torch.float16)
    input_ids = tokens(40)
    assert distances(ours(input_ids).logits, fp32_logits(theirs, input_ids))[0] < 5e-3


@contextmanager
def constants_of(**changed: bool) -> Iterator[None]:
    """Kernels planned meanwhile have these constants."""

    def change(*arguments):
        return dataclasses.replace(kernel_constants(*arguments), **changed)

    with mock.patch("tri_mpk.persistent_kernel.kernel_constants", change):
        yield


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def plain_model(**changed: bool) -> CausalLM:
    with constants_of(ring=False, **changed):
        model, _ = random(SMALL["llama"], torch.bfloat16)
        model.compile()
    return model


def test_the_portable_form_gives_the_same_bits():
    """Triton's atomics and the PTX of waits and signals stand for each other."""
    portable, ptx = plain_model(portable=True), plain_model(portable=False)
    assert "PORTABLE = tl.constexpr(True)" in portable.kernel.program.source
    assert "PORTABLE = tl.constexpr(False)" in ptx.kernel.program.source
    input_ids = tokens(20)
    assert torch.equal(portable(input_ids).logits, ptx(input_ids).logits)


def test_the_weight_ring_and_plain_loads_stand_for_each_other(small):
    """They sum up in different orders, so that some activations round the other way."""
    plain = plain_model()
    small.compile()
    assert small.kernel.program.constants.slot_bytes > 0
    assert "RING = tl.constexpr(0)" in plain.kernel.program.source
    input_ids = tokens(200)
    ring_logits, plain_logits = small(input_ids).logits, plain(input_ids).logits
    assert distances(ring_logits, plain_logits[0])[0] < 0.02
    _, theirs = random(SMALL["llama"], torch.bfloat16)
    exact = fp32_logits(theirs, input_ids)
    assert distances(ring_logits, exact)[0] <= 1.1 * distances(plain_logits, exact)[0]


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (64, torch.float16), (80, torch.bfloat16), (128, torch.bfloat16)],
    ids=str,
)
def test_attention_by_warps_and_by_blocks_stand_for_each_other(head_dim, dtype):
    """On the same filled cache, which goes on beyond the position, at the edges of blocks and with one to many splits.

    A part is some 0.15 in size, a mean of 64 to 128 random values: a token too many or too few changes it by 5 %.
    """
    config = tiny_config(
        "qwen3", vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=4096,
    )  # fmt: skip
    by_warps, theirs = random(config, dtype)
    by_warps.compile()
    with constants_of(ring=False):
        by_blocks = tri_mpk.from_model(theirs, max_seq_len=MAX_SEQ_LEN, progress=False)
        by_blocks.compile()
    models = (by_warps, by_blocks)
    assert [attention_constants(model)["BY_WARPS"] for model in models] == [True, False]
    (split_tokens,) = {attention_constants(model)["SPLIT_TOKENS"] for model in models}
    for position in (0, 1, 15, 16, 17, 31, 32, 33, 300, 600, 1000, 1100, 1500):
        active = max(1, -(-position // split_tokens))
        found = []
        for model in models:
            tensors = model.kernel.tensors
            fill_cache(model)
            parts, lse = tensors["attention"].data, tensors["attention.lse"].data
            assert active <= parts.shape[0]
            for tensor in (parts, lse):
                tensor.fill_(float("nan"))
            before = [tensors[f"L00.{kind}_cache"].data.clone() for kind in "kv"]
            logits = logits_at(model, position, token=5)
            rows = []
            for kind, old in zip("kv", before, strict=True):
                cache = tensors[f"L00.{kind}_cache"].data
                place = (int(tensors["page_table"].data[position // PAGE_SIZE]), slice(None), position % PAGE_SIZE)
                rows.append(cache[place].clone())
                assert not torch.equal(rows[-1], old[place]), "the new token is not in the cache"
                old[place] = rows[-1]
                assert torch.equal(cache, old), "another row of the cache has changed"
            assert bool(parts[active:].isnan().all()) and bool(lse[active:].isnan().all())
            found.append((logits, parts[:active].clone(), lse[:active].clone(), *rows))
        (logits, parts, lse, *rows), (other_logits, other_parts, other_lse, *other_rows) = found
        assert bool(logits.isfinite().all()) and relative_l2(logits, other_logits) < 0.02, position
        for split in range(active):  # each of them, lest many hide the fault of one
            assert relative_l2(parts[split], other_parts[split]) < 0.02, (position, split)
        torch.testing.assert_close(lse, other_lse, rtol=0.0, atol=0.03)
        for row, other_row in zip(rows, other_rows, strict=True):
            assert relative_l2(row, other_row) < 0.02, position


def attention_constants(model: CausalLM) -> dict[str, object]:
    (variant,) = [v for v in model.kernel.program.variants if v.op.name == "attention"]
    return dict(variant.constants)


@pytest.mark.parametrize("slots", [3, 4])
def test_the_result_does_not_depend_on_the_slots_of_the_ring(small, slots):
    expected = small(tokens(30)).logits.clone()
    plan = small.kernel.runtime.shared_memory
    assert plan.ring_slots > slots
    small.kernel.runtime.shared_memory = dataclasses.replace(plan, ring_slots=slots)
    try:
        assert torch.equal(small(tokens(30)).logits, expected)
    finally:
        small.kernel.runtime.shared_memory = plan


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_prompt_skips_the_language_model_head(num_workers):
    """Whose weights are on their way already: all of them with many workers, only the first ones with two."""
    model, _ = random(SMALL["llama"], torch.bfloat16, num_workers=num_workers)
    text = model.generate(tokens(20), max_new_tokens=30)
    assert torch.equal(model.generate(text[:, :40], max_new_tokens=10), text)


# ---- launches ----


def test_the_same_bits_every_time(small):
    input_ids = tokens(30)
    logits = small(input_ids).logits.clone()
    text = small.generate(input_ids, max_new_tokens=200)
    for _ in range(20):
        assert torch.equal(small(input_ids).logits, logits)
        assert torch.equal(small.generate(input_ids, max_new_tokens=200), text)


def test_one_launch_per_generate(small):
    small.compile()
    launched = []
    hook = launched.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        small.generate(tokens(5), max_new_tokens=100)
        assert len(launched) == 1
        small.generate(tokens(9), max_new_tokens=1)
        assert len(launched) == 2
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)


class AtToken(BaseStreamer):
    """Does something at the n-th new token."""

    def __init__(self, n: int, action):
        self.left, self.action = n + 1, action  # the prompt is put first

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def end(self) -> None: ...


def test_tokens_arrive_while_the_kernel_runs(small):
    done = []
    streamer = AtToken(1, lambda: done.append(small.kernel.runtime.done.query()))
    small.generate(tokens(5), max_new_tokens=2000, streamer=streamer)
    assert done == [False]


def test_ctrl_c_leaves_the_model_usable(small):
    expected = small.generate(tokens(5), max_new_tokens=50)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.generate(tokens(5), max_new_tokens=2000, streamer=AtToken(3, interrupt))
    assert small.kernel.runtime.finished() and int(small.kernel.step.data) < 2000
    assert torch.equal(small.generate(tokens(5), max_new_tokens=50), expected)


@pytest.mark.parametrize("epoch", [2**31 - 20, -20])
def test_epochs_wrap_around(small, epoch):
    expected = small.generate(tokens(5), max_new_tokens=100)
    small.kernel.runtime.set_epoch(epoch)
    assert torch.equal(small.generate(tokens(5), max_new_tokens=100), expected)
    small.kernel.runtime.set_epoch(1)


def test_two_models_take_turns(small):
    other, _ = random(SMALL["qwen3"], torch.bfloat16)
    first = small.generate(tokens(5), max_new_tokens=20), other.generate(tokens(5), max_new_tokens=20)
    again = small.generate(tokens(5), max_new_tokens=20), other.generate(tokens(5), max_new_tokens=20)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["layers.1.self_attn.v_proj", "layers.0.mlp.gate_proj", "layers.2.self_attn.o_proj"])
def test_weights_are_used_where_they_lie(name):
    ours, theirs = random(SMALL["llama"], torch.bfloat16)
    before = ours(tokens(3)).logits.clone()
    dict(theirs.model.named_parameters())[f"{name}.weight"].data.mul_(-1)
    after = ours(tokens(3)).logits
    assert distances(after, fp32_logits(theirs, tokens(3)))[0] < 0.05 < distances(before, after[0])[0]


def test_memory_is_weights_cache_and_little_more():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = tri_mpk.from_config(geometry("Qwen3-0.6B"), max_seq_len=MAX_SEQ_LEN, progress=False)
    model.compile()
    used = torch.cuda.memory_allocated() - before
    needed = memory_bytes(model.config, describe(model.config, MAX_SEQ_LEN), torch.bfloat16, MAX_SEQ_LEN)
    assert used <= 1.02 * needed + (256 << 20)


# ---- time stamps ----


@pytest.mark.parametrize("name", ["llama", "llama, odd sizes", "qwen3"])
def test_a_profile(name):
    """The same tokens; records of every task, in order on a clock that all SMs share."""
    plain, theirs = random(SMALL[name], torch.bfloat16)
    model = tri_mpk.from_model(theirs, max_seq_len=MAX_SEQ_LEN, progress=False, profile=True)
    for _ in range(2):
        expected = plain.generate(tokens(5), max_new_tokens=60)
        assert torch.equal(model.generate(tokens(5), max_new_tokens=60), expected)
        profile = model.profile()
        assert profile.is_real_time and profile.steps == range(32, 64)
        assert_sound(profile)
        launch_ns = model.kernel.runtime.last_launch_ms * 1e6
        recorded_ns = profile.step_times.max() - profile.step_times.min()
        assert 0.3 * launch_ns < recorded_ns < launch_ns  # of 64 steps, the last 32
        assert 0.05 < profile.summary()["utilisation"] < 1


def test_stamps_cost_little():
    """Under 3 % for the models of the bench, see bench/profile_overhead.py; here, on a small one, an order of that."""
    config = geometry("Llama-3.2-1B")
    config.num_hidden_layers = 4
    theirs = random_model(config, 0, torch.bfloat16, CUDA)
    models = [tri_mpk.from_model(theirs, max_seq_len=512, progress=False, profile=p) for p in (False, True)]
    off, on = (min(times) for times in zip(*([decode_at(m, 256, 32) for m in models] for _ in range(20)), strict=True))
    assert on < 1.1 * off


# ---- planted faults ----


@pytest.fixture
def impatient(small) -> Iterator[CausalLM]:
    small.compile()
    small.kernel.runtime.wait_bound_s = 1.0
    yield small
    small.kernel.runtime.wait_bound_s = 10.0


def check_timeout(model: CausalLM, fault, repair) -> MegakernelTimeout:
    """The fault ends a launch in time; after the repair the next launch is right."""
    expected = model.generate(tokens(5), max_new_tokens=20)
    fault()
    started = time.monotonic()
    with pytest.raises(MegakernelTimeout) as caught:
        model.generate(tokens(5), max_new_tokens=20)
    assert time.monotonic() - started < 5
    repair()
    assert torch.equal(model.generate(tokens(5), max_new_tokens=20), expected)
    return caught.value


def test_a_wait_that_counts_too_far(impatient):
    queue, count = impatient.kernel.runtime.queue, words.TASK_WAIT_COUNT.value
    saved = queue.clone()
    record = int((saved[:, count] > 0).nonzero()[0])

    def fault() -> None:
        queue[record, count] += 1

    error = check_timeout(impatient, fault, lambda: queue.copy_(saved))
    assert error.seen < error.wanted and 0 <= error.worker < impatient.kernel.num_workers
    assert error.task in str(error) and f"event {error.event} stood at {error.seen}" in str(error)
    damaged = impatient.kernel.program.graph.task_name(int(saved[record, words.TASK_VARIANT.value]) >> 32)
    assert error.chain[-1].startswith(f"{damaged} (") and f"the descriptor of {damaged} (" in error.root_cause


def test_a_task_of_no_variant(impatient):
    queue = impatient.kernel.runtime.queue
    saved = queue.clone()

    def fault() -> None:
        queue[0, words.TASK_VARIANT.value] = queue[0, words.TASK_VARIANT.value] >> 32 << 32 | 77

    error = check_timeout(impatient, fault, lambda: queue.copy_(saved))
    damaged = impatient.kernel.program.graph.task_name(impatient.kernel.program.schedule.queues[0][0])
    assert error.seen < error.wanted
    assert error.chain[-1].startswith(f"{damaged} (") and f"the descriptor of {damaged} (" in error.root_cause


def test_tasks_that_only_signal(impatient):
    """What the account makes of tasks that it takes away: nobody waits for them in vain, and they write nothing."""
    expected = impatient.generate(tokens(5), max_new_tokens=20)
    parts = impatient.kernel.tensors["attention"].data
    with edited(impatient, (Queues.without_attention,)):
        parts.fill_(7.0)
        assert impatient.generate(tokens(5), max_new_tokens=20).shape == expected.shape
        assert bool((parts == 7.0).all())
    assert torch.equal(impatient.generate(tokens(5), max_new_tokens=20), expected)


def test_a_lost_signal(impatient):
    runtime = impatient.kernel.runtime
    event = 1 + len(runtime.program.events.events) // 2
    error = check_timeout(impatient, lambda: runtime.events[event * EVENT_STRIDE].sub_(1), lambda: None)
    count = runtime.program.events.events[event].count
    assert error.wanted > error.seen and f"1 of {count} signals of event {event} never came" in error.root_cause


# ---- refusals ----


def test_too_many_workers(small):
    expected = small.generate(tokens(5), max_new_tokens=5)
    model, _ = random(SMALL["llama"], torch.bfloat16, num_workers=1000)
    with pytest.raises(DeviceError, match=r"1000 workers at once.*num_workers"):
        model.generate(tokens(5), max_new_tokens=5)
    assert torch.equal(small.generate(tokens(5), max_new_tokens=5), expected)


def test_few_workers_give_the_same_tokens(small):
    model, theirs = random(SMALL["llama"], torch.bfloat16, num_workers=7)
    exact = fp32_logits(theirs, tokens(9))
    assert distances(model(tokens(9)).logits, exact)[0] <= 1.5 * distances(small(tokens(9)).logits, exact)[0]


def test_too_little_memory():
    config = tiny_config(vocab_size=40_000_000, hidden_size=4096, num_attention_heads=32, head_dim=128)
    before = torch.cuda.memory_allocated()
    with pytest.raises(DeviceError, match=r"GiB are needed on cuda:0.*are free"):
        tri_mpk.from_config(config, dtype=torch.bfloat16)
    assert torch.cuda.memory_allocated() == before


def test_a_cpu_model_moves_to_the_gpu():
    theirs = random_model(SMALL["qwen3"], 0, torch.bfloat16, torch.device("cpu"))
    model = tri_mpk.from_model(theirs, device="cuda", max_seq_len=64, progress=False)
    assert model.device == CUDA and model.generate([[1, 2]], max_new_tokens=2).device == CUDA
