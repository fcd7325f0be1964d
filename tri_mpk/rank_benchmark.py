"""Measuring decode on several ranks, under torchrun: the numbers of benchmark.py, and the time without communication.

Every rank runs the same launches; rank 0 measures the time of its own, which ends when all ranks are done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from tri_mpk.account import EDITS, RANK_EDITS, account, edited
from tri_mpk.baseline import ATTENTIONS, copy_bandwidth_gbps
from tri_mpk.batch_benchmark import (
    DEFAULT_BATCHES,
    DEFAULT_CONTEXT,
    DEFAULT_PROMPT,
    check_batches,
    empty_step_ms,
    first_token_ms,
    measure_decode,
    pages_of,
    round_up,
    row_of,
    settings_of,
)
from tri_mpk.benchmark import (
    CHECKED_CONTEXTS,
    DEFAULT_CONTEXTS,
    SEED,
    WARMUP,
    Subject,
    bench_device,
    check_numbers,
    compare_logits,
    compile_seconds,
    environment,
    fill_cache,
    free_memory,
    logits_at,
    measure,
    median_ms,
    quantiles,
    random_caches,
    references,
)
from tri_mpk.distributed import rank_device, world
from tri_mpk.geometries import GEOMETRIES, geometry
from tri_mpk.loading import from_config, memory_bytes, random_model
from tri_mpk.model import PAGE_SIZE, CausalLM
from tri_mpk.models import describe
from tri_mpk.rank_baseline import REDUCES, run_baseline


def run_rank_bench(
    geometry_name: str,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    *,
    num_tokens: int = 32,
    launches: int = 20,
    check: bool = True,
    account_too: bool = False,
    reduce_dtype: torch.dtype = torch.float32,
    baseline: Sequence[str] = REDUCES,
    attentions: Sequence[str] = ATTENTIONS,
    progress: bool = True,
) -> dict[str, Any]:
    """As `run_bench`, on the ranks of torchrun; rank 0's report has everything, the others lack the baseline.

    A row also has what `communication_of` finds. Logits are checked where the whole model fits rank 0's GPU too.
    `baseline`: the ways to add up that torch.compile is timed with (tri_mpk/rank_baseline.py); none: it is not timed.
    """
    config = geometry(geometry_name)
    name = next(known for known in GEOMETRIES if known.lower() == geometry_name.lower())
    check_numbers(contexts, num_tokens, launches)
    device = bench_device(rank_device())
    rank, world_size = world()
    free_memory()
    max_seq_len = -(-(max(contexts) + num_tokens) // PAGE_SIZE) * PAGE_SIZE
    show = progress and rank == 0

    def say(stage: str) -> None:
        if show:
            tqdm.write(f"{name}, {world_size} ranks: {stage}", file=sys.stderr)

    copy_gbps = copy_bandwidth_gbps(device)
    free_memory()
    say(f"a copy moves {copy_gbps:.0f} GB/s")
    if baseline:
        say("the baseline: torch.compile in a CUDA graph, a minute or more for each way and context")
    best, failures = run_baseline(name, contexts, baseline, attentions)
    for context, row in best.items():
        say(f"the baseline at context {context}: {row['ms_p50']:.3f} ms per token")
    say("making random weights")
    model = from_config(
        config, seed=SEED, max_seq_len=max_seq_len, device=device, progress=show, reduce_dtype=reduce_dtype
    )
    seconds = compile_seconds(model)
    say(f"compiled in {seconds:.1f} s")
    fill_cache(model)
    subject = Subject(name, None, model, num_tokens, launches, copy_gbps, seconds, seconds, best)
    errors = check_contexts(model, [c for c in contexts if check and c in CHECKED_CONTEXTS], say)
    fill_cache(model)
    rows = []
    for context in contexts:
        times = measure(model, context, num_tokens, launches)
        found = communication_of(model, times["ms_p50"], partial(median_ms, model, context, num_tokens, launches))
        rows.append(subject.row(context, times, errors.get(context)) | found)
        alone = found["no_communication_ms_p50"]
        say(f"context {context}, {times['ms_p50']:.3f} ms per token, {alone:.3f} without communication")
    report = subject.report(rows)
    report["settings"] |= of_ranks(world_size, reduce_dtype)
    report["failures"] = failures
    if account_too:
        report["account"] = [
            {"context": context, "change": entry.name, "ms_p50": entry.ms}
            for context in contexts
            for entry in account(model, partial(median_ms, model, context, num_tokens, launches))
        ]
    del subject, model
    free_memory()
    return report


def communication_of(model: CausalLM, whole_ms: float, measure: Callable[[], float]) -> dict[str, float]:
    """How much of a step of `whole_ms` communication takes, and how much of it the copies of weights hide.

    `no_communication_ms_p50` is of the same kernels, each of which is its own peer: what is above that is exposed.
    `communication_ms` is the same difference where no weights are copied, so that nothing can hide it; the
    hidden share is what is less of that in the real step: none, if communication takes longer beside copies.
    """
    ms = {}
    for name in ("no communication", "no weights copied", "no communication, no weights copied"):
        with edited(model, (EDITS | RANK_EDITS)[name]):
            ms[name] = measure()
    exposed_ms = whole_ms - ms["no communication"]
    bare_ms = ms["no weights copied"] - ms["no communication, no weights copied"]
    return {
        "no_communication_ms_p50": ms["no communication"],
        "exposed_communication": exposed_ms / whole_ms,
        "communication_ms": bare_ms,
        "hidden_communication": max(0.0, 1.0 - exposed_ms / bare_ms) if bare_ms > 0 else 0.0,
    }


def run_rank_batches(
    geometry_name: str,
    batches: Sequence[int] = DEFAULT_BATCHES,
    context: int = DEFAULT_CONTEXT,
    *,
    num_steps: int = 32,
    launches: int = 10,
    tokens_per_step: int = 256,
    prompt: int = DEFAULT_PROMPT,
    reduce_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict[str, Any]:
    """ms per step of many sequences, and the time to first token of a prompt alone, on the ranks of torchrun.

    As `run_batch_bench`, without what it measures for comparison; the same report on all ranks.
    """
    config = geometry(geometry_name)
    name = next(known for known in GEOMETRIES if known.lower() == geometry_name.lower())
    check_batches(batches, context, num_steps, launches, prompt)
    device = bench_device(rank_device())
    rank, world_size = world()
    free_memory()
    slots, longest = max(2, *batches), max(context + num_steps, prompt + 1)
    max_seq_len = round_up(longest, PAGE_SIZE)
    num_pages = max(pages_of([context] * max(batches), num_steps, PAGE_SIZE), max_seq_len // PAGE_SIZE)
    copy_gbps = copy_bandwidth_gbps(device)
    batching = {"max_batch_size": slots, "max_tokens_per_step": tokens_per_step, "num_pages": num_pages}
    model = from_config(
        config, seed=SEED, max_seq_len=max_seq_len, device=device, progress=progress and rank == 0,
        reduce_dtype=reduce_dtype, **batching,
    )  # fmt: skip
    start = time.perf_counter()
    model.compile()
    compile_s = time.perf_counter() - start
    rows = []
    for batch in batches:
        fill_cache(model)
        times = measure_decode(model, [context] * batch, num_steps, launches)
        rows.append(row_of(model, batch, context, times, copy_gbps, None))
        if progress and rank == 0:
            tqdm.write(f"{name}, {world_size} ranks: batch {batch}: {times['ms_p50']:.3f} ms per step", file=sys.stderr)
    report = {
        "geometry": name,
        **environment(device, world_size),
        "settings": settings_of(model, context, num_steps, launches) | of_ranks(world_size, reduce_dtype),
        "copy_gbps": copy_gbps, "plan_and_compile_s": compile_s, "empty_step_ms": empty_step_ms(model),
        "rows": rows, "launches": model.kernel.runtime.num_launches, "failures": [],
    }  # fmt: skip
    if prompt:
        generator = torch.Generator().manual_seed(SEED)
        prompts = torch.randint(model.config.vocab_size, (WARMUP + max(2, launches // 2), prompt), generator=generator)
        with model.serve() as engine:
            report["prompt_ms"] = quantiles([first_token_ms(engine, ids) for ids in prompts][WARMUP:])
    del model
    free_memory()
    return report


def of_ranks(world_size: int, reduce_dtype: torch.dtype) -> dict[str, Any]:
    """What the settings of a report on several ranks have beside those on one."""
    return {"tensor_parallel": world_size, "reduce_dtype": str(reduce_dtype).removeprefix("torch.")}


def check_contexts(model: CausalLM, contexts: Sequence[int], say) -> dict[int, dict[str, float]]:
    """Per context the errors as `check_logits` finds them, on rank 0; the other ranks have none.

    Raises AssertionError on all ranks if our logits are farther from fp32 than bf16 is.
    """
    ours = {context: logits_at(model, context - 1, 1) for context in contexts}
    found: dict[int, dict[str, float]] = {}
    problem = None
    if contexts and model.kernel.rank == 0:
        config, device = model.config, model.device
        needed = memory_bytes(config, describe(config, model.max_seq_len), model.dtype, model.max_seq_len)
        if device.type == "cuda" and needed * 1.1 > torch.cuda.mem_get_info(device)[0]:
            say("logits are not checked: the whole model does not fit this GPU beside the shard")
        else:
            whole = random_model(config, SEED, model.dtype, device).requires_grad_(False)
            caches = dict(random_caches(model))
            try:
                for context in contexts:
                    exact, rounded = references(model, whole, context - 1, 1, caches)
                    found[context] = compare_logits(ours[context], exact, rounded, context - 1)
            except Exception as error:  # the other ranks wait for the outcome
                problem = f"{type(error).__name__}: {error}"
            del whole, caches
            free_memory()
    if problems := [text for text in model.ranks.meet("the check of logits", problem) if text]:
        raise AssertionError(problems[0])
    return found
