"""The end of a step of many sequences: chosen tokens are delivered, requests come and go, and the next step is planned.

chosen [S] int32, logprobs [S] fp32 read | asked [ranks, ASKED_SLOTS + 2 * S] int64 read: see host_words.py
requests, through rings in the host's memory, read and answered: see rings.py
slots [SLOT_FIELDS, S] int32, counters [NUM_COUNTERS] int64, records [S, RECORD] int64, tokens [S, L] int32,
pages [2, num_pages] int32: those that are free, and how many sequences use each | the plan of the next step written
A single task, vectors over the S slots. A slot is free, runs, or waits for pages. In this order:

1. The chosen tokens are appended and reported; sequences that end here, or that were cancelled, free slot and pages.
2. Those that wait run again if pages for all their tokens are there, oldest first; then new requests are taken in, if
   no older one waits, a slot is free, and pages for the prompt are there, beside those that others will still need.
3. The next step's T tokens are shared out: one for each sequence that decodes, then prompts, oldest first, in chunks.
4. Each takes the pages that its tokens need. If there are too few, the youngest gives all of its pages back and waits:
   it is recomputed later from its tokens so far. The oldest never waits, so there is always progress. One of which
   nothing is computed yet begins with the pages of another that begins with the same tokens, those that are full and
   computed; a page is free when nobody uses it any more.

Where results of a whole step do not fit the ring the next step is empty, and so on until the host has made room. With
nothing to do steps are empty too, and look for requests; the last one ends the launch.

On several ranks each does the same with the same numbers, which are those of all hosts: a request is taken in when all
have submitted it, a result's place is free when all have taken it, one that cancels a request or stops does so for all.
Source: Orca (OSDI 2022), arXiv:2309.06180, 2308.16369.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid, next_power_of_2
from tri_mpk.ops.rings import (
    ASKED_FIRST,
    ASKED_SLOTS,
    END_BY_CANCEL,
    END_OF_LENGTH,
    END_OF_TEXT,
    HOST_REQUESTS,
    HOST_RESULTS,
    HOST_STOP,
    KERNEL_REQUESTS,
    KERNEL_RESULTS,
    MAX_ENDS,
    RECORD,
    RECORD_ENDS,
    RECORD_MAX_LENGTH,
    RECORD_NUM_ENDS,
    RECORD_PROMPT,
    RECORD_PROMPT_LENGTH,
    RESULT,
    RESULT_REASON,
    RESULT_TOKEN,
    RINGS,
    STOP_NOW,
    publish_word,
)
from tri_mpk.scheduler.device import CONTROL_LAST_EPOCH, CONTROL_STOP, signal
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import wait_for_any

# Fields of a slot, each a row of `slots`.
SLOT_STATUS = tl.constexpr(0)
SLOT_TICKET = tl.constexpr(1)
SLOT_LENGTH = tl.constexpr(2)  # tokens known: the prompt and those chosen so far
SLOT_DONE = tl.constexpr(3)  # of them are processed when this step is over
SLOT_MAX_LENGTH = tl.constexpr(4)
SLOT_PAGES = tl.constexpr(5)  # that it holds: the first so many of its page table
SLOT_ORDER = tl.constexpr(6)  # of its being taken in, modulo 2**32
SLOT_NEW = tl.constexpr(7)  # taken in just before this step
SLOT_FIELDS = tl.constexpr(8)
FREE = tl.constexpr(0)
RUNS = tl.constexpr(1)
WAITS = tl.constexpr(2)  # it was preempted, and keeps its slot and its tokens

# Words of `counters`.
NUM_ADMITTED = tl.constexpr(0)  # requests that were taken in
NUM_RESULTS = tl.constexpr(1)  # written
NUM_FREE_PAGES = tl.constexpr(2)  # the first so many of the first row of `pages`
BLOCKED_NEED = tl.constexpr(3)  # pages that the next request lacked when it was last looked at
LOOKS = tl.constexpr(4)  # whether this step reads the host's words
MISMATCH = tl.constexpr(5)  # 1 + number of the request that is not the same on all ranks; 0: there is none
NUM_STEPS = tl.constexpr(6)  # statistics: all steps, those with tokens, their tokens, preemptions
NUM_BUSY_STEPS = tl.constexpr(7)
NUM_TOKENS = tl.constexpr(8)
NUM_PREEMPTIONS = tl.constexpr(9)
NUM_SHARED = tl.constexpr(10)  # pages that sequences began with
NUM_PAGES = tl.constexpr(11)
NUM_COUNTERS = tl.constexpr(12)

LOOK_INTERVAL = tl.constexpr(8)  # steps between two looks at the host's words while no slot is free


@triton.jit
def sum_of_earlier(values, keys):
    """Of every slot the sum of `values` over all with a smaller key."""
    return tl.sum(tl.where(keys[None, :] < keys[:, None], values[None, :], 0), axis=1)


@triton.jit
def words_of_all(asked_ptr, slots, is_slot, S: tl.constexpr, RANKS: tl.constexpr):
    """How many requests all ranks have, how many results all have taken, and whose request any of them cancels."""
    num_requests = tl.load(asked_ptr + HOST_REQUESTS)
    num_taken = tl.load(asked_ptr + HOST_RESULTS)
    cancels = tl.load(asked_ptr + ASKED_SLOTS + slots, mask=is_slot, other=0)
    for rank in tl.static_range(1, RANKS):
        row_ptr = asked_ptr + rank * (ASKED_SLOTS + 2 * S)
        num_requests = tl.minimum(num_requests, tl.load(row_ptr + HOST_REQUESTS))
        num_taken = tl.minimum(num_taken, tl.load(row_ptr + HOST_RESULTS))
        cancels |= tl.load(row_ptr + ASKED_SLOTS + slots, mask=is_slot, other=0)
    return num_requests, num_taken, cancels != 0


@triton.jit
def end_of_launch(asked_ptr, num_admitted, is_idle, S: tl.constexpr, RANKS: tl.constexpr):
    """Whether the launch is over, and whether a rank has request `num_admitted` that another one never submits.

    Read again: that is cheaper than registers for all of the step.
    """
    stop = tl.load(asked_ptr + HOST_STOP)
    num_requests = tl.load(asked_ptr + HOST_REQUESTS)
    stops_now = stop == STOP_NOW
    has_more = num_requests > num_admitted
    has_last = (stop != 0) & (num_requests == num_admitted)  # and submits no more
    is_done = has_last
    for rank in tl.static_range(1, RANKS):
        row_ptr = asked_ptr + rank * (ASKED_SLOTS + 2 * S)
        stop = tl.load(row_ptr + HOST_STOP)
        num_requests = tl.load(row_ptr + HOST_REQUESTS)
        stops_now |= stop == STOP_NOW
        has_more |= num_requests > num_admitted
        has_this = (stop != 0) & (num_requests == num_admitted)
        has_last |= has_this
        is_done &= has_this
    return stops_now | (is_done & is_idle), is_idle & has_last & has_more


@triton.jit
def equal_requests(asked_ptr, slots, is_slot, S: tl.constexpr, RANKS: tl.constexpr):
    """How many requests from ASKED_FIRST on are the same on all ranks, and whether the next one is not.

    A rank that has not got one yet has a fingerprint of 0.
    """
    prints_ptr = asked_ptr + ASKED_SLOTS + S + slots
    low = tl.load(prints_ptr, mask=is_slot, other=0)
    high = low
    for rank in tl.static_range(1, RANKS):
        its = tl.load(prints_ptr + rank * (ASKED_SLOTS + 2 * S), mask=is_slot, other=0)
        low = tl.minimum(low, its)
        high = tl.maximum(high, its)
    number = tl.min(tl.where((low > 0) & (low == high), S, slots), axis=0)
    differs = tl.max(((slots == number) & (low > 0) & (low != high)).to(tl.int32), axis=0) > 0
    return number, differs


@triton.jit
def give_back(
    page_table_ptr, free_pages_ptr, users_ptr, num_free, slot, number, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """The pages of a slot have a user less; those without one are free. Returns how many are free then."""
    places = tl.arange(0, BLOCK)
    pages = tl.load(page_table_ptr + slot * STRIDE + places, mask=places < number, other=0)
    users = tl.load(users_ptr + pages, mask=places < number, other=0) - 1
    tl.store(users_ptr + pages, users, mask=places < number)
    is_free = ((places < number) & (users == 0)).to(tl.int32)
    tl.store(free_pages_ptr + num_free + tl.cumsum(is_free, axis=0) - 1, pages, mask=is_free > 0)
    tl.debug_barrier()  # the next slot may have the same pages
    return num_free + tl.sum(is_free, axis=0)


@triton.jit
def share_pages(
    page_table_ptr, users_ptr, tokens_ptr, slots, slot, length, computed,
    L: tl.constexpr, PAGE_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A slot begins with the pages of the one that has most of its tokens in front. Returns how many pages these are.

    `computed`: pages of every slot, from the first one on, whose tokens are all processed. One token at least is left.
    """
    common = tl.where(slots == slot, 0, tl.minimum(computed, (length - 1) // PAGE_SIZE))  # pages
    first = length * 0
    while first < tl.max(common, axis=0) * PAGE_SIZE:
        place = first + tl.arange(0, BLOCK_TOKENS)
        mine = tl.load(tokens_ptr + slot.to(tl.int64) * L + place, mask=place < length, other=-1)
        theirs = tl.load(
            tokens_ptr + slots.to(tl.int64)[:, None] * L + place[None, :],
            mask=place[None, :] < (common * PAGE_SIZE)[:, None],
            other=-1,
        )
        same = tl.min(tl.where(mine[None, :] == theirs, 0x7FFFFFFF, place[None, :]), axis=1)
        common = tl.minimum(common, same // PAGE_SIZE)
        first += BLOCK_TOKENS
    number = tl.max(common, axis=0)
    other = tl.max(tl.where((common == number) & (number > 0), slots, -1), axis=0)
    places = tl.arange(0, BLOCK)
    pages = tl.load(page_table_ptr + other * STRIDE + places, mask=places < number, other=0)
    tl.store(page_table_ptr + slot * STRIDE + places, pages, mask=places < number)
    users = tl.load(users_ptr + pages, mask=places < number, other=0)
    tl.store(users_ptr + pages, users + 1, mask=places < number)
    tl.debug_barrier()
    return number


@triton.jit
def report(
    mailbox_ptr, num_results, records_ptr, tokens_ptr, chosen_ptr, logprobs_ptr,
    slots, has_token, is_cancelled, ticket, length, max_length,
    TICKETS: tl.constexpr, RESULTS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Appends the chosen tokens and writes results. Returns why sequences end (0: they go on), and how many results."""
    token = tl.load(chosen_ptr + slots, mask=has_token, other=-1)
    logprob = tl.load(logprobs_ptr + slots, mask=has_token, other=0.0)
    ends = tl.arange(0, MAX_ENDS)[None, :]
    num_ends = tl.load(records_ptr + slots * RECORD + RECORD_NUM_ENDS, mask=has_token, other=0)
    end = tl.load(records_ptr + slots[:, None] * RECORD + RECORD_ENDS + ends, mask=ends < num_ends[:, None], other=-1)
    is_end = tl.max((end == token[:, None]).to(tl.int32), axis=1) > 0
    tl.store(tokens_ptr + slots.to(tl.int64) * L + length, token, mask=has_token)
    reason = tl.where(has_token & (length + 1 >= max_length), END_OF_LENGTH, 0)
    reason = tl.where(has_token & is_end, END_OF_TEXT, reason)
    reason = tl.where(is_cancelled & (reason == 0), END_BY_CANCEL, reason)
    is_result = (has_token | (reason > 0)).to(tl.int32)
    place = (num_results + tl.cumsum(is_result, axis=0) - is_result) & (RESULTS - 1)
    at_ptr = mailbox_ptr + RINGS + TICKETS + TICKETS * RECORD + place * RESULT
    first = ticket.to(tl.int64) | (reason.to(tl.int64) << RESULT_REASON)
    first |= tl.where(has_token, RESULT_TOKEN, 0)
    second = (token.to(tl.int64) & 0xFFFFFFFF) | (logprob.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    tl.store(at_ptr, first, mask=is_result > 0)
    tl.store(at_ptr + 1, second, mask=is_result > 0)
    return reason, tl.sum(is_result, axis=0)


@triton.jit
def take_in(
    mailbox_ptr, records_ptr, tokens_ptr, num_admitted, slot, available,
    TICKETS: tl.constexpr, RESULTS: tl.constexpr, PROMPTS: tl.constexpr, L: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Copies the next request to a slot, if pages for its prompt are available; so many it needs."""
    RECORDS: tl.constexpr = RINGS + TICKETS
    ticket = tl.load(mailbox_ptr + RINGS + (num_admitted & (TICKETS - 1)), volatile=True)
    words = tl.arange(0, RECORD)
    record = tl.load(mailbox_ptr + RECORDS + ticket * RECORD + words, volatile=True)
    prompt = tl.sum(tl.where(words == RECORD_PROMPT, record, 0), axis=0)
    length = tl.sum(tl.where(words == RECORD_PROMPT_LENGTH, record, 0), axis=0).to(tl.int32)
    max_length = tl.sum(tl.where(words == RECORD_MAX_LENGTH, record, 0), axis=0).to(tl.int32)
    need = (length + PAGE_SIZE - 1) // PAGE_SIZE
    fits = need <= available
    tl.store(records_ptr + slot * RECORD + words, record, mask=fits & (words < RECORD))
    for first in tl.range(0, tl.where(fits, length, 0), 1024, num_stages=1):
        place = first + tl.arange(0, 1024)
        at = RECORDS + TICKETS * RECORD + RESULTS * RESULT + ((prompt + place) & (PROMPTS - 1))
        token = tl.load(mailbox_ptr + at, mask=place < length, other=0, volatile=True)
        tl.store(tokens_ptr + slot.to(tl.int64) * L + place, token.to(tl.int32), mask=place < length)
    return ticket.to(tl.int32), length, max_length, need, fits


@triton.jit
def write_plan(
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
    first_token_ptr, sequence_tokens_ptr, output_token_ptr, tokens_ptr,
    slots, is_slot, share, begin, length, L: tl.constexpr,
):  # fmt: skip
    """The plan of a step in which every slot has its share of tokens, from position `begin` on."""
    first = tl.cumsum(share, axis=0) - share
    tl.store(num_tokens_ptr, tl.sum(share, axis=0))
    tl.store(first_token_ptr + slots, first, mask=is_slot)
    tl.store(sequence_tokens_ptr + slots, share, mask=is_slot)
    is_last = (share > 0) & (begin + share == length)
    tl.store(output_token_ptr + slots, tl.where(is_last, first + share - 1, -1), mask=is_slot)
    token = tl.load(tokens_ptr + slots.to(tl.int64) * L + begin, mask=share > 0, other=0)
    tl.store(token_ids_ptr + first, token, mask=share > 0)
    tl.store(token_positions_ptr + first, begin, mask=share > 0)
    tl.store(token_sequences_ptr + first, slots, mask=share > 0)
    is_chunk = share > 1  # the rest of them one after another: chunks are few
    for _ in tl.range(0, tl.sum(is_chunk.to(tl.int32), axis=0), num_stages=1):
        slot = tl.max(tl.where(is_chunk, slots, -1), axis=0)
        is_this = slots == slot
        is_chunk = is_chunk & (slots != slot)
        number = tl.sum(tl.where(is_this, share, 0), axis=0)
        at = tl.sum(tl.where(is_this, first, 0), axis=0)
        position = tl.sum(tl.where(is_this, begin, 0), axis=0)
        for done in tl.range(1, number, 512, num_stages=1):
            i = done + tl.arange(0, 512)
            rest = tl.load(tokens_ptr + slot.to(tl.int64) * L + position + i, mask=i < number, other=0)
            tl.store(token_ids_ptr + at + i, rest, mask=i < number)
            tl.store(token_positions_ptr + at + i, position + i, mask=i < number)
            tl.store(token_sequences_ptr + at + i, slot + tl.zeros([512], tl.int32), mask=i < number)


@triton.jit
def advance_requests(
    control_ptr, mailbox_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
    first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
    chosen_ptr, logprobs_ptr, asked_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
    TICKETS: tl.constexpr, RESULTS: tl.constexpr, PROMPTS: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, L: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_PAGES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    MAX_PAGES: tl.constexpr = (L + PAGE_SIZE - 1) // PAGE_SIZE
    users_ptr = free_pages_ptr + tl.load(counters_ptr + NUM_PAGES)
    slots = tl.arange(0, BLOCK_S)
    is_slot = slots < S
    status = tl.load(slots_ptr + SLOT_STATUS * S + slots, mask=is_slot, other=FREE)
    ticket = tl.load(slots_ptr + SLOT_TICKET * S + slots, mask=is_slot, other=0)
    length = tl.load(slots_ptr + SLOT_LENGTH * S + slots, mask=is_slot, other=0)
    done = tl.load(slots_ptr + SLOT_DONE * S + slots, mask=is_slot, other=0)
    max_length = tl.load(slots_ptr + SLOT_MAX_LENGTH * S + slots, mask=is_slot, other=0)
    num_pages = tl.load(slots_ptr + SLOT_PAGES * S + slots, mask=is_slot, other=0)
    order = tl.load(slots_ptr + SLOT_ORDER * S + slots, mask=is_slot, other=0)
    output = tl.load(output_token_ptr + slots, mask=is_slot, other=-1)
    num_admitted = tl.load(counters_ptr + NUM_ADMITTED)
    num_results = tl.load(counters_ptr + NUM_RESULTS)
    num_free = tl.load(counters_ptr + NUM_FREE_PAGES).to(tl.int32)
    blocked_need = tl.load(counters_ptr + BLOCKED_NEED).to(tl.int32)
    num_requests, num_taken, cancels = words_of_all(asked_ptr, slots, is_slot, S, RANKS)
    if RANKS > 1:
        num_equal, differs = equal_requests(asked_ptr, slots, is_slot, S, RANKS)
        num_equal += tl.load(asked_ptr + ASKED_FIRST)
        tl.store(counters_ptr + MISMATCH, tl.where(differs & (num_equal < num_requests), num_equal + 1, 0))
        num_requests = tl.minimum(num_equal, num_requests)

    # 1. what was chosen, and who ends
    has_room = RESULTS - (num_results - num_taken) >= S  # it has where there are tokens
    looks = tl.load(counters_ptr + LOOKS) != 0  # else `cancels` may be about requests that a slot had before
    is_cancelled = cancels & (status != FREE) & looks & has_room
    has_token = output >= 0
    reason, num_new = report(
        mailbox_ptr, num_results, records_ptr, tokens_ptr, chosen_ptr, logprobs_ptr,
        slots, has_token, is_cancelled, ticket, length, max_length, TICKETS, RESULTS, L,
    )  # fmt: skip
    if num_new > 0:
        num_results += num_new
        publish_word(mailbox_ptr + KERNEL_RESULTS, num_results, PORTABLE)
    length += has_token.to(tl.int32)
    leaves = reason > 0
    status = tl.where(leaves, FREE, status)
    for _ in tl.range(0, tl.sum(leaves.to(tl.int32), axis=0), num_stages=1):
        slot = tl.max(tl.where(leaves, slots, -1), axis=0)
        number = tl.sum(tl.where(slots == slot, num_pages, 0), axis=0)
        num_free = give_back(page_table_ptr, free_pages_ptr, users_ptr, num_free, slot, number, MAX_PAGES, BLOCK_PAGES)
        leaves = leaves & (slots != slot)
    num_pages = tl.where(status == FREE, 0, num_pages)

    # 2. who runs
    age = order - num_admitted.to(tl.int32)  # below zero, and greater for younger ones; wrap-around is harmless
    all_pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    available = num_free - tl.sum(tl.where(status == RUNS, tl.maximum(all_pages - num_pages, 0), 0), axis=0)
    wanted = tl.where(status == WAITS, all_pages, 0)
    resumes = (status == WAITS) & (sum_of_earlier(wanted, age) + wanted <= available)
    available -= tl.sum(tl.where(resumes, wanted, 0), axis=0)
    status = tl.where(resumes, RUNS, status)
    num_unused = tl.sum((is_slot & (status == FREE)).to(tl.int32), axis=0)
    num_unused = tl.where(tl.sum((status == WAITS).to(tl.int32), axis=0) > 0, 0, num_unused)
    is_new = tl.zeros([BLOCK_S], tl.int32)
    was_admitted = num_admitted
    if (num_admitted != num_requests) & (num_unused > 0) & (blocked_need <= available):
        blocked_need = 0
        while (num_admitted != num_requests) & (num_unused > 0) & (blocked_need == 0):
            slot = tl.min(tl.where(is_slot & (status == FREE), slots, BLOCK_S), axis=0)
            its_ticket, its_length, its_max_length, need, fits = take_in(
                mailbox_ptr, records_ptr, tokens_ptr, num_admitted, slot, available,
                TICKETS, RESULTS, PROMPTS, L, PAGE_SIZE,
            )  # fmt: skip
            is_this = (slots == slot) & fits
            status = tl.where(is_this, RUNS, status)
            ticket = tl.where(is_this, its_ticket, ticket)
            length = tl.where(is_this, its_length, length)
            max_length = tl.where(is_this, its_max_length, max_length)
            done = tl.where(is_this, 0, done)
            order = tl.where(is_this, num_admitted.to(tl.int32), order)
            is_new = tl.where(is_this, 1, is_new)
            blocked_need = tl.where(fits, 0, need)
            available -= tl.where(fits, need, 0)
            num_admitted += fits.to(tl.int64)
            num_unused -= fits.to(tl.int32)
        if num_admitted != was_admitted:
            publish_word(mailbox_ptr + KERNEL_REQUESTS, num_admitted, PORTABLE)

    # 3. tokens of the next step
    age = order - num_admitted.to(tl.int32)
    left = tl.where(status == RUNS, length - done, 0)
    key = tl.where(left == 1, age - (1 << 30), age)
    has_room = RESULTS - (num_results - num_taken) >= S
    limit = tl.where(has_room, T, 0)
    share = tl.minimum(left, tl.maximum(limit - sum_of_earlier(left, key), 0))

    # 4. their pages
    tl.debug_barrier()  # tokens that were taken in or appended
    computed = tl.where(status == RUNS, done // PAGE_SIZE, 0)
    begins = (share > 0) & (done == 0)
    num_shared = tl.sum(begins.to(tl.int32), axis=0) * 0
    for _ in tl.range(0, tl.sum(begins.to(tl.int32), axis=0), num_stages=1):
        slot = tl.max(tl.where(begins, slots, -1), axis=0)
        begins = begins & (slots != slot)
        its_length = tl.sum(tl.where(slots == slot, length, 0), axis=0)
        number = share_pages(
            page_table_ptr, users_ptr, tokens_ptr, slots, slot, its_length, computed,
            L, PAGE_SIZE, MAX_PAGES, BLOCK_PAGES, BLOCK_TOKENS,
        )  # fmt: skip
        num_pages = tl.where(slots == slot, number, num_pages)
        done = tl.where(slots == slot, number * PAGE_SIZE, done)
        num_shared += number
    share = tl.minimum(share, length - done)
    need = tl.where(share > 0, (done + share + PAGE_SIZE - 1) // PAGE_SIZE - num_pages, 0)
    num_preempted = 0
    while tl.sum(need, axis=0) > num_free:
        youngest = tl.max(tl.where(status == RUNS, age, -0x7FFFFFFF), axis=0)
        is_this = (status == RUNS) & (age == youngest)
        slot = tl.max(tl.where(is_this, slots, -1), axis=0)
        number = tl.sum(tl.where(is_this, num_pages, 0), axis=0)
        num_free = give_back(page_table_ptr, free_pages_ptr, users_ptr, num_free, slot, number, MAX_PAGES, BLOCK_PAGES)
        status = tl.where(is_this, WAITS, status)
        done = tl.where(is_this, 0, done)
        share = tl.where(is_this, 0, share)
        need = tl.where(is_this, 0, need)
        num_pages = tl.where(is_this, 0, num_pages)
        num_preempted += 1
    tl.debug_barrier()  # pages that were given back, tokens that were appended
    last = num_free - 1 - (tl.cumsum(need, axis=0) - need)
    for i in tl.range(0, tl.max(need, axis=0), num_stages=1):
        page = tl.load(free_pages_ptr + last - i, mask=i < need, other=0)
        tl.store(page_table_ptr + slots * MAX_PAGES + num_pages + i, page, mask=i < need)
        tl.store(users_ptr + page, tl.full([BLOCK_S], 1, tl.int32), mask=i < need)
    num_free -= tl.sum(need, axis=0)
    num_pages += need

    write_plan(
        num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
        first_token_ptr, sequence_tokens_ptr, output_token_ptr, tokens_ptr,
        slots, is_slot, share, done, length, L,
    )  # fmt: skip
    tl.store(slots_ptr + SLOT_STATUS * S + slots, status, mask=is_slot)
    tl.store(slots_ptr + SLOT_TICKET * S + slots, ticket, mask=is_slot)
    tl.store(slots_ptr + SLOT_LENGTH * S + slots, length, mask=is_slot)
    tl.store(slots_ptr + SLOT_DONE * S + slots, done + share, mask=is_slot)
    tl.store(slots_ptr + SLOT_MAX_LENGTH * S + slots, max_length, mask=is_slot)
    tl.store(slots_ptr + SLOT_PAGES * S + slots, num_pages, mask=is_slot)
    tl.store(slots_ptr + SLOT_ORDER * S + slots, order, mask=is_slot)
    tl.store(slots_ptr + SLOT_NEW * S + slots, is_new, mask=is_slot)
    num_live = tl.sum((status != FREE).to(tl.int32), axis=0)
    num_steps = tl.load(counters_ptr + NUM_STEPS)
    num_tokens = tl.sum(share, axis=0)
    looks_next = (num_live < S) | (num_tokens == 0) | (num_steps % LOOK_INTERVAL == 0)
    tl.store(counters_ptr + NUM_ADMITTED, num_admitted)
    tl.store(counters_ptr + NUM_RESULTS, num_results)
    tl.store(counters_ptr + NUM_FREE_PAGES, num_free.to(tl.int64))
    tl.store(counters_ptr + BLOCKED_NEED, blocked_need.to(tl.int64))
    tl.store(counters_ptr + LOOKS, looks_next.to(tl.int64))
    tl.store(counters_ptr + NUM_STEPS, num_steps + 1)
    tl.store(counters_ptr + NUM_BUSY_STEPS, tl.load(counters_ptr + NUM_BUSY_STEPS) + (num_tokens > 0).to(tl.int64))
    tl.store(counters_ptr + NUM_TOKENS, tl.load(counters_ptr + NUM_TOKENS) + num_tokens)
    tl.store(counters_ptr + NUM_PREEMPTIONS, tl.load(counters_ptr + NUM_PREEMPTIONS) + num_preempted)
    tl.store(counters_ptr + NUM_SHARED, tl.load(counters_ptr + NUM_SHARED) + num_shared)
    is_over, never_comes = end_of_launch(asked_ptr, num_admitted, num_live == 0, S, RANKS)
    if RANKS > 1:
        mismatch = tl.where(never_comes, num_admitted + 1, tl.load(counters_ptr + MISMATCH))
        tl.store(counters_ptr + MISMATCH, mismatch)
        is_over |= mismatch != 0
    tl.store(control_ptr + CONTROL_STOP, is_over.to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))


# Triton's time for a function grows with the square of its size, so this one is not inlined.
@triton.jit(noinline=True)
def advance_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,  # out: the plan
    first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
    chosen_ptr, logprobs_ptr, asked_ptr,  # in
    slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,  # in and out
    TICKETS: tl.constexpr, RESULTS: tl.constexpr, PROMPTS: tl.constexpr,  # places of the rings
    S: tl.constexpr, T: tl.constexpr, L: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_PAGES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    advance_requests(
        control_ptr, mailbox_ptr, epoch,
        num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
        first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
        chosen_ptr, logprobs_ptr, asked_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
        TICKETS, RESULTS, PROMPTS, S, T, L, PAGE_SIZE, BLOCK_S, BLOCK_PAGES, BLOCK_TOKENS, RANKS, PORTABLE,
    )  # fmt: skip
    signal(task, event_ptr, PORTABLE)


@dataclass(frozen=True, slots=True)
class RingSizes:
    """Places of the rings, powers of 2."""

    tickets: int
    results: int
    prompts: int  # tokens

    def __post_init__(self) -> None:
        for name in ("tickets", "results", "prompts"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"a ring of {size} {name} is not supported; choose a power of 2")

    @property
    def records_at(self) -> int:
        return RINGS.value + self.tickets

    @property
    def results_at(self) -> int:
        return self.records_at + self.tickets * RECORD.value

    @property
    def prompts_at(self) -> int:
        return self.results_at + self.results * RESULT.value

    @property
    def num_words(self) -> int:
        return self.prompts_at + self.prompts


def compared_tokens(num_slots: int) -> int:
    """Tokens of all slots that are compared at a time: few numbers per thread."""
    return max(1, 2048 // next_power_of_2(max(num_slots, 32)))


def cut_advance(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_ids: TensorHandle,
    token_positions: TensorHandle,
    token_sequences: TensorHandle,
    first_token: TensorHandle,
    sequence_tokens: TensorHandle,
    output_token: TensorHandle,
    page_table: TensorHandle,
    chosen: TensorHandle,
    logprobs: TensorHandle,
    asked: TensorHandle,
    slots: TensorHandle,
    counters: TensorHandle,
    records: TensorHandle,
    tokens: TensorHandle,
    free_pages: TensorHandle,
    rings: RingSizes,
    page_size: int,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("advance", grid_dim, 1, "one task")
    num_slots, length = tokens.dims
    reads = {"chosen_ptr": chosen, "logprobs_ptr": logprobs}
    plan = {
        "num_tokens_ptr": num_tokens, "token_ids_ptr": token_ids, "token_positions_ptr": token_positions,
        "token_sequences_ptr": token_sequences, "first_token_ptr": first_token,
        "sequence_tokens_ptr": sequence_tokens, "output_token_ptr": output_token, "page_table_ptr": page_table,
    }  # fmt: skip
    state = {
        "slots_ptr": slots, "counters_ptr": counters, "records_ptr": records, "tokens_ptr": tokens,
        "free_pages_ptr": free_pages,
    }  # fmt: skip
    constants = {
        "TICKETS": rings.tickets, "RESULTS": rings.results, "PROMPTS": rings.prompts,
        "S": num_slots, "T": token_ids.numel, "L": length, "PAGE_SIZE": page_size,
        "BLOCK_S": next_power_of_2(max(num_slots, 2)), "BLOCK_PAGES": next_power_of_2(max(page_table.dims[1], 2)),
        "BLOCK_TOKENS": compared_tokens(num_slots),
    }  # fmt: skip
    cut = Cut(constants, reads | {"asked_ptr": asked} | plan | state)
    own = reads | plan | state
    cut.tasks.append(
        Task(
            op=0,
            tile=(0,),
            reads=(*(tensor.whole() for tensor in own.values()), asked.columns(0, asked.dims[1])),
            writes=tuple(tensor.whole() for tensor in (plan | state).values()),
            cost_bytes=64 * num_slots,
            fields=cut.addresses(),
        )
    )
    return cut


def advance_torch(length: torch.Tensor, done: torch.Tensor, order: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """How many tokens each sequence has in a step, where pages are no matter."""
    left = (length - done).tolist()
    share = torch.zeros_like(length)
    for slot in sorted(range(len(left)), key=lambda s: (left[s] > 1, int(order[s]))):
        share[slot] = min(left[slot], max_tokens - int(share.sum()))
    return share


ADVANCE = Op("advance", advance_tile, cut_advance, advance_torch, waits_for_ranks=True, ends_step=True)
