"""`tri-mpk tune`, `bench` and `profile`: what measures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tri_mpk.cli.options import (
    CacheDirOption,
    ConfigArgument,
    DeviceOption,
    DtypeOption,
    GeometryOption,
    JsonOption,
    NumWorkersOption,
    OfflineOption,
    PolicyOption,
    ProgressOption,
    RevisionOption,
    WaitBoundOption,
    hub_options,
    named_config,
)
from tri_mpk.terminal import note, print_table, spinner

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tri_mpk.model import CausalLM
    from tri_mpk.profiler import Profile


def tune(
    model: ConfigArgument = None,
    geometry: GeometryOption = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequence lengths that count; several may follow. [512 4096]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for the search; Ctrl-C ends it earlier.")] = 60.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the GPU anew first: bandwidth and hops, some seconds.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Find the fastest knobs of a kernel by measuring on this machine's GPU, and store them.

    Without MODEL: only the GPU itself is measured, for the cost model that chooses the knobs of all models. With MODEL
    (its shapes count, weights are random) candidates around that choice are compiled, checked and timed. Both results
    lie in the cache folder, where generate, chat, inspect, compile, bench and from_pretrained find them.

    \b
    Examples:
      tri-mpk tune
      tri-mpk tune meta-llama/Llama-3.2-1B --context 512 4096 --seconds 120
      tri-mpk tune --geometry Qwen3-8B
    """
    from tri_mpk.aot import check_compiler
    from tri_mpk.tuner import DEFAULT_CONTEXTS, ready_gpu
    from tri_mpk.tuner import tune as tune_model

    check_compiler()
    if model is None and geometry is None:
        _, profile, _ = ready_gpu(device, again=True)
        print_gpu(asdict(profile), as_json)
        return
    result = tune_model(
        named_config(model, geometry), context or DEFAULT_CONTEXTS, seconds=seconds, dtype=dtype, device=device,
        measure_gpu=measure, progress=progress,
    )  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        print_tuning(result)


def print_gpu(profile: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(profile))
        return
    print_table({"what": "", "value": ""}, [{"what": name, "value": value} for name, value in profile.items()])


def print_tuning(result: dict[str, Any]) -> None:
    columns = {name: name for name in result["best"]}
    print_table(columns | {"estimated_ms": "estimated ms", "ms": "ms", "failure": ""}, result["trials"])
    print(
        f"best       {', '.join(f'{k} {v}' for k, v in result['best'].items())}: {result['best_ms']:.4f} ms per token,"
        f" {result['best_ms'] / result['chosen_ms'] - 1:+.1%} against the cost model's choice"
    )
    print(f"search     {len(result['trials'])} candidates; {result['outcome']}")
    print(f"stored     {result['file']}")


def bench(
    geometry: Annotated[str, typer.Option("--geometry", metavar="NAME", help="Which model's shapes, as Qwen3-8B.")],
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequence lengths to measure at; several may follow. [64 512 4096]")
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens per launch.")] = 32,
    launches: Annotated[int, typer.Option(min=2, help="Launches per measurement.")] = 20,
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="Also time the PyTorch baseline.")] = True,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Also compare the results.")] = True,
    account: Annotated[
        bool, typer.Option("--account", help="Also show where the time goes: with waits, attention, ... taken away.")
    ] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Batch sizes, all from one kernel for the largest; several may follow. --context: 512"
        ),
    ] = None,
    device: DeviceOption = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report; '-': to standard output.")
    ] = None,
    progress: ProgressOption = True,
) -> None:
    """Measure ms per token of a geometry with random weights; with --batch, per step of many sequences.

    With --batch also the time to first token of a prompt of 2048 tokens, and torch.compile and transformers beside it.

    \b
    Examples:
      tri-mpk bench --geometry Qwen3-8B --context 64 512 4096 --json report.json
      tri-mpk bench --geometry Llama-3.2-1B --context 512 --no-baseline --account
      tri-mpk bench --geometry Qwen3-8B --batch 1 2 4 8 16 32 64
    """
    if batch:
        bench_batches(
            geometry, batch, context, json_file, account=account, num_steps=num_tokens, launches=launches,
            baseline=baseline, check=check, device=device, progress=progress,
        )  # fmt: skip
        return
    from tri_mpk.benchmark import run_bench

    result = run_bench(
        geometry, context or [64, 512, 4096], num_tokens=num_tokens, launches=launches, baseline=baseline, check=check,
        account=account, device=device, progress=progress,
    )  # fmt: skip
    if json_file == "-":
        print(json.dumps(result))
        return
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=2) + "\n")
        note(f"tri-mpk: wrote {json_file}")
    columns = {key: key for row in result["rows"] for key, value in row.items() if not isinstance(value, dict | list)}
    print_table(columns, result["rows"])
    if account:
        print_table({"context": "context", "change": "change", "ms_p50": "ms_p50"}, result["account"])


def bench_batches(
    geometry: str,
    batches: list[int],
    contexts: list[int] | None,
    json_file: str | None,
    account: bool,
    **options: object,
) -> None:
    from tri_mpk.batch_benchmark import DEFAULT_CONTEXT, run_batch_bench

    if account or len(contexts or [0]) > 1:
        raise ValueError("--batch goes with one --context, and without --account")
    result = run_batch_bench(geometry, batches, contexts[0] if contexts else DEFAULT_CONTEXT, **options)
    if json_file == "-":
        print(json.dumps(result))
    else:
        if json_file:
            Path(json_file).write_text(json.dumps(result, indent=2) + "\n")
            note(f"tri-mpk: wrote {json_file}")
        columns = {key: key for row in result["rows"] for key, value in row.items() if not isinstance(value, dict)}
        print_table(columns, result["rows"])
        facts = {name: result[name] for name in ("compiles", "launches", "empty_step_ms", "one_sequence", "prompt")}
        print_table({"what": "", "value": ""}, [{"what": name, "value": value} for name, value in facts.items()])
    if result["failures"]:
        raise AssertionError("; ".join(result["failures"]))


def profile(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Checkpoint folder or name on the hub.")] = None,
    geometry: GeometryOption = None,
    context: Annotated[int, typer.Option(min=1, help="Sequence length to decode at.")] = 512,
    steps: Annotated[int, typer.Option(min=1, max=32, help="Steps to record.")] = 4,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev: .json or .json.gz.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the step of median length: .svg, .png or .pdf.")
    ] = None,
    as_json: JsonOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    policy: PolicyOption = "static",
    wait_bound_s: WaitBoundOption = 10.0,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    local_files_only: OfflineOption = False,
    progress: ProgressOption = True,
) -> None:
    """Record when every task of some decode steps was fetched, waited, ran and signalled.

    Keys and values are random, and so are the weights of a geometry: time depends on shapes. On a CPU the clock
    counts its own readings, which tells order, not duration.

    The table is per step. fetch, wait, run, signal: mean over all workers; they add up to the step. critical: what the
    op takes of the longest chain of tasks and hops. GB/s: of the task's bytes while it runs, for all workers together;
    attention counts a full cache. Under torchrun the table is of rank 0, and each rank writes a trace and a picture of
    its own: trace.rank0.json.gz and so on.

    \b
    Examples:
      tri-mpk profile --geometry Llama-3.2-1B --context 512 --out trace.json.gz --picture step.svg
      tri-mpk profile demos/tiny --device cpu --context 16 --steps 2
    """
    from tri_mpk.benchmark import profile_at

    if picture:
        from tri_mpk.picture import check_matplotlib

        check_matplotlib()
    hub = hub_options(revision, cache_dir, local_files_only)
    lm = profiled_model(
        model, geometry, hub, context + steps, dtype=dtype, device=device, num_workers=num_workers,
        wait_bound_s=wait_bound_s, policy=policy, progress=progress,
    )  # fmt: skip
    with spinner("compiling the kernel (seconds from the cache, else up to a minute)", progress):
        lm.compile()
    result = profile_at(lm, context, steps, progress)
    name = geometry or model
    if as_json:
        print(json.dumps({"model": name, "context": context, **result.summary(), "ops": ops_of(result)}))
    else:
        dtype_name = str(lm.dtype).removeprefix("torch.")
        print(f"{name}: {dtype_name}, context {context}, {lm.kernel.num_workers} workers, {steps} steps")
        print_profile(result)
    out, picture = (path and rank_file(path) for path in (out, picture))
    if out:
        with spinner(f"writing {out}", progress):
            result.to_perfetto(out)
        note(f"tri-mpk: wrote {out}; open it at https://ui.perfetto.dev")
    if picture:
        with spinner(f"drawing {picture}", progress):
            result.picture(picture)
        note(f"tri-mpk: wrote {picture}")


def profiled_model(
    name: str | None,
    geometry: str | None,
    hub: dict[str, object],
    length: int,
    *,
    device: str | None,
    progress: bool,
    **options: object,
) -> CausalLM:
    """A checkpoint, or a geometry with random weights, for sequences of `length` tokens, with profile=True."""
    from transformers.utils import logging

    import tri_mpk
    from tri_mpk.aot import check_compiler
    from tri_mpk.errors import DeviceError
    from tri_mpk.geometries import geometry as named_geometry
    from tri_mpk.inspect import load_config
    from tri_mpk.loading import resolve_device
    from tri_mpk.model import PAGE_SIZE

    check_compiler()
    if (name is None) == (geometry is None):
        raise ValueError("give either MODEL or --geometry NAME")
    config: PreTrainedConfig = named_geometry(geometry) if geometry else load_config(name, **hub)
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(f"--context and --steps make {length} tokens, but {name or geometry} has {limit} positions")
    if not progress:
        logging.disable_progress_bar()
    max_seq_len = min(limit, -(-length // PAGE_SIZE) * PAGE_SIZE)
    options |= {"device": device, "progress": progress, "profile": True, "max_seq_len": max_seq_len}
    if not geometry:
        return tri_mpk.from_pretrained(name, **options, **hub)
    if resolve_device(device).type == "cpu":
        raise DeviceError("a geometry is too large for a CPU; use a CUDA GPU or a small model: tri-mpk profile MODEL")
    return tri_mpk.from_config(config, **options)


def rank_file(path: str) -> str:
    """`trace.rank1.json.gz` for rank 1 of several: each has a profile of its own workers."""
    from tri_mpk.distributed import world

    rank, world_size = world()
    if world_size == 1:
        return path
    name, *suffixes = Path(path).name.split(".")
    return str(Path(path).with_name(".".join([name, f"rank{rank}", *suffixes])))


def ops_of(result: Profile) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(row) for row in result.table()]


def print_profile(result: Profile) -> None:
    columns = {name: name for name in ("op", "tasks", "fetch", "wait", "run", "signal", "share")}
    columns |= {"gbps": "GB/s", "critical": "critical", "hops": "hops"}
    if not result.is_real_time:
        del columns["gbps"]
    rows = []
    for op in ops_of(result):
        cells = {name: f"{op[name]:.2f}" for name in ("fetch", "wait", "run", "signal", "critical")}
        cells |= {"share": f"{op['share']:.1%}", "hops": f"{op['hops']:.3g}"}
        cells |= {"gbps": f"{op['gbps']:.0f}" if op["gbps"] is not None else "-"}
        rows.append(op | cells)
    print_table(columns, rows)
    facts = result.summary()
    length, unit = facts["step"], facts["unit"]
    shares = ", ".join(f"{name} {facts[name] / length:.1%}" for name in ("run", "wait", "fetch", "signal"))
    print(f"{unit} per step: mean over all workers; critical: of the critical path")
    print(f"step       {length:.2f} {unit}; workers: {shares}, step event {facts['step_event_wait'] / length:.1%}")
    print(
        f"critical   {facts['path_tasks']:.4g} tasks, {facts['path_hops']:.3g} hops that take"
        f" {facts['path_hop_time']:.2f} {unit}"
    )
