"""What the commands of bench/ share: whatever a measurement does, the others count and the exit code tells."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench_scripts import load_script


def report(name: str, **more: object) -> dict[str, object]:
    return {"geometry": name, "gpu": "a GPU", "commit": "of the tree", "settings": {}, **more}


def broken() -> dict[str, object]:
    raise RuntimeError("out of memory, say")


@pytest.mark.parametrize(
    ("middle", "told"), [(broken, "out of memory"), (lambda: report("B", failures=["wrong logits"]), "wrong logits")]
)
def test_a_failure_is_told_and_the_others_count(middle, told: str, tmp_path: Path, capsys):
    commands, shown = load_script("commands"), []
    parser = argparse.ArgumentParser()
    commands.add_options(parser, "some")
    options = parser.parse_args(["--out", str(tmp_path), "--commit", "given"])
    measurements = {"A": lambda: report("A"), "B": middle, "C": lambda: report("C")}
    assert commands.report_each(measurements, shown.append, options) == 1
    errors = capsys.readouterr().err
    assert told in errors and "failed: B" in errors
    saved = {path.name: json.loads(path.read_text())["commit"] for path in tmp_path.iterdir()}
    assert saved == {f"{entry['geometry']}_a-GPU.json": "given" for entry in shown} and {"A", "C"} <= {
        entry["geometry"] for entry in shown
    }
    del measurements["B"]
    assert commands.report_each(measurements, shown.append, options) == 0


def test_ranks_beyond_the_first_are_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    commands = load_script("commands")
    monkeypatch.setattr(commands, "world", lambda: (1, 2))
    options = argparse.Namespace(commit=None, out=tmp_path)
    assert commands.report_each({"A": lambda: report("A")}, print, options) == 0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
