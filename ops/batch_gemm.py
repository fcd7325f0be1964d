"""The product of weight rows with the activations of many tokens, the core of the batch ops: y = W[rows] @ x^T.

On Hopper most weights come in panels (panels.py). All others take the loops here: operand A are ROWS rows of weights,
B's columns are TOKENS tokens, and asynchronous copies that Triton's pipeline makes of plain loads bring both to shared
memory. A task's rows and K are one loop, so that copies do not run dry between two blocks of rows.

How many tokens a step has is data. There are loops for FEW, SOME and MANY, and a step takes the smallest that has room
for its tokens: with fewer columns, more of the weights are on their way in the same shared memory. More tokens go
through the largest in groups, each of which reads the weights again; with that many, memory is not what they wait for.
A token's sums depend neither on its neighbours nor on the loop: K has one order in all of them, and sums over other
things than K are in fp64, where order does not count (tests/gpu/test_batches.py compares bits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import TensorHandle
from tri_mpk.ops.panels import PANEL_TOKENS, begin_panels, multiply_panels
from tri_mpk.scheduler.graph import Region

ROWS = tl.constexpr(64)  # the least that `wgmma` takes
FEW = tl.constexpr(32)  # tokens
SOME = tl.constexpr(64)
MANY = tl.constexpr(128)
SUM_PARTS = tl.constexpr(32)
TILES_BYTES = tl.constexpr(192 << 10)  # of weights and activations, on their way and being multiplied


@triton.jit
def begin_weights(
    task, control_ptr, num_tokens, x_map_addr, weight_ptr, second_ptr, row0, num_rows,
    K: tl.constexpr, GATED: tl.constexpr, HALVES: tl.constexpr, PANELS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Before a task's wait: has memory bring the weights that it reads first. Returns the ring, for `multiply_rows`."""
    if not PANELS:
        prefetch_rows(weight_ptr, second_ptr, row0, num_rows, K, GATED, HALVES, PORTABLE)
    return begin_panels(task, control_ptr, num_tokens, x_map_addr, PANELS)


@triton.jit
def prefetch_rows(
    weight_ptr, second_ptr, row0, num_rows, K: tl.constexpr, GATED: tl.constexpr, HALVES: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Asks L2 for what `multiply_rows` reads first, 64 KiB, so that memory does not idle while a task waits."""
    if not PORTABLE:
        BLOCK: tl.constexpr = ROWS // 2 if GATED or HALVES == 2 else ROWS
        LINE: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        HALF: tl.constexpr = (K + 4 * LINE - 1) // (4 * LINE) * (2 * LINE) if HALVES == 2 else 0
        row = tl.arange(0, ROWS)[:, None]
        begin = tl.where(row < BLOCK, weight_ptr, second_ptr) if GATED else weight_ptr
        col = tl.arange(0, 8)[None, :] * LINE + row // BLOCK * HALF
        wanted = (row % BLOCK < even_block(num_rows, BLOCK)) & (col < K)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [(begin + (row0 + row % BLOCK).to(tl.int64) * K + col).to(tl.int64), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def even_block(num_rows, BLOCK: tl.constexpr):
    """The rows of a task's blocks: equal ones, but for the last, and not more than BLOCK."""
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    return (num_rows + num_blocks - 1) // num_blocks


@triton.jit
def for_all_tokens(
    num_tokens, args, FOR_TOKENS: tl.constexpr, CONSTANTS: tl.constexpr, MAX_TOKENS: tl.constexpr,
    LARGEST: tl.constexpr, PANELS: tl.constexpr,
):  # fmt: skip
    """FOR_TOKENS(first, num_tokens, args, CONSTANTS, TOKENS, PANELS) until all tokens have had their turn.

    LARGEST: SOME for what has not registers enough for MANY: halves of K, and the residual stream.
    """
    if PANELS:
        for first in tl.range(0, num_tokens, PANEL_TOKENS, num_stages=1, disable_licm=True):
            FOR_TOKENS(first, num_tokens, args, CONSTANTS, PANEL_TOKENS, True)
    elif num_tokens <= FEW:
        if num_tokens > 0:
            FOR_TOKENS(0, num_tokens, args, CONSTANTS, FEW, False)
    elif MAX_TOKENS > FEW:
        if LARGEST == SOME:
            for first in tl.range(0, num_tokens, SOME, num_stages=1, disable_licm=True):
                FOR_TOKENS(first, num_tokens, args, CONSTANTS, SOME, False)
        elif num_tokens <= SOME:
            FOR_TOKENS(0, num_tokens, args, CONSTANTS, SOME, False)
        elif MAX_TOKENS > SOME:
            for first in tl.range(0, num_tokens, MANY, num_stages=1, disable_licm=True):
                FOR_TOKENS(first, num_tokens, args, CONSTANTS, MANY, False)


@triton.jit
def multiply_rows(
    ring, first, row0, num_rows, weight_ptr, second_ptr, x_ptr, x_row, is_token, state, args,
    FINISH: tl.constexpr, CONSTANTS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, HALVES: tl.constexpr,
    TOKENS: tl.constexpr, PANELS: tl.constexpr,
):  # fmt: skip
    """A task's rows of a matrix times the rows `x_row` [TOKENS] of x, block by block.

    PANELS: from the ring; x_row are TOKENS rows from `first` on then.

    Each block ends in state = FINISH(product [rows, TOKENS] fp32, row, is_row, is_token, state, args, CONSTANTS).
    GATED: a block is of ROWS / 2 rows of each of two matrices; row and is_row are those ROWS / 2.
    HALVES = 2: A are both halves of ROWS / 2 rows, one below the other, and B both halves of the tokens; of the product
    only what is of one half counts. A task of few rows so fills the shared memory with weights.
    """
    if PANELS:
        BLOCK: tl.constexpr = ROWS // 2 if GATED or HALVES == 2 else ROWS
        PRODUCT_ROWS: tl.constexpr = ROWS // 2 if HALVES == 2 else ROWS
        state = multiply_panels(
            ring, first, num_rows, even_block(num_rows, BLOCK), is_token, state, args,
            FINISH, CONSTANTS, K, BLOCK, PRODUCT_ROWS, weight_ptr.dtype.element_ty,
        )  # fmt: skip
    else:
        state = multiply_loaded(
            row0, num_rows, weight_ptr, second_ptr, x_ptr, x_row, is_token, state, args,
            FINISH, CONSTANTS, K, GATED, HALVES, TOKENS,
        )  # fmt: skip
    return state


@triton.jit
def multiply_loaded(
    row0, num_rows, weight_ptr, second_ptr, x_ptr, x_row, is_token, state, args,
    FINISH: tl.constexpr, CONSTANTS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """`multiply_rows` by loads that Triton turns into asynchronous copies, some tiles ahead."""
    BLOCK: tl.constexpr = ROWS // 2 if GATED or HALVES == 2 else ROWS
    ITEM: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    TILE_K: tl.constexpr = 256 // ITEM
    STEPS: tl.constexpr = (K + TILE_K * HALVES - 1) // (TILE_K * HALVES)
    # where each step ends a block, FINISH is not behind a condition, and its loads would have stages as well
    STAGES: tl.constexpr = TILES_BYTES // ((ROWS + TOKENS * HALVES) * TILE_K * ITEM) if STEPS > 1 else 1
    HALF: tl.constexpr = STEPS * TILE_K
    block_rows = even_block(num_rows, BLOCK)
    tile_row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TOKENS * HALVES)
    weight_k = tl.arange(0, TILE_K)[None, :]
    x_k = tl.arange(0, TILE_K)[:, None]
    if HALVES == 2:
        weight_k += tile_row // BLOCK * HALF
        x_k += (column // TOKENS * HALF)[None, :]
        is_column = tl.ravel(tl.trans(tl.join(is_token, is_token)))
        x_row = tl.ravel(tl.trans(tl.join(x_row, x_row)))
    else:
        is_column = is_token
    w_begin = tl.where(tile_row < BLOCK, weight_ptr, second_ptr) if GATED else weight_ptr
    w_begin += (row0 + tile_row % BLOCK).to(tl.int64) * K
    x_begin = x_ptr + x_row[None, :] * K
    acc = tl.zeros([ROWS, TOKENS * HALVES], tl.float32)
    for i in tl.range(0, (num_rows + block_rows - 1) // block_rows * STEPS, num_stages=STAGES):
        step = i % STEPS
        done = i // STEPS * block_rows
        left = tl.minimum(block_rows, num_rows - done)
        is_row = tile_row % BLOCK < left
        w_at = w_begin + (done * K + step * TILE_K + weight_k)
        x_at = x_begin + (step * TILE_K + x_k)
        if HALF * HALVES == K:
            w = tl.load(w_at, mask=is_row, other=0.0)
            x = tl.load(x_at, mask=is_column[None, :], other=0.0)
        else:
            w = tl.load(w_at, mask=is_row & (step * TILE_K + weight_k < K), other=0.0)
            x = tl.load(x_at, mask=is_column[None, :] & (step * TILE_K + x_k < K), other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if step == STEPS - 1:
            row = tl.arange(0, BLOCK)
            if HALVES == 2:
                of_halves = tl.reshape(acc, (2, BLOCK, 2, TOKENS))
                same = tl.arange(0, 2)[:, None, None, None] == tl.arange(0, 2)[None, None, :, None]
                y = tl.sum(tl.sum(tl.where(same, of_halves, 0.0), axis=2), axis=0)
            else:
                y = acc
            state = FINISH(y, row0 + done + row, row < left, is_token, state, args, CONSTANTS)
            acc = tl.zeros([ROWS, TOKENS * HALVES], tl.float32)
    return state


@triton.jit
def token_rstd(
    squares_ptr, token, is_token, K: tl.constexpr, EPS: tl.constexpr, NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr
):
    """rsqrt(mean(x^2) + eps) of tokens [TOKENS], from the parts [NUM_PARTS, MAX_TOKENS] of their squares.

    Added up in fp64: exact in any order, as long as no part is 2^21 times as large as another.
    """
    parts = tl.arange(0, SUM_PARTS)[:, None]
    sums = tl.zeros([SUM_PARTS, token.shape[0]], tl.float64)
    for first in tl.static_range(0, NUM_PARTS, SUM_PARTS):
        mask = (first + parts < NUM_PARTS) & is_token[None, :]
        sums += tl.load(squares_ptr + (first + parts) * MAX_TOKENS + token[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(sums, axis=0).to(tl.float32) / K + EPS)


@triton.jit
def store_rows(y, y_ptr, bias_ptr, row, is_row, token, is_token, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y [rows, tokens] (+ bias [N]) as columns of `y_ptr` [T, N]."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + token[None, :] * N + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


@triton.jit
def store_residual(x, x_ptr, xb_ptr, gain_ptr, row, is_row, token, is_token, D: tl.constexpr):
    """The residual stream x [rows, tokens] and what the next matrix reads of it; the rows' sums of squares [tokens].

    These in fp64, so that their order does not count: the rows of a block and a thread differ with the loop.
    """
    at = token[None, :] * D + row[:, None]
    mask = is_row[:, None] & is_token[None, :]
    gain = tl.load(gain_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(xb_ptr + at, (x * gain[:, None]).to(xb_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, x * x, 0.0).to(tl.float64), axis=0)


def normed_torch(x: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the residual stream [T, D]: what the next matrix reads, and the sums of squares [T]."""
    return (x.float() * gain.float()).to(dtype), x.float().square().sum(-1)


def residual_reads(k: int, normed: TensorHandle, squares: TensorHandle) -> tuple[tuple[Region, ...], dict[str, int]]:
    """What a task reads that needs all of `normed` [T, k] and `squares` [parts, T], and the constants of these sizes.

    On several ranks both are symmetric: (rank, part of a task), see rank_batch_residual.py.
    """
    max_tokens = normed.numel // k
    sizes = {"NUM_PARTS": squares.numel // max_tokens, "MAX_TOKENS": max_tokens}
    return tuple(tensor.columns(0, tensor.dims[1]) for tensor in (normed, squares)), sizes


def halves(num_rows: int) -> int:
    """HALVES, for tasks of so many rows of one matrix."""
    return 2 if num_rows <= ROWS.value // 2 else 1
