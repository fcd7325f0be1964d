"""Options that commands share, and what several of them make of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tri_mpk.terminal import DEFAULT_NEW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
DoSampleOption = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Tokens at random, or the best; default: greedy unless a flag says how."),
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="When sampling: below 1.0 likely tokens become likelier.")
]
TopKOption = Annotated[int | None, typer.Option(help="Only the so many best tokens; 0: all. Default: 50.")]
TopPOption = Annotated[float | None, typer.Option(help="Only the best tokens that have this probability together.")]
MinPOption = Annotated[float | None, typer.Option(help="Only tokens of this part of the best one's probability.")]
SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
PenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1.0, tokens that occurred are less likely.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def hub_options(revision: str | None, cache_dir: str | None, local_files_only: bool) -> dict[str, object]:
    given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    return {name: value for name, value in given.items() if value is not None}


def named_config(model: str | None, geometry: str | None) -> PreTrainedConfig:
    from tri_mpk.geometries import geometry as named_geometry
    from tri_mpk.inspect import load_config
    from tri_mpk.models import describe

    if (model is None) == (geometry is None):
        raise ValueError("give either MODEL or --geometry NAME")
    config = named_geometry(geometry) if geometry else load_config(model)
    describe(config, 2)  # before anything else is read from the config of an unknown family
    return config
