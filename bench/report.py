"""Writes results/results.csv and the README's table from results/*.json.

    python bench/report.py           # writes both
    python bench/report.py --check   # fails if either is out of date

Of several results for one geometry on one GPU the newest counts. Ranks that send each other another type than float32
have rows of their own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path

BENCH = Path(__file__).parent
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
COLUMNS = (
    "geometry", "context", "p20", "p50", "p80", "unit", "gpu", "driver", "torch", "triton",
    "baseline_p50", "baseline", "commit", "date",
)  # fmt: skip
HEADER = """\
| model | context | ms/token | p20 – p80 | tokens/s | TB/s | of copy | torch.compile + CUDA graph | speedup |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


class ReportError(Exception):
    """What the user has to put right."""


def load_results(folder: Path) -> list[dict]:
    """The newest report of each row name and GPU, in order of GPU, then name."""
    newest: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        key = (report["gpu"], row_name(report))
        if key not in newest or report["date"] > newest[key]["date"]:  # ISO 8601 in UTC sorts as text
            newest[key] = report
    return [newest[key] for key in sorted(newest)]


def row_name(report: dict) -> str:
    parts = report["settings"].get("reduce_dtype", "float32")
    return report["geometry"] + (f" (parts in {parts})" if parts != "float32" else "")


def to_csv(reports: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for report in reports:
        for row in report["rows"]:
            writer.writerow(
                [
                    row_name(report),
                    row["context"],
                    *(f"{row[name]:.4f}" for name in ("ms_p20", "ms_p50", "ms_p80")),
                    "ms/token",
                    *(report[name] for name in ("gpu", "driver", "torch", "triton")),
                    "" if row["baseline_ms_p50"] is None else f"{row['baseline_ms_p50']:.4f}",
                    "" if row["baseline_ms_p50"] is None else report["baseline_version"],
                    report["commit"],
                    report["date"],
                ]
            )
    return text.getvalue()


def to_markdown(reports: list[dict]) -> str:
    """One table per GPU, each under a line that says how it was measured."""
    if not reports:
        return "No results yet: see [bench/README.md](bench/README.md)."
    blocks = []
    for gpu in dict.fromkeys(report["gpu"] for report in reports):
        mine = [report for report in reports if report["gpu"] == gpu]
        lines = [HEADER]
        for report in mine:
            lines += [_table_row(row_name(report), row) for row in report["rows"]]
        blocks += [_caption(mine), "\n".join(lines)]
    return "\n\n".join(blocks)


def _caption(reports: list[dict]) -> str:
    def all_of(values: object) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "unknown"

    launches, tokens, dtypes = (
        all_of(report["settings"][name] for report in reports) for name in ("launches", "num_tokens", "dtype")
    )
    return (
        f"**{reports[0]['gpu']}**, driver {all_of(r['driver'] for r in reports)},"
        f" torch {all_of(r['torch'] for r in reports)}, triton {all_of(r['triton'] for r in reports)};"
        f" commit {all_of(r['commit'] for r in reports)}, {all_of(r['date'][:10] for r in reports)}."
        f" Batch 1, {dtypes}, random weights; median of {launches} launches of {tokens} tokens."
    )


def _table_row(name: str, row: dict) -> str:
    baseline, speedup = row["baseline_ms_p50"], row["speedup"]
    cells = [
        name,
        str(row["context"]),
        f"{row['ms_p50']:.3f}",
        f"{row['ms_p20']:.3f} – {row['ms_p80']:.3f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['gbps'] / 1e3:.2f}",
        f"{row['fraction_of_copy']:.0%}",
        "–" if baseline is None else f"{baseline:.3f}",
        "–" if speedup is None else f"{speedup:.2f}x",
    ]
    return f"| {' | '.join(cells)} |"


def insert(readme: str, table: str) -> str:
    """The README with the text between the markers replaced."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ReportError(f"the README needs one line {START} and, below it, one line {END}")
    before, rest = readme.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--readme", type=Path, default=BENCH.parent / "README.md")
    options = parser.parse_args(arguments)
    reports = load_results(options.results)
    try:
        readme = insert(options.readme.read_text(), to_markdown(reports))
    except (ReportError, OSError) as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 1
    wanted = {options.results / "results.csv": to_csv(reports), options.readme: readme}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path} is out of date; run python bench/report.py and commit the result", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
