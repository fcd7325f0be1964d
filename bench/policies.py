"""Static, hybrid and dynamic kernels of the same weights against each other, and what bounded waits cost.

PYTHONPATH=. python bench/policies.py --geometry Llama-3.2-1B Qwen3-8B --context 512 4096
PYTHONPATH=. python bench/policies.py --uneven    # tasks whose sizes the host does not know

Every kernel is planned, verified, compiled and, with a geometry, held against fp32 logits as in bench/run.py. Then they
take turns, a launch each, so that whatever drifts hits all of them: `against` is the median, over the turns, of a
kernel's time by that of the static one, less 1. `static again` is the same kernel once more: what differs there is
noise. `static, unbounded` is the static one, in the same memory, with waits that poll and do nothing else: no clock, no
deadline, no abort flag. (That flag is still read once, at the end of a step.)

--uneven: layers of tasks that read as many blocks of memory as their number in a tensor on the device says, as
attention over sequences of different lengths does. Sizes are drawn from a Pareto distribution. The host takes all
tasks for equal (static, dynamic), or knows the sizes (static, sizes known), which is the best it can do beforehand.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from commands import add_options, report_each
from tqdm.auto import tqdm
from uneven import BLOCK, NUM_LAYERS, TASKS_PER_WORKER, build_uneven, draw_sizes, run_uneven, uneven_torch

from tri_mpk.benchmark import (
    CHECKED_CONTEXTS,
    SEED,
    WARMUP,
    bench_device,
    check_numbers,
    compare_logits,
    decode_at,
    environment,
    fill_cache,
    logits_at,
    quantiles,
    references,
)
from tri_mpk.generator import import_source, write_source
from tri_mpk.geometries import geometry
from tri_mpk.loading import check_memory, from_model, random_model, resolve_dtype
from tri_mpk.model import PAGE_SIZE
from tri_mpk.models import describe
from tri_mpk.persistent_kernel import POLICIES
from tri_mpk.runtime import CudaRuntime
from tri_mpk.terminal import print_table

AGAIN, UNBOUNDED = "static again", "static, unbounded"
Launch = Callable[[], float]  # returns ms per token


# ---- kernels taking turns ----


def take_turns(launches: dict[str, Launch], rounds: int, what: str) -> list[dict[str, Any]]:
    """A row per kernel; `against` compares with the first one."""
    times: dict[str, list[float]] = {name: [] for name in launches}
    for launch in launches.values():
        for _ in range(WARMUP):
            launch()
    for _ in tqdm(range(rounds), what, leave=False):
        for name, launch in launches.items():
            times[name].append(launch())
    first = next(iter(times.values()))
    return [
        {"kernel": name, **quantiles(mine), "against": statistics.median(map(float.__truediv__, mine, first)) - 1}
        for name, mine in times.items()
    ]


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# ---- waits without a bound ----


@triton.jit
def poll_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr, SCOPE: tl.constexpr):
    """For ever, until `counter - wanted >= 0`. A lost signal hangs the GPU: for measurements only."""
    if PORTABLE:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope=SCOPE)
        while seen - wanted < 0:
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope=SCOPE)
        tl.debug_barrier()
    else:
        tl.inline_asm_elementwise(
            f"""{{
            .reg .pred p; .reg .s32 seen, left; .reg .u32 tid;
            mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0; @p bra DONE;
            POLL: ld.acquire.{SCOPE}.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.lt.s32 p, left, 0; @p bra POLL;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }}""",
            "=r,l,r",
            [counter_ptr.to(tl.int64), wanted],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def unbounded(source: str) -> str:
    """The source of a kernel with that `poll_counter` in place of its own."""
    (old,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == "poll_counter"]
    lines = source.split("\n")
    lines[old.lineno - 2 : old.end_lineno] = inspect.getsource(poll_counter.fn).rstrip().split("\n")  # and decorator
    return "\n".join(lines)


class WithoutBound:
    """The same runtime, memory and queues with another kernel, compiled once."""

    def __init__(self, runtime: CudaRuntime):
        self.runtime, self.own = runtime, (runtime.kernel, runtime.compiled, runtime.shared_memory)
        runtime.kernel = import_source(write_source(unbounded(runtime.program.source))).megakernel
        self.other = (runtime.kernel, *runtime._compile())
        self._use(self.own)

    def _use(self, kernel: tuple) -> None:
        self.runtime.kernel, self.runtime.compiled, self.runtime.shared_memory = kernel

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._use(self.other)
        try:
            yield
        finally:
            self._use(self.own)


# ---- a geometry ----


def compare(name: str, contexts: list[int], num_tokens: int, launches: int, check: bool) -> dict[str, Any]:
    """The report of one geometry. Models share the weights that are used where they lie, and have equal caches."""
    config, device = geometry(name), bench_device(None)
    check_numbers(contexts, num_tokens, launches)
    dtype = resolve_dtype(None, device, config)
    max_seq_len = -(-(max(contexts) + num_tokens) // PAGE_SIZE) * PAGE_SIZE
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len)
    say(f"{name}: making random weights")
    hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)
    models = {}
    for policy in POLICIES:
        say(f"{name}: planning, verifying and compiling the {policy} kernel")
        models[policy] = from_model(hf_model, max_seq_len=max_seq_len, policy=policy)
        models[policy].compile()
    static = models["static"]
    say(f"{name}: compiling the static kernel without bounds")
    without_bound = WithoutBound(static.kernel.runtime)

    def decode_unbounded(context: int) -> float:
        with without_bound():
            return decode_at(static, context, num_tokens)

    rows = []
    for context in contexts:
        for model in models.values():
            fill_cache(model)  # launches write keys and values of their own, which differ in rounding
        errors: dict[str, dict[str, float]] = {}
        if check and context in CHECKED_CONTEXTS:
            exact, rounded = references(static, hf_model, context - 1, token=1)
            for policy, model in models.items():
                errors[policy] = compare_logits(logits_at(model, context - 1, token=1), exact, rounded, context - 1)
            with without_bound():
                ours = logits_at(static, context - 1, token=1)
            errors[UNBOUNDED] = compare_logits(ours, exact, rounded, context - 1)
        turns = {p: partial(decode_at, model, context, num_tokens) for p, model in models.items()}
        turns |= {AGAIN: turns["static"], UNBOUNDED: partial(decode_unbounded, context)}
        for row in take_turns(turns, launches, f"{name}, context {context}"):
            rows.append({"context": context} | row | errors.get(row["kernel"], {}))
    program = static.kernel.program
    settings = {"dtype": str(dtype).removeprefix("torch."), "max_seq_len": max_seq_len}
    settings |= {"num_workers": program.num_workers, "tuning": str(program.tuning)}
    return report_of(name, device, rows, num_tokens, launches, settings)


def report_of(
    name: str, device: torch.device, rows: list[dict], num_tokens: int, launches: int, settings: dict[str, object]
) -> dict[str, Any]:
    common = {"num_tokens": num_tokens, "launches": launches, "warmup": WARMUP, "seed": SEED}
    return {"geometry": name, **environment(device), "settings": common | settings, "rows": rows}


# ---- tasks of uneven sizes ----


def compare_uneven(num_tokens: int, launches: int, num_workers: int | None = None) -> dict[str, Any]:
    device = bench_device(None)
    check_numbers([1], num_tokens, launches)
    num_workers = num_workers or torch.cuda.get_device_properties(device).multi_processor_count
    sizes = draw_sizes(TASKS_PER_WORKER * num_workers, SEED)
    generator = torch.Generator(device).manual_seed(SEED)
    blocks = torch.randn((int(sizes.sum()), BLOCK), generator=generator, device=device)
    blocks *= BLOCK**-0.5
    kernels = {}
    for name, policy, known in (
        ("static", "static", False), ("dynamic", "dynamic", False), ("static, sizes known", "static", True),
    ):  # fmt: skip
        say(f"uneven: planning, verifying and compiling: {name}")
        x = torch.zeros(len(sizes), device=device)
        expected = x.clone()
        mpk = kernels[name] = build_uneven(x, sizes, blocks, num_tokens, policy, known, num_workers)
        mpk.compile()
        run_uneven(mpk, num_tokens=1)
        for _ in range(NUM_LAYERS):
            expected = uneven_torch(expected, sizes.to(device), blocks)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    turns = {name: partial(run_uneven, mpk, num_tokens) for name, mpk in kernels.items()}
    rows = take_turns(turns | {AGAIN: turns["static"]}, launches, "uneven")
    settings = {"num_workers": num_workers, "layers": NUM_LAYERS, "tasks": len(sizes), "block_bytes": 4 * BLOCK}
    settings |= {"blocks_max": int(sizes.max()), "blocks_mean": float(sizes.float().mean())}
    return report_of("uneven", device, rows, num_tokens, launches, settings)


# ---- the command ----


def print_report(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(f"{report['geometry']} on {report['gpu']}, {settings['num_workers']} workers, commit {report['commit']}")
    columns = {"context": "context"} if "context" in report["rows"][0] else {}
    columns |= {"what": "kernel", "ms_p50": "ms/token", "ms_p20": "p20", "ms_p80": "p80", "against": "against static"}
    if any("rel_l2" in row for row in report["rows"]):
        columns |= {"rel_l2": "rel. L2 to fp32", "rel_l2_bf16": "of bf16"}
    rows = []
    for row in report["rows"]:
        times = {name: f"{row[name]:.4f}" for name in ("ms_p20", "ms_p50", "ms_p80")}
        rows.append(row | times | {"what": row["kernel"], "against": f"{row['against']:+.2%}"})
    print_table(columns, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", help="default: Llama-3.2-1B Qwen3-8B; with --uneven: none")
    parser.add_argument("--context", nargs="+", type=int, default=[512, 4096], help="KV lengths; default: 512 4096")
    parser.add_argument("--uneven", action="store_true", help="the synthetic workload with tasks of uneven sizes")
    parser.add_argument("--num-tokens", type=int, default=32, help="tokens per launch; default: 32")
    parser.add_argument("--launches", type=int, default=10, help="launches of each kernel that count; default: 10")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison of logits with fp32")
    add_options(parser, "policies")
    options = parser.parse_args(arguments)
    names = options.geometry or ([] if options.uneven else ["Llama-3.2-1B", "Qwen3-8B"])
    measurements = {
        name: partial(compare, name, options.context, options.num_tokens, options.launches, not options.no_check)
        for name in names
    }
    if options.uneven:
        measurements["uneven"] = partial(compare_uneven, options.num_tokens, options.launches)
    return report_each(measurements, print_report, options)


if __name__ == "__main__":
    sys.exit(main())
