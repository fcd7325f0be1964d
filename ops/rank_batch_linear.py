"""A matrix whose columns are shared out, of many tokens: this rank's part of y = W @ h (+ bias).

num tokens [1] read | h [T, K of this rank] read | W [N, K of this rank] read | bias [N] read
parts [ranks, T, N / ranks] pushed
Each rank adds up N / ranks columns of y (rank_batch_residual.py), so each part goes to one rank: a reduce-scatter, the
first half of an all-reduce. One task = consecutive rows of W that are columns of one rank, of all tokens. A bias
belongs to one rank; the others have zeros. Source: arXiv:1909.08053, figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import (
    SOME,
    begin_weights,
    for_all_tokens,
    halves,
    multiply_rows,
    store_rows,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.panels import panel_streams
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Region, Task
from tri_mpk.scheduler.peers import at_peer, signal_ranks


@triton.jit
def finish_parts(y, row, is_row, is_token, state, args, CONSTANTS: tl.constexpr):
    parts_ptr, bias_ptr, token = args
    store_rows(y, parts_ptr, bias_ptr, row, is_row, token, is_token, CONSTANTS[0], CONSTANTS[2])
    return state


@triton.jit(noinline=True)  # but not beside panels
def parts_of_tokens(first, num_tokens, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr):
    ring, row0, num_rows, h_ptr, weight_ptr, bias_ptr, parts_ptr = args
    K: tl.constexpr = CONSTANTS[1]
    HALVES: tl.constexpr = CONSTANTS[3]
    token = first + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    multiply_rows(
        ring, first, row0, num_rows, weight_ptr, weight_ptr, h_ptr, token, is_token, (), (parts_ptr, bias_ptr, token),
        finish_parts, CONSTANTS, K, False, HALVES, TOKENS, PANELS,
    )  # fmt: skip


@triton.jit
def rank_batch_linear_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, h_ptr, weight_ptr, bias_ptr, parts_ptr,  # in, in, in, in, out
    place, row0, num_rows, h_map_addr,
    WIDTH: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, MAX_TOKENS: tl.constexpr, HALVES: tl.constexpr,
    SIZE: tl.constexpr, PANELS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    ring = begin_weights(
        task, control_ptr, num_tokens, h_map_addr, weight_ptr, weight_ptr, row0, num_rows,
        K, False, HALVES, PANELS, PORTABLE,
    )  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for_all_tokens(
        num_tokens,
        (ring, row0, num_rows, h_ptr, weight_ptr, bias_ptr, at_peer(task, parts_ptr + place, 0, SIZE, PORTABLE)),
        parts_of_tokens, (WIDTH, K, HAS_BIAS, HALVES), MAX_TOKENS, SOME, PANELS,
    )  # fmt: skip
    signal_ranks(task, event_ptr, 1, PORTABLE)


class Share(NamedTuple):
    """The columns of a task, all of which one rank adds up."""

    ahead: int  # how far that rank is ahead
    lo: int
    hi: int
    place: int  # in `parts` of that rank, where column 0 of token 0 would be
    pushed: Region


def shares(rank: int, parts: TensorHandle, width: int, num_tasks: int) -> Iterator[Share]:
    """How tasks share out the columns, of which each rank adds up `width`."""
    num_ranks, size = parts.dims
    num_tasks = max(num_tasks, num_ranks)
    for ahead, (begin, end) in enumerate(even_ranges(num_tasks, num_ranks)):
        first = (rank + ahead) % num_ranks * width
        for lo, hi in even_ranges(width, min(width, end - begin)):
            yield Share(ahead, first + lo, first + hi, rank * size - first, Region(parts.name, ((lo, hi),)))


def cut_rank_batch_linear(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    input: TensorHandle,
    weight: TensorHandle,
    parts: TensorHandle,
    rank: int,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    (num_rows, k), num_ranks = weight.dims, parts.dims[0]
    width, max_tokens = num_rows // num_ranks, input.dims[0]
    each = list(shares(rank, parts, width, grid_dim or machine.num_workers))
    streams, h_map = panel_streams(machine, weight, [(share.lo, share.hi) for share in each], input)
    cut = Cut(
        {
            "WIDTH": width, "K": k, "HAS_BIAS": bias is not None, "MAX_TOKENS": max_tokens,
            "HALVES": halves(max(share.hi - share.lo for share in each)), "SIZE": parts.dtype.itemsize,
            "PANELS": h_map is not None,
        },
        {
            "num_tokens_ptr": num_tokens, "h_ptr": input, "weight_ptr": weight, "bias_ptr": bias or input,
            "parts_ptr": parts,
        },
    )  # fmt: skip
    whole, addresses = (num_tokens.whole(), input.columns(0, k)), cut.addresses()
    for i, (ahead, lo, hi, place, pushed) in enumerate(each):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight.span(lo * k, hi * k)) + ((bias.span(lo, hi),) if bias else ()),
                writes=(),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"place": place, "row0": lo, "num_rows": hi - lo, "h_map_addr": h_map or 0},
                panels=streams[i],
                pushes=(pushed,),
                ahead=ahead,
            )
        )
    return cut


def rank_batch_linear_torch(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's part of all columns [T, N]."""
    y = h.float() @ weight.float().T
    return y if bias is None else y + bias.float()


RANK_BATCH_LINEAR = Op("batch_linear_parts", rank_batch_linear_tile, cut_rank_batch_linear, rank_batch_linear_torch)
