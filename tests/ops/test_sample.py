"""sample: what is kept and how often it is chosen, function by function, and the op in a kernel of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ahead import ahead
from op_harness import OpHarness
from tri_mpk.ops.sample import SAMPLE
from tri_mpk.runtime import LaunchRequest
from tri_mpk.sampling import Sampling

TESTS = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 70
GROUPS = ("repeats", "draws", "more_draws", "edges", "kept", "odd", "chosen")  # of tests/sampling_kernels.py


def run_group(group: str) -> subprocess.CompletedProcess:
    """In a process whose Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "sampling_kernels.py"), group]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[tuple, Future]]:
    with ahead(request, "group", run_group) as outcomes:
        yield outcomes


@pytest.mark.parametrize("group", [(name,) for name in GROUPS], ids=" ".join)
@pytest.mark.slow
def test_functions(group: tuple[str], outcomes: dict[tuple, Future]):
    result = outcomes[group].result()
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.fixture(scope="module")
def harness():
    torch.manual_seed(0)
    harness = OpHarness(max_seq_len=16)
    x, gain, weight = harness.input(32), harness.gain(32), harness.input(VOCAB_SIZE, 32, scale=0.5)
    best = harness.output(3), harness.mpk.new_tensor((3,), torch.int32, name="best_index")
    harness.mpk.lm_head_layer(input=x, weight_norm=gain, weight_linear=weight, output=best)
    harness.mpk.sample_layer(input=best)
    harness.compile()
    return harness


def launch(harness, sampling: Sampling, start: int = 2, last_step: int = 8) -> list[int]:
    harness.mpk.step.data.fill_(start)
    harness.mpk.tokens.data.copy_(torch.arange(16))
    for name in ("logprobs", "scores", "sample.scratch"):
        harness.mpk.tensors[name].data.fill_(float("nan"))
    harness.mpk.tensors["sample.indices"].data.fill_(-(1 << 30))
    request = LaunchRequest(start + 1, last_step, logits_from=start, sampling=sampling)
    tokens = list(harness.mpk.launch(request))
    for guard in harness.mpk.runtime.memory.guards:
        assert bool((guard == 0x5A).all()), "memory behind a tensor was written to"
    return tokens


def test_greedy_decoding_leaves_scores_and_log_probabilities_alone(harness):
    best = int(harness.run(step=2))
    assert launch(harness, Sampling()) == [best] * 7
    assert bool(harness.mpk.tensors["logprobs"].data.isnan().all())
    assert bool(harness.mpk.tensors["scores"].data.isnan().all())


def test_tokens_and_log_probabilities_by_position(harness):
    p = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    tokens = launch(harness, Sampling(True, seed=7, **p))
    logits = harness.mpk.runtime.default_logits
    probabilities = SAMPLE.reference(logits, torch.tensor([0]), **p)
    logprobs = harness.mpk.tensors["logprobs"].data
    torch.testing.assert_close(logprobs[3:10], probabilities[tokens].log(), rtol=1e-4, atol=1e-4)
    assert bool(logprobs[:3].isnan().all() and logprobs[10:].isnan().all())
    assert launch(harness, Sampling(True, seed=7, **p)) == tokens
    assert launch(harness, Sampling(True, seed=7, **p), start=4, last_step=6) == tokens[2:5]  # by position only
    assert launch(harness, Sampling(True, seed=8, **p)) != tokens


def test_a_penalty_knows_prompt_and_new_tokens(harness):
    """The logits are the same at every step, so that the chosen tokens follow each other down the logits."""
    logits = harness.mpk.runtime.default_logits.clone()
    assert bool(logits.topk(8).values[-1] > 0)
    order = [token for token in logits.sort(descending=True).indices.tolist() if token > 2]  # 0 to 2 are the prompt
    assert launch(harness, Sampling(repetition_penalty=1e6)) == order[:7]
    assert launch(harness, Sampling(repetition_penalty=1e6)) == order[:7]  # forgotten between launches


def test_more_than_greedy_needs_the_layer():
    harness = OpHarness()
    with pytest.raises(ValueError, match="no sample_layer"):
        harness.compile()
        harness.mpk.launch(LaunchRequest(1, 2, sampling=Sampling(True)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "hot"), ("temperature", True), ("top_k", -1), ("top_k", 2.5), ("top_k", True), ("top_p", -0.1),
        ("top_p", 1.1), ("top_p", float("nan")), ("min_p", -0.5), ("min_p", 2), ("repetition_penalty", 0),
        ("repetition_penalty", -1.0), ("repetition_penalty", 1e300), ("seed", -1), ("seed", 1.5), ("seed", 1 << 64),
    ],
)  # fmt: skip
def test_absurd_values_are_named(name: str, value: object):
    with pytest.raises(ValueError, match=rf"{name}=.* must be "):
        Sampling(**{name: value})
