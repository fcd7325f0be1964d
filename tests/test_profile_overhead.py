"""bench/profile_overhead.py: the same weights without and with stamps, launches in turn, the slowdown as a ratio."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench/profile_overhead.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_slowdown(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    launches = []

    def decode_at(model: SimpleNamespace, context: int, num_tokens: int) -> float:
        launches.append(model.profile)
        return (1.02 if model.profile else 1.0) * context / 64

    monkeypatch.setattr(script, "bench_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(script, "random_model", lambda *_: "weights")
    monkeypatch.setattr(script, "from_model", lambda weights, **options: SimpleNamespace(**options))
    monkeypatch.setattr(script, "fill_cache", lambda _: None)
    monkeypatch.setattr(script, "decode_at", decode_at)
    file = tmp_path / "overhead.json"
    arguments = ["--geometry", "Qwen3-0.6B", "--context", "64", "128", "--launches", "5", "--json", str(file)]
    assert script.main(arguments) == 0
    assert launches == [False, True] * 2 * (5 + script.WARMUP)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["context"], row["ms_off"], row["ms_on"]) for row in rows] == [(64, 1.0, 1.02), (128, 2.0, 2.04)]
    assert [row["slowdown"] for row in rows] == pytest.approx([0.02, 0.02])
    assert capsys.readouterr().out.count("+2.00%") == 2


def test_without_a_gpu(script):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from tri_mpk import DeviceError

    with pytest.raises(DeviceError, match="CUDA GPU"):
        script.main(["--geometry", "Qwen3-0.6B"])
