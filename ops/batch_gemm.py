"""The product of weight rows with the activations of many tokens, the core of the batch ops: y = W[rows] @ x^T.

Operand A are ROWS rows of weights, B's columns are TOKENS tokens. Each of the 16 warps has a segment of the columns of
both (the batch of a three-dimensional `tl.dot`), so every weight is read from shared memory once; the sums of the warps
are added at the end. Both come by asynchronous copies that Triton's pipeline makes of plain loads. With more tokens the
same rows are read again, from L2, and the tokens of a block that there are not cost no bytes.

A token's sums do not depend on its neighbours, because there is one path for any number of tokens: the same shape, the
same order of K, and an instruction of its own for each eight tokens. (ROWS < 64 makes Triton choose `mma.sync`; it
takes `wgmma` from 64 rows on.) A second path for fewer tokens would save traffic in shared memory, nothing else.

What ops keep of tokens across rows (a norm's scale, sums of squares, the best logit) are tensors [BLOCKS, TOKENS].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import TensorHandle, next_power_of_2

ROWS = tl.constexpr(32)
TOKENS = tl.constexpr(32)
STAGES = tl.constexpr(4)  # three tiles of 32 KiB of weights on their way
SUM_PARTS = tl.constexpr(32)
SEGMENT_BYTES = 64  # of a row that a warp takes at a time


@triton.jit
def not_unrolled(start, PORTABLE: tl.constexpr):
    """The index of a loop, a multiple of 16. ptxas would unroll the loop, but there are no registers to spare."""
    if PORTABLE:
        return start
    else:
        start = tl.inline_asm_elementwise(
            '.pragma "nounroll"; mov.u32 $0, $1;', "=r,r", [start], dtype=tl.int32, is_pure=True, pack=1
        )
        return start // 16 * 16


@triton.jit
def multiply_rows(
    weight_ptr, second_ptr, row, num_rows, x_ptr, first, num_tokens, outputs_ptr, output_token_ptr,
    K: tl.constexpr, GATED: tl.constexpr, OUTPUTS: tl.constexpr, SEGMENT: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] fp32: num_rows rows of a matrix from `row` on, times num_tokens rows of x from `first` on.

    GATED: ROWS / 2 rows of each of two matrices. OUTPUTS: rows of x are the output tokens of the sequences `outputs`.
    Indices are computed in the shape in which they are used: a change of layout goes through shared memory.
    """
    SEGMENTS: tl.constexpr = 16  # of K: one per warp
    HALF: tl.constexpr = ROWS // 2
    segment = (tl.arange(0, SEGMENTS) * SEGMENT)[:, None, None]
    weight_k = segment + tl.arange(0, SEGMENT)[None, None, :]
    x_k = segment + tl.arange(0, SEGMENT)[None, :, None]
    tile_row = tl.arange(0, ROWS)[None, :, None]
    token = tl.arange(0, TOKENS)[None, None, :]
    is_token = token < num_tokens - first
    if GATED:
        is_row = tile_row % HALF < num_rows
        begin = tl.where(tile_row < HALF, weight_ptr, second_ptr) + (row + tile_row % HALF).to(tl.int64) * K
    else:
        is_row = tile_row < num_rows
        begin = weight_ptr + (row + tile_row).to(tl.int64) * K
    if OUTPUTS:
        sequence = tl.load(outputs_ptr + first + token, mask=is_token, other=0)
        x_begin = x_ptr + tl.load(output_token_ptr + sequence, mask=is_token, other=0) * K
    else:
        x_begin = x_ptr + (first + token) * K
    acc = tl.zeros([SEGMENTS, ROWS, TOKENS], tl.float32)
    for start in tl.range(0, K, SEGMENTS * SEGMENT, num_stages=STAGES):
        start = not_unrolled(start, PORTABLE)
        if K % (SEGMENTS * SEGMENT) == 0:
            w = tl.load(begin + (start + weight_k), mask=is_row, other=0.0)
            x = tl.load(x_begin + (start + x_k), mask=is_token, other=0.0)
        else:
            w = tl.load(begin + (start + weight_k), mask=is_row & (start + weight_k < K), other=0.0)
            x = tl.load(x_begin + (start + x_k), mask=is_token & (start + x_k < K), other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return tl.sum(acc, axis=0)


@triton.jit
def even_block(num_rows, BLOCK: tl.constexpr):
    """The rows of a task's blocks: equal ones, but for the last, and not more than BLOCK."""
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    return (num_rows + num_blocks - 1) // num_blocks


@triton.jit
def all_tokens(BLOCKS: tl.constexpr):
    """[BLOCKS, TOKENS]: 0, 1, 2, ..."""
    return tl.arange(0, BLOCKS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]


@triton.jit
def of_block(x, block, BLOCKS: tl.constexpr):
    """A row of x [BLOCKS, TOKENS]. Adding zeros changes no bit."""
    return tl.sum(tl.where((tl.arange(0, BLOCKS) == block)[:, None], x, 0), axis=0)


@triton.jit
def with_block(x, block, new, BLOCKS: tl.constexpr):
    """x [BLOCKS, TOKENS] with a new row."""
    return tl.where((tl.arange(0, BLOCKS) == block)[:, None], new[None, :], x)


@triton.jit
def token_rstd(
    squares_ptr, token, is_token,
    K: tl.constexpr, EPS: tl.constexpr, NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """rsqrt(mean(x^2) + eps) of tokens [BLOCKS, TOKENS], from the parts [NUM_PARTS, MAX_TOKENS] of their squares."""
    parts = tl.arange(0, SUM_PARTS)[:, None, None]
    sums = tl.zeros([SUM_PARTS, BLOCKS, TOKENS], tl.float32)
    for first in tl.static_range(0, NUM_PARTS, SUM_PARTS):
        mask = (first + parts < NUM_PARTS) & is_token[None]
        sums += tl.load(squares_ptr + (first + parts) * MAX_TOKENS + token[None], mask=mask, other=0.0)
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


def token_blocks(max_tokens: int) -> int:
    """BLOCKS."""
    return next_power_of_2(-(-max_tokens // TOKENS.value))


def segment(weight: TensorHandle) -> int:
    """Columns of a row that a warp takes at a time."""
    return SEGMENT_BYTES // weight.dtype.itemsize


def normed_torch(x: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the residual stream [T, D]: what the next matrix reads, and the sums of squares [T]."""
    return (x.float() * gain.float()).to(dtype), x.float().square().sum(-1)
