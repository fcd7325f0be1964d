"""lm_head: logits, the best of every task, ties, and positions whose logits nobody wants."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.lm_head import LM_HEAD
from tri_mpk.runtime import LaunchRequest

EPS = 1e-6
# vocabulary, columns, tasks; the last ones: an odd size, and as few rows as tasks
SHAPES = [(1030, 64, 2), (97, 70, 4), (2, 64, 2)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def harness(request):
    torch.manual_seed(0)
    vocab_size, size, num_tasks = request.param
    harness = OpHarness(max_seq_len=16)
    harness.x, harness.gain_handle = harness.input(size), harness.gain(size)
    harness.weight = harness.input(vocab_size, size, scale=size**-0.5)
    harness.best = harness.output(num_tasks), harness.mpk.new_tensor((num_tasks,), torch.int32, name="best_index")
    harness.mpk.lm_head_layer(
        input=harness.x, weight_norm=harness.gain_handle, weight_linear=harness.weight, output=harness.best, eps=EPS
    )
    harness.mpk.argmax_layer(input=harness.best)
    harness.compile()
    return harness


def reference(harness) -> torch.Tensor:
    return LM_HEAD.reference(harness.x.data, harness.gain_handle.data, harness.weight.data, EPS)


def test_logits_and_token(harness):
    token = harness.run(step=5)
    logits = harness.mpk.runtime.default_logits
    check_close(actual=logits, expected=reference(harness))
    assert token == int(logits.argmax())
    value, index = (handle.data for handle in harness.best)
    assert torch.equal(logits[index.long()], value)
    assert float(value.max()) == float(logits.max())


def test_a_tie_goes_to_the_lowest_index(harness):
    before = harness.weight.data.clone()
    direction = harness.x.data * harness.gain_handle.data
    vocab_size = len(before)
    tied = sorted({vocab_size - 1, vocab_size // 2 + 1, vocab_size // 3, 1} & set(range(vocab_size)))
    harness.weight.data[tied] = direction
    token = harness.run()
    harness.weight.data.copy_(before)
    assert token == tied[0]


def test_all_logits_equal(harness):
    before = harness.weight.data.clone()
    harness.weight.data.zero_()
    token = harness.run()
    harness.weight.data.copy_(before)
    assert token == 0


def test_only_wanted_positions_are_computed(harness):
    runtime = harness.mpk.runtime
    logits = runtime.empty((6, harness.mpk.vocab_size), torch.float32).fill_(float("nan"))
    harness.mpk.step.data.zero_()
    request = LaunchRequest(num_known=7, last_step=5, logits_from=3, logits=logits)
    assert list(harness.mpk.launch(request)) == []
    assert bool(logits[:3].isnan().all())
    expected = reference(harness)
    for row in logits[3:]:
        check_close(actual=row, expected=expected)
    assert bool((runtime.memory.guards[-1] == 0x5A).all())
    runtime.free(logits)
