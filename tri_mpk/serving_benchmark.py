"""Throughput of a kernel that serves: requests of random lengths arrive at random times, and clients read along.

Arrivals are a Poisson process; prompts and new tokens have uniformly drawn lengths. A client sees a token when its own
asynchronous iterator does, by the host's clock, and its first one counts from the time at which the request was due.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tri_mpk.batch_benchmark import compile_count, round_up
from tri_mpk.batching import PAGE_SIZE, Batching
from tri_mpk.benchmark import SEED, bench_device, environment, free_memory
from tri_mpk.geometries import GEOMETRIES, geometry
from tri_mpk.loading import check_memory, from_model, random_model, resolve_dtype
from tri_mpk.model import CausalLM
from tri_mpk.models import describe
from tri_mpk.serving import Engine

DEFAULT_RATES = (4.0, 8.0, math.inf)


@dataclass(frozen=True, slots=True)
class Traffic:
    """`rate`: requests per second on average, inf: all at once. Lengths lie in the ranges, ends included."""

    rate: float
    num_requests: int = 128
    prompt: tuple[int, int] = (32, 992)
    output: tuple[int, int] = (16, 240)

    def __post_init__(self) -> None:
        if not self.rate > 0 or self.num_requests < 1:
            raise ValueError(f"rate={self.rate} must be above 0 and num_requests={self.num_requests} at least 1")
        for name in ("prompt", "output"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be two lengths, 1 <= least <= most")

    @property
    def longest(self) -> int:
        return self.prompt[1] + self.output[1]


@dataclass(frozen=True, slots=True)
class Arrival:
    due: float  # seconds from the beginning
    prompt: Tensor
    num_new: int


@dataclass(frozen=True, slots=True)
class Served:
    """When the tokens of a request came, in seconds from the beginning."""

    due: float
    prompt_length: int
    tokens: list[float]


def arrivals(traffic: Traffic, vocab_size: int, seed: int = SEED) -> list[Arrival]:
    """The same requests for every rate."""
    random = np.random.default_rng(seed)
    prompts = random.integers(*traffic.prompt, traffic.num_requests, endpoint=True)
    outputs = random.integers(*traffic.output, traffic.num_requests, endpoint=True)
    due = random.exponential(1.0, traffic.num_requests).cumsum() / traffic.rate
    tokens = [torch.from_numpy(random.integers(0, vocab_size, length)) for length in prompts]
    return [Arrival(float(at), ids, int(new)) for at, ids, new in zip(due, tokens, outputs, strict=True)]


async def serve_all(engine: Engine, requests: Sequence[Arrival], progress: bool = False) -> list[Served]:
    """Every request in its time, with a client of its own."""
    bar = tqdm(total=len(requests), desc="requests", leave=False, disable=not progress)
    start = time.perf_counter()

    async def client(request: Arrival) -> Served:
        await asyncio.sleep(max(0.0, start + request.due - time.perf_counter()))
        stream = engine.submit(request.prompt, max_new_tokens=request.num_new, eos_token_id=None)
        times = []
        async for _ in stream:
            times.append(time.perf_counter() - start)
        assert len(times) == request.num_new, (len(times), request.num_new, stream.finish_reason)
        bar.update()
        return Served(request.due, len(request.prompt), times)

    with bar:
        return await asyncio.gather(*(client(request) for request in requests))


def summary(served: Sequence[Served]) -> dict[str, float]:
    """Rates from the first request to the last token; times in ms."""
    seconds = max(each.tokens[-1] for each in served) - min(each.due for each in served)
    new_tokens = sum(len(each.tokens) for each in served)
    all_tokens = new_tokens + sum(each.prompt_length for each in served)
    times = {
        "first_token": [each.tokens[0] - each.due for each in served],
        "between_tokens": [after - before for each in served for before, after in pairwise(each.tokens)] or [0.0],
        "request": [each.tokens[-1] - each.due for each in served],
    }
    result = {
        "seconds": seconds,
        "requests_per_s": len(served) / seconds,
        "tokens_per_s": new_tokens / seconds,
        "all_tokens_per_s": all_tokens / seconds,
    }
    for name, values in times.items():
        for percent in (50, 99):
            result[f"{name}_ms_p{percent}"] = float(np.percentile(values, percent)) * 1e3
    return result


def measure_traffic(model: CausalLM, traffic: Traffic, progress: bool = False) -> dict[str, Any]:
    """One launch that serves all of it."""
    requests = arrivals(traffic, model.config.vocab_size)
    with model.serve(max_waiting=len(requests)) as engine:
        served = asyncio.run(serve_all(engine, requests, progress))
    statistics = engine.statistics
    launch_s = model.kernel.runtime.last_launch_ms / 1e3
    return {
        "rate": traffic.rate if math.isfinite(traffic.rate) else "inf",
        "requests": len(served),
        **summary(served),
        **asdict(statistics),
        "steps_per_s": statistics.steps / launch_s,
        "tokens_per_busy_step": statistics.tokens / max(1, statistics.busy_steps),
    }


def run_serving_bench(
    geometry_name: str,
    rates: Sequence[float] = DEFAULT_RATES,
    traffic: Traffic = Traffic(1.0),  # noqa: B008  it is frozen
    *,
    max_batch_size: int = 64,
    tokens_per_step: int = 256,
    num_pages: int | None = None,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """A launch for each rate, all of one compiled kernel, as a report of plain values.

    traffic: all but the rate.
    num_pages: of the KV cache; None: enough for max_batch_size of the longest requests.

    Raises: DeviceError without a CUDA GPU, ValueError for bad numbers, AssertionError if a request lost a token.
    """
    config = geometry(geometry_name)
    name = next((known for known in GEOMETRIES if known.lower() == geometry_name.lower()), geometry_name)
    each = [Traffic(rate, traffic.num_requests, traffic.prompt, traffic.output) for rate in rates]
    device = bench_device(device)
    free_memory()
    dtype = resolve_dtype(None, device, config)
    max_seq_len = round_up(traffic.longest, PAGE_SIZE)
    batching = Batching(max_batch_size, tokens_per_step, num_pages)
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len, batching)

    def say(text: str) -> None:
        if progress:
            tqdm.write(f"{name}: {text}", file=sys.stderr)

    say("making random weights, planning and compiling")
    hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)
    model = from_model(
        hf_model, max_seq_len=max_seq_len, max_batch_size=max_batch_size, max_tokens_per_step=tokens_per_step,
        num_pages=num_pages, num_workers=num_workers, progress=progress,
    )  # fmt: skip
    model.compile()
    measure_traffic(model, Traffic(math.inf, 2, traffic.prompt, (1, 2)))  # the first launch does not count
    rows = []
    for one in each:
        rows.append(measure_traffic(model, one, progress))
        say(f"{one.rate:g} requests/s: {rows[-1]['tokens_per_s']:.0f} new tokens/s")
    report = {
        "geometry": name,
        **environment(device),
        "settings": {
            "prompt": list(traffic.prompt),
            "output": list(traffic.output),
            "seed": SEED,
            "dtype": str(dtype).removeprefix("torch."),
            "max_seq_len": max_seq_len,
            **asdict(batching),
            "num_workers": model.kernel.num_workers,
        },
        "compiles": compile_count(model),
        "launches": model.kernel.runtime.num_launches,
        "rows": rows,
    }
    del model
    free_memory()
    assert report["compiles"] in (None, 1), f"the kernel was compiled {report['compiles']} times"
    return report
