"""rmsnorm_gated_linear: gate and up in step, large gates, partial blocks."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.rmsnorm_gated_linear import RMSNORM_GATED_LINEAR

EPS = 1e-6
# rows, columns, tasks
ALIGNED = [(96, 64, None), (600, 64, None), (37, 300, 3), (1, 256, None)]
ODD = [(33, 70, None), (64, 257, 4)]


@pytest.fixture(scope="module", params=[ALIGNED, ODD], ids=["aligned", "odd"])
def harness(request):
    torch.manual_seed(0)
    harness = OpHarness()
    harness.cases = []
    for num_rows, size, grid_dim in request.param:
        tensors = {
            "input": harness.input(size),
            "weight_norm": harness.gain(size),
            "weight_gate": harness.input(num_rows, size, scale=4 * size**-0.5),  # both ends of the sigmoid
            "weight_up": harness.input(num_rows, size, scale=size**-0.5),
            "output": harness.output(num_rows),
        }
        harness.mpk.rmsnorm_gated_linear_layer(**tensors, eps=EPS, grid_dim=grid_dim)
        harness.cases.append(tensors)
    harness.run()
    return harness


def test_equals_reference(harness):
    for tensors in harness.cases:
        weights = [tensors[name].data for name in ("weight_norm", "weight_gate", "weight_up")]
        expected = RMSNORM_GATED_LINEAR.reference(tensors["input"].data, *weights, EPS)
        check_close(actual=tensors["output"].data, expected=expected)


def test_a_very_negative_gate_gives_zero(harness):
    tensors = harness.cases[0]
    before = tensors["weight_gate"].data.clone()
    tensors["weight_gate"].data.copy_(-1e4 * torch.sign(tensors["input"].data))
    harness.run()
    tensors["weight_gate"].data.copy_(before)
    assert torch.equal(tensors["output"].data.abs(), torch.zeros(tensors["output"].numel))
