"""The pictures of docs/scheduler.md can be drawn anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


def test_pictures_are_drawn_from_graphs(tmp_path: Path):
    command = [sys.executable, str(ROOT / "docs/pictures.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("layer.svg", "queues.svg", "experts.svg"):
        shapes = [element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / name).iter()]
        assert shapes.count("rect") > 10 and name in (ROOT / "docs/scheduler.md").read_text()
        assert ("circle" in shapes) == (name != "queues.svg")
