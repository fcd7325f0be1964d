"""RMSNorm and a matrix, of many tokens: y = W @ rmsnorm(x) (+ bias).

num tokens [1] read | xb [T, K] = x * gain read | squares [num_parts, T] fp32 read | W [N, K] read | bias [N] read
y [T, N] written
The norm's scale rsqrt(mean(x^2) + eps) is a factor of each token's sums, so xb needs none of it.
One task = consecutive rows, of all tokens. Source: arXiv:1910.07467; transformers LlamaDecoderLayer, nn.Linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import (
    MANY,
    SOME,
    begin_weights,
    for_all_tokens,
    halves,
    multiply_rows,
    residual_reads,
    store_rows,
    token_rstd,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.panels import panel_streams
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import wait_for_any


@triton.jit
def finish_linear(y, row, is_row, is_token, state, args, CONSTANTS: tl.constexpr):
    y_ptr, bias_ptr, token, rstd = args
    store_rows(y * rstd[None, :], y_ptr, bias_ptr, row, is_row, token, is_token, CONSTANTS[0], CONSTANTS[3])
    return state


@triton.jit(noinline=True)  # but not beside panels
def linear_of_tokens(first, num_tokens, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr):
    ring, row0, num_rows, xb_ptr, squares_ptr, weight_ptr, bias_ptr, y_ptr = args
    K: tl.constexpr = CONSTANTS[1]
    EPS: tl.constexpr = CONSTANTS[2]
    NUM_PARTS: tl.constexpr = CONSTANTS[4]
    MAX_TOKENS: tl.constexpr = CONSTANTS[5]
    HALVES: tl.constexpr = CONSTANTS[6]
    token = first + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    rstd = token_rstd(squares_ptr, token, is_token, K, EPS, NUM_PARTS, MAX_TOKENS)
    multiply_rows(
        ring, first, row0, num_rows, weight_ptr, weight_ptr, xb_ptr, token, is_token, (),
        (y_ptr, bias_ptr, token, rstd), finish_linear, CONSTANTS, K, False, HALVES, TOKENS, PANELS,
    )  # fmt: skip


@triton.jit
def batch_linear_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, xb_ptr, squares_ptr, weight_ptr, bias_ptr, y_ptr,  # in, in, in, in, in, out
    row0, num_rows, xb_map_addr,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, HALVES: tl.constexpr, PANELS: tl.constexpr,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    ring = begin_weights(
        task, control_ptr, num_tokens, xb_map_addr, weight_ptr, weight_ptr, row0, num_rows,
        K, False, HALVES, PANELS, PORTABLE,
    )  # fmt: skip
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    for_all_tokens(
        num_tokens, (ring, row0, num_rows, xb_ptr, squares_ptr, weight_ptr, bias_ptr, y_ptr),
        linear_of_tokens, (N, K, EPS, HAS_BIAS, NUM_PARTS, MAX_TOKENS, HALVES), MAX_TOKENS,
        SOME if HALVES == 2 else MANY, PANELS,
    )  # fmt: skip
    signal(task, event_ptr, PORTABLE)


def cut_batch_linear(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    input: TensorHandle,
    squares: TensorHandle,
    weight: TensorHandle,
    output: TensorHandle,
    eps: float,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, k = weight.dims
    ranges = list(even_ranges(num_rows, min(num_rows, grid_dim or machine.num_workers)))
    most = max(hi - lo for lo, hi in ranges)
    streams, x_map = panel_streams(machine, weight, ranges, input)
    residual, sizes = residual_reads(k, input, squares)
    cut = Cut(
        {
            "N": num_rows, "K": k, "EPS": eps, "HAS_BIAS": bias is not None,
            "HALVES": halves(most), "PANELS": x_map is not None,
        } | sizes,
        {
            "num_tokens_ptr": num_tokens, "xb_ptr": input, "squares_ptr": squares, "weight_ptr": weight,
            "bias_ptr": bias or squares, "y_ptr": output,
        },
    )  # fmt: skip
    whole = (num_tokens.whole(), *residual)
    addresses = cut.addresses()
    for i, (lo, hi) in enumerate(ranges):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight.span(lo * k, hi * k)) + ((bias.span(lo, hi),) if bias else ()),
                writes=(output.columns(lo, hi),),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"row0": lo, "num_rows": hi - lo, "xb_map_addr": x_map or 0},
                panels=streams[i],
            )
        )
    return cut


def scale_torch(squares: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """The norm's scale of tokens [T, 1], from the parts [num_parts, T] of their sums of squares."""
    return torch.rsqrt(squares.sum(0) / size + eps)[:, None]


def batch_linear_torch(
    xb: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = xb.float() @ weight.float().T * scale_torch(squares, weight.shape[1], eps)
    return y if bias is None else y + bias.float()


BATCH_LINEAR = Op("batch_linear", batch_linear_tile, cut_batch_linear, batch_linear_torch, waits_for_ranks=True)
