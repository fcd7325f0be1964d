"""Merges the splits of attention: out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) l_s, m = max_s m_s.

acc [S, H, Dh], max, sum [S, H] fp32 read | out [H * Dh] written | the splits are added in their order
Splits without a token (short contexts) wrote nothing and are left out. One task = one query head.
Source: arXiv:2311.01282, section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task


@triton.jit
def attention_merge_tile(
    task, event_ptr, control_ptr, epoch, step,
    acc_ptr, max_ptr, sum_ptr, out_ptr,  # in, in, in, out
    head,
    H: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DH)
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    has_tokens = split * num_blocks // NUM_SPLITS < (split + 1) * num_blocks // NUM_SPLITS
    mask = (split < NUM_SPLITS) & (has_tokens | (split == NUM_SPLITS - 1))
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    # all loads before the first use of one: they are under way together
    m = tl.load(max_ptr + split * H + head, mask=mask, other=float("-inf"))
    l = tl.load(sum_ptr + split * H + head, mask=mask, other=0.0)
    acc = tl.load(
        acc_ptr + (split * H + head)[:, None] * DH + d[None, :], mask=mask[:, None] & (d < DH)[None, :], other=0.0
    )
    weight = tl.exp2(m - tl.max(m, axis=0))
    total = tl.sum(weight * l, axis=0)
    out = tl.sum(acc * (weight / total)[:, None], axis=0)
    tl.store(out_ptr + head * DH + d, out.to(out_ptr.dtype.element_ty), mask=d < DH)
    signal(task, event_ptr, PORTABLE)


def cut_attention_merge(
    machine: Machine,
    *,
    acc: TensorHandle,
    row_max: TensorHandle,
    row_sum: TensorHandle,
    output: TensorHandle,
    block_kv: int,
    grid_dim: int | None = None,
) -> Cut:
    num_splits, num_heads, head_dim = acc.dims
    pointers = {"acc_ptr": acc, "max_ptr": row_max, "sum_ptr": row_sum, "out_ptr": output}
    cut = Cut(
        {
            "H": num_heads,
            "DH": head_dim,
            "NUM_SPLITS": num_splits,
            "BLOCK_S": next_power_of_2(num_splits),
            "BLOCK_DH": next_power_of_2(head_dim),
            "BLOCK_KV": block_kv,
        },
        pointers,
    )
    for head in range(num_heads):
        cut.tasks.append(
            Task(
                op=0,
                tile=(head,),
                reads=tuple(t.box((0, num_splits), (head, head + 1)) for t in (acc, row_max, row_sum)),
                writes=(output.span(head * head_dim, (head + 1) * head_dim),),
                cost_bytes=4 * num_splits * (head_dim + 2),
                fields={name: Address(tensor.name) for name, tensor in pointers.items()} | {"head": head},
            )
        )
    return cut


def attention_merge_torch(acc: torch.Tensor, max: torch.Tensor, sum: torch.Tensor) -> torch.Tensor:
    weight = torch.exp2(max - max.amax(0))
    return (acc * weight[..., None]).sum(0) / (sum * weight).sum(0)[..., None]


ATTENTION_MERGE = Op("attention_merge", attention_merge_tile, cut_attention_merge, attention_merge_torch)
