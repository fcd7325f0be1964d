"""What this rank's host has written so far, read at the beginning of a step and told to all ranks.

mailbox, slots, counters read, the latter as the last step left them | asked [ranks, ASKED_SLOTS + 2 * S] int64: a row
A single task. All that can differ between ranks is what their hosts have written at a moment, and even the warps of one
worker may see different words. So nobody else reads those that decide something: `advance` of all ranks decides from
the same rows. Reading the host's memory is a journey over the bus, beside the first ops of a step; a step that does not
look (LOOKS of advance.py) leaves the row as it was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.advance import FREE, LOOKS, NUM_ADMITTED, SLOT_STATUS, SLOT_TICKET, RingSizes
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid, next_power_of_2
from tri_mpk.ops.rings import (
    ASKED_FIRST,
    ASKED_SLOTS,
    HOST_REQUESTS,
    HOST_RESULTS,
    HOST_STOP,
    RECORD,
    RECORD_CANCEL,
    RECORD_FINGERPRINT,
    RINGS,
    acquired_word,
)
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Region, Task
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def tell(task, ptr, values, mask, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """Stores int64 values, on all ranks."""
    if RANKS > 1:
        push(task, ptr, values, mask, 8, RANKS, PORTABLE)
    else:
        tl.store(ptr, values, mask=mask)


@triton.jit
def read_host_words(
    task, mailbox_ptr, slots_ptr, counters_ptr, row_ptr,
    TICKETS: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    records_ptr = mailbox_ptr + RINGS + TICKETS
    slots = tl.arange(0, BLOCK_S)
    is_slot = slots < S
    status = tl.load(slots_ptr + SLOT_STATUS * S + slots, mask=is_slot, other=FREE)
    ticket = tl.load(slots_ptr + SLOT_TICKET * S + slots, mask=is_slot, other=0)
    first = tl.load(counters_ptr + NUM_ADMITTED)
    cancels = tl.load(records_ptr + ticket * RECORD + RECORD_CANCEL, mask=status != FREE, other=0, volatile=True)
    num_taken = tl.load(mailbox_ptr + HOST_RESULTS, volatile=True)
    # In this order: if no request will follow, the number of requests is the last one. One thread stores both.
    stop = acquired_word(mailbox_ptr + HOST_STOP, PORTABLE)
    num_requests = acquired_word(mailbox_ptr + HOST_REQUESTS, PORTABLE)
    tell(task, row_ptr + HOST_STOP, stop, None, RANKS, PORTABLE)
    tell(task, row_ptr + HOST_REQUESTS, num_requests, None, RANKS, PORTABLE)
    tell(task, row_ptr + HOST_RESULTS, num_taken, None, RANKS, PORTABLE)
    tell(task, row_ptr + ASKED_FIRST, first, None, RANKS, PORTABLE)
    tell(task, row_ptr + ASKED_SLOTS + slots, cancels, is_slot, RANKS, PORTABLE)
    if RANKS > 1:
        number = first + slots
        is_there = is_slot & (number < num_requests)
        ticket_ptr = mailbox_ptr + RINGS + (number & (TICKETS - 1))
        next_ticket = tl.load(ticket_ptr, mask=is_there, other=0, volatile=True)
        print_ptr = records_ptr + next_ticket * RECORD + RECORD_FINGERPRINT
        prints = tl.load(print_ptr, mask=is_there, other=0, volatile=True)
        tell(task, row_ptr + ASKED_SLOTS + S + slots, prints, is_slot, RANKS, PORTABLE)


@triton.jit
def host_words_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch,
    slots_ptr, counters_ptr, asked_ptr,  # in, in, out
    place,
    TICKETS: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if tl.load(counters_ptr + LOOKS) != 0:
        read_host_words(
            task, mailbox_ptr, slots_ptr, counters_ptr, asked_ptr + place, TICKETS, S, BLOCK_S, RANKS, PORTABLE
        )
    if RANKS > 1:
        signal_ranks(task, event_ptr, RANKS, PORTABLE)
    else:
        signal(task, event_ptr, PORTABLE)


def cut_host_words(
    machine: Machine,
    *,
    slots: TensorHandle,
    counters: TensorHandle,
    asked: TensorHandle,
    rings: RingSizes,
    rank: int,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("host_words", grid_dim, 1, "one task")
    num_ranks, words = asked.dims
    num_slots = slots.dims[1]
    constants = {"TICKETS": rings.tickets, "S": num_slots, "BLOCK_S": next_power_of_2(max(num_slots, 2))}
    cut = Cut(constants, {"slots_ptr": slots, "counters_ptr": counters, "asked_ptr": asked})
    cut.tasks.append(
        Task(
            op=0,
            tile=(0,),
            reads=(slots.whole(), counters.whole()),
            writes=() if num_ranks > 1 else (asked.whole(),),
            cost_bytes=64 * num_slots,
            fields=cut.addresses() | {"place": rank * words},
            pushes=(Region(asked.name, ((0, words),)),) if num_ranks > 1 else (),
            to_all_ranks=num_ranks > 1,
        )
    )
    return cut


def host_words_torch(mailbox: torch.Tensor) -> torch.Tensor:
    """The first words of a row."""
    return mailbox[HOST_STOP.value : HOST_RESULTS.value + 1]


HOST_WORDS = Op("host_words", host_words_tile, cut_host_words, host_words_torch)
