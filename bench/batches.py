"""Many sequences per step: ms per step of every batch size from one compiled kernel, beside torch.compile.

PYTHONPATH=. python bench/batches.py --geometry Qwen3-8B --batch 1 2 4 8 16 32 64 --context 512
PYTHONPATH=. python bench/batches.py --policy static hybrid    # sequences of uneven lengths, kernels taking turns
PYTHONPATH=. torchrun --nproc-per-node 2 bench/batches.py      # one model on two GPUs; steps and a prompt alone

A step decodes one token of each of `--batch` sequences, which have `--context` tokens in a cache of random values
half-way through a launch. The kernel is compiled once, for the largest batch, and the report counts how often. Beside
it: the same weights through torch.compile and a CUDA graph, the kernel for one sequence, empty steps, sampling instead
of the best token, logits against fp32 (every sequence), and the time to first token of a `--prompt` alone and beside 8
sequences that decode, against transformers' prefill.

--policy: sequences of very uneven lengths (one long among short ones; Pareto) and of equal ones, with a kernel for each
of these policies. They take turns, a launch each, as in bench/policies.py, whose columns these are.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from commands import add_options, report_each
from policies import AGAIN, report_of, say, take_turns

from tri_mpk.baseline import ATTENTIONS, BATCH_ATTENTIONS
from tri_mpk.batch_benchmark import (
    DEFAULT_BATCHES,
    DEFAULT_CONTEXT,
    DEFAULT_PROMPT,
    check_batch,
    decode_batch,
    pages_of,
    round_up,
    run_batch_bench,
)
from tri_mpk.batching import PAGE_SIZE, Batching
from tri_mpk.benchmark import SEED, bench_device, fill_cache
from tri_mpk.distributed import world
from tri_mpk.geometries import geometry
from tri_mpk.loading import check_memory, from_model, random_model, resolve_dtype
from tri_mpk.models import describe
from tri_mpk.persistent_kernel import POLICIES
from tri_mpk.rank_benchmark import run_rank_batches
from tri_mpk.terminal import print_table

SHORT, LONG = 128, 16384  # lengths of uneven sequences


# ---- uneven lengths ----


def uneven_lengths(longest: int = LONG, shortest: int = SHORT) -> dict[str, list[int]]:
    """7 short ones and a long one; 16 of a Pareto distribution; 8 equal ones with as many tokens as the first."""
    generator = torch.Generator().manual_seed(SEED)
    pareto = shortest / (1 - torch.rand(16, generator=generator, dtype=torch.float64))  # P(length > n) = shortest / n
    return {
        "one long": [shortest] * 7 + [longest],
        "pareto": pareto.clamp(max=longest).int().tolist(),
        "equal": [(7 * shortest + longest) // 8] * 8,
    }


def compare_policies(
    name: str,
    policies: list[str],
    num_steps: int,
    launches: int,
    check: bool,
    lengths: dict[str, list[int]] | None = None,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """The report of one geometry: rows of every set of lengths and every policy."""
    lengths = lengths or uneven_lengths()
    config, device = geometry(name), bench_device(None)
    dtype = resolve_dtype(None, device, config)
    max_seq_len = round_up(max(map(max, lengths.values())) + num_steps, PAGE_SIZE)
    num_pages = max(pages_of(each, num_steps, PAGE_SIZE) for each in lengths.values())
    slots = max(map(len, lengths.values()))
    batching = Batching(slots, max_tokens_per_step=max(slots, 16), num_pages=num_pages)
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len, batching)
    say(f"{name}: making random weights")
    hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)
    models = {}
    for policy in policies:
        say(f"{name}: planning, verifying and compiling the {policy} kernel")
        models[policy] = from_model(
            hf_model, max_seq_len=max_seq_len, policy=policy, max_batch_size=slots, num_pages=num_pages,
            max_tokens_per_step=batching.max_tokens_per_step, num_workers=num_workers, progress=False,
        )  # fmt: skip
        models[policy].compile()
    rows, failures = [], []
    for what, each in lengths.items():
        errors = {}
        for policy, model in models.items():
            fill_cache(model)
            if check:
                errors[policy] = check_batch(model, hf_model, each).summary()
                if errors[policy]["farther"]:
                    failures.append(f"{what}, {policy}: farther from fp32 than bf16: {errors[policy]}")
        turns = {policy: partial(decode_batch, model, each, num_steps) for policy, model in models.items()}
        turns[AGAIN.replace("static", policies[0])] = turns[policies[0]]
        for row in take_turns(turns, launches, f"{name}, {what}"):
            rows.append({"what": what, "lengths": each} | row | errors.get(row["kernel"], {}))
    settings = {"dtype": str(dtype).removeprefix("torch."), "max_seq_len": max_seq_len, "num_pages": num_pages}
    settings |= {"max_batch_size": slots, "num_workers": next(iter(models.values())).kernel.num_workers}
    report = report_of(name, device, rows, num_steps, launches, settings)
    return report | {"geometry": f"{name}_uneven", "failures": failures}


def print_policies(report: dict[str, Any]) -> None:
    print(f"{report['geometry']} on {report['gpu']}, commit {report['commit']}")
    columns = {"what": "lengths", "kernel": "kernel", "ms_p50": "ms/step", "ms_p20": "p20", "ms_p80": "p80"}
    columns |= {"against": "against the first"}
    rows = []
    for row in report["rows"]:
        times = {name: f"{row[name]:.4f}" for name in ("ms_p20", "ms_p50", "ms_p80")}
        rows.append(row | times | {"against": f"{row['against']:+.2%}"})
    print_table(columns, rows)


# ---- batch sizes ----


def print_rank_batches(report: dict[str, Any]) -> None:
    print(
        f"{report['geometry']} on {report['gpu']}, context {report['settings']['context']}, commit {report['commit']}"
    )
    columns = {"batch": "batch", "ms": "ms/step", "tokens_per_s": "tokens/s", "copy": "of copy"}
    rows = [
        row | {"ms": f"{row['ms_p50']:.3f}", "tokens_per_s": f"{row['tokens_per_s']:.0f}"}
        | {"copy": f"{row['fraction_of_copy']:.0%}"}
        for row in report["rows"]
    ]  # fmt: skip
    print_table(columns, rows)
    print(f"  a step without tokens: {report['empty_step_ms']:.3f} ms")
    if "prompt_ms" in report:
        print(f"  time to first token of a prompt alone: {report['prompt_ms']['ms_p50']:.1f} ms")


def print_batches(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(
        f"{report['geometry']} on {report['gpu']}, context {settings['context']}, {settings['num_workers']} workers,"
        f" commit {report['commit']}; compiled {report['compiles']} time(s) for {report['launches']} launches"
    )
    columns = {"batch": "batch", "ms": "ms/step", "tokens_per_s": "tokens/s", "copy": "of copy", "against": "by one"}
    columns |= {"baseline": "torch.compile", "speedup": "speedup", "sampled": "sampling", "l2": "rel. L2 (bf16)"}
    rows = []
    for row in report["rows"]:
        cells = {"batch": row["batch"], "ms": f"{row['ms_p50']:.3f}", "tokens_per_s": f"{row['tokens_per_s']:.0f}"}
        cells |= {"copy": f"{row['fraction_of_copy']:.0%}", "sampled": f"{row['sampled_ms_p50']:.3f}"}
        cells["against"] = "-" if row["against_one"] is None else f"{row['against_one']:.2f}x"
        cells["baseline"] = "-" if row["speedup"] is None else f"{row['baseline_ms_p50']:.3f}"
        cells["speedup"] = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        cells["l2"] = f"{row['rel_l2']:.1e} ({row['rel_l2_bf16']:.1e})" if "rel_l2" in row else "-"
        rows.append(cells)
    print_table(columns, rows)
    one = report["one_sequence"]
    print(f"  the kernel for one sequence: {one['ms_p50']:.3f} ms per step" if one else "  no kernel for one sequence")
    print(f"  a step without tokens: {report['empty_step_ms']:.3f} ms")
    for row in report.get("overhead", []):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if name not in ("batch", "share"))
        print(f"  batch {row['batch']}: choosing and planning are {row['share']:.1%} of the critical path ({parts})")
    if prompt := report.get("prompt"):
        reference = prompt["reference"]
        against = "" if reference is None else f", transformers {reference['ms_p50']:.1f} ms"
        against += "" if reference is None else f" ({prompt['against_reference']:.2f}x)"
        print(
            f"  time to first token, {prompt['prompt']} tokens: {prompt['alone']['ms_p50']:.1f} ms alone{against};"
            f" {prompt['beside_decodes']['ms_p50']:.1f} ms beside {prompt['beside']} sequences, which take"
            f" {prompt['decode_ms']:.2f} ms per token alone and {prompt['decode_beside_ms']:.2f} meanwhile"
        )


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=["Qwen3-8B"], help="default: Qwen3-8B")
    parser.add_argument("--batch", nargs="+", type=int, default=list(DEFAULT_BATCHES), help="default: 1 2 4 ... 64")
    parser.add_argument("--context", type=int, default=DEFAULT_CONTEXT, help="KV length; default: 512")
    parser.add_argument("--num-steps", type=int, default=32, help="steps per launch; default: 32")
    parser.add_argument("--launches", type=int, default=10, help="launches that count; default: 10")
    parser.add_argument("--tokens-per-step", type=int, default=256, help="max_tokens_per_step; default: 256")
    parser.add_argument("--prompt", type=int, default=DEFAULT_PROMPT, help="for the time to first token; 0: skip it")
    parser.add_argument("--no-baseline", action="store_true", help="skip torch.compile and transformers' prefill")
    parser.add_argument(
        "--attention", nargs="+", default=list(BATCH_ATTENTIONS), choices=sorted({*ATTENTIONS, *BATCH_ATTENTIONS}),
        help="which ones the baseline tries, each with a compilation of its own; default: split rows",
    )  # fmt: skip
    parser.add_argument(
        "--baseline-s", type=float, default=float("inf"),
        help="seconds after which torch.compile is tried for no further batch size; default: for all",
    )  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="skip the comparison of logits with fp32")
    parser.add_argument("--no-one", action="store_true", help="skip the kernel for one sequence")
    parser.add_argument("--profile", action="store_true", help="also: what choosing and planning take of a step")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, help="uneven lengths with these policies instead")
    add_options(parser, "batches")
    options = parser.parse_args(arguments)
    if options.policy:
        measurements = {
            name: partial(
                compare_policies, name, options.policy, options.num_steps, options.launches, not options.no_check
            )
            for name in options.geometry
        }
        return report_each(measurements, print_policies, options)
    if world()[1] > 1:
        measurements = {
            name: partial(
                run_rank_batches, name, options.batch, options.context, num_steps=options.num_steps,
                launches=options.launches, tokens_per_step=options.tokens_per_step, prompt=options.prompt,
            )
            for name in options.geometry
        }  # fmt: skip
        return report_each(measurements, print_rank_batches, options)
    measurements = {
        name: partial(
            run_batch_bench, name, options.batch, options.context, num_steps=options.num_steps,
            launches=options.launches, tokens_per_step=options.tokens_per_step, prompt=options.prompt,
            baseline=not options.no_baseline, baseline_bound_s=options.baseline_s,
            attentions=options.attention, check=not options.no_check,
            one=not options.no_one, profile=options.profile,
        )
        for name in options.geometry
    }  # fmt: skip
    return report_each(measurements, print_batches, options)


if __name__ == "__main__":
    sys.exit(main())
