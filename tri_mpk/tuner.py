"""Refining the cost model's choice of knobs by measuring: `tri-mpk tune`.

Coordinate descent: one knob after another, all its values in the order of the model's estimates, and again until no
knob gains anything or the time is up. Every candidate is planned, verified, compiled and checked against the fp32
reference before it is timed; what the model thinks far slower is left out. The search itself (`search`) needs no GPU:
what measures is passed in.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from tri_mpk.benchmark import (
    SEED,
    bench_device,
    check_numbers,
    compare_logits,
    fill_cache,
    free_memory,
    logits_at,
    measure,
    references,
)
from tri_mpk.cost_model import estimate
from tri_mpk.errors import DeviceError, TriMpkError
from tri_mpk.gpu_profile import GpuProfile, find_profile, store
from tri_mpk.inspect import plan_config
from tri_mpk.loading import check_memory, from_model, random_model, resolve_dtype
from tri_mpk.microbenchmarks import measure_profile
from tri_mpk.model import PAGE_SIZE
from tri_mpk.models import DecoderShape, describe
from tri_mpk.persistent_kernel import has_bulk_copies
from tri_mpk.program import Program
from tri_mpk.tuning import (
    MAX_SLOT_BYTES,
    MIN_BLOCK_KV,
    MIN_SLOT_BYTES,
    Tuning,
    choose_tuning,
    largest_block_kv,
)
from tri_mpk.tuning_store import StoredTuning, dtype_name, kernel_version, shape_name, store_tuning, tuning_path

DEFAULT_CONTEXTS = (512, 4096)
DEFAULT_SECONDS = 60.0
MIN_GAIN = 0.003  # less is noise
WORTH_TRYING = 1.1  # times the estimate of the best: what the cost model thinks slower is not measured
NUM_TOKENS, LAUNCHES = 32, 10  # per measurement

Times = dict[int, float]  # ms per token by context


# ---- the search ----


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: measured, or why it could not be."""

    tuning: Tuning
    estimated_ms: float
    ms: Times | None
    failure: str | None = None

    @property
    def score(self) -> float:
        """Geometric mean over the contexts, in ms: a gain of 1 % counts the same at each of them."""
        return statistics.geometric_mean(self.ms.values()) if self.ms else math.inf


@dataclass(slots=True)
class Search:
    """What was tried, in order; the first trial is the cost model's choice."""

    trials: list[Trial] = field(default_factory=list)
    outcome: str = ""  # why it ended

    @property
    def first(self) -> Trial:
        return self.trials[0]

    @property
    def best(self) -> Trial:
        """The fastest, but the cost model's choice unless another gains more than noise."""
        fastest = min(self.trials, key=lambda trial: trial.score)
        return fastest if fastest.score < self.first.score * (1 - MIN_GAIN) else self.first


def search(
    start: Tuning,
    knobs: dict[str, Sequence[int]],
    estimated_ms: Callable[[Tuning], float],
    measured_ms: Callable[[Tuning], Times],
    seconds: float,
    *,
    on_trial: Callable[[Search], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Search:
    """Measures `start`, then changes one knob at a time, and ends when nothing gains, at Ctrl-C, or in time.

    Args:
        knobs: the values to try, by name, in the order in which knobs take their turns.
        estimated_ms, measured_ms: ms per token. What raises an Exception in either is not a candidate.
        seconds: no candidate is begun that would probably end later than so long after the call, except the first.
        on_trial: called after each trial.

    Raises: what measuring `start` raises.
    """
    began = clock()
    result = Search([Trial(start, estimated_ms(start), measured_ms(start))])
    on_trial(result)
    longest = clock() - began
    try:
        gained = True
        while gained:
            before = result.best.tuning
            for knob, values in knobs.items():
                for tuning, estimate_ms in _candidates(result, knob, values, estimated_ms):
                    begins = clock()
                    if begins - began + longest > seconds:
                        result.outcome = "the time was up"
                        return result
                    result.trials.append(_try(tuning, estimate_ms, measured_ms))
                    longest = max(longest, clock() - begins)
                    on_trial(result)
            gained = result.best.tuning != before
        result.outcome = "no knob gained anything more"
    except KeyboardInterrupt:
        result.outcome = "interrupted"
    return result


def _candidates(
    result: Search, knob: str, values: Sequence[int], estimated_ms: Callable[[Tuning], float]
) -> list[tuple[Tuning, float]]:
    """The best so far with other values of a knob, unless tried before or hopeless; those that the model thinks fastest
    first.
    """
    tried = {trial.tuning for trial in result.trials}
    candidates = []
    for value in values:
        tuning = replace(result.best.tuning, **{knob: value})
        if tuning in tried:
            continue
        try:
            candidates.append((tuning, estimated_ms(tuning)))
        except (TriMpkError, ValueError) as error:  # the cost model sees that there is no such kernel
            result.trials.append(Trial(tuning, math.inf, None, str(error)))
    hopeless = WORTH_TRYING * result.best.estimated_ms
    return sorted((c for c in candidates if c[1] <= hopeless), key=lambda candidate: candidate[1])


def _try(tuning: Tuning, estimate_ms: float, measured_ms: Callable[[Tuning], Times]) -> Trial:
    try:
        return Trial(tuning, estimate_ms, measured_ms(tuning))
    except Exception as error:  # whatever it is, the other candidates still count
        return Trial(tuning, estimate_ms, None, f"{type(error).__name__}: {error}".splitlines()[0])


def knob_values(gpu: GpuProfile, shape: DecoderShape, start: Tuning, ring: bool) -> dict[str, list[int]]:
    """The values worth trying, the most promising knob first. `ring`: weights come through one."""
    powers = [1 << n for n in range(4, 17)]
    heads = shape.num_kv_heads
    splits = {start.num_splits // 4, start.num_splits // 2, start.num_splits, 2 * start.num_splits}
    whole_heads = gpu.num_sms // heads * heads  # so many that every worker has equally many splits
    return {
        "slot_bytes": [n for n in powers if MIN_SLOT_BYTES <= n <= MAX_SLOT_BYTES] if ring else [start.slot_bytes],
        "prefetch_bytes": [0, 128 << 10, 256 << 10, 512 << 10, 1 << 20] if ring else [start.prefetch_bytes],
        "num_splits": sorted(n for n in splits if n),
        "split_tokens": sorted({64, 128, 256, 512, 1024, start.split_tokens}),
        "block_kv": [n for n in powers if MIN_BLOCK_KV <= n <= largest_block_kv(shape.head_dim)],
        "num_workers": sorted({gpu.num_sms, whole_heads or gpu.num_sms}),
    }


# ---- on a GPU ----


class StepEstimate:
    """The cost model's ms per token of a tuning, mean over contexts, from plans of one and of two layers: all layers
    are equal, and planning them all would take seconds per candidate.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        gpu: GpuProfile,
        dtype: torch.dtype,
        contexts: Sequence[int],
        bulk_copies: bool = True,
    ):
        self.config, self.gpu, self.dtype, self.contexts = config, gpu, dtype, contexts
        self.bulk_copies = bulk_copies

    def __call__(self, tuning: Tuning) -> float:
        one, two = (self.plan(num_layers, tuning) for num_layers in (1, 2))
        more = self.config.num_hidden_layers - 1
        times = []
        for context in self.contexts:
            first, both = (estimate(program, self.gpu, context).step_s for program in (one, two))
            times.append(1e3 * (first + more * (both - first)))
        return statistics.geometric_mean(times)

    def plan(self, num_layers: int, tuning: Tuning) -> Program:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = num_layers
        max_seq_len = sequence_length(self.contexts)
        return plan_config(config, self.dtype, max_seq_len, bulk_copies=self.bulk_copies, tuning=tuning)


class StepMeasurement:
    """Measured ms per token of a tuning, on random weights that all candidates share."""

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, contexts: Sequence[int]
    ) -> None:
        self.contexts = contexts
        self.max_seq_len = sequence_length(contexts)
        check_memory(config, describe(config, self.max_seq_len), dtype, device, self.max_seq_len)
        self.hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)
        self.references: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, tuning: Tuning) -> Times:
        """Raises: AssertionError when the logits are farther from fp32 than bf16's, and all that compiling raises."""
        free_memory()
        model = from_model(self.hf_model, max_seq_len=self.max_seq_len, tuning=tuning, progress=False)
        fill_cache(model)
        position, token = min(self.contexts), 1
        if self.references is None:  # the cache holds the same values every time
            self.references = references(model, self.hf_model, position, token)
        compare_logits(logits_at(model, position, token), *self.references, position)
        return {context: measure(model, context, NUM_TOKENS, LAUNCHES)["ms_p50"] for context in self.contexts}


def sequence_length(contexts: Sequence[int]) -> int:
    """Whole pages that hold the launches of all measurements."""
    return -(-(max(contexts) + NUM_TOKENS) // PAGE_SIZE) * PAGE_SIZE


def ready_gpu(device: torch.device | str | None, again: bool) -> tuple[torch.device, GpuProfile, str]:
    """The GPU to tune for, with its profile, which is measured and stored if nobody has or if it is to be done again.

    Raises: DeviceError without a GPU.
    """
    try:
        device = bench_device(device, "tuning measures kernels on")
    except DeviceError as error:
        raise DeviceError(f"{error}. Until then the cost model chooses the knobs: see `tri-mpk inspect`") from None
    profile, source = find_profile(device)
    if again or source == "estimated":
        profile, source = measure_profile(device), "measured now"
        store(profile)
    return device, profile, source


def tune(
    config: PreTrainedConfig,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    *,
    seconds: float = DEFAULT_SECONDS,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    measure_gpu: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Finds the fastest knobs for a model's shapes on a GPU and stores them for `from_pretrained`.

    Args:
        contexts: KV lengths that count, all the same.
        seconds: for the search, the first measurement included; weights and the GPU's profile come before.
        measure_gpu: measure the GPU's profile even if there is one.

    Returns: a report of plain values. Ctrl-C ends the search; what was best until then is stored.
    Raises: DeviceError without a GPU, ValueError for contexts that the model cannot have, and whatever keeps the cost
        model's own choice from running.
    """
    check_numbers(contexts, NUM_TOKENS, LAUNCHES)
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be positive")
    device, gpu, gpu_source = ready_gpu(device, measure_gpu)
    shape = describe(config, sequence_length(contexts))
    dtype = resolve_dtype(dtype, device, config)
    start = choose_tuning(gpu, shape.num_kv_heads, shape.head_dim)
    estimated_ms = StepEstimate(config, gpu, dtype, contexts, has_bulk_copies(device))
    knobs = knob_values(gpu, shape, start, ring=estimated_ms.plan(1, start).constants.ring)
    measured_ms = StepMeasurement(config, dtype, device, contexts)
    path = tuning_path(gpu, shape, dtype)
    with tqdm(total=round(seconds), unit="s", desc="tuning", disable=not progress, leave=False) as bar:
        began = time.perf_counter()

        def on_trial(so_far: Search) -> None:
            bar.n = min(bar.total, round(time.perf_counter() - began))
            bar.set_postfix_str(f"{len(so_far.trials)} tried, {so_far.first.score:.4f} -> {so_far.best.score:.4f} ms")

        found = search(start, knobs, estimated_ms, measured_ms, seconds, on_trial=on_trial)
    store_tuning(path, stored_tuning(gpu, shape, dtype, found))
    return report(found, gpu, gpu_source, contexts) | {"file": str(path)}


def stored_tuning(gpu: GpuProfile, shape: DecoderShape, dtype: torch.dtype, found: Search) -> StoredTuning:
    def by_context(times: Times) -> dict[str, float]:
        return {str(context): ms for context, ms in times.items()}

    return StoredTuning(
        gpu=gpu.name,
        num_sms=gpu.num_sms,
        shape=shape_name(shape),
        dtype=dtype_name(dtype),
        kernel=kernel_version(),
        tuning=found.best.tuning,
        ms=by_context(found.best.ms),
        chosen_ms=by_context(found.first.ms),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def report(found: Search, gpu: GpuProfile, gpu_source: str, contexts: Sequence[int]) -> dict[str, Any]:
    """Everything that `tri-mpk tune` shows, ready for JSON."""
    return {
        "gpu": asdict(gpu),
        "gpu_source": gpu_source,
        "contexts": list(contexts),
        "outcome": found.outcome,
        "chosen": asdict(found.first.tuning),
        "best": asdict(found.best.tuning),
        "chosen_ms": found.first.score,
        "best_ms": found.best.score,
        "trials": [
            asdict(trial.tuning)
            | {"estimated_ms": trial.estimated_ms if trial.estimated_ms < math.inf else None}
            | {"ms": trial.score if trial.ms else None, "failure": trial.failure}
            for trial in found.trials
        ],
    }
