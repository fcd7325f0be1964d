"""The product of weight rows with the activations of many tokens, the core of the batch ops: y = W[rows] @ x^T.

Operand A are ROWS rows of weights, B's columns are tokens, up to MANY at a time. Each of the 16 warps has a segment of
the columns of both (the batch of a three-dimensional `tl.dot`), so every weight is read from shared memory once; the
sums of the warps are added at the end. Both come by asynchronous copies that Triton's pipeline makes of plain loads.

A token's sums do not depend on its neighbours: ROWS < 64 makes Triton choose `mma.sync` whatever the number of tokens
is (it takes `wgmma` for 64 rows or more), each n8 block of tokens is an instruction of its own, and K is cut the same
way for FEW tokens as for MANY. FEW is not worth more than shared memory traffic: one sixteenth of x instead of one
quarter. What follows the product is done once, in one shape [ROWS, MANY], so that it cannot differ either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import TensorHandle

ROWS = tl.constexpr(32)
FEW = tl.constexpr(16)
MANY = tl.constexpr(64)
FEW_STAGES = tl.constexpr(5)  # four tiles of 32 KiB of weights on their way
MANY_STAGES = tl.constexpr(3)
SEGMENT_BYTES = 64  # of a row that a warp takes at a time
SUM_PARTS = tl.constexpr(32)


@triton.jit
def multiply_rows(
    weight_ptrs, is_row, x_ptr, first, num_tokens, outputs_ptr, output_token_ptr,
    K: tl.constexpr, SEGMENT: tl.constexpr, OUTPUTS: tl.constexpr, NUM_TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[ROWS, NUM_TOKENS] fp32. weight_ptrs, is_row [ROWS]: where rows of weights begin, and which of them there are.

    Columns are the rows of x from `first` on or, if OUTPUTS, those of the output tokens of the sequences `outputs`.
    """
    SEGMENTS: tl.constexpr = 16  # of K: one per warp
    token = first + tl.arange(0, NUM_TOKENS)
    is_token = token < num_tokens
    if OUTPUTS:
        sequence = tl.load(outputs_ptr + token, mask=is_token, other=0)
        token = tl.load(output_token_ptr + sequence, mask=is_token, other=0)
    segment = tl.arange(0, SEGMENTS) * SEGMENT
    k = tl.arange(0, SEGMENT)
    weight_k = segment[:, None, None] + k[None, None, :]
    x_k = segment[:, None, None] + k[None, :, None]
    weight_at = weight_ptrs[None, :, None] + weight_k
    x_at = x_ptr + token[None, None, :] * K + x_k
    acc = tl.zeros([SEGMENTS, ROWS, NUM_TOKENS], tl.float32)
    for start in tl.range(0, K, SEGMENTS * SEGMENT, num_stages=STAGES):
        weight_mask = is_row[None, :, None]
        x_mask = is_token[None, None, :]
        if K % (SEGMENTS * SEGMENT) != 0:
            weight_mask = weight_mask & (start + weight_k < K)
            x_mask = x_mask & (start + x_k < K)
        w = tl.load(weight_at + start, mask=weight_mask, other=0.0)
        x = tl.load(x_at + start, mask=x_mask, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return tl.sum(acc, axis=0)


@triton.jit
def batch_rows(
    weight_ptrs, is_row, x_ptr, first, num_tokens, outputs_ptr, output_token_ptr,
    K: tl.constexpr, SEGMENT: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """[ROWS, MANY]; columns of tokens that there are not hold nothing to be used."""
    if num_tokens - first <= FEW:
        few = multiply_rows(
            weight_ptrs, is_row, x_ptr, first, num_tokens, outputs_ptr, output_token_ptr,
            K, SEGMENT, OUTPUTS, FEW, FEW_STAGES,
        )  # fmt: skip
        y = tl.reshape(tl.broadcast_to(few[:, None, :], (ROWS, MANY // FEW, FEW)), (ROWS, MANY))
    else:
        y = multiply_rows(
            weight_ptrs, is_row, x_ptr, first, num_tokens, outputs_ptr, output_token_ptr,
            K, SEGMENT, OUTPUTS, MANY, MANY_STAGES,
        )  # fmt: skip
    return y


@triton.jit
def even_block(num_rows, BLOCK: tl.constexpr):
    """In how many blocks of up to BLOCK rows a task works, and the rows of each but the last: equal ones."""
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    return num_blocks, (num_rows + num_blocks - 1) // num_blocks


@triton.jit
def token_rstd(
    squares_ptr, token, is_token, K: tl.constexpr, EPS: tl.constexpr, NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr
):
    """rsqrt(mean(x^2) + eps) of tokens, from the parts [NUM_PARTS, MAX_TOKENS] of their sums of squares."""
    parts = tl.arange(0, SUM_PARTS)
    sums = tl.zeros([SUM_PARTS, token.shape[0]], tl.float32)
    for first in tl.static_range(0, NUM_PARTS, SUM_PARTS):
        part = first + parts
        at = squares_ptr + part[:, None] * MAX_TOKENS + token[None, :]
        sums += tl.load(at, mask=(part < NUM_PARTS)[:, None] & is_token[None, :], other=0.0)
    return tl.rsqrt(tl.sum(sums, axis=0) / K + EPS)


@triton.jit
def store_residual(x, x_ptr, xb_ptr, gain_ptr, row, is_row, token, is_token, D: tl.constexpr):
    """The residual stream x [rows, tokens] and what the next matrix reads of it; the rows' sums of squares [tokens]."""
    at = token[None, :] * D + row[:, None]
    mask = is_row[:, None] & is_token[None, :]
    gain = tl.load(gain_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(xb_ptr + at, (x * gain[:, None]).to(xb_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, x * x, 0.0), axis=0)


def segment(weight: TensorHandle) -> int:
    """Columns of a row that a warp takes at a time."""
    return SEGMENT_BYTES // weight.dtype.itemsize


def normed_torch(x: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the residual stream [T, D]: what the next matrix reads, and the sums of squares [T]."""
    return (x.float() * gain.float()).to(dtype), x.float().square().sum(-1)
