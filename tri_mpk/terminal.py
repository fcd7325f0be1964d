"""What the command line shows: errors as one line with an exit code, notes, tables, a spinner.

Results go to standard output, everything else to standard error. NO_COLOR is respected; a pipe gets plain text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tri_mpk.errors import MegakernelTimeout, TriMpkError, WorkerDiedError

if TYPE_CHECKING:
    from rich.console import Console

    from tri_mpk.model import CausalLM

RUNTIME_FAILURES = (MegakernelTimeout, WorkerDiedError)
DEFAULT_NEW_TOKENS = 256


def debugging() -> bool:
    return os.environ.get("TRI_MPK_DEBUG", "0") != "0"


def report(error: BaseException) -> int:
    """Prints an error as one line and returns the exit code."""
    message = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, (TriMpkError, ValueError, NotImplementedError, OSError))
    if not expected:
        message = f"{type(error).__name__}: {message} (TRI_MPK_DEBUG=1 shows the traceback)"
    print(f"tri-mpk: error: {message}", file=sys.stderr)
    return 2 if expected and not isinstance(error, RUNTIME_FAILURES) else 1


class Commands(TyperGroup):
    """Errors become one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `tri-mpk inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except Exception as error:
            # typer reports usage errors and exits itself
            if debugging() or type(error).__module__.startswith("typer"):
                raise
            raise typer.Exit(report(error)) from None


class ManyValues(TyperCommand):
    """`--context 64 512 4096`, `--context 64,512` and `--context 64 --context 512` all work; likewise `--batch`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        expanded: list[str] = []
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            name, equals, value = arg.partition("=")
            if name not in ("--context", "--batch"):
                expanded.append(arg)
                continue
            values = [value] if equals else []
            while rest and rest[0].replace(",", "").isdigit():
                values.append(rest.pop(0))
            # without a value the bare flag stays, for typer to complain about
            expanded += [f"{name}={part}" for part in ",".join(values).split(",") if part] or [name]
        return super().parse_args(ctx, expanded)


def console(stderr: bool = False) -> Console:
    """Colours and borders on a terminal (NO_COLOR is respected), plain wide text in a pipe."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 160, highlight=False)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def spinner(text: str, progress: bool) -> Iterator[None]:
    if not progress or not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(text):
        yield


def print_table(columns: dict[str, str], rows: list[dict[str, object]], wide_only: str = "") -> None:
    """`columns`: key of the row -> heading. On a narrow terminal the column `wide_only` is left out."""
    from rich import box
    from rich.table import Table

    out = console()
    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, padding=(0, 1, 0, 0))
    if out.width < 110:
        columns = {key: heading for key, heading in columns.items() if key != wide_only}
    for key, heading in columns.items():
        left = all(isinstance(row.get(key), str) for row in rows) and key in ("op", "name", "what")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row.get(key)) for key in columns))
    out.print(table)


def cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def kib(num_bytes: float) -> str:
    return f"{num_bytes / 2**10:,.1f}"


def new_token_limit(asked: int | None, model: CausalLM, num_prompt: int) -> int:
    return asked or max(1, min(DEFAULT_NEW_TOKENS, model.max_seq_len - num_prompt))
