"""`tri-mpk inspect`, `verify` and `compile`: what needs neither weights nor a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tri_mpk.cli.options import (
    ConfigArgument,
    DtypeOption,
    GeometryOption,
    JsonOption,
    MaxSeqLenOption,
    NumWorkersOption,
    PolicyOption,
    ProgressOption,
    RanksOption,
    named_config,
)
from tri_mpk.terminal import kib, note, print_table, spinner

if TYPE_CHECKING:
    from tri_mpk.gpu_profile import GpuProfile
    from tri_mpk.program import Program


def planned(
    model: str | None,
    geometry: str | None,
    dtype: str | None,
    max_seq_len: int | None,
    num_workers: int | None,
    bulk_copies: bool = True,
    policy: str = "static",
    tensor_parallel: int = 1,
) -> tuple[Program, GpuProfile, dict[str, object]]:
    """The program for a model's GPU form, the GPU, and what else it was planned for."""
    import torch

    from tri_mpk.aot import check_compiler
    from tri_mpk.gpu_profile import find_profile
    from tri_mpk.inspect import plan_config
    from tri_mpk.loading import resolve_dtype, resolve_max_seq_len
    from tri_mpk.models import describe
    from tri_mpk.sharding import Shard
    from tri_mpk.tuning_store import find_tuning

    check_compiler()
    config = named_config(model, geometry)
    gpu, gpu_source = find_profile(torch.device("cuda" if torch.cuda.is_available() else "meta"))
    if num_workers is None and not torch.cuda.is_available():
        note(f"tri-mpk: no GPU here, so planning for an {gpu.name} with {gpu.num_sms} SMs (see --num-workers)")
    resolved_dtype = resolve_dtype(dtype, torch.device("meta"), config)
    resolved_len = resolve_max_seq_len(max_seq_len, config)
    local = config if tensor_parallel == 1 else Shard(config, 0, tensor_parallel).local_config()
    tuning, tuning_source = find_tuning(gpu, describe(local, resolved_len), resolved_dtype, num_workers)
    program = plan_config(
        config, resolved_dtype, resolved_len, bulk_copies=bulk_copies, tuning=tuning, policy=policy,
        world_size=tensor_parallel,
    )  # fmt: skip
    facts = {
        "model": geometry or model,
        "dtype": str(resolved_dtype).removeprefix("torch."),
        "max_seq_len": resolved_len,
        "gpu_source": gpu_source,
        "tuning_source": tuning_source,
    }
    return program, gpu, facts


def inspect(
    model: ConfigArgument = None,
    geometry: GeometryOption = None,
    num_workers: NumWorkersOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Length at which attention is looked at; default: 4096 or max-seq-len."),
    ] = None,
    per_op: Annotated[bool, typer.Option("--all", help="Each op of each layer, instead of layers together.")] = False,
    as_json: JsonOption = False,
    dot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write ops and events as Graphviz; '-': to standard output.")
    ] = None,
    policy: PolicyOption = "static",
    layer: Annotated[str, typer.Option(help="Layer for --dot: a number, or all.")] = "0",
) -> None:
    """Plan a kernel without weights or a GPU and show its tasks, events, balance, critical path and estimated time.

    \b
    Examples:
      tri-mpk inspect Qwen/Qwen3-8B
      tri-mpk inspect --geometry Llama-3.2-1B --json
      tri-mpk inspect path/to/config.json --dot - | dot -Tsvg > layer.svg
    """
    from tri_mpk.inspect import dot as as_dot
    from tri_mpk.inspect import inspect_program

    if layer != "all" and not layer.isdigit():
        raise ValueError(f"--layer {layer} is not supported; give a number or all")
    program, gpu, facts = planned(model, geometry, dtype, max_seq_len, num_workers, policy=policy)
    longest = int(facts["max_seq_len"])
    if context is not None and context > longest:
        raise ValueError(f"--context {context} is more than max_seq_len={longest}; raise --max-seq-len")
    facts |= inspect_program(program, gpu, context or min(4096, longest), per_op)
    if dot is not None:
        text = as_dot(program, None if layer == "all" else int(layer))
        if dot == "-":
            print(text, end="")
            return
        Path(dot).write_text(text)
        note(f"tri-mpk: wrote {dot}")
    if as_json:
        print(json.dumps(facts))
    else:
        print_inspection(facts)


def print_inspection(facts: dict[str, Any]) -> None:
    columns = {"op": "op", "name": "tile function", "variants": "variant", "calls": "calls", "tasks": "tasks"}
    columns |= {"events": "events", "hops": "hops", "max": "KiB max", "mean": "mean", "imbalance": "max/mean"}
    rows = []
    for op in facts["ops"]:
        sizes = {"max": kib(op["worker_max_bytes"]), "mean": kib(op["worker_mean_bytes"])}
        rows.append(
            op | sizes | {"variants": ", ".join(map(str, op["variants"])), "imbalance": f"{op['imbalance']:.3f}"}
        )
    attention = facts["attention"]
    print(f"{facts['model']}: {facts['dtype']}, max_seq_len {facts['max_seq_len']}, {facts['num_workers']} workers")
    print_table(columns, rows, wide_only="name")
    print("KiB: of one call, busiest worker and mean over all workers; the most uneven call of each row")
    print(
        f"step       {facts['tasks']} tasks, {facts['events']} events, {facts['variants']} variants,"
        f" {facts['bytes'] / 1e9:.3f} GB"
    )
    print(
        f"worker     {facts['worker_max_bytes'] / 1e6:.2f} MB busiest, {facts['worker_mean_bytes'] / 1e6:.2f} MB mean"
        f" per step; busiest worker / mean {facts['imbalance']:.3f}"
    )
    if facts["pool_bytes"]:
        print(f"pools      {facts['pool_bytes'] / 1e6:.2f} MB more, for whichever worker is free")
    columns = {"name": "pass", "events": "events", "waits_per_task": "waits per task", "max_waits": "most"}
    columns |= {
        "signals_per_task": "signals per task",
        "max_signals": "most",
        "hops": "hops",
        "hops_per_layer": "per layer",
    }
    print_table(columns, facts["passes"])
    print(f"critical   {facts['hops']} hops, {facts['hops_per_layer']} per layer")
    estimate = facts["estimate"]
    print(
        f"estimate   {estimate['ms']:.3f} ms per token at {estimate['context']} tokens on an {estimate['gpu']}"
        f" ({facts['gpu_source']} profile): bytes alone {estimate['stream_ms']:.3f},"
        f" tasks and hops alone {estimate['chain_ms']:.3f}"
    )
    print(f"knobs      {', '.join(f'{k} {v}' for k, v in facts['tuning'].items())} ({facts['tuning_source']})")
    print(
        f"attention  {attention['coverage']:.1%} of the workers have some of {attention['context']} tokens to read"
        f" ({attention['splits']} splits per KV head, blocks of {attention['block_kv']})"
    )
    print(f"proof      {facts['verify']['text']}")
    print(f"planned    in {facts['planning_seconds']:.2f} s")
    print(f"kernel     {facts['kernel']}")


def verify_schedule(
    model: ConfigArgument = None,
    geometry: GeometryOption = None,
    num_workers: NumWorkersOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    policy: PolicyOption = "static",
    tensor_parallel: RanksOption = 1,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Put verify itself on trial, on random and on large schedules.")
    ] = False,
    cases: Annotated[int, typer.Option(min=0, help="Random schedules for --self-check.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the random schedules.")] = 0,
    tasks: Annotated[
        int, typer.Option(min=0, help="Tasks of the large schedules for --self-check; 0: none.")
    ] = 100_000,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Prove a model's schedule free of deadlock and races, or check the proofs against all interleavings.

    \b
    Examples:
      tri-mpk verify --geometry Qwen3-8B
      tri-mpk verify --geometry Qwen3-8B --tensor-parallel 4
      tri-mpk verify --self-check --cases 10000 --seed 1
    """
    if not self_check:
        program, _, facts = planned(
            model, geometry, dtype, max_seq_len, num_workers, policy=policy, tensor_parallel=tensor_parallel
        )
        facts |= {"num_workers": program.num_workers, "num_ranks": program.num_ranks} | asdict(program.report)
        where = f"{program.num_workers} workers" + (f" on each of {tensor_parallel} ranks" * (tensor_parallel > 1))
        print(json.dumps(facts) if as_json else f"{facts['model']}, {where}: {program.report}")
        return
    if model is not None or geometry is not None:
        raise ValueError("--self-check makes its own schedules; leave out MODEL and --geometry")
    from tri_mpk.trial import run_trial

    result = run_trial(cases, seed, tasks, progress)
    if as_json:
        print(json.dumps(result))
    else:
        print_trial(result)
    if result["disagreements"]:
        raise typer.Exit(1)


def print_trial(result: dict[str, Any]) -> None:
    kinds, large = result["kinds"], result["large"]
    columns = {"what": "schedule", "cases": "cases", "safe": "safe", "accepted": "accepted", "unsafe": "unsafe"}
    columns |= {"rejected": "rejected"} | {error: error.removesuffix("Error") for error in result["errors"]}
    if kinds:
        print_table(columns | {"disagreements": "disagree", "states": "states"}, kinds)
        print("safe and unsafe: what all interleavings show; errors: why verify rejects")
        print(f"{len(result['disagreements'])} disagreements, {result['seconds']:.1f} s")
    for text in result["disagreements"]:
        note(f"tri-mpk: disagreement: {text}")
    if large:
        print_table({"what": "schedule", "tasks": "tasks", "events": "events", "pairs": "pairs", "seconds": "s"}, large)


def compile_kernel(
    model: ConfigArgument = None,
    geometry: GeometryOption = None,
    target: Annotated[str | None, typer.Option(metavar="sm_NN", help="Default: the present GPU, else sm_90.")] = None,
    num_workers: NumWorkersOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    tensor_parallel: RanksOption = 1,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Compile a kernel ahead of time, without weights or a GPU; a later run takes it from Triton's cache.

    \b
    Examples:
      tri-mpk compile Qwen/Qwen3-8B --target sm_90
      tri-mpk compile --geometry Llama-3.2-1B --json
    """
    import torch

    from tri_mpk.aot import DEFAULT_TARGET, compile_report, has_bulk_copies
    from tri_mpk.generator import write_source

    if target is None and torch.cuda.is_available():
        target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    target = target or DEFAULT_TARGET
    program, _, facts = planned(
        model, geometry, dtype, max_seq_len, num_workers, has_bulk_copies(target), tensor_parallel=tensor_parallel
    )
    path = write_source(program.source)
    with spinner(f"compiling for {target}, half a minute or so", progress):
        resources = compile_report(path, target)
    if as_json:
        print(json.dumps(resources))
        return
    units = {"registers": "per thread", "spills": "instructions", "stack_bytes": "per thread", "seconds": "to compile"}
    print(f"{facts['model']}: {facts['dtype']}, {program.num_workers} workers, {target}")
    rows = [{"what": key, "value": value, "unit": units.get(key, "")} for key, value in resources.items()]
    print_table({"what": "", "value": "", "unit": ""}, rows)
    print(f"kernel  {path}")
