"""argmax: the best of the parts, the lowest index on a tie, and the end of the step."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tri_mpk.runtime import LaunchRequest

NUM_PARTS = 5
INF = float("inf")


@pytest.fixture(scope="module")
def harness():
    harness = OpHarness(max_seq_len=8)
    harness.best = harness.attach(torch.zeros(NUM_PARTS)), harness.attach(torch.zeros(NUM_PARTS, dtype=torch.int32))
    harness.mpk.argmax_layer(input=harness.best)
    harness.compile()
    return harness


@pytest.mark.parametrize(
    ("values", "indices", "token"),
    [
        ([1.0, 5.0, 2.0, 3.0, 4.0], [9, 8, 7, 6, 5], 8),
        ([1.0, 5.0, 5.0, 5.0, 4.0], [1, 12, 3, 30, 5], 3),  # a tie: the lowest index, wherever it stands
        ([-7.0] * 5, [50, 40, 30, 20, 10], 10),
        ([-INF, -INF, -3.0, -INF, -INF], [0, 1, 151935, 2, 3], 151935),
        ([0.0, -0.0, -1.0, -1.0, -1.0], [7, 6, 0, 0, 0], 6),
        ([-INF] * 5, [4, 3, 2, 8, 9], 2),  # no logit is finite: still a token of the vocabulary
    ],
)
def test_lowest_index_of_the_largest(harness, values, indices, token):
    harness.best[0].data.copy_(torch.tensor(values))
    harness.best[1].data.copy_(torch.tensor(indices, dtype=torch.int32))
    assert harness.run(step=3) == token


def launch(harness, start: int, **request) -> list[int]:
    harness.best[0].data.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    harness.best[1].data.fill_(42)
    harness.mpk.step.data.fill_(start)
    harness.mpk.tokens.data.copy_(torch.arange(8))
    return list(harness.mpk.launch(LaunchRequest(**request)))


def test_prompt_tokens_are_left_alone(harness):
    assert launch(harness, 0, num_known=4, last_step=5) == [42, 42, 42]
    assert harness.mpk.tokens.data.tolist() == [0, 1, 2, 3, 42, 42, 42, 7]
    assert int(harness.mpk.step.data) == 6


def test_stops_at_any_of_the_eos_tokens(harness):
    assert launch(harness, 0, num_known=2, last_step=6, eos_token_ids=(7, 42, 9)) == [42]
    assert int(harness.mpk.step.data) == 2


def test_other_eos_tokens_do_not_stop(harness):
    assert launch(harness, 0, num_known=2, last_step=4, eos_token_ids=(41, 43, -1, 0)) == [42] * 4


def test_eos_in_the_prompt_does_not_stop(harness):
    assert launch(harness, 0, num_known=3, last_step=3, eos_token_ids=(1, 2)) == [42, 42]


def test_32_eos_tokens(harness):
    eos = tuple(range(100, 131)) + (42,)
    assert launch(harness, 0, num_known=1, last_step=6, eos_token_ids=eos) == [42]
