"""The second half of argmax, and the end of a decode step: which token comes next, and whether one comes.

best value, index [num_parts] read | tokens [max_seq_len] int64 written | step [1] int32 written
A single task. The token goes to tokens[step + 1] and to the host's mailbox, unless the prompt goes on; a tie goes to
the lowest index. It also reads the host's stop request, so that nobody else has to.
Source: torch.argmax, GenerationMixin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.scheduler.device import (
    CONTROL_EOS,
    CONTROL_LAST_EPOCH,
    CONTROL_LAST_STEP,
    CONTROL_NUM_EOS,
    CONTROL_NUM_KNOWN,
    CONTROL_STOP,
    signal,
    wait,
)
from tri_mpk.scheduler.graph import Address, Task

# Words of the mailbox (int64), memory of the host that the kernel can reach.
MAILBOX_STOP = tl.constexpr(0)  # set by the host: stop at the next step that looks
MAILBOX_NUM_TOKENS = tl.constexpr(1)  # set by the kernel: so many tokens were chosen in this launch
MAILBOX_TOKENS = tl.constexpr(2)  # the tokens, in order
STOP_INTERVAL = tl.constexpr(16)  # steps between two looks at MAILBOX_STOP, each a journey over the bus


@triton.jit
def publish_token(mailbox_ptr, num_tokens, token, PORTABLE: tl.constexpr):
    """The token, then the count that makes it visible to the host (release at system scope)."""
    tl.store(mailbox_ptr + MAILBOX_TOKENS + num_tokens, token)
    if PORTABLE:
        tl.debug_barrier()
        tl.atomic_add(mailbox_ptr + MAILBOX_NUM_TOKENS, 1, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(  # a plain store: not every host lets a GPU do atomics on its memory
            """{
            .reg .pred p; .reg .u32 tid; .reg .s64 count;
            bar.sync 0; mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0;
            cvt.s64.s32 count, $2; @!p st.release.sys.global.s64 [$1], count; mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [(mailbox_ptr + MAILBOX_NUM_TOKENS).to(tl.int64), num_tokens + 1],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def best_of_parts(value_ptr, index_ptr, NUM_PARTS: tl.constexpr):
    """The index of the largest value, the lowest of equal ones.

    As many at a time as a warp has lanes: a reduction over more holds a register throughout the kernel (ops/warps.py).
    """
    parts = tl.arange(0, 32)
    value = tl.full([32], float("-inf"), tl.float32)
    index = tl.full([32], 0x7FFFFFFF, tl.int32)
    for first in tl.static_range(0, NUM_PARTS, 32):
        mask = first + parts < NUM_PARTS
        next_value = tl.load(value_ptr + first + parts, mask=mask, other=float("-inf"))
        next_index = tl.load(index_ptr + first + parts, mask=mask, other=0x7FFFFFFF)
        index = tl.where((next_value > value) | ((next_value == value) & (next_index < index)), next_index, index)
        value = tl.maximum(value, next_value)
    best = tl.max(value, axis=0)
    return tl.min(tl.where(value == best, index, 0x7FFFFFFF), axis=0).to(tl.int64)


@triton.jit
def finish_step(
    control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token goes to `tokens` and to the host, unless the prompt goes on. `stop`: this step is the last one."""
    if step + 1 >= num_known:
        tl.store(tokens_ptr + step + 1, token)
        publish_token(mailbox_ptr, step + 1 - num_known, token, PORTABLE)
        stop = stop | (tl.sum((is_eos_id & (eos == token)).to(tl.int32), axis=0) > 0)
    tl.store(step_ptr, step + 1)
    tl.store(control_ptr + CONTROL_STOP, stop.to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))


@triton.jit
def argmax_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch, step, step_ptr,
    best_value_ptr, best_index_ptr, tokens_ptr,  # in, in, out
    NUM_PARTS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    asks = step % STOP_INTERVAL == 0
    stop_asked = tl.load(mailbox_ptr + MAILBOX_STOP, mask=asks, other=0, volatile=True) != 0
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    token = best_of_parts(best_value_ptr, best_index_ptr, NUM_PARTS)
    stop = (step >= last_step) | stop_asked
    finish_step(
        control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop, PORTABLE
    )
    signal(task, event_ptr, PORTABLE)


def cut_argmax(
    machine: Machine,
    *,
    best_value: TensorHandle,
    best_index: TensorHandle,
    tokens: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("argmax", grid_dim, 1, "one task")
    tensors = {"best_value_ptr": best_value, "best_index_ptr": best_index, "tokens_ptr": tokens}
    num_parts = best_value.numel
    return Cut(
        {"NUM_PARTS": num_parts},
        tensors,
        [
            Task(
                op=0,
                tile=(0,),
                reads=(best_value.whole(), best_index.whole()),
                writes=(tokens.whole(),),
                cost_bytes=8 * num_parts,
                fields={name: Address(tensor.name) for name, tensor in tensors.items()},
            )
        ],
    )


def argmax_torch(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


ARGMAX = Op("argmax", argmax_tile, cut_argmax, argmax_torch, ends_step=True)
