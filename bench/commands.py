"""What the commands here share: one report after another is measured, printed and saved."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tri_mpk.benchmark import free_memory, save_report
from tri_mpk.distributed import world

RESULTS = Path(__file__).resolve().parent / "results"


def add_options(parser: argparse.ArgumentParser, folder: str = "") -> None:
    """Where reports go and which commit they are of."""
    out = RESULTS / folder
    parser.add_argument("--commit", help="to record where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of reports; default: {out.name} here")


def report_each(
    measurements: dict[str, Callable[[], dict[str, Any]]],
    show: Callable[[dict[str, Any]], None],
    options: argparse.Namespace,
) -> int:
    """The exit code: 1 if a measurement raised or has failures to tell of. The others count all the same.

    Under torchrun rank 0 speaks for all.
    """
    failed = []
    rank, _ = world()
    for name, measure in measurements.items():
        start = time.perf_counter()
        try:
            report = measure()
        except Exception:  # told, and in the exit code; the other measurements still count
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            free_memory()
        if report.get("failures"):
            failed.append(name)
        if rank:
            continue
        report["commit"] = options.commit or report["commit"]
        show(report)
        print(f"  {save_report(report, options.out)}, {time.perf_counter() - start:.0f} s", flush=True)
        for failure in report.get("failures", ()):
            print(f"  FAILED: {failure}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
