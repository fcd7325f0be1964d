"""advance against a reference in Python, step by step, in the interpreter: `python tests/advance_kernels.py GROUP`.

Run by tests/ops/test_advance.py, in a process of its own, because a Triton that interprets can do nothing else. The
reference is written from the description of what a step does, not from the kernel: lists and dictionaries, no vectors.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tri_mpk._interpreter_worker import tune_interpreter
from tri_mpk.generation import GenerationRequest
from tri_mpk.ops.advance import (
    FREE,
    LOOK_INTERVAL,
    LOOKS,
    NUM_ADMITTED,
    NUM_COUNTERS,
    NUM_FREE_PAGES,
    NUM_PAGES,
    NUM_PREEMPTIONS,
    NUM_RESULTS,
    NUM_SHARED,
    RUNS,
    SEEN,
    SLOT_FIELDS,
    WAITS,
    RingSizes,
    advance_requests,
)
from tri_mpk.ops.op import next_power_of_2
from tri_mpk.ops.rings import RECORD
from tri_mpk.rings import HostRings, Result
from tri_mpk.scheduler import device as words


@triton.jit
def advance_kernel(
    control_ptr, mailbox_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
    first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
    chosen_ptr, logprobs_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
    tickets_size, results_size, prompts_size,
    S: tl.constexpr, T: tl.constexpr, L: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_PAGES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    looks = tl.load(counters_ptr + LOOKS) != 0
    host = tl.load(mailbox_ptr + tl.arange(0, 4), mask=looks & (tl.arange(0, 4) < 4), other=0)
    advance_requests(
        control_ptr, mailbox_ptr, epoch, host,
        num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
        first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
        chosen_ptr, logprobs_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
        tickets_size, results_size, prompts_size,
        S, T, L, PAGE_SIZE, BLOCK_S, BLOCK_PAGES, BLOCK_TOKENS, True,
    )  # fmt: skip


class Kernel:
    """The tensors of `advance`, and one call of it per step."""

    def __init__(self, S: int, T: int, L: int, page_size: int, num_pages: int, rings: RingSizes, first: int = 0):
        self.S, self.T, self.L, self.page_size, self.rings = S, T, L, page_size, rings
        row = -(-L // page_size)
        int32 = {"dtype": torch.int32}
        self.control = torch.zeros(64, dtype=torch.int64)
        self.mailbox = torch.zeros(rings.num_words, dtype=torch.int64)
        self.num_tokens = torch.zeros(1, **int32)
        self.ids, self.positions, self.sequences = (torch.full((T,), -9, **int32) for _ in range(3))
        self.first, self.number = torch.zeros(S, **int32), torch.zeros(S, **int32)
        self.output, self.table = torch.full((S,), -1, **int32), torch.full((S, row), -9, **int32)
        self.chosen, self.logprobs = torch.zeros(S, **int32), torch.zeros(S)
        self.slots = torch.zeros(SLOT_FIELDS.value, S, **int32)
        self.counters = torch.zeros(NUM_COUNTERS.value, dtype=torch.int64)
        self.records = torch.zeros(S, RECORD.value, dtype=torch.int64)
        self.tokens = torch.full((S, L), -9, **int32)
        self.free = torch.stack((torch.arange(num_pages, **int32), torch.zeros(num_pages, **int32)))
        self.counters[NUM_FREE_PAGES.value] = self.counters[NUM_PAGES.value] = num_pages
        self.counters[LOOKS.value] = 1
        self.epoch = 0

    def step(self) -> bool:
        """Whether the launch goes on."""
        self.epoch += 1
        advance_kernel[(1,)](
            self.control, self.mailbox, self.epoch, self.num_tokens, self.ids, self.positions, self.sequences,
            self.first, self.number, self.output, self.table, self.chosen, self.logprobs, self.slots, self.counters,
            self.records, self.tokens, self.free, self.rings.tickets, self.rings.results, self.rings.prompts,
            S=self.S, T=self.T, L=self.L, PAGE_SIZE=self.page_size, BLOCK_S=next_power_of_2(max(self.S, 2)),
            BLOCK_PAGES=next_power_of_2(max(self.table.shape[1], 2)),
            BLOCK_TOKENS=4,  # several turns for a page, or several pages in a turn
        )  # fmt: skip
        assert int(self.control[words.CONTROL_LAST_EPOCH.value]) == self.epoch
        return int(self.control[words.CONTROL_STOP.value]) == 0


@dataclass
class Sequence:
    ticket: int
    request: GenerationRequest
    order: int
    tokens: list[int]
    done: int = 0
    pages: list[object] = field(default_factory=list)
    runs: bool = True

    @property
    def num_pages(self) -> int:
        return len(self.pages)


@dataclass
class Reference:
    """What `advance` does, said plainly."""

    S: int
    T: int
    page_size: int
    num_pages: int
    results_size: int
    slots: list[Sequence | None] = field(default_factory=list)
    queue: deque = field(default_factory=deque)  # (ticket, request), as handed over by the host
    num_seen: int = 0  # of the queue: those that were there at the last look
    cancelled: set[int] = field(default_factory=set)  # tickets
    num_cancels: int = 0
    num_cancels_known: int = 0  # at the last look at who is cancelled
    num_cancels_seen: int = 0
    num_taken: int = 0  # results, by the host
    num_taken_seen: int = 0
    num_written: int = 0
    num_admitted: int = 0
    num_preempted: int = 0
    num_shared: int = 0
    num_steps: int = 0
    blocked_need: int = 0
    looks: bool = True
    plan: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, begin, number)

    def __post_init__(self) -> None:
        self.slots = [None] * self.S

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    @property
    def live(self) -> list[Sequence]:
        """Oldest first."""
        return sorted(filter(None, self.slots), key=lambda q: q.order)

    @property
    def free(self) -> int:
        return self.num_pages - len({page for q in self.live for page in q.pages})

    @property
    def has_room(self) -> bool:
        return self.results_size - (self.num_written - self.num_taken_seen) >= self.S

    def outputs(self) -> dict[int, int]:
        """Slots that choose a token after the present step, and the length of the sequence until then."""
        lengths = {s: len(self.slots[s].tokens) for s, _, _ in self.plan}
        return {s: lengths[s] for s, begin, number in self.plan if begin + number == lengths[s]}

    def step(self, chosen: dict[int, int]) -> list[Result]:
        if self.looks:
            self.num_seen, self.num_taken_seen = len(self.queue), self.num_taken
            self.num_cancels_seen = self.num_cancels
        results = self.deliver(chosen)
        new = self.admit()
        self.share()
        self.looks = len(self.live) < self.S or not self.plan or self.num_steps % LOOK_INTERVAL.value == 0
        self.num_steps += 1
        self.new = new
        return results

    def deliver(self, chosen: dict[int, int]) -> list[Result]:
        looks_at_cancelled = self.num_cancels_seen != self.num_cancels_known and self.has_room
        if looks_at_cancelled:
            self.num_cancels_known = self.num_cancels_seen
        results = []
        for s, q in enumerate(self.slots):
            if q is None:
                continue
            token, reason = chosen.get(s), None
            if token is not None:
                q.tokens.append(token)
                if token in q.request.eos_token_ids:
                    reason = "stop"
                elif len(q.tokens) >= q.request.max_length:
                    reason = "length"
            if reason is None and looks_at_cancelled and q.ticket in self.cancelled:
                reason = "cancelled"
            if token is not None or reason is not None:
                results.append(Result(q.ticket, token, 0.0, reason))
            if reason is not None:
                self.slots[s] = None
        self.num_written += len(results)
        return results

    def admit(self) -> list[int]:
        available = self.free - sum(self.pages(len(q.tokens)) - q.num_pages for q in self.live if q.runs)
        for q in [q for q in self.live if not q.runs]:
            if self.pages(len(q.tokens)) > available:
                break
            available -= self.pages(len(q.tokens))
            q.runs = True
        new = []
        if any(not q.runs for q in self.live) or self.blocked_need > available:
            return new
        while self.num_seen and None in self.slots:
            ticket, request = self.queue[0]
            need = self.pages(len(request.prompt))
            self.blocked_need = need if need > available else 0
            if need > available:
                break
            self.queue.popleft()
            self.num_seen -= 1
            available -= need
            slot = self.slots.index(None)
            new.append(slot)
            self.slots[slot] = Sequence(ticket, request, self.num_admitted, request.prompt.tolist())
            self.num_admitted += 1
            if ticket in self.cancelled:
                self.num_cancels_known = -1
        return new

    def share(self) -> None:
        left = self.T if self.has_room else 0
        shares: dict[int, int] = {}
        running = [q for q in self.live if q.runs]
        for q in sorted(running, key=lambda q: (len(q.tokens) - q.done > 1, q.order)):
            shares[q.order] = min(left, len(q.tokens) - q.done)
            left -= shares[q.order]

        computed = {q.order: q.done // self.page_size for q in running}
        for q in running:
            if shares[q.order] and q.done == 0:
                self.begin_with_pages_of_others(q, running, computed)
                shares[q.order] = min(shares[q.order], len(q.tokens) - q.done)

        def need(q: Sequence) -> int:
            return self.pages(q.done + shares[q.order]) - q.num_pages if shares.get(q.order) else 0

        while sum(map(need, running)) > self.free:
            youngest = running.pop()
            youngest.runs, youngest.done, youngest.pages = False, 0, []
            del shares[youngest.order]
            self.num_preempted += 1
        self.plan = []
        for s, q in enumerate(self.slots):
            if q is not None and shares.get(q.order):
                while q.num_pages < self.pages(q.done + shares[q.order]):
                    q.pages.append(object())
                self.plan.append((s, q.done, shares[q.order]))
                q.done += shares[q.order]

    def begin_with_pages_of_others(self, q: Sequence, running: list[Sequence], computed: dict[int, int]) -> None:
        def common(other: Sequence) -> int:
            most = min(computed[other.order], (len(q.tokens) - 1) // self.page_size)
            tokens = zip(q.tokens, other.tokens, strict=False)
            same = next((i for i, (a, b) in enumerate(tokens) if a != b), min(len(q.tokens), len(other.tokens)))
            return 0 if other is q else min(most, same // self.page_size)

        best = max(running, key=lambda other: (common(other), self.slots.index(other)))
        q.pages = best.pages[: common(best)]
        q.done = len(q.pages) * self.page_size
        self.num_shared += len(q.pages)


def check(kernel: Kernel, ours: Reference) -> None:
    """The plan and the state of the kernel are those of the reference, and no page has two owners."""
    at = 0
    numbers = {s: (begin, number) for s, begin, number in ours.plan}
    for s in range(kernel.S):
        begin, number = numbers.get(s, (0, 0))
        assert int(kernel.number[s]) == number
        output = -1
        if number:
            tokens = ours.slots[s].tokens
            assert int(kernel.first[s]) == at
            assert kernel.ids[at : at + number].tolist() == tokens[begin : begin + number]
            assert kernel.positions[at : at + number].tolist() == list(range(begin, begin + number))
            assert kernel.sequences[at : at + number].tolist() == [s] * number
            output = at + number - 1 if begin + number == len(tokens) else -1
        assert int(kernel.output[s]) == output
        at += number
    assert int(kernel.num_tokens) == at <= kernel.T
    assert at or not ours.live or not ours.has_room, "nothing happens, though something could"
    names: dict[object, int] = {}  # of pages of the reference, in the kernel
    users = [0] * kernel.free.shape[1]
    for s, q in enumerate(ours.slots):
        status, ticket, length, done, max_length, num_pages, order, is_new = kernel.slots[:, s].tolist()
        assert is_new == (s in ours.new)
        if q is None:
            assert (status, num_pages) == (FREE.value, 0)
            continue
        assert status == (RUNS.value if q.runs else WAITS.value)
        assert (ticket, length, done) == (q.ticket, len(q.tokens), q.done)
        assert (max_length, num_pages) == (q.request.max_length, q.num_pages)
        assert num_pages == -(-done // kernel.page_size), "more than a page is wasted"
        assert kernel.tokens[s, :length].tolist() == q.tokens
        for page, name in zip(q.pages, kernel.table[s, :num_pages].tolist(), strict=True):
            assert names.setdefault(page, name) == name
            users[name] += 1
    num_free = int(kernel.counters[NUM_FREE_PAGES.value])
    assert sorted([*names.values(), *kernel.free[0, :num_free].tolist()]) == list(range(len(users)))
    assert kernel.free[1].tolist() == users
    assert int(kernel.counters[NUM_SHARED.value]) == ours.num_shared
    assert int(kernel.counters[NUM_PREEMPTIONS.value]) == ours.num_preempted
    assert int(kernel.counters[LOOKS.value]) == ours.looks


def run(kernel: Kernel, ours: Reference, rng: np.random.Generator, num_steps: int, first: int = 0) -> list[int]:
    """A launch with random requests, cancels and pauses of the host; until all is done. Returns who was preempted."""
    rings = HostRings(kernel.mailbox.numpy(), kernel.rings)
    rings.num_requests = first  # counters near 2**31
    rings.num_taken = first
    for word in (1, 2, 8, 9):
        kernel.mailbox[word] = first
    for word in (SEEN.value + 1, SEEN.value + 2, NUM_ADMITTED.value, NUM_RESULTS.value):
        kernel.counters[word] = first
    open_tickets: set[int] = set()
    expected, number, closed, waits = [], 0, False, False
    for step in range(num_steps + 400):
        busy = step < num_steps
        for _ in range(int(rng.integers(4)) if busy else 0):
            length = int(rng.integers(1, kernel.L))
            prompt = torch.from_numpy(rng.integers(0, 50, length))
            if rng.random() < 0.8:  # the same beginning as others
                same = int(rng.integers(length // 2, length)) + 1
                prompt[:same] = torch.arange(same) % 7
            ends = tuple(rng.integers(0, 50, int(rng.integers(3))).tolist())
            request = GenerationRequest(prompt, int(rng.integers(length + 1, kernel.L + 1)), ends)
            ticket = rings.put(request)
            if ticket is not None:
                assert ticket not in open_tickets
                open_tickets.add(ticket)
                ours.queue.append((ticket, request))
                number += 1
        if open_tickets and busy and rng.random() < 0.1:
            ticket = int(rng.choice(sorted(open_tickets)))
            rings.cancel(ticket)
            ours.cancelled.add(ticket)
            ours.num_cancels += 1
        if not busy and not closed:
            rings.stop(when_done=True)
            closed = True
        if rng.random() < 0.1 and busy:
            waits = not waits  # the host sleeps for a while
        chosen = {  # often what prompts that begin alike go on with
            s: length % 7 if rng.random() < 0.7 else int(rng.integers(50)) for s, length in ours.outputs().items()
        }
        for s in range(kernel.S):
            kernel.chosen[s] = chosen.get(s, -5)
        goes_on = kernel.step()
        expected += ours.step(chosen)
        check(kernel, ours)
        if not waits or not busy:
            taken = rings.take()
            assert [(r.ticket, r.token, r.reason) for r in taken] == [(r.ticket, r.token, r.reason) for r in expected]
            ours.num_taken += len(taken)
            for r in taken:
                if r.reason:
                    open_tickets.remove(r.ticket)
                    ours.cancelled.discard(r.ticket)
            expected = []
        if not goes_on:
            break
    assert not goes_on and not open_tickets and not ours.live and not ours.queue, "the launch does not end"
    assert closed
    return number


@settings(max_examples=int(sys.argv[2]) if len(sys.argv) > 2 else 8, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 5), st.integers(0, 9), st.integers(3, 20), st.integers(1, 6), st.integers(0, 6),
    st.sampled_from([8, 32]), st.sampled_from([0, (1 << 31) - 4, (1 << 32) - 2]), st.integers(0, 1 << 30),
)  # fmt: skip
def random(S, more_tokens, L, page_size, more_pages, results, first, seed) -> None:
    """Odd sizes, scarce pages, results rings that are often full, counters that wrap around."""
    num_pages = -(-L // page_size) + more_pages
    rings = RingSizes(tickets=8, results=results, prompts=next_power_of_2(2 * L))
    kernel = Kernel(S, S + more_tokens, L, page_size, num_pages, rings)
    ours = Reference(S, S + more_tokens, page_size, num_pages, results, num_admitted=0)
    number = run(kernel, ours, np.random.default_rng(seed), 20, first)
    what = f"{number} requests, {ours.num_preempted} preempted, {ours.num_shared} shared"
    print(f"{S=} {L=} {page_size=} {num_pages=}: {what}", flush=True)


def alike() -> None:
    """Many sequences with the same beginning, at the same time."""
    rings = RingSizes(tickets=16, results=32, prompts=64)
    kernel = Kernel(4, 6, 20, 3, 16, rings)
    ours = Reference(4, 6, 3, 16, 32)
    number = run(kernel, ours, np.random.default_rng(0), 25)
    print(f"{number} requests, {ours.num_preempted} preempted, {ours.num_shared} shared")
    assert ours.num_shared > 8


if __name__ == "__main__":
    tune_interpreter()
    {"random": random, "alike": alike}[sys.argv[1]]()
