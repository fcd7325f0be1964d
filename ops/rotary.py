"""Rotary position embedding of single heads, with Qwen3's norm before it.

Source: arXiv:2104.09864; transformers apply_rotary_pos_emb, Qwen3Attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def load_head(ptr, head, num_heads, HEADS: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr):
    """Rows `head` to `head + num_heads` of a [heads, Dh] matrix, and each element's partner in rotate_half."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    h = tl.arange(0, HEADS)[:, None]
    mask = (h < num_heads) & (d < DH)
    base = ptr + (head + h) * DH
    partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
    return tl.load(base + d, mask=mask, other=0.0), tl.load(base + partner, mask=mask, other=0.0)


@triton.jit
def inverse_norms(x, DH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """rsqrt(mean(x^2) + eps) of each row, if NORM."""
    if NORM:
        x = x.to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, axis=1) / DH + EPS)[:, None]
    else:
        return 1.0


@triton.jit
def rotate_head(
    x, x_partner, rstd, gain_ptr, cos_row, sin_row, DH: tl.constexpr, BLOCK_DH: tl.constexpr, NORM: tl.constexpr
):
    """Normalised (if NORM, by `rstd` and the gain) and rotated: x * cos + rotate_half(x) * sin."""
    d = tl.arange(0, BLOCK_DH)[None, :] + tl.zeros(x.shape, tl.int32)  # as few elements per thread as x has
    x = x.to(tl.float32)
    x_partner = x_partner.to(tl.float32)
    if NORM:
        partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
        x *= rstd * tl.load(gain_ptr + d, mask=d < DH, other=0.0).to(tl.float32)
        x_partner *= rstd * tl.load(gain_ptr + partner, mask=d < DH, other=0.0).to(tl.float32)
    return x * cos_row + tl.where(d < DH // 2, -x_partner, x_partner) * sin_row


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
