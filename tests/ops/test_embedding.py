"""embedding: the row of the token, and nothing else."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tri_mpk.ops.embedding import EMBEDDING

SHAPES = [(11, 64, None), (7, 70, None), (5, 5000, None), (9, 70, 3)]  # vocabulary, columns, tasks


@pytest.fixture(scope="module")
def harness():
    torch.manual_seed(0)
    harness = OpHarness()
    harness.cases = []
    for vocab_size, size, grid_dim in SHAPES:
        table, y = harness.input(vocab_size, size), harness.output(size)
        harness.mpk.embed_layer(weight=table, output=y, grid_dim=grid_dim)
        harness.cases.append((table, y))
    return harness


@pytest.mark.parametrize("token", [0, 3, 4])
def test_equals_reference(harness, token):
    harness.run(step=2, token=token)
    for table, y in harness.cases:
        assert torch.equal(y.data.view(-1), EMBEDDING.reference(token, table.data))


def test_columns_are_cut_as_asked(harness):
    harness.compile()
    assert [len(harness.tasks(op)) for op in range(len(SHAPES))] == [1, 1, 2, 3]
