"""`tri-mpk`: generate, chat, inspect, verify, compile, tune, bench and profile from a shell.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed while running, 2 bad
input or unsupported model or device, 130 interrupted. torch and transformers are imported inside the commands.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tri_mpk.cli.measurements import bench, profile, tune
from tri_mpk.cli.plans import compile_kernel, inspect, verify_schedule
from tri_mpk.cli.text import chat, generate
from tri_mpk.terminal import Commands, ManyValues

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


def show_version(wanted: bool) -> None:
    if wanted:
        from tri_mpk import __version__

        print(f"tri-mpk {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command("verify")(verify_schedule)
app.command("compile")(compile_kernel)
app.command(cls=ManyValues)(tune)
app.command(cls=ManyValues)(bench)
app.command()(profile)


def main() -> None:
    """Entry point of `tri-mpk` and `python -m tri_mpk`."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun, rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    app(prog_name="tri-mpk")
