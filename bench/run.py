"""Measures geometries on the GPU of this machine and saves one report each: see README.md beside this file.

PYTHONPATH=. python bench/run.py --geometry Llama-3.2-1B Qwen3-8B --context 64 512 4096
PYTHONPATH=. torchrun --nproc-per-node 2 bench/run.py --geometry Qwen3-8B   # one model on two GPUs
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from commands import add_options, report_each

from tri_mpk.baseline import ATTENTIONS
from tri_mpk.benchmark import DEFAULT_CONTEXTS, run_bench
from tri_mpk.distributed import world
from tri_mpk.geometries import GEOMETRIES
from tri_mpk.rank_baseline import REDUCES
from tri_mpk.rank_benchmark import run_rank_bench

FOR_ONE_GPU = [name for name in GEOMETRIES if name != "Llama-3.1-70B"]


def summary(report: dict) -> str:
    lines = [
        f"{report['geometry']} on {report['gpu']}: compiled in {report['compile_cold_s']:.1f} s,"
        f" cached {report['compile_cached_s']:.1f} s; a copy moves {report['copy_gbps']:.0f} GB/s"
    ]
    for row in report["rows"]:
        line = f"  context {row['context']:6}: {row['ms_p50']:.3f} ms/token, {row['fraction_of_copy']:.0%} of the copy"
        if row["speedup"] is not None:
            line += f", baseline {row['baseline_ms_p50']:.3f} ms, {row['speedup']:.2f}x"
        if "exposed_communication" in row:
            line += f", {row['no_communication_ms_p50']:.3f} ms without communication"
            line += f" ({row['exposed_communication']:.0%} exposed)"
            if "hidden_communication" in row:  # older results lack it
                line += f", {row['hidden_communication']:.0%} of {row['communication_ms']:.3f} ms hidden"
        if row["rel_l2"] is not None:
            line += f", relative L2 to fp32 {row['rel_l2']:.1e} (bf16 {row['rel_l2_bf16']:.1e})"
        lines.append(line)
    for entry in report.get("account", []):
        lines.append(f"  context {entry['context']:6}: {entry['ms_p50']:.3f} ms/token with {entry['change']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=list(FOR_ONE_GPU), help="default: all that fit one GPU")
    parser.add_argument("--context", nargs="+", type=int, default=list(DEFAULT_CONTEXTS))
    parser.add_argument("--num-tokens", type=int, default=32, help="tokens per launch")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--no-baseline", action="store_true", help="skip torch.compile, which takes most of the time")
    parser.add_argument(
        "--attention", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS,
        help="which ones the baseline tries, each with a compilation per context (40 s for 8B); default: all",
    )  # fmt: skip
    parser.add_argument(
        "--reduce", nargs="+", default=list(REDUCES), choices=REDUCES,
        help="on several GPUs: what adds up in the baseline, NCCL or torch's symmetric memory; default: each of them",
    )  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="skip the comparison of logits with fp32")
    parser.add_argument("--account", action="store_true", help="also where the time goes (tri_mpk/account.py)")
    parser.add_argument("--reduce-dtype", default="float32", help="of what ranks send each other: float32 or bfloat16")
    add_options(parser)
    options = parser.parse_args(arguments)
    common = {"num_tokens": options.num_tokens, "launches": options.launches, "check": not options.no_check}
    if world()[1] > 1:
        common |= {"account_too": options.account, "reduce_dtype": getattr(torch, options.reduce_dtype)}
        baseline = () if options.no_baseline else options.reduce
        measure = partial(run_rank_bench, baseline=baseline, attentions=options.attention, **common)
    else:
        measure = partial(
            run_bench, baseline=not options.no_baseline, attentions=options.attention, account=options.account, **common
        )
    measurements = {name: partial(measure, name, options.context) for name in options.geometry}
    return report_each(measurements, lambda report: print(summary(report)), options)


if __name__ == "__main__":
    sys.exit(main())
