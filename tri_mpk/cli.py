"""`tri-mpk`: generate, chat, inspect, verify, compile, tune, bench and profile from a shell.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed while running, 2 bad
input or unsupported model or device, 130 interrupted. torch and transformers are imported inside the commands.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tri_mpk.terminal import (
    DEFAULT_NEW_TOKENS,
    Commands,
    ManyValues,
    kib,
    new_token_limit,
    note,
    print_table,
    spinner,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from tri_mpk.gpu_profile import GpuProfile
    from tri_mpk.model import CausalLM
    from tri_mpk.profiler import Profile
    from tri_mpk.program import Program


# ---- options that commands share ----

app = typer.Typer(
    name="tri-mpk",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""A Hugging Face language model as one persistent Triton kernel.

    \b
    Examples:
      tri-mpk generate Qwen/Qwen3-8B "Once upon a time"
      tri-mpk inspect --geometry Llama-3.2-1B
    """,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or name on the hub.")]
ConfigArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Checkpoint folder, name on the hub, or a config.json file.")
]
GeometryOption = Annotated[
    str | None, typer.Option("--geometry", metavar="NAME", help="A model's shapes without a checkpoint, as Qwen3-8B.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="bfloat16, float16, float32; default: the checkpoint's (CPU: float32)."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if there is one.")]
MaxSeqLenOption = Annotated[
    int | None, typer.Option(min=2, help="Prompt and new tokens together; default: 4096, or the model's limit if less.")
]
NumWorkersOption = Annotated[int | None, typer.Option(min=1, help="Persistent programs; default: one per SM.")]
RanksOption = Annotated[
    int, typer.Option("--tensor-parallel", min=1, max=8, help="Ranks that the model is shared out among.")
]
TuningOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The kernel's knobs as JSON; default: what tri-mpk tune stored, or a choice."),
]
PolicyOption = Annotated[
    str,
    typer.Option(metavar="POLICY", help="Who hands out tasks: static, hybrid (attention dynamic), dynamic."),
]
WaitBoundOption = Annotated[float, typer.Option(min=0.001, help="Longest wait inside the kernel, in seconds.")]
ProgressOption = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress on standard error.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
CacheDirOption = Annotated[str | None, typer.Option(help="Where hub downloads are kept.")]
OfflineOption = Annotated[bool, typer.Option("--local-files-only", help="Use downloaded files only.")]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help=f"Tokens to generate at most; default: {DEFAULT_NEW_TOKENS}, or what max-seq-len leaves."),
]
EosOption = Annotated[
    list[int] | None, typer.Option("--eos-token-id", help="Stop at this token (repeatable); default: the checkpoint's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def show_version(wanted: bool) -> None:
    if wanted:
        from tri_mpk import __version__

        print(f"tri-mpk {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


# ---- generate and chat ----


def hub_options(revision: str | None, cache_dir: str | None, local_files_only: bool) -> dict[str, object]:
    given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    return {name: value for name, value in given.items() if value is not None}


def load(
    name: str, hub: dict[str, object], progress: bool, tuning: Path | None = None, **parameters: object
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer, with the kernel compiled."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import tri_mpk
    from tri_mpk.aot import check_compiler
    from tri_mpk.inspect import load_config
    from tri_mpk.tuning_store import read_tuning

    check_compiler()
    if tuning is not None:
        parameters["tuning"] = read_tuning(tuning)
    if not progress:
        logging.disable_progress_bar()
    load_config(name, **hub)  # says most clearly what is wrong with a name
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    model = tri_mpk.from_pretrained(name, progress=progress, **parameters, **hub)
    if progress and model.tuning_source.startswith("measured"):
        note(f"tri-mpk: the kernel's knobs are those that tri-mpk tune {model.tuning_source}")
    with spinner("compiling the kernel (seconds from the cache, else up to a minute)", progress):
        model.compile()
    return model, tokenizer


def greedy_parameters(config: GenerationConfig) -> dict[str, object]:
    """What makes `generate` greedy where the checkpoint's defaults ask for sampling; says so."""
    from tri_mpk.generation import NEUTRAL_VALUES

    names = ("do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
    asked = {name: getattr(config, name, None) for name in names}
    asked = {name: value for name, value in asked.items() if value not in NEUTRAL_VALUES[name]}
    if asked:
        settings = ", ".join(f"{name}={value}" for name, value in asked.items())
        note(f"tri-mpk: decoding is greedy; the checkpoint's {settings} is left out")
    return {name: NEUTRAL_VALUES[name][-1] for name in asked}


def read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; give one as the second argument or on standard input")
    return sys.stdin.read().removesuffix("\n")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text; '-' or none: standard input.")] = None,
    max_new_tokens: MaxNewTokensOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    wait_bound_s: WaitBoundOption = 10.0,
    tuning: TuningOption = None,
    policy: PolicyOption = "static",
    tensor_parallel: Annotated[
        str, typer.Option(metavar="auto|N", help="Ranks that share the model; auto: all that torchrun has started.")
    ] = "auto",
    reduce_dtype: Annotated[str, typer.Option(help="Of what ranks send each other.")] = "float32",
    eos_token_id: EosOption = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text while it is made.")] = True,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    local_files_only: OfflineOption = False,
    progress: ProgressOption = True,
) -> None:
    """Continue a prompt greedily, in one kernel launch.

    \b
    Examples:
      tri-mpk generate meta-llama/Llama-3.2-1B "The sea is" --max-new-tokens 50
      tri-mpk generate demos/tiny --device cpu --json < prompt.txt
      torchrun --nproc-per-node 2 -m tri_mpk generate Qwen/Qwen3-8B "The sea is"
    """
    text = read_prompt(prompt)
    lm, tokenizer = load(
        model, hub_options(revision, cache_dir, local_files_only), progress, dtype=dtype, device=device,
        max_seq_len=max_seq_len, num_workers=num_workers, wait_bound_s=wait_bound_s, tuning=tuning, policy=policy,
        tensor_parallel=tensor_parallel, reduce_dtype=reduce_dtype,
    )  # fmt: skip
    from transformers import TextStreamer

    streaming = stream and not as_json
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    parameters = greedy_parameters(lm.generation_config)
    if eos_token_id:
        parameters["eos_token_id"] = list(eos_token_id)
    started = time.perf_counter()
    output = lm.generate(
        input_ids,
        max_new_tokens=new_token_limit(max_new_tokens, lm, input_ids.shape[1]),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None,
        **parameters,
    )
    seconds = time.perf_counter() - started
    tokens = output[0, input_ids.shape[1] :].tolist()
    result = {
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(tokens) / seconds, 2),
        "launches": lm.kernel.runtime.num_launches,
    }
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    if not streaming:
        print(result["text"])
    if progress:
        launches = result["launches"]
        note(
            f"tri-mpk: {len(tokens)} tokens in {seconds:.2f} s ({result['tokens_per_second']:.1f} per second,"
            f" prompt of {input_ids.shape[1]} included), {launches} launch{'' if launches == 1 else 'es'}"
        )


@app.command()
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: MaxNewTokensOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    wait_bound_s: WaitBoundOption = 10.0,
    tuning: TuningOption = None,
    policy: PolicyOption = "static",
    eos_token_id: EosOption = None,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    local_files_only: OfflineOption = False,
    progress: ProgressOption = True,
) -> None:
    """Talk to a model that has a chat template. Greedy; each answer is one kernel launch.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this.

    \b
    Example:
      tri-mpk chat Qwen/Qwen3-8B --system "Answer in one sentence."
    """
    from transformers import AutoTokenizer

    from tri_mpk.chat import converse
    from tri_mpk.inspect import load_config

    hub = hub_options(revision, cache_dir, local_files_only)
    load_config(model, **hub)
    if AutoTokenizer.from_pretrained(model, **hub).chat_template is None:
        raise ValueError(f"{model} has no chat template, so it is no chat model; try: tri-mpk generate {model} PROMPT")
    lm, tokenizer = load(
        model, hub, progress, dtype=dtype, device=device, max_seq_len=max_seq_len, num_workers=num_workers,
        wait_bound_s=wait_bound_s, tuning=tuning, policy=policy, tensor_parallel=1,
    )  # fmt: skip
    parameters = greedy_parameters(lm.generation_config)
    if eos_token_id:
        parameters["eos_token_id"] = list(eos_token_id)
    converse(lm, tokenizer, system, max_new_tokens, parameters)


# ---- inspect, compile, tune, bench ----


def named_config(model: str | None, geometry: str | None) -> PreTrainedConfig:
    from tri_mpk.geometries import geometry as named_geometry
    from tri_mpk.inspect import load_config
    from tri_mpk.models import describe

    if (model is None) == (geometry is None):
        raise ValueError("give either MODEL or --geometry NAME")
    config = named_geometry(geometry) if geometry else load_config(model)
    describe(config, 2)  # before anything else is read from the config of an unknown family
    return config


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


@app.command()
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


@app.command("verify")
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


@app.command("compile")
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


@app.command(cls=ManyValues)
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


@app.command(cls=ManyValues)
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
    device: DeviceOption = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the report; '-': to standard output.")
    ] = None,
    progress: ProgressOption = True,
) -> None:
    """Measure ms per token of a geometry with random weights.

    \b
    Examples:
      tri-mpk bench --geometry Qwen3-8B --context 64 512 4096 --json report.json
      tri-mpk bench --geometry Llama-3.2-1B --context 512 --no-baseline --account
    """
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


# ---- profile ----


@app.command()
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
    attention counts a full cache.

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


def main() -> None:
    """Entry point of `tri-mpk` and `python -m tri_mpk`."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun, rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    app(prog_name="tri-mpk")
