"""Stored tunings: found for what they were measured for, and ignored with one warning when damaged or stale."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tri_mpk import tuning_store
from tri_mpk.geometries import geometry
from tri_mpk.gpu_profile import default_profile, with_sms
from tri_mpk.models import describe
from tri_mpk.tuning import choose_tuning
from tri_mpk.tuning_store import (
    StoredTuning,
    find_tuning,
    kernel_version,
    load_tuning,
    read_tuning,
    shape_name,
    store_tuning,
    tuning_path,
)

H200 = default_profile()
SHAPE = describe(geometry("Llama-3.2-1B"), 4096)
CHOSEN = choose_tuning(H200, SHAPE.num_kv_heads, SHAPE.head_dim)
TUNED = StoredTuning(
    gpu="NVIDIA H200", num_sms=132, shape=shape_name(SHAPE), dtype="bfloat16", kernel=kernel_version(),
    tuning=replace(CHOSEN, slot_bytes=16 << 10), ms={"512": 0.7}, chosen_ms={"512": 0.71}, date="2026-11-21T00:00:00Z",
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    path = tuning_path(H200, SHAPE, torch.bfloat16)
    assert path.is_relative_to(tmp_path)
    store_tuning(path, TUNED)
    return path


def test_round_trip(path: Path):
    assert load_tuning(H200, SHAPE, torch.bfloat16) == TUNED
    assert find_tuning(H200, SHAPE, torch.bfloat16) == (TUNED.tuning, "measured 2026-11-21T00:00:00Z")
    assert read_tuning(path) == TUNED.tuning
    assert load_tuning(H200, SHAPE, torch.float16) is None


def test_the_length_of_the_cache_does_not_matter(path: Path):
    assert load_tuning(H200, describe(geometry("Llama-3.2-1B"), 64), torch.bfloat16) == TUNED
    assert shape_name(SHAPE) == "L16-D2048-I8192-H32-KV8x64-V128256"


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "0"}, {"num_sms": 66}, {"gpu": "NVIDIA H100"}, {"shape": "L1"}, {"dtype": "float16"}, {"ms": {}},
        {"ms": {"512": "fast"}}, {"tuning": {}}, {"tuning": asdict(CHOSEN) | {"block_kv": 7}}, {"another": 1},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_ignored_with_one_warning(path: Path, change: dict):
    path.write_text(json.dumps(asdict(TUNED) | change))
    with pytest.warns(UserWarning, match=r"ignores .*Run `tri-mpk tune`") as warned:
        assert find_tuning(H200, SHAPE, torch.bfloat16) == (CHOSEN, "cost model")
    assert len(warned) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"tuning": 3}'])
def test_damaged_files_are_ignored_or_refused(path: Path, text: str):
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignores"):
        assert load_tuning(H200, SHAPE, torch.bfloat16) is None
    with pytest.raises(ValueError, match=r"\.json holds no tuning"):
        read_tuning(path)


def test_a_part_of_the_gpu_is_another_gpu(path: Path):
    with pytest.warns(UserWarning, match="num_sms=132, not 66"):
        assert find_tuning(with_sms(H200, 66), SHAPE, torch.bfloat16)[1] == "cost model"


def test_knobs_alone_are_a_file_too(tmp_path: Path):
    file = tmp_path / "knobs.json"
    file.write_text(json.dumps(asdict(CHOSEN)))
    assert read_tuning(file) == CHOSEN


def test_the_version_changes_with_what_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    present = kernel_version()
    assert kernel_version() == present and len(present) == 16
    for name in ("gemv.py", "attention.py"):
        (tmp_path / name).write_text("changed")
    monkeypatch.setattr(tuning_store.ops, "__path__", [str(tmp_path)])
    kernel_version.cache_clear()
    assert kernel_version() != present
    kernel_version.cache_clear()
