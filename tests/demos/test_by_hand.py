"""The model built by hand equals `from_model` to the last bit, and says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(240)
def test_equals_from_model(tmp_path):
    command = [sys.executable, str(ROOT / "demos/by_hand.py"), "--max-new-tokens", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "tokens equal, logits equal bit for bit" in result.stdout
    assert "launches = 1" in result.stdout
