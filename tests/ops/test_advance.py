"""advance against a reference in Python, step by step: plans, pages, slots and results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tri_mpk.ops import sample
from tri_mpk.ops.advance import ADVANCE, RingSizes
from tri_mpk.sampling import Sampling
from tri_mpk.scheduler import device

TESTS = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> str:
    """In a process whose Triton interprets; see tests/advance_kernels.py."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "advance_kernels.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


def test_some_launches():
    assert run("random", 3).count("preempted") >= 3


def test_equal_beginnings_share_pages():
    assert "shared" in run("alike")


def test_ranks_do_the_same_whenever_their_hosts_write():
    assert run("ranks").count("preempted") == 2


@pytest.mark.parametrize("case", ["differ", "stop"])
def test_hosts_that_want_different_things(case):
    run(case)


@pytest.mark.parametrize("case", ["look", "order"])
def test_words_of_a_host(case):
    run(case)


@pytest.mark.slow
def test_many_launches():
    assert run("random", 60).count("preempted") >= 60


def test_the_reference_shares_out_all_tokens():
    length, done, order = torch.tensor([5, 9, 4, 30]), torch.tensor([4, 0, 3, 2]), torch.tensor([3, 0, 1, 2])
    assert ADVANCE.reference(length, done, order, 16).tolist() == [1, 9, 1, 5]
    assert ADVANCE.reference(length, done, order, 4).tolist() == [1, 2, 1, 0]


def test_rings_are_powers_of_two():
    for sizes in ((3, 4, 4), (4, 0, 4), (4, 4, -4)):
        with pytest.raises(ValueError, match="power of 2"):
            RingSizes(*sizes)


def test_words_of_a_choice_fit_their_places():
    assert len(Sampling().words()) == sample.CHOICE_WORDS.value
    assert device.CONTROL_CHOICE.value + sample.CHOICE_WORDS.value <= device.CONTROL_RECORDED_STEPS.value
