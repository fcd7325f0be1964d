"""How close two results must be: one table for all tests."""

from __future__ import annotations

import torch

# dtype -> (relative, absolute); values under test are of order one, sums run in fp32
TOLERANCES = {
    torch.float32: (1e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
# a whole model: hundreds of roundings one after another
MODEL_TOLERANCES = {torch.float32: (1e-4, 1e-4)}


def check_close(*, actual: torch.Tensor, expected: torch.Tensor, table: dict = TOLERANCES) -> None:
    """`actual` of a kernel against its fp32 definition; the dtype of `actual` decides the tolerance."""
    rtol, atol = table[actual.dtype]
    torch.testing.assert_close(actual.float().cpu(), expected.float().cpu(), rtol=rtol, atol=atol)
