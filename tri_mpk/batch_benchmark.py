"""Measuring steps of many sequences: ms per step of each batch size, empty steps, time to first token.

`run_batch_bench` measures one geometry with one compiled kernel, beside torch.compile and transformers' prefill on the
same weights. To decode at a given length, sequences are put into the kernel's state as if they had come as requests,
over a cache of random values; from there on the kernel goes on by itself, and a launch ends with their last tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tri_mpk.baseline import BATCH_ATTENTIONS, copy_bandwidth_gbps, measure_batches, prefill_ms
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.batching import PAGE_SIZE, Batching
from tri_mpk.benchmark import (
    SEED,
    WARMUP,
    bench_device,
    dense_cache,
    environment,
    fill_cache,
    free_memory,
    kl_divergence,
    kv_bytes,
    measure,
    quantiles,
    relative_l2,
)
from tri_mpk.geometries import GEOMETRIES, geometry, weight_bytes
from tri_mpk.loading import check_memory, from_model, random_model, resolve_dtype
from tri_mpk.model import CausalLM
from tri_mpk.models import describe
from tri_mpk.ops import advance
from tri_mpk.ops.rings import HOST_STOP, RECORD_CHOICE, STOP_WHEN_DONE
from tri_mpk.profiler import read_profile
from tri_mpk.reference import reference_logits
from tri_mpk.rings import HostRings, Result
from tri_mpk.runtime import CudaRuntime, LaunchRequest
from tri_mpk.sampling import Sampling
from tri_mpk.serving import Engine

DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_CONTEXT = 512
DEFAULT_PROMPT = 2048
BESIDE = 8  # sequences that decode while a prompt is read
WINDOW = 16  # tokens of each, while nothing else happens
ATTEMPTS = 5  # launches until one has no step but those that were asked for
SAMPLED = Sampling(do_sample=True, temperature=0.8, top_k=50, top_p=0.9, seed=SEED)
OVERHEAD = ("items", "advance sample", "advance")  # ops of a step that are there for the batch, not for the model


# ---- sequences of a given length ----


def place_sequences(
    kernel: BatchKernel,
    lengths: Sequence[int],
    num_steps: int,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> None:
    """Before a launch: as if requests had come and all their tokens but the last had been processed.

    Sequence i has `lengths[i]` tokens, random ones, and pages here and there. The next step decodes each of them; after
    `num_steps` steps they end, and the launch with them.
    """
    state, plan = kernel.state, kernel.step_plan
    lengths_ = torch.tensor(lengths, dtype=torch.int32)
    number, size = len(lengths), state.page_size
    longest = max(lengths) + num_steps
    if number > kernel.max_batch_size or min(lengths) < 1 or longest > kernel.max_seq_len:
        raise ValueError(
            f"{number} sequences of up to {longest} tokens do not fit max_batch_size={kernel.max_batch_size} and"
            f" max_seq_len={kernel.max_seq_len}"
        )
    if (needed := pages_of(lengths, num_steps, size)) > state.num_pages:
        raise ValueError(f"{needed} pages are needed, but there are {state.num_pages}; load with more num_pages")
    state.reset(plan)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(kernel.vocab_size, state.tokens.dims, generator=generator, dtype=torch.int32)
    state.tokens.data.copy_(tokens)

    pages = torch.randperm(state.num_pages, generator=generator, dtype=torch.int32)
    held = (lengths_ + size - 1) // size
    table = torch.zeros(plan.page_table.dims, dtype=torch.int32)
    dealt = 0
    for i, count in enumerate(held.tolist()):
        table[i, :count] = pages[dealt : dealt + count]
        dealt += count
    plan.page_table.data.copy_(table)
    users = torch.zeros_like(pages)
    users[pages[:dealt].long()] = 1
    state.free_pages.data[0, : state.num_pages - dealt].copy_(pages[dealt:])
    state.free_pages.data[1].copy_(users)

    slots = torch.zeros(state.slots.dims, dtype=torch.int32)
    slots[advance.SLOT_STATUS.value, :number] = advance.RUNS.value
    slots[advance.SLOT_TICKET.value, :number] = torch.arange(number, dtype=torch.int32)
    slots[advance.SLOT_LENGTH.value, :number] = lengths_
    slots[advance.SLOT_DONE.value, :number] = lengths_
    slots[advance.SLOT_MAX_LENGTH.value, :number] = lengths_ + num_steps
    slots[advance.SLOT_PAGES.value, :number] = held
    slots[advance.SLOT_ORDER.value, :number] = torch.arange(number, dtype=torch.int32) - number
    slots[advance.SLOT_NEW.value, :number] = int(sampling.penalises)
    state.slots.data.copy_(slots)
    choice = torch.tensor(sampling.words(), dtype=torch.int64)
    records = torch.zeros(state.records.dims, dtype=torch.int64)
    records[:, RECORD_CHOICE.value : RECORD_CHOICE.value + len(choice)] = choice
    state.records.data.copy_(records)
    counters = state.counters.data.tolist()
    counters[advance.NUM_FREE_PAGES.value] = state.num_pages - dealt
    counters[advance.LOOKS.value] = 0  # at the host's words, which stand here already
    state.counters.data.copy_(torch.tensor(counters))
    state.asked.data.zero_()
    state.asked.data[:, HOST_STOP.value] = STOP_WHEN_DONE.value

    def fill(handle, values: Tensor, rest: int = 0) -> None:
        handle.data.fill_(rest)
        handle.data[:number].copy_(values)

    each = torch.arange(number, dtype=torch.int32)
    plan.num_tokens.data.fill_(number)
    fill(plan.token_ids, tokens[each.long(), lengths_.long() - 1])
    fill(plan.token_positions, lengths_ - 1)
    fill(plan.token_sequences, each)
    fill(plan.first_token, each)
    fill(plan.sequence_tokens, torch.ones_like(each))
    fill(plan.output_token, each, rest=-1)


def pages_of(lengths: Iterable[int], num_steps: int, page_size: int) -> int:
    """Pages for sequences that begin with so many tokens."""
    return sum(-(-(length + num_steps) // page_size) for length in lengths)


def launch_placed(kernel: BatchKernel) -> list[Result]:
    """One launch from the state as it is, and what it tells the host."""
    results: list[Result] = []
    with kernel.runtime.launched(LaunchRequest.of_batches()):
        rings = HostRings(kernel.runtime.mailbox.numpy(), kernel.state.rings)
        rings.stop(when_done=True)
        while not kernel.runtime.finished():
            results += rings.take()
            time.sleep(50e-6)
    return results + rings.take()


def decode_batch(
    model: CausalLM,
    lengths: Sequence[int],
    num_steps: int,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> float:
    """ms per step of one launch in which these sequences decode `num_steps` tokens each.

    A launch in which the host was late, so that a step had to wait for room in its rings, does not count.
    """
    model.compile()
    for _ in range(ATTEMPTS):
        place_sequences(model.kernel, lengths, num_steps, sampling)
        results = launch_placed(model.kernel)
        assert len(results) == len(lengths) * num_steps, (len(results), len(lengths), num_steps)
        steps = int(model.kernel.state.counters.data[advance.NUM_STEPS.value])
        if steps == num_steps:
            return model.kernel.runtime.last_launch_ms / num_steps
    raise AssertionError(f"{ATTEMPTS} launches of {num_steps} steps had empty ones too, the last one {steps} in all")


def measure_decode(
    model: CausalLM,
    lengths: Sequence[int],
    num_steps: int,
    launches: int,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> dict[str, float]:
    """p20, p50 and p80 of ms per step over many launches. The lengths are passed half-way through a launch."""
    begin = [max(1, length - num_steps // 2) for length in lengths]
    for _ in range(WARMUP):
        decode_batch(model, begin, num_steps, sampling)
    return quantiles([decode_batch(model, begin, num_steps, sampling) for _ in range(launches)])


def empty_step_ms(model: CausalLM, seconds: float = 0.1) -> float:
    """ms of a step without tokens: all tasks wait and signal, and `advance` looks for requests."""
    kernel = model.kernel
    model.compile()
    kernel.state.reset(kernel.step_plan)
    with kernel.runtime.launched(LaunchRequest.of_batches()):
        time.sleep(seconds)
        HostRings(kernel.runtime.mailbox.numpy(), kernel.state.rings).stop(when_done=False)
    return kernel.runtime.last_launch_ms / int(kernel.state.counters.data[advance.NUM_STEPS.value])


def compile_count(model: CausalLM) -> int | None:
    """How often the kernel was compiled in this process; None in the interpreter, which compiles nothing."""
    runtime = model.kernel.runtime
    if not isinstance(runtime, CudaRuntime):
        return None
    return len(runtime.kernel.device_caches[runtime.device.index][0])


# ---- logits ----


def batch_logits(model: CausalLM, lengths: Sequence[int]) -> Tensor:
    """fp32 [len(lengths), V] after one step of one launch. Each sequence attends to the cache below its last token."""
    model.compile()
    place_sequences(model.kernel, lengths, num_steps=1)
    launch_placed(model.kernel)
    return model.kernel.tensors["logits"].data[: len(lengths)].clone()


@dataclass(frozen=True, slots=True)
class Distances:
    """Of every sequence's logits to the fp32 reference: ours and the bf16 reference's."""

    rel_l2: list[float]
    rel_l2_bf16: list[float]
    kl: list[float]
    kl_bf16: list[float]

    @property
    def farther(self) -> list[int]:
        """Sequences of which ours are farther away than bf16, or no numbers."""
        return [
            i
            for i, (l2, l2_bf16, kl, kl_bf16) in enumerate(
                zip(self.rel_l2, self.rel_l2_bf16, self.kl, self.kl_bf16, strict=True)
            )
            if not (l2 <= l2_bf16 and kl <= kl_bf16)
        ]

    def summary(self) -> dict[str, Any]:
        """The largest of each, and how many sequences fail."""
        largest = {name: max(values, default=0.0) for name, values in asdict(self).items()}
        return largest | {"checked": len(self.rel_l2), "farther": len(self.farther)}


def check_batch(model: CausalLM, hf_model: nn.Module, lengths: Sequence[int]) -> Distances:
    """Ours and the bf16 reference's distance to the fp32 reference on the same cache, for every sequence."""
    ours = batch_logits(model, lengths)
    plan = model.kernel.step_plan
    tokens = model.kernel.state.tokens.data
    distances = Distances([], [], [], [])
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for length, group in groupby(order, key=lengths.__getitem__):
        sequences = list(group)
        token = tokens[sequences, length - 1].long()
        assert plan.page_table.data.dim() == 2
        cache = dense_cache(model, length - 1, sequences=sequences)
        exact = reference_logits(hf_model, *cache, token, length - 1)
        rounded = reference_logits(hf_model, *cache, token, length - 1, dtype=torch.bfloat16)
        for row, sequence in enumerate(sequences):
            distances.rel_l2.append(relative_l2(ours[sequence], exact[row]))
            distances.rel_l2_bf16.append(relative_l2(rounded[row], exact[row]))
            distances.kl.append(kl_divergence(ours[sequence], exact[row]))
            distances.kl_bf16.append(kl_divergence(rounded[row], exact[row]))
    return distances


# ---- time to first token ----


def first_token_ms(engine: Engine, prompt: Tensor) -> float:
    start = time.perf_counter()
    engine.submit(prompt, max_new_tokens=1, eos_token_id=None).result()
    return (time.perf_counter() - start) * 1e3


def measure_prompt(model: CausalLM, prompt_length: int, num_beside: int, context: int, repeats: int) -> dict[str, Any]:
    """Time to first token of a prompt, by the host's clock, through `model.serve`: alone, and beside `num_beside`
    sequences that decode from `context` on; and ms per token of those, alone and while a prompt is read.
    """
    vocab_size = model.config.vocab_size
    generator = torch.Generator().manual_seed(SEED)

    def prompt(length: int) -> Tensor:
        return torch.randint(vocab_size, (length,), generator=generator)

    def num_decoded() -> int:
        return sum(len(stream.tokens) for stream in decodes)

    with model.serve() as engine:
        for _ in range(WARMUP):
            first_token_ms(engine, prompt(prompt_length))
        alone = [first_token_ms(engine, prompt(prompt_length)) for _ in range(repeats)]
        new_tokens = model.max_seq_len - context
        decodes = [
            engine.submit(prompt(context), max_new_tokens=new_tokens, eos_token_id=None) for _ in range(num_beside)
        ]
        for stream in decodes:
            next(stream)
        start, before = time.perf_counter(), num_decoded()
        while num_decoded() < before + WINDOW * num_beside:
            time.sleep(100e-6)
        decode_ms = (time.perf_counter() - start) * 1e3 * num_beside / max(1, num_decoded() - before)
        beside, decode_beside = [], []
        for _ in range(repeats):
            before = num_decoded()
            beside.append(first_token_ms(engine, prompt(prompt_length)))
            decode_beside.append(beside[-1] * num_beside / max(1, num_decoded() - before))
        running = sum(stream.finish_reason is None for stream in decodes)
        for stream in decodes:
            stream.cancel()
    assert running == num_beside, f"only {running} of {num_beside} sequences still decoded; load with more max_seq_len"
    return {
        "prompt": prompt_length,
        "beside": num_beside,
        "alone": quantiles(alone),
        "beside_decodes": quantiles(beside),
        "decode_ms": decode_ms,
        "decode_beside_ms": quantiles(decode_beside)["ms_p50"],
    }


# ---- where a step's time goes ----


def overhead(model: CausalLM, lengths: Sequence[int], num_steps: int) -> dict[str, Any]:
    """Of a model with profile=True: how much of a step's critical path the ops are that the batch needs, not the model.

    They are what makes lists of the plan, chooses tokens, and makes the next plan.
    """
    model.compile()
    for _ in range(WARMUP + 1):
        place_sequences(model.kernel, lengths, num_steps)
        launch_placed(model.kernel)
    profile = read_profile(model.kernel)
    step = profile.summary()["step"]
    critical = {row.op: row.critical for row in profile.table()}
    ours = {name: critical[name] for name in OVERHEAD}
    return {"step": step, **ours, "share": sum(ours.values()) / step}


# ---- one geometry ----


def run_batch_bench(
    geometry_name: str,
    batches: Sequence[int] = DEFAULT_BATCHES,
    context: int = DEFAULT_CONTEXT,
    *,
    num_steps: int = 32,
    launches: int = 10,
    tokens_per_step: int = 256,
    prompt: int = DEFAULT_PROMPT,
    baseline: bool = True,
    baseline_bound_s: float = float("inf"),
    attentions: Sequence[str] = BATCH_ATTENTIONS,
    check: bool = True,
    one: bool = True,
    profile: bool = False,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """ms per step of one geometry for each batch size, all from one compiled kernel, as a report of plain values.

    Args:
        batches: so many sequences decode, each with `context` tokens in its cache half-way through a launch.
        num_steps: of a launch.
        prompt: also measure the time to first token of a prompt of this length; 0: do not.
        baseline: time torch.compile for each batch size, and transformers' prefill, on the same weights too (most of
            the run: `attentions` says which ways are tried). After `baseline_bound_s` no further batch size is begun.
        check: compare logits with the fp32 reference, for every sequence; `failures` of the report says what is wrong.
        one: time the kernel for one sequence too.
        profile: also compile a kernel that records, and tell what choosing tokens and planning takes of a step.

    Raises: DeviceError without a CUDA GPU, ValueError for bad numbers, AssertionError if the kernel compiled twice.
    """
    config = geometry(geometry_name)
    name = next((known for known in GEOMETRIES if known.lower() == geometry_name.lower()), geometry_name)
    check_batches(batches, context, num_steps, launches, prompt)
    device = bench_device(device)
    free_memory()
    dtype = resolve_dtype(None, device, config)

    def say(text: str) -> None:
        if progress:
            tqdm.write(f"{name}: {text}", file=sys.stderr)

    slots = max(2, *batches)
    num_beside = min(BESIDE, slots - 1)
    repeats = max(2, launches // 2)
    # enough for those beside to go on while prompts are read
    prompt_steps = -(-prompt // max(1, tokens_per_step - num_beside)) + 2
    after = context + repeats * prompt_steps + 4 * WINDOW if prompt else 0
    max_seq_len = round_up(max(context + num_steps, prompt + 1, after), PAGE_SIZE)
    num_pages = pages_of([context] * max(batches), num_steps, PAGE_SIZE)
    if prompt:
        num_pages = max(num_pages, (num_beside * max_seq_len + round_up(prompt + 1, PAGE_SIZE)) // PAGE_SIZE)
    batching = Batching(slots, tokens_per_step, num_pages)
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len, batching)
    copy_gbps = copy_bandwidth_gbps(device)
    say(f"a copy moves {copy_gbps:.0f} GB/s; making random weights")
    hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)

    measured: dict[int, dict[str, Any]] = {}
    reference_prefill = None
    if baseline:
        start = time.perf_counter()
        with closing(measure_batches(hf_model, batches, context, attentions=attentions)) as rows_of_baseline:
            for row in rows_of_baseline:
                measured[row["batch"]] = row
                say(f"torch.compile, batch {row['batch']}: {row['ms_p50']:.3f} ms per step, {row['attention']}")
                if time.perf_counter() - start > baseline_bound_s:
                    say(f"torch.compile has taken more than {baseline_bound_s:g} s: other batch sizes go without")
                    break
        free_memory()
        if prompt:
            reference_prefill = quantiles(prefill_ms(hf_model, prompt, repeats))
            say(f"transformers' prefill of {prompt} tokens: {reference_prefill['ms_p50']:.1f} ms")
        free_memory()

    options = {"num_workers": num_workers, "progress": progress}
    one_ms = None
    if one:
        say("the kernel for one sequence")
        model = from_model(hf_model, max_seq_len=round_up(context + num_steps, PAGE_SIZE), **options)
        fill_cache(model)
        one_ms = measure(model, context, num_steps, launches)
        say(f"the kernel for one sequence: {one_ms['ms_p50']:.3f} ms per step")
        del model
        free_memory()

    batch_options = {
        "max_seq_len": max_seq_len, "max_batch_size": slots, "max_tokens_per_step": tokens_per_step,
        "num_pages": num_pages, **options,
    }  # fmt: skip
    say(f"the kernel for up to {slots} sequences and {tokens_per_step} tokens per step")
    start = time.perf_counter()
    model = from_model(hf_model, **batch_options)
    model.compile()
    compile_s = time.perf_counter() - start
    say(f"planned and compiled in {compile_s:.1f} s")
    rows, failures = [], []
    for batch in batches:
        fill_cache(model)  # launches write keys and values of their own
        errors: dict[str, Any] = {}
        if check:
            errors = check_batch(model, hf_model, [context] * batch).summary()
            if errors["farther"]:
                failures.append(f"batch {batch}: {errors['farther']} of {batch} farther from fp32 than bf16: {errors}")
        times = measure_decode(model, [context] * batch, num_steps, launches)
        sampled = measure_decode(model, [context] * batch, num_steps, launches, SAMPLED)["ms_p50"]
        rows.append(row_of(model, batch, context, times, copy_gbps, measured.get(batch)))
        rows[-1] |= {"against_one": one_ms and times["ms_p50"] / one_ms["ms_p50"], "sampled_ms_p50": sampled, **errors}
        say(f"batch {batch}: {times['ms_p50']:.3f} ms per step")
    report = {
        "geometry": name,
        **environment(device),
        "settings": settings_of(model, context, num_steps, launches),
        "baseline_version": f"torch.compile {torch.__version__}" if baseline else None,
        "copy_gbps": copy_gbps,
        "plan_and_compile_s": compile_s,
        "one_sequence": one_ms,
        "empty_step_ms": empty_step_ms(model),
        "rows": rows,
    }
    if prompt:
        measurement = measure_prompt(model, prompt, num_beside, context, repeats)
        ours = measurement["alone"]["ms_p50"]
        against = None if reference_prefill is None else ours / reference_prefill["ms_p50"]
        report["prompt"] = measurement | {"reference": reference_prefill, "against_reference": against}
        say(f"time to first token of {prompt} tokens: {ours:.1f} ms")
    report["compiles"] = compile_count(model)
    report["launches"] = model.kernel.runtime.num_launches
    if profile:
        del model
        free_memory()
        say("a kernel that records")
        recording = from_model(hf_model, profile=True, **batch_options)
        fill_cache(recording)
        report["overhead"] = [
            {"batch": batch, **overhead(recording, [context] * batch, min(8, num_steps))} for batch in batches
        ]
    report["failures"] = failures
    free_memory()
    assert report["compiles"] in (None, 1), f"the kernel was compiled {report['compiles']} times"
    return report


def settings_of(model: CausalLM, context: int, num_steps: int, launches: int) -> dict[str, Any]:
    """What is needed to repeat the rows of a report."""
    return {
        "context": context,
        "num_steps": num_steps,
        "launches": launches,
        "warmup": WARMUP,
        "seed": SEED,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_seq_len": model.max_seq_len,
        **asdict(model.batching),
        "num_workers": model.kernel.num_workers,
    }


def row_of(
    model: CausalLM, batch: int, context: int, times: dict[str, float], copy_gbps: float, baseline: dict | None
) -> dict[str, Any]:
    """All about one batch size. Bytes of a rank: weights once, and keys and values of all sequences."""
    weights = weight_bytes(model.config, model.dtype.itemsize) // model.kernel.world_size
    kv = batch * kv_bytes(model, context)
    gbps = (weights + kv) / times["ms_p50"] / 1e6
    return {
        "batch": batch,
        "context": context,
        **times,
        "tokens_per_s": batch * 1e3 / times["ms_p50"],
        "weight_bytes": weights,
        "kv_bytes": kv,
        "gbps": gbps,
        "fraction_of_copy": gbps / copy_gbps,
        **{f"baseline_{name}": baseline and baseline[name] for name in ("ms_p20", "ms_p50", "ms_p80", "attention")},
        "baseline_tried": baseline and baseline["tried"],
        "speedup": baseline and baseline["ms_p50"] / times["ms_p50"],
    }


def check_batches(batches: Sequence[int], context: int, num_steps: int, launches: int, prompt: int) -> None:
    if not batches or min(batches) < 1:
        raise ValueError(f"batches={list(batches)} must be one or more batch sizes of at least 1")
    if min(context, num_steps, launches) < 1 or prompt < 0:
        raise ValueError(
            f"context={context}, num_steps={num_steps} and launches={launches} must be at least 1, prompt={prompt} at"
            " least 0"
        )


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
