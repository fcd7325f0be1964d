"""A matrix and the residual stream, of many tokens: x += W @ h (+ bias), and what the next norm's matrix needs of x.

num tokens [1] read | h [T, K] read | W [N, K] read | bias [N] read | gain [N] of the next norm read
x [T, N] fp32 read and written | xb [T, N] = x * gain written | squares [num_tasks, T] fp32 written
xb is rounded once and not normalised; squares are the sums of x^2 over a task's rows, which the next matrix adds up.
One task = consecutive rows, of all tokens. Source: transformers LlamaDecoderLayer, nn.Linear; fp32 residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import (
    SOME,
    begin_weights,
    for_all_tokens,
    halves,
    multiply_rows,
    normed_torch,
    store_residual,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.panels import panel_streams
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def finish_residual(y, row, is_row, is_token, squares, args, CONSTANTS: tl.constexpr):
    x_ptr, xb_ptr, bias_ptr, gain_ptr, token = args
    N: tl.constexpr = CONSTANTS[0]
    HAS_BIAS: tl.constexpr = CONSTANTS[2]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    mask = is_row[:, None] & is_token[None, :]
    x = y + tl.load(x_ptr + token[None, :] * N + row[:, None], mask=mask, other=0.0)
    return squares + store_residual(x, x_ptr, xb_ptr, gain_ptr, row, is_row, token, is_token, N)


@triton.jit(noinline=True)  # but not beside panels
def linear_residual_of_tokens(
    first, num_tokens, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr
):
    ring, part, row0, num_rows, inputs, outputs = args
    K: tl.constexpr = CONSTANTS[1]
    MAX_TOKENS: tl.constexpr = CONSTANTS[3]
    HALVES: tl.constexpr = CONSTANTS[4]
    h_ptr, weight_ptr, bias_ptr, gain_ptr = inputs
    x_ptr, xb_ptr, squares_ptr = outputs
    token = first + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    squares = multiply_rows(
        ring, first, row0, num_rows, weight_ptr, weight_ptr, h_ptr, token, is_token, tl.zeros([TOKENS], tl.float64),
        (x_ptr, xb_ptr, bias_ptr, gain_ptr, token), finish_residual, CONSTANTS, K, False, HALVES, TOKENS, PANELS,
    )  # fmt: skip
    tl.store(squares_ptr + part * MAX_TOKENS + token, squares.to(tl.float32), mask=is_token)


@triton.jit
def batch_linear_residual_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, h_ptr, weight_ptr, bias_ptr, gain_ptr,  # in
    x_ptr, xb_ptr, squares_ptr,  # in and out, out, out
    part, row0, num_rows, h_map_addr,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, MAX_TOKENS: tl.constexpr, HALVES: tl.constexpr,
    PANELS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    ring = begin_weights(
        task, control_ptr, num_tokens, h_map_addr, weight_ptr, weight_ptr, row0, num_rows,
        K, False, HALVES, PANELS, PORTABLE,
    )  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for_all_tokens(
        num_tokens,
        (ring, part, row0, num_rows, (h_ptr, weight_ptr, bias_ptr, gain_ptr), (x_ptr, xb_ptr, squares_ptr)),
        linear_residual_of_tokens, (N, K, HAS_BIAS, MAX_TOKENS, HALVES), MAX_TOKENS, SOME, PANELS,
    )  # fmt: skip
    signal(task, event_ptr, PORTABLE)


def cut_batch_linear_residual(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    input: TensorHandle,
    weight: TensorHandle,
    gain: TensorHandle,
    residual: TensorHandle,
    normed: TensorHandle,
    squares: TensorHandle,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, k = weight.dims
    num_parts, max_tokens = squares.dims
    if grid_dim not in (None, num_parts):
        raise ValueError(f"squares={squares.name} is for {num_parts} tasks, got grid_dim={grid_dim}; leave it out")
    ranges = list(even_ranges(num_rows, num_parts))
    streams, h_map = panel_streams(machine, weight, ranges, input)
    cut = Cut(
        {
            "N": num_rows, "K": k, "HAS_BIAS": bias is not None, "MAX_TOKENS": max_tokens,
            "HALVES": halves(-(-num_rows // num_parts)), "PANELS": h_map is not None,
        },
        {
            "num_tokens_ptr": num_tokens, "h_ptr": input, "weight_ptr": weight, "bias_ptr": bias or squares,
            "gain_ptr": gain, "x_ptr": residual, "xb_ptr": normed, "squares_ptr": squares,
        },
    )  # fmt: skip
    whole, addresses = (num_tokens.whole(), input.columns(0, k)), cut.addresses()
    for i, (lo, hi) in enumerate(ranges):
        x = residual.columns(lo, hi)
        reads = (*whole, weight.span(lo * k, hi * k), gain.span(lo, hi), x)
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads + ((bias.span(lo, hi),) if bias else ()),
                writes=(x, normed.columns(lo, hi), squares.box((i, i + 1), (0, max_tokens))),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"part": i, "row0": lo, "num_rows": hi - lo, "h_map_addr": h_map or 0},
                panels=streams[i],
            )
        )
    return cut


def batch_linear_residual_torch(
    h: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, xb, and the sums of squares [T]."""
    x = residual.float() + h.float() @ weight.float().T
    if bias is not None:
        x = x + bias.float()
    return (x, *normed_torch(x, gain, weight.dtype))


BATCH_LINEAR_RESIDUAL = Op(
    "batch_linear_residual", batch_linear_residual_tile, cut_batch_linear_residual, batch_linear_residual_torch
)
