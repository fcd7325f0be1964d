"""The picture of a step: drawn for its format, the same bytes every time, and not without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from profiles import simulated_profile
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.profiler import Profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 1
    return simulated_profile(plan_config(config, torch.bfloat16, 512, num_workers=12, profile=True))


def test_svg_is_small_and_the_same_every_time(profile, tmp_path: Path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    profile.picture(first)
    profile.picture(second, step=profile.typical_step)
    assert first.read_bytes() == second.read_bytes()
    assert ElementTree.parse(first).getroot().tag.endswith("svg") and first.stat().st_size < 500_000


def test_png_has_the_colours_of_ops_and_waits(profile, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from tri_mpk.picture import OP_COLOURS, WAIT_COLOUR

    path = tmp_path / "step.png"
    profile.picture(path, step=profile.steps[1])
    pixels = imread(path)[..., :3]
    for colour in (*OP_COLOURS[:5], WAIT_COLOUR):
        near = abs(pixels - to_rgb(colour)).max(axis=-1) < 0.01
        assert near.mean() > 1e-3, colour


def test_unknown_step(profile, tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="step=1 was not recorded"):
        profile.picture(tmp_path / "step.svg", step=1)


def test_without_matplotlib(profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'tri_mpk\[profile\]'"):
        profile.picture(tmp_path / "step.svg")
