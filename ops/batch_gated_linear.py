"""RMSNorm, gate, up and SiLU, of many tokens: h = silu(Wg @ rmsnorm(x)) * (Wu @ rmsnorm(x)).

num tokens [1] read | xb [T, K] = x * gain read | squares [num_parts, T] fp32 read | Wg, Wu [N, K] read
h [T, N] written
A tile of weights has half of its rows from each matrix, so both products share one reading of the activations.
One task = equal consecutive rows of both matrices, of all tokens. Source: arXiv:2002.05202; transformers LlamaMLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import (
    MANY,
    begin_weights,
    for_all_tokens,
    multiply_rows,
    residual_reads,
    store_rows,
    token_rstd,
)
from tri_mpk.ops.batch_linear import batch_linear_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.panels import panel_streams
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import wait_for_any


@triton.jit
def finish_gated(y, row, is_row, is_token, state, args, CONSTANTS: tl.constexpr):
    h_ptr, token, rstd = args
    y *= rstd[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, y.shape[0] // 2, y.shape[1])), (1, 2, 0)))
    h = gate / (1.0 + tl.exp(-gate)) * up
    store_rows(h, h_ptr, h_ptr, row, is_row, token, is_token, CONSTANTS[0], False)
    return state


@triton.jit(noinline=True)  # but not beside panels
def gated_linear_of_tokens(
    first, num_tokens, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr
):
    ring, row0, num_rows, xb_ptr, squares_ptr, gate_ptr, up_ptr, h_ptr = args
    K: tl.constexpr = CONSTANTS[1]
    EPS: tl.constexpr = CONSTANTS[2]
    NUM_PARTS: tl.constexpr = CONSTANTS[3]
    MAX_TOKENS: tl.constexpr = CONSTANTS[4]
    token = first + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    rstd = token_rstd(squares_ptr, token, is_token, K, EPS, NUM_PARTS, MAX_TOKENS)
    multiply_rows(
        ring, first, row0, num_rows, gate_ptr, up_ptr, xb_ptr, token, is_token, (),
        (h_ptr, token, rstd), finish_gated, CONSTANTS, K, True, 1, TOKENS, PANELS,
    )  # fmt: skip


@triton.jit
def batch_gated_linear_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, xb_ptr, squares_ptr, gate_ptr, up_ptr, h_ptr,  # in, in, in, in, in, out
    row0, num_rows, xb_map_addr,
    N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, PANELS: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    ring = begin_weights(
        task, control_ptr, num_tokens, xb_map_addr, gate_ptr, up_ptr, row0, num_rows, K, True, 1, PANELS, PORTABLE
    )
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    for_all_tokens(
        num_tokens, (ring, row0, num_rows, xb_ptr, squares_ptr, gate_ptr, up_ptr, h_ptr),
        gated_linear_of_tokens, (N, K, EPS, NUM_PARTS, MAX_TOKENS), MAX_TOKENS, MANY, PANELS,
    )  # fmt: skip
    signal(task, event_ptr, PORTABLE)


def cut_batch_gated_linear(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    input: TensorHandle,
    squares: TensorHandle,
    weight_gate: TensorHandle,
    weight_up: TensorHandle,
    output: TensorHandle,
    eps: float,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, k = weight_gate.dims
    ranges = list(even_ranges(num_rows, min(num_rows, grid_dim or machine.num_workers)))
    streams, x_map = panel_streams(machine, weight_gate, ranges, input, weight_up)
    residual, sizes = residual_reads(k, input, squares)
    cut = Cut(
        {"N": num_rows, "K": k, "EPS": eps, "PANELS": x_map is not None} | sizes,
        {
            "num_tokens_ptr": num_tokens, "xb_ptr": input, "squares_ptr": squares,
            "gate_ptr": weight_gate, "up_ptr": weight_up, "h_ptr": output,
        },
    )  # fmt: skip
    whole = (num_tokens.whole(), *residual)
    addresses = cut.addresses()
    for i, (lo, hi) in enumerate(ranges):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight_gate.span(lo * k, hi * k), weight_up.span(lo * k, hi * k)),
                writes=(output.columns(lo, hi),),
                cost_bytes=2 * (hi - lo) * k * weight_gate.dtype.itemsize,
                fields=addresses | {"row0": lo, "num_rows": hi - lo, "xb_map_addr": x_map or 0},
                panels=streams[i],
            )
        )
    return cut


def batch_gated_linear_torch(
    xb: torch.Tensor, squares: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, eps: float
) -> torch.Tensor:
    return torch.nn.functional.silu(batch_linear_torch(xb, squares, gate, eps)) * batch_linear_torch(
        xb, squares, up, eps
    )


BATCH_GATED_LINEAR = Op(
    "batch_gated_linear",
    batch_gated_linear_tile,
    cut_batch_gated_linear,
    batch_gated_linear_torch,
    waits_for_ranks=True,
)
