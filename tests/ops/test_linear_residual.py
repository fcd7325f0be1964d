"""linear_residual: with and without a split K, residuals in parts, biases; parts add up in one order."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness, total
from tolerances import check_close
from tri_mpk.ops.linear_residual import LINEAR_RESIDUAL

# rows, columns, bias, parts of the residual, tasks
ALIGNED = [
    (96, 64, False, 1, None),
    (1100, 64, True, 1, None),
    (70, 1024, True, 3, None),  # K is split
    (48, 300, False, 2, 3),
    (37, 512, False, 1, 5),  # K is split, and tasks do not end where parts do
    (1, 64, False, 1, None),
]
ODD = [(33, 70, True, 2, None), (64, 1030, False, 1, 4)]


@pytest.fixture(scope="module", params=[ALIGNED, ODD], ids=["aligned", "odd"])
def harness(request):
    torch.manual_seed(0)
    harness = OpHarness()
    harness.cases = []
    for num_rows, k, has_bias, parts, grid_dim in request.param:
        tensors = {
            "input": harness.input(k),
            "weight": harness.input(num_rows, k, scale=k**-0.5),
            "residual": harness.input(num_rows, parts=parts),
            "output": harness.output(num_rows),
            "bias": harness.input(num_rows) if has_bias else None,
        }
        harness.mpk.linear_with_residual_layer(**tensors, grid_dim=grid_dim)
        harness.cases.append(tensors)
    # the residual stream: what reads a sum in parts, and adds to it
    last = harness.cases[-1]
    size = last["output"].numel
    chained = {
        "input": harness.input(64),
        "weight": harness.input(size, 64, scale=0.125),
        "residual": last["output"],
        "output": harness.output(size),
        "bias": None,
    }
    harness.mpk.linear_with_residual_layer(**chained)
    harness.cases.append(chained)
    harness.run()
    return harness


def expected(tensors: dict) -> torch.Tensor:
    bias = tensors["bias"]
    x, weight, residual = tensors["input"].data, tensors["weight"].data, total(tensors["residual"])
    return LINEAR_RESIDUAL.reference(x, weight, residual, bias and bias.data)


def test_equals_reference(harness):
    for tensors in harness.cases:
        check_close(actual=total(tensors["output"]), expected=expected(tensors))


def test_some_case_splits_k(harness):
    parts = [tensors["output"].parts for tensors in harness.cases]
    assert max(parts) > 1 and min(parts) == 1


def test_every_part_is_its_own_share_of_k(harness):
    for tensors in harness.cases:
        parts = tensors["output"].parts
        for part, x, weight in zip(
            range(parts), tensors["input"].data.chunk(parts), tensors["weight"].data.chunk(parts, 1), strict=True
        ):
            if part > 0:  # part 0 has the residual and the bias too
                check_close(actual=tensors["output"].data[part], expected=weight @ x)


def test_same_bits_again(harness):
    first = [tensors["output"].data.clone() for tensors in harness.cases]
    harness.run()
    assert all(torch.equal(a, tensors["output"].data) for a, tensors in zip(first, harness.cases, strict=True))
