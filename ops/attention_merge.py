"""Merges the splits of attention: out = sum_s 2^(m_s - m) acc_s / sum_s 2^(m_s - m) l_s, m = max_s m_s.

acc [S, H, Dh], max, sum [S, H] fp32 read | out [H * Dh] written | the splits are added in one order
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
    BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_DH)
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    top = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_DH], tl.float32)
    # Sixteen splits at a time, all their loads on the way together, nothing summed up across threads. The last sixteen
    # come first: the last split of all always has a token, so that `top` is a number from then on.
    for group in tl.static_range((NUM_SPLITS + 15) // 16):
        m = ()
        l = ()
        acc = ()
        for i in tl.static_range(16 if NUM_SPLITS - group * 16 >= 16 else NUM_SPLITS - group * 16):
            split = NUM_SPLITS - 1 - group * 16 - i
            has_tokens = split * num_blocks // NUM_SPLITS < (split + 1) * num_blocks // NUM_SPLITS
            has_tokens = has_tokens | (group + i == 0)
            row = split * H + head
            m = m + (tl.load(max_ptr + row, mask=has_tokens, other=float("-inf")),)
            l = l + (tl.load(sum_ptr + row, mask=has_tokens, other=0.0),)
            acc = acc + (tl.load(acc_ptr + row * DH + d, mask=has_tokens & (d < DH), other=0.0),)
        new_top = top
        for i in tl.static_range(len(m)):
            new_top = tl.maximum(new_top, m[i])
        scale = tl.exp2(top - new_top)
        total *= scale
        out *= scale
        for i in tl.static_range(len(m)):
            weight = tl.exp2(m[i] - new_top)
            total += l[i] * weight
            out += acc[i] * weight
        top = new_top
    out /= total
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
