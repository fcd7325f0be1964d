"""The demo agrees with transformers, and would say so if it did not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demos/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(240)
def test_short_run_passes(tmp_path):
    command = [sys.executable, str(ROOT / "demos/demo.py"), "--prompt", "Four score", "--max-new-tokens", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "\nFour score and" in result.stdout
    assert "1 launch" in result.stdout
    assert result.stdout.endswith("PASSED\n")


@pytest.mark.parametrize("expected", [[1, 2, 4], [1, 2], [1, 2, 3, 4]])
def test_other_tokens_are_reported(demo, capsys, expected):
    assert not demo.compare_tokens([1, 2, 3], expected)
    assert "DIFFER from token" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
def test_wrong_logits_are_reported(demo, capsys, wrong):
    logits = torch.zeros(2, 5)
    assert demo.compare_logits("same", logits, logits, 1e-3)
    assert not demo.compare_logits("other", logits, logits.index_fill(0, torch.tensor(1), wrong), 1e-3)
    assert "MORE THAN" in capsys.readouterr().out
