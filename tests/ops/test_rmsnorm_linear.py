"""rmsnorm_linear: full and partial row blocks and column stages, biases."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.rmsnorm_linear import RMSNORM_LINEAR

EPS = 1e-5
# rows, columns, bias, tasks
ALIGNED = [
    (96, 64, False, None),
    (1100, 64, True, None),  # two row blocks per worker, the second one partial
    (37, 300, True, None),  # more columns than two stages, the last one partial
    (5, 516, False, 3),
    (256, 64, False, None),  # whole blocks
    (1, 128, False, None),  # fewer rows than workers
]
ODD = [(33, 70, True, None), (64, 257, False, 4)]  # rows of the matrix start unaligned


@pytest.fixture(scope="module", params=[ALIGNED, ODD], ids=["aligned", "odd"])
def harness(request):
    torch.manual_seed(0)
    harness = OpHarness()
    harness.cases = []
    for num_rows, size, has_bias, grid_dim in request.param:
        tensors = {
            "input": harness.input(size, scale=3.0),
            "weight_norm": harness.gain(size),
            "weight_linear": harness.input(num_rows, size, scale=size**-0.5),
            "output": harness.output(num_rows),
            "bias": harness.input(num_rows) if has_bias else None,
        }
        harness.mpk.rmsnorm_linear_layer(**tensors, eps=EPS, grid_dim=grid_dim)
        harness.cases.append((tensors, grid_dim))
    harness.run()
    return harness


def test_equals_reference(harness):
    for tensors, _ in harness.cases:
        bias = tensors["bias"]
        expected = RMSNORM_LINEAR.reference(
            tensors["input"].data, tensors["weight_norm"].data, tensors["weight_linear"].data, bias and bias.data, EPS
        )
        check_close(actual=tensors["output"].data, expected=expected)


def test_grid_dim_is_the_number_of_tasks(harness):
    for op, (tensors, grid_dim) in enumerate(harness.cases):
        num_rows = tensors["output"].numel
        assert len(harness.tasks(op)) == min(num_rows, grid_dim or harness.mpk.num_workers)


def test_same_bits_again(harness):
    first = [tensors["output"].data.clone() for tensors, _ in harness.cases]
    harness.run()
    assert all(torch.equal(a, tensors["output"].data) for a, (tensors, _) in zip(first, harness.cases, strict=True))
