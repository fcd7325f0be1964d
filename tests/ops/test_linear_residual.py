"""linear_residual: full and partial row blocks and columns, biases, a chain of residuals; the same bits again."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.linear_residual import LINEAR_RESIDUAL

# rows, columns, bias, tasks
ALIGNED = [
    (96, 64, False, None),
    (1100, 64, True, None),  # several row blocks per worker, the last one partial
    (70, 1024, True, None),
    (48, 300, False, 3),
    (37, 512, False, 5),  # tasks of unequal length
    (1, 64, False, None),  # fewer rows than workers
]
ODD = [(33, 70, True, None), (64, 1030, False, 4)]  # rows of the matrix start unaligned


@pytest.fixture(scope="module", params=[ALIGNED, ODD], ids=["aligned", "odd"])
def harness(request):
    torch.manual_seed(0)
    harness = OpHarness()
    harness.cases = []
    for num_rows, k, has_bias, grid_dim in request.param:
        tensors = {
            "input": harness.input(k),
            "weight": harness.input(num_rows, k, scale=k**-0.5),
            "residual": harness.input(num_rows),
            "output": harness.output(num_rows),
            "bias": harness.input(num_rows) if has_bias else None,
        }
        harness.mpk.linear_with_residual_layer(**tensors, grid_dim=grid_dim)
        harness.cases.append(tensors)
    # the residual stream: an op adds to the sum of the one before
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
    x, weight, residual = tensors["input"].data, tensors["weight"].data, tensors["residual"].data
    return LINEAR_RESIDUAL.reference(x, weight, residual, bias and bias.data)


def test_equals_reference(harness):
    for tensors in harness.cases:
        check_close(actual=tensors["output"].data, expected=expected(tensors))


def test_a_task_reads_whole_rows(harness):
    """No task has a share of the columns only: what an op leaves is a sum that is complete."""
    for op, tensors in enumerate(harness.cases):
        num_rows, k = tensors["weight"].dims
        tasks = harness.tasks(op)
        assert sum(task.fields["num_rows"] for task in tasks) == num_rows == tensors["output"].numel
        for task in tasks:
            row0, rows = task.fields["row0"], task.fields["num_rows"]
            assert tensors["weight"].span(row0 * k, (row0 + rows) * k) in task.reads
            assert tensors["input"].whole() in task.reads


def test_same_bits_again(harness):
    first = [tensors["output"].data.clone() for tensors in harness.cases]
    harness.run()
    assert all(torch.equal(a, tensors["output"].data) for a, tensors in zip(first, harness.cases, strict=True))
