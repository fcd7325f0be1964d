"""What one of several ranks does in a test: `python rank_program.py CASE ARGUMENTS`, started by ranks.py."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import time
import zlib
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import tri_mpk
from decoders import prompt, tiny_config, transformers_model
from tri_mpk import CausalLM

FEW_POLLS_S = 2.0  # in the interpreter: 2000 polls


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def pair(
    family: str = "llama", max_seq_len: int = 64, wait_bound_s: float = 60.0, on_gpu: bool = False,
    options: dict[str, int] | None = None, **changes: object,
):  # fmt: skip
    """Our part of a tiny model, and all of transformers'. On a GPU in fp32 too, but with workers as the GPU has SMs."""
    theirs = transformers_model(tiny_config(family, **changes))
    where = {"dtype": torch.float32} if on_gpu else {"device": "cpu", "num_workers": 2}
    where |= options or {}
    ours = tri_mpk.from_model(
        copy.deepcopy(theirs), max_seq_len=max_seq_len, wait_bound_s=wait_bound_s, progress=False, **where
    )
    return ours, theirs


def digest(*tensors: torch.Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), value)
    return value


def residual_bits(model: CausalLM) -> int:
    """Of all that should be the same on all ranks after a step."""
    tensors = model.kernel.tensors
    names = ("x", "x_attention", "parts_x", "parts_attention", "best_value", "best_index", "asked", "tokens")
    return digest(*(tensors[name].data for name in names))


@torch.no_grad()
def decode(length: int = 3, num_new: int = 4, repeats: int = 2, **parameters: Any) -> None:
    """Tokens, and logits of all positions, beside transformers'."""
    ours, theirs = pair(**parameters)
    input_ids = prompt(length)
    result: dict[str, Any] = {"tokens": [], "residual": [], "logits": []}
    for _ in range(repeats):
        result["tokens"].append(ours.generate(input_ids, max_new_tokens=num_new)[0].tolist())
        result["residual"].append(residual_bits(ours))
        logits = ours(input_ids).logits
        result["logits"].append(digest(logits))
    exact, logits = theirs(input_ids).logits, logits.cpu()
    result["expected"] = theirs.generate(input_ids, max_new_tokens=num_new)[0].tolist()
    result["error"] = float((logits - exact).norm() / exact.norm())
    say(result)


def sample(requests: list[dict[str, Any]], **parameters: Any) -> None:
    """Tokens and log-probabilities of requests, then of one whose seed is drawn, and of a greedy one."""
    ours, theirs = pair(**parameters)
    common = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logprobs": True}
    found = [ours.generate(prompt(3), **common, **request) for request in requests]
    torch.manual_seed(ours.kernel.rank)
    drawn = ours.generate(prompt(3), max_new_tokens=4, do_sample=True, temperature=9.0)[0].tolist()
    greedy = torch.equal(ours.generate(prompt(3), max_new_tokens=3), theirs.generate(prompt(3), max_new_tokens=3))
    say({
        "tokens": [each.sequences[0].tolist() for each in found], "drawn": drawn, "greedy": greedy,
        "logprobs": [each.logprobs[0].tolist() for each in found],
    })  # fmt: skip


def batch_pair(on_gpu: bool = False, **parameters: Any):
    """As `pair`, for batches: three slots, and chunks of prompts."""
    options = {"max_batch_size": 3, "max_tokens_per_step": 8, "page_size": 64 if on_gpu else 7}
    return pair(on_gpu=on_gpu, options=options, **parameters)


def shared_bits(model: CausalLM) -> int:
    """Of all that ranks have pushed to all."""
    tensors = [tensor for name, tensor in model.kernel.tensors.items() if tensor.symmetric and name != "x.parts"]
    assert len(tensors) == 6
    return digest(*(tensor.data for tensor in tensors))


def batch(lengths: list[int], num_new: int = 4, repeats: int = 2, **parameters: Any) -> None:
    """Greedy tokens of prompts of these lengths, and transformers'."""
    ours, theirs = batch_pair(**parameters)
    prompts = [prompt(length, seed=i)[0] for i, length in enumerate(lengths)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, own_mask, own in zip(ids, mask, prompts, strict=True):
        row[-len(own) :], own_mask[-len(own) :] = own, 1
    common = {"attention_mask": mask, "max_new_tokens": num_new, "pad_token_id": 0}
    found = [ours.generate(ids, **common).tolist() for _ in range(repeats)]
    say({
        "tokens": found, "bits": shared_bits(ours), "launches": ours.kernel.runtime.num_launches,
        "expected": theirs.generate(ids, do_sample=False, **common).tolist(),
    })  # fmt: skip


def serve_batch(requests: list[dict[str, Any]], cancelling: int = -1, **parameters: Any) -> None:
    """Requests that come one after another; the rank `cancelling` cancels a long one."""
    ours, _ = batch_pair(**parameters)
    torch.manual_seed(ours.kernel.rank)  # what a rank would draw for itself
    with ours.serve() as engine:
        long = engine.submit(prompt(2), max_new_tokens=ours.max_seq_len - 4)
        streams = [engine.submit(prompt(3), max_new_tokens=4, output_logprobs=True, **each) for each in requests]
        drawn = engine.submit(prompt(3), max_new_tokens=4, do_sample=True, temperature=9.0)
        found = [(stream.result(), stream.logprobs) for stream in streams]
        next(long)
        if ours.kernel.rank == cancelling:
            long.cancel()
        try:
            long.result()
        finally:
            engine.finish()
    say({
        "tokens": [tokens for tokens, _ in found], "logprobs": [logprobs for _, logprobs in found],
        "drawn": drawn.result(), "reason": long.finish_reason, "long": long.tokens, "bits": shared_bits(ours),
    })  # fmt: skip


def different_requests(what: str, **parameters: Any) -> None:
    """Ranks that do not submit the same: an error, and then a launch that is in order."""
    ours, theirs = batch_pair(**parameters)
    rank = ours.kernel.rank
    text = ""
    try:
        with ours.serve() as engine:
            first = engine.submit(prompt(2), max_new_tokens=2)
            if what == "a prompt":
                second = engine.submit(prompt(3, seed=rank), max_new_tokens=2)
            else:
                second = engine.submit(prompt(3), max_new_tokens=2) if rank == 0 else first
            second.result()
    except tri_mpk.TriMpkError as error:
        text = f"{type(error).__name__}: {error}"
    equal = torch.equal(ours.generate(prompt(2), max_new_tokens=3), theirs.generate(prompt(2), max_new_tokens=3))
    say({"text": text, "equal": equal})


def serve_and_hang(bound_s: float = 3 * FEW_POLLS_S, **parameters: Any) -> None:
    """Serves until something happens to another rank, and says what it was."""
    ours, _ = batch_pair(wait_bound_s=20.0, **parameters)
    ours.generate(prompt(2), max_new_tokens=2)
    ours.kernel.runtime.wait_bound_s = bound_s
    say({"pids": [os.getpid(), *(worker.pid for worker in getattr(ours.kernel.runtime, "workers", []))]})
    try:
        with ours.serve() as engine:
            engine.submit(prompt(2), max_new_tokens=2).result()
            say("idle")
            while engine.is_open:
                time.sleep(0.05)
    except tri_mpk.TriMpkError as error:
        say({"error": type(error).__name__, "text": str(error), "silent_ranks": getattr(error, "silent_ranks", None)})
        return
    say({"error": None})


class AtToken(BaseStreamer):
    def __init__(self, n: int, action):
        self.left, self.action = n + 1, action

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def end(self) -> None: ...


def stop_on_one_rank(stopping: int, **parameters: Any) -> None:
    """One rank's streamer fails; all ranks end after the same step, and the model stays usable."""
    ours, theirs = pair(**parameters)

    def fail() -> None:
        raise ValueError("enough")

    streamer = AtToken(1, fail) if ours.kernel.rank == stopping else None
    failed = False
    try:
        ours.generate(prompt(2), max_new_tokens=ours.max_seq_len - 4, streamer=streamer)
    except ValueError:
        failed = True
    step = int(ours.kernel.step.data)
    equal = torch.equal(ours.generate(prompt(2), max_new_tokens=3), theirs.generate(prompt(2), max_new_tokens=3))
    say({"failed": failed, "step": step, "equal": equal})


def epochs(start: int) -> None:
    """Steps across the wrap-around of the epoch and of counters."""
    ours, theirs = pair()
    expected = theirs.generate(prompt(2), max_new_tokens=3)
    ours.compile()
    ours.kernel.runtime.set_epoch(start)
    equal = [torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected) for _ in range(2)]
    say({"equal": equal, "next": ours.kernel.runtime.next_epoch})


def hang(bound_s: float = FEW_POLLS_S, max_seq_len: int = 512, **parameters: Any) -> None:
    """Decodes until something happens to another rank, and says what it was."""
    ours, _ = pair(max_seq_len=max_seq_len, wait_bound_s=20.0, max_position_embeddings=65536, **parameters)
    ours.generate(prompt(2), max_new_tokens=2)
    ours.kernel.runtime.wait_bound_s = bound_s
    workers = getattr(ours.kernel.runtime, "workers", [])
    say({"pids": [os.getpid(), *(worker.pid for worker in workers)]})
    try:
        ours.generate(prompt(2), max_new_tokens=max_seq_len - 4, streamer=AtToken(2, lambda: say("decoding")))
    except tri_mpk.TriMpkError as error:
        facts = ("rank", "silent_ranks", "event", "seen", "wanted", "task", "root_cause")
        say({"error": type(error).__name__, "text": str(error)} | {n: getattr(error, n, None) for n in facts})
        return
    say({"error": None})


def lost_signal(on: int, bound_s: float = FEW_POLLS_S, **parameters: Any) -> None:
    """One counter of one rank lacks a signal; all ranks end, and the next launch is right."""
    ours, theirs = pair(wait_bound_s=20.0, **parameters)
    expected = theirs.generate(prompt(2), max_new_tokens=3)
    ours.compile()
    runtime = ours.kernel.runtime
    # The others give up first. One that is let go by what this rank signals after it has given up would begin the next
    # step, whose signals to this rank fill up the counter that lacks one.
    runtime.wait_bound_s = bound_s if ours.kernel.rank == on else bound_s / 2
    if ours.kernel.rank == on:
        runtime.events[32] -= 1
    try:
        ours.generate(prompt(2), max_new_tokens=3)
        error = None
    except tri_mpk.MegakernelTimeout as caught:
        error = {"rank": caught.rank, "silent": caught.silent_ranks, "text": str(caught)}
    runtime.wait_bound_s = 20.0
    say({"error": error, "equal": torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected)})


def profile() -> None:
    """Time stamps of a kernel on several ranks."""
    from profiles import assert_sound

    theirs = transformers_model(tiny_config(num_attention_heads=4, num_key_value_heads=2))
    ours = tri_mpk.from_model(theirs, device="cpu", max_seq_len=64, num_workers=2, progress=False, profile=True)
    tokens = ours.generate(prompt(2), max_new_tokens=3)
    found = ours.profile()
    assert_sound(found)
    equal = torch.equal(tokens, theirs.generate(prompt(2), max_new_tokens=3))
    say({"equal": equal, "steps": found.summary()["steps"]})


def out_of_step(on: int) -> None:
    """Counters of one rank stand where others do not expect them, as after a launch that only it has given up."""
    ours, theirs = pair()
    expected = theirs.generate(prompt(2), max_new_tokens=3)
    equal = [torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected)]
    if ours.kernel.rank == on:
        ours.kernel.runtime.out_of_step = True
        ours.kernel.runtime.events.fill_(12345)
    equal.append(torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected))
    if ours.kernel.rank == on:
        ours.kernel.runtime.set_epoch(77)
    equal.append(torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected))
    say({"equal": equal})


def dead_worker(on: int) -> None:
    """A worker of one rank is killed in a launch; its host says so, the other ranks time out, and all go on."""
    ours, theirs = pair(wait_bound_s=20.0)
    expected = theirs.generate(prompt(2), max_new_tokens=3)
    ours.compile()
    runtime = ours.kernel.runtime
    runtime.wait_bound_s = FEW_POLLS_S
    streamer = AtToken(2, runtime.workers[1].kill) if ours.kernel.rank == on else None
    try:
        ours.generate(prompt(2), max_new_tokens=50, streamer=streamer)
        error = None
    except tri_mpk.TriMpkError as caught:
        error = type(caught).__name__
    runtime.wait_bound_s = 20.0
    say({"error": error, "equal": torch.equal(ours.generate(prompt(2), max_new_tokens=3), expected)})


def refuse(what: str) -> None:
    """A mistake that is named before anything is launched, on all ranks."""
    rank = int(os.environ["RANK"])
    try:
        if what == "prompt":
            ours, _ = pair()
            ours.generate(prompt(2, seed=1 + rank), max_new_tokens=2)
        elif what == "sampling":
            ours, _ = pair()
            ours.generate(prompt(2), max_new_tokens=2, do_sample=rank == 0)
        elif what == "length":
            pair(max_seq_len=64 + rank)
        elif what == "pages":
            pair(options={"max_batch_size": 3, "num_pages": 9 + rank})
        elif what == "config":
            pair(rms_norm_eps=1e-5 * (1 + rank))
        elif what == "workers":
            ours, _ = pair()
            ours.kernel.program = None
        elif what == "world":
            theirs = transformers_model(tiny_config())
            tri_mpk.from_model(theirs, device="cpu", tensor_parallel=3, progress=False)
        elif what == "absent":
            from tri_mpk import distributed

            ours, _ = pair()
            ours.compile()
            distributed.MEET_BOUND_S = 2.0  # only now: until here ranks may be late without being absent
            if rank == 0:
                ours.generate(prompt(2), max_new_tokens=2)
            time.sleep(4.0)
        else:
            pair(**json.loads(what))
        say({"error": None})
    except Exception as error:
        say({"error": type(error).__name__, "text": str(error)})


@torch.no_grad()
def checkpoint(folder: str) -> None:
    """From safetensors files, of which only a part is read."""
    from transformers import AutoModelForCausalLM

    ours = tri_mpk.from_pretrained(folder, device="cpu", max_seq_len=64, num_workers=2, progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tensors = [t for t in ours.kernel.tensors.values() if t.data is not None and t.dtype.is_floating_point]
    held = sum(t.numel for t in tensors if len(t.dims) == 2)
    equal = torch.equal(ours.generate(prompt(2), max_new_tokens=3), theirs.generate(prompt(2), max_new_tokens=3))
    say({"equal": equal, "held": held, "whole": sum(p.numel() for p in theirs.parameters() if p.dim() == 2)})


@torch.no_grad()
def bench() -> None:
    """The parts of the benchmark that run on a CPU: weights, caches and logits of ranks are those of one model."""
    from tri_mpk.benchmark import fill_cache
    from tri_mpk.rank_benchmark import check_contexts

    config = tiny_config("qwen3", num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    ours = tri_mpk.from_config(config, device="cpu", max_seq_len=128, num_workers=2, progress=False)
    fill_cache(ours)
    assert ours.dtype is torch.float32
    found = check_contexts(ours, [37], print)
    say({"errors": found.get(37)})


def graph() -> None:
    """all_reduce, all_gather and argmax through the graph API, without a model."""
    from tri_mpk.distributed import world
    from tri_mpk.persistent_kernel import PersistentKernel

    rank, world_size = world()
    torch.manual_seed(rank)
    step, tokens = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    torch.distributed.init_process_group("gloo")
    mpk = PersistentKernel(world_size, rank, 2, [step, tokens], wait_bound_s=60.0)
    x = torch.randn(37)
    value, index = torch.randn(3), torch.arange(3, dtype=torch.int32) + 3 * rank
    total = mpk.new_tensor((37,), torch.float32, name="total")
    mpk.all_reduce_layer(input=mpk.attach_input(x, name="x"), output=total)
    copies = mpk.new_tensor((world_size, 37), torch.float32, name="copies", symmetric=True)
    mpk.all_gather_layer(input=total, output=copies)
    best = []
    for name, tensor in (("value", value), ("index", index)):
        best.append(mpk.new_tensor((world_size, 3), tensor.dtype, name=f"best_{name}", symmetric=True))
        mpk.all_gather_layer(input=mpk.attach_input(tensor, name=name), output=best[-1])
    asked = mpk.new_tensor((world_size, 1), torch.int32, name="asked", symmetric=True)
    mpk.stop_request_layer(output=asked)
    mpk.argmax_layer(input=tuple(best), asked=asked)
    length = mpk(num_tokens=1, max_new_tokens=2)
    everybody = [torch.empty_like(x) for _ in range(world_size)]
    torch.distributed.all_gather(everybody, x)
    values = [torch.empty_like(value) for _ in range(world_size)]
    torch.distributed.all_gather(values, value)
    expected = torch.zeros(37)
    for part in everybody:
        expected += part
    say({
        "equal": torch.equal(total.data, expected) and torch.equal(copies.data, expected.expand(world_size, 37)),
        "tokens": tokens[:length].tolist(),
        "best": int(torch.cat(values).argmax()), "step": int(step),
    })  # fmt: skip
    torch.distributed.destroy_process_group()


def serve(cancelling: int = 1) -> None:
    """Launches of one kernel that takes requests: alike on all ranks, ended by one of them, and not alike."""
    from transformers import GenerationConfig

    from hash_model import VOCAB_SIZE, greedy_tokens, hash_kernel
    from tri_mpk.distributed import world
    from tri_mpk.generation import seed_generator
    from tri_mpk.serving import Engine

    rank, world_size = world()
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo")
    kernel = hash_kernel(2, 4, num_pages=12, wait_bound_s=60.0, world_size=world_size, rank=rank)
    kernel.compile()

    def engine() -> Engine:
        return Engine(kernel, GenerationConfig(), VOCAB_SIZE, generator=seed_generator(kernel.ranks))

    result: dict[str, Any] = {}
    with engine() as alike:
        time.sleep(rank * 0.5)
        streams = [alike.submit([i + 1, 2, 3], max_new_tokens=3 + i) for i in range(4)]
        drawn = [alike.submit([1, 2], max_new_tokens=4, do_sample=True) for _ in range(2)]
        endless = alike.submit([5], max_new_tokens=31)
        if rank == cancelling:
            next(endless)
            endless.cancel()
        result["cancelled"] = endless.result() == greedy_tokens(endless.request)[: len(endless.tokens)]
        result["reason"] = endless.finish_reason
        result["greedy"] = all(stream.result() == greedy_tokens(stream.request) for stream in streams)
        result["drawn"] = [stream.result() for stream in drawn]
    result["statistics"] = alike.statistics.tokens

    with engine() as ended:
        streams = [ended.submit([i + 1], max_new_tokens=30) for i in range(4)]
        if rank == cancelling:
            next(streams[0])
            ended.close(cancel=True)
        [stream.result() for stream in streams]
        result["ended"] = [stream.finish_reason for stream in streams]

    differs = engine()
    streams = [differs.submit([1], max_new_tokens=31), differs.submit([2 + rank], max_new_tokens=31)]
    result["differs"] = []
    for stream in streams:
        try:
            stream.result(timeout=60)
        except tri_mpk.errors.RankError as error:
            result["differs"].append(str(error))
    differs.close()

    more = engine()
    streams = [more.submit([1], max_new_tokens=3) for _ in range(2 + rank)]
    try:
        more.close()
        result["more"] = None
    except tri_mpk.errors.RankError as error:
        result["more"] = str(error)
    result["reasons"] = [stream.finish_reason for stream in streams]

    with engine() as again:
        result["again"] = again.submit([3, 1], max_new_tokens=2).result()
    say(result)
    torch.distributed.destroy_process_group()


@torch.no_grad()
def baseline() -> None:
    """The baseline of several ranks, as torch.compile traces it, with gloo, chooses transformers' tokens."""
    from tri_mpk.distributed import connect, world
    from tri_mpk.rank_baseline import RankDecoder, nccl_reduce
    from tri_mpk.sharding import Shard, shard_model

    rank, world_size = world()
    ranks = connect(world_size, rank, torch.device("cpu"))
    theirs = transformers_model(tiny_config("qwen3", num_attention_heads=4, num_key_value_heads=2, vocab_size=97))
    shard = Shard(theirs.config, rank, world_size)
    cpu = torch.device("cpu")
    decoder = RankDecoder(shard_model(theirs, shard, torch.float32, cpu), shard, nccl_reduce)
    decoder.allocate_cache(16)
    next_token = decoder.compiled(backend="aot_eager")
    tokens = prompt(3, 97)[0].tolist()
    for position in range(6):
        token = torch.tensor(tokens[position : position + 1])
        chosen = int(next_token(token, torch.tensor([position])))
        if position + 1 == len(tokens):
            tokens.append(chosen)
    ranks.meet("the end")
    say({"tokens": tokens, "expected": theirs.generate(prompt(3, 97), max_new_tokens=4)[0].tolist()})


@torch.no_grad()
def emulated(slots: int = 3, half: bool = False, **changes: Any) -> None:
    """What a GPU runs, with weight rings and inline PTX, but for waits and signals: as tests/ops/test_by_warps.py."""
    from pathlib import Path
    from unittest import mock

    from tri_mpk.distributed import connect, world
    from tri_mpk.model import PAGE_SIZE
    from tri_mpk.models import describe
    from tri_mpk.models.decoder import build
    from tri_mpk.persistent_kernel import PersistentKernel
    from tri_mpk.program import SharedMemoryPlan
    from tri_mpk.runtime import InterpreterRuntime, LaunchRequest
    from tri_mpk.sharding import Shard, shard_model

    cpu = torch.device("cpu")
    config = tiny_config(**changes)
    exact = transformers_model(config)
    theirs = copy.deepcopy(exact).half()
    exact.load_state_dict({key: value.float() for key, value in theirs.state_dict().items()})
    rank, world_size = world()
    shard = Shard(config, rank, world_size)
    tokens = torch.zeros(PAGE_SIZE, dtype=torch.int64)
    text = torch.tensor([3, 14, 15, 9])
    tokens[: len(text)] = text
    kernel = PersistentKernel(
        world_size, rank, 2, [torch.zeros(1, dtype=torch.int32), tokens], wait_bound_s=60.0,
        ranks=connect(world_size, rank, cpu),
    )  # fmt: skip
    kernel.has_bulk_copies = True
    local = shard_model(theirs, shard, torch.float16, cpu).requires_grad_(False)
    build(
        kernel, describe(local.config, PAGE_SIZE), local, PAGE_SIZE, progress=False, shard=shard,
        reduce_dtype=torch.float16 if half else torch.float32,
    )  # fmt: skip
    program = kernel.plan()
    assert program.constants.ring and program.constants.portable
    script = Path(__file__).with_name("emulated_worker.py")
    with mock.patch.object(InterpreterRuntime, "worker_script", script):
        kernel.compile()
    plan = SharedMemoryPlan.divide(program, 0, 216_064)
    fewer = plan.num_bytes - (plan.ring_slots - slots) * plan.slot_bytes
    kernel.runtime.shared_memory = SharedMemoryPlan.divide(program, 0, fewer)
    last = len(text) + 1
    chosen = list(kernel.launch(LaunchRequest(num_known=len(text), last_step=last, logits_from=len(text) - 1)))
    expected = exact(torch.cat((text, torch.tensor(chosen[:-1])))[None]).logits[0, -1]
    logits = kernel.ranks.gather(kernel.runtime.default_logits)
    error = float((logits - expected).norm() / expected.norm())
    say({"error": error, "chosen": chosen, "best": int(logits.argmax()), "residual": digest(
        *(kernel.tensors[name].data for name in ("x", "x_attention", "parts_x", "parts_attention"))
    )})  # fmt: skip


@torch.no_grad()
def accuracy(name: str, length: int = 50, num_new: int = 64, repeats: int = 3, reduce_dtype: str = "float32") -> None:
    """On GPUs, in bf16: our distance to transformers in fp32 beside that of transformers in bf16."""
    from tri_mpk.benchmark import kl_divergence, relative_l2
    from tri_mpk.geometries import geometry
    from tri_mpk.loading import random_model

    config = tiny_config(**json.loads(name)) if name.startswith("{") else geometry(name)
    ours = tri_mpk.from_config(
        config, dtype=torch.bfloat16, max_seq_len=1024, progress=False, reduce_dtype=getattr(torch, reduce_dtype)
    )
    ours.generation_config.eos_token_id = None
    input_ids = prompt(length, config.vocab_size)
    result: dict[str, Any] = {"tokens": [], "residual": [], "logits": []}
    for _ in range(repeats):
        result["tokens"].append(ours.generate(input_ids, max_new_tokens=num_new)[0].tolist())
        result["residual"].append(residual_bits(ours))
        logits = ours(input_ids).logits
        result["logits"].append(digest(logits))
    if ours.kernel.rank == 0:
        torch.set_float32_matmul_precision("highest")
        theirs = random_model(config, 0, torch.bfloat16, ours.device)
        rounded = theirs(input_ids.to(ours.device)).logits
        theirs.float().set_attn_implementation("eager")
        exact = theirs(input_ids.to(ours.device)).logits
        for kind, found in (("ours", logits), ("bf16", rounded)):
            result[kind] = relative_l2(found[0], exact[0]), kl_divergence(found[0], exact[0]) / length
        # greedy tokens, teacher-forced with ours: equal where the margin is above the noise
        text = torch.tensor([result["tokens"][0]], device=ours.device)
        exact = theirs(text[:, :-1]).logits[0, length - 1 :]
        best, second = exact.topk(2, -1).values.unbind(-1)
        noise = 4 * (logits[0].float() - theirs(input_ids.to(ours.device)).logits[0]).abs().max()
        sure = best - second > noise
        result["sure"] = int(sure.sum())
        result["wrong"] = int((exact.argmax(-1) != text[0, length:])[sure].sum())
    ours.ranks.meet("the end")
    say(result)


def batch_ops() -> None:
    """Ops of many tokens on several ranks against their references; what nobody writes is NaN."""
    from batch_harness import fill_plan
    from repeat_step import REPEAT_STEP
    from tri_mpk.batch_kernel import BatchKernel
    from tri_mpk.distributed import world
    from tri_mpk.ops.batch_linear import batch_linear_torch
    from tri_mpk.ops.end_step import RANK_END_STEP
    from tri_mpk.ops.rank_batch_embedding import rank_batch_embedding_torch
    from tri_mpk.ops.rank_batch_gather import rank_batch_gather_torch
    from tri_mpk.ops.rank_batch_linear import rank_batch_linear_torch
    from tri_mpk.ops.rank_batch_residual import rank_batch_residual_torch
    from tri_mpk.ops.rings import RECORD_CHOICE
    from tri_mpk.runtime import LaunchRequest

    rank, world_size = world()
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)  # every rank knows what all have
    num_tokens, hidden, k, vocab, parts = 69, 70 * world_size, 9, 10 * world_size + 1, 3
    first_rows = [r * vocab // world_size for r in range(world_size + 1)]
    table = torch.randn(vocab, hidden)
    gains = torch.rand(2, hidden) + 0.5
    before, weights = torch.randn(world_size, k, hidden) / hidden**0.5, torch.randn(world_size, hidden, k)
    biases = torch.zeros(world_size, hidden)
    biases[0].normal_()
    logits = torch.randn(3, vocab)
    ids = torch.randint(vocab, (num_tokens,))

    step, text = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int64)
    mpk = BatchKernel(
        world_size, rank, 2, [step, text], wait_bound_s=60.0, max_batch_size=3, max_tokens_per_step=80
    )  # fmt: skip

    def attach(tensor: torch.Tensor, name: str):
        return mpk.attach_input(tensor.contiguous().clone(), name=name)

    state, plan = mpk.host_words_layer(page_size=16, num_pages=24), mpk.new_step_plan(8)
    x = mpk.new_residual(hidden, torch.float32, "x")
    rows = slice(first_rows[rank], first_rows[rank + 1])
    gain = [attach(each, f"gain{i}") for i, each in enumerate(gains)]
    mpk.batch_embed_layer(
        plan=plan, weight=attach(table[rows], "table"), next_norm=gain[0], output=x, first_row=rows.start
    )  # fmt: skip
    h = mpk.new_tensor((80, k), torch.float32, name="h")
    mpk.batch_linear_layer(plan=plan, input=x, weight=attach(before[rank], "before"), output=h)
    mpk.batch_linear_with_residual_layer(
        plan=plan, input=h, weight=attach(weights[rank], "w"), residual=x, next_norm=gain[1],
        bias=attach(biases[rank], "bias"),
    )  # fmt: skip
    num_rows, most = rows.stop - rows.start, -(-vocab // world_size)
    own = torch.full((3, most), torch.nan)
    own[:, :num_rows] = logits[:, rows]
    chunks = own[:, :num_rows].tensor_split(parts, dim=1)
    begins = torch.tensor([0, *[chunk.shape[1] for chunk in chunks[:-1]]]).cumsum(0)
    best = (
        attach(torch.stack([chunk.max(1).values for chunk in chunks], 1), "best_value"),
        attach((torch.stack([chunk.argmax(1) for chunk in chunks], 1) + begins).int(), "best_index"),
    )
    (all_value, all_index), all_logits = mpk.batch_gather_layer(
        plan=plan, state=state, best=best, logits=attach(own, "logits"), first_row=rows.start, num_rows=num_rows,
        vocab_size=vocab,
    )  # fmt: skip
    done = mpk.new_tensor((1,), torch.int32, name="done")
    mpk.op_layer(REPEAT_STEP, logits=x.x, done=done, label="repeat")
    mpk.op_layer(RANK_END_STEP, counters=done, label="end")
    mpk.compile()
    for handle in (x.x, x.normed, x.squares, x.parts, all_value, all_logits):
        handle.data.fill_(torch.nan)
    fill_plan(plan, {2: (5, ids[:66].tolist()), 0: (0, ids[66:].tolist())})
    state.records.data[2, RECORD_CHOICE.value] = 1  # sequence 2 samples, 0 takes the best, 1 is not there
    mpk.step.data.zero_()
    assert list(mpk.runtime.run(LaunchRequest(1 << 20, 0))) == []

    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    width, ranks = hidden // world_size, range(world_size)
    tables = [table[first_rows[r] : first_rows[r + 1]] for r in ranks]
    embedded = torch.stack([rank_batch_embedding_torch(ids, tables[r], first_rows[r]) for r in ranks])
    columns_of = [slice(r * width, (r + 1) * width) for r in ranks]
    begun = [rank_batch_residual_torch(torch.zeros(()), embedded[:, :, c], gains[0, c]) for c in columns_of]
    normed, sums = torch.cat([each[1] for each in begun], 1), torch.stack([each[2] for each in begun])
    inputs = [batch_linear_torch(normed, sums, before[r], 1e-6) for r in ranks]
    close(h.data[:num_tokens], inputs[rank])
    products = torch.stack([rank_batch_linear_torch(inputs[r], weights[r], biases[r]) for r in ranks])
    squares = x.squares.data.view(-1, 80)[:, :num_tokens].view(world_size, -1, num_tokens)
    for r, columns in enumerate(columns_of):
        total, normed, sums = rank_batch_residual_torch(begun[r][0], products[:, :, columns], gains[1, columns])
        close(x.normed.data.view(80, hidden)[:num_tokens, columns], normed)
        close(squares[r].sum(0), sums)
        if r == rank:
            close(x.x.data[:num_tokens], total)
    assert x.x.data[num_tokens:].isnan().all() and x.normed.data.view(80, hidden)[num_tokens:].isnan().all()
    value, index, whole = rank_batch_gather_torch([logits[:, first_rows[r] : first_rows[r + 1]] for r in ranks])
    found = all_logits.data.view(-1)[: 3 * vocab].view(3, vocab)
    assert (
        torch.equal(all_value.data.view(3, -1)[[0, 2]], value[[0, 2]]) and all_value.data.view(3, -1)[1].isnan().all()
    )
    assert torch.equal(all_index.data.view(3, -1)[[0, 2]].long(), index[[0, 2]])
    assert torch.equal(found[2], whole[2]) and found[:2].isnan().all()
    say("equal")
    torch.distributed.destroy_process_group()


@torch.no_grad()
def batch_accuracy(name: str, length: int = 50, num_new: int = 16, number: int = 4, **options: Any) -> None:
    """On GPUs, in bf16: the logits of the last tokens of `number` texts, as `accuracy` looks at those of one."""
    from tri_mpk.benchmark import kl_divergence, relative_l2
    from tri_mpk.geometries import geometry
    from tri_mpk.loading import random_model

    config = tiny_config(**json.loads(name)) if name.startswith("{") else geometry(name)
    ours = tri_mpk.from_config(
        config, dtype=torch.bfloat16, max_seq_len=512, progress=False, max_batch_size=number, max_tokens_per_step=64,
        **options,
    )  # fmt: skip
    ours.generation_config.eos_token_id = None
    ids = torch.cat([prompt(length, config.vocab_size, seed=i) for i in range(number)])
    result: dict[str, Any] = {"tokens": [], "bits": [], "ours": [], "bf16": []}
    for _ in range(2):
        texts = ours.generate(ids, max_new_tokens=num_new, do_sample=True, seed=3)
        result["tokens"].append(texts.tolist())
        result["bits"].append(shared_bits(ours))
    logits = ours.kernel.tensors["all_logits"].data.view(-1)[: number * config.vocab_size].view(number, -1).clone()
    if ours.kernel.rank == 0:
        torch.set_float32_matmul_precision("highest")
        theirs = random_model(config, 0, torch.bfloat16, ours.device)
        texts = texts[:, :-1].to(ours.device)
        rounded = theirs(texts).logits[:, -1]
        theirs.float().set_attn_implementation("eager")
        exact = theirs(texts).logits[:, -1]
        for kind, found in (("ours", logits), ("bf16", rounded)):
            for row, expected in zip(found, exact, strict=True):
                result[kind].append((relative_l2(row, expected), kl_divergence(row, expected)))
    ours.ranks.meet("the end")
    say(result)


if __name__ == "__main__":
    {f.__name__: f for f in (
        decode, stop_on_one_rank, epochs, hang, lost_signal, dead_worker, refuse, checkpoint, bench, accuracy,
        emulated, baseline, graph,
        out_of_step, profile, sample, batch, serve_batch, different_requests, serve_and_hang, serve,
        batch_accuracy, batch_ops,
    )}[sys.argv[1]](**json.loads(sys.argv[2]))  # fmt: skip
