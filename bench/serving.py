"""Throughput mode: Poisson arrivals of requests with random prompt and output lengths to a kernel that serves.

PYTHONPATH=. python bench/serving.py --geometry Qwen3-8B --rate 4 8 inf --requests 128

One launch for each rate, all of one compiled kernel. Prompts and new tokens have lengths drawn between the two numbers
of --prompt and --output. Reported, by the host's clock as clients see it: new tokens per second, time to first token
(from the moment the request was due, so that waiting for a slot counts) and between tokens, p50 and p99; steps per
second of the launch, idle ones included.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from commands import add_options, report_each

from tri_mpk.serving_benchmark import DEFAULT_RATES, Traffic, run_serving_bench
from tri_mpk.terminal import print_table


def print_report(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(
        f"{report['geometry']} on {report['gpu']}, up to {settings['max_batch_size']} sequences and"
        f" {settings['max_tokens_per_step']} tokens per step, commit {report['commit']};"
        f" compiled {report['compiles']} time(s) for {report['launches']} launches"
    )
    columns = {"rate": "requests/s", "tokens_per_s": "new tokens/s", "all_tokens_per_s": "with prompts"}
    columns |= {"first": "first token p50/p99 ms", "between": "between tokens p50/p99 ms"}
    columns |= {"steps_per_s": "steps/s", "tokens_per_busy_step": "tokens/busy step", "preemptions": "preemptions"}
    rows = []
    for row in report["rows"]:
        whole = {name: f"{row[name]:.0f}" for name in ("tokens_per_s", "all_tokens_per_s", "steps_per_s")}
        whole["tokens_per_busy_step"] = f"{row['tokens_per_busy_step']:.1f}"
        whole["first"] = f"{row['first_token_ms_p50']:.1f} / {row['first_token_ms_p99']:.1f}"
        whole["between"] = f"{row['between_tokens_ms_p50']:.2f} / {row['between_tokens_ms_p99']:.2f}"
        rows.append(row | whole)
    print_table(columns, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Traffic(1.0)
    parser.add_argument("--geometry", nargs="+", default=["Qwen3-8B"], help="default: Qwen3-8B")
    parser.add_argument(
        "--rate", nargs="+", type=float, default=list(DEFAULT_RATES),
        help="requests per second, inf: all at once; default: 4 8 inf",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=default.num_requests, help="of each rate; default: 128")
    parser.add_argument("--prompt", nargs=2, type=int, default=default.prompt, help="lengths; default: 32 992")
    parser.add_argument("--output", nargs=2, type=int, default=default.output, help="new tokens; default: 16 240")
    parser.add_argument("--max-batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--tokens-per-step", type=int, default=256, help="max_tokens_per_step; default: 256")
    parser.add_argument("--num-pages", type=int, help="of the KV cache; default: enough for all slots")
    add_options(parser, "serving")
    options = parser.parse_args(arguments)
    traffic = Traffic(1.0, options.requests, tuple(options.prompt), tuple(options.output))
    measurements = {
        name: partial(
            run_serving_bench, name, options.rate, traffic, max_batch_size=options.max_batch_size,
            tokens_per_step=options.tokens_per_step, num_pages=options.num_pages,
        )
        for name in options.geometry
    }  # fmt: skip
    return report_each(measurements, print_report, options)


if __name__ == "__main__":
    sys.exit(main())
