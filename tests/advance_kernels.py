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
from tri_mpk.ops import host_words
from tri_mpk.ops.advance import (
    FREE,
    LOOK_INTERVAL,
    LOOKS,
    MISMATCH,
    NUM_ADMITTED,
    NUM_COUNTERS,
    NUM_FREE_PAGES,
    NUM_PAGES,
    NUM_PREEMPTIONS,
    NUM_RESULTS,
    NUM_SHARED,
    RUNS,
    SLOT_FIELDS,
    WAITS,
    RingSizes,
    advance_requests,
)
from tri_mpk.ops.host_words import host_words_tile
from tri_mpk.ops.op import next_power_of_2
from tri_mpk.ops.rings import (
    ASKED_SLOTS,
    HOST_REQUESTS,
    HOST_RESULTS,
    HOST_STOP,
    KERNEL_REQUESTS,
    KERNEL_RESULTS,
    RECORD,
    RECORD_FINGERPRINT,
    STOP_WHEN_DONE,
)
from tri_mpk.rings import HostRings, Result
from tri_mpk.scheduler import device as words


@triton.jit
def look_kernel(
    task, event_ptr, control_ptr, mailbox_ptr, epoch, slots_ptr, counters_ptr, asked_ptr, place,
    TICKETS: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    host_words_tile(
        task, event_ptr, control_ptr, mailbox_ptr, epoch, slots_ptr, counters_ptr, asked_ptr, place,
        TICKETS, S, BLOCK_S, RANKS, True,
    )  # fmt: skip


@triton.jit
def advance_kernel(
    control_ptr, mailbox_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
    first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
    chosen_ptr, logprobs_ptr, asked_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
    TICKETS: tl.constexpr, RESULTS: tl.constexpr, PROMPTS: tl.constexpr,
    S: tl.constexpr, T: tl.constexpr, L: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_PAGES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    advance_requests(
        control_ptr, mailbox_ptr, epoch,
        num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr,
        first_token_ptr, sequence_tokens_ptr, output_token_ptr, page_table_ptr,
        chosen_ptr, logprobs_ptr, asked_ptr, slots_ptr, counters_ptr, records_ptr, tokens_ptr, free_pages_ptr,
        TICKETS, RESULTS, PROMPTS, S, T, L, PAGE_SIZE, BLOCK_S, BLOCK_PAGES, BLOCK_TOKENS, RANKS, True,
    )  # fmt: skip


class Kernel:
    """The tensors of host_words and `advance` on one of several ranks, and one call of both per step."""

    def __init__(
        self, S: int, T: int, L: int, page_size: int, num_pages: int, rings: RingSizes,
        rank: int = 0, asked: torch.Tensor | None = None,
    ):  # fmt: skip
        """`asked`: that of all ranks; None: there is only this one."""
        self.S, self.T, self.L, self.page_size, self.rings = S, T, L, page_size, rings
        self.rank, self.asked = rank, new_asked(1, S) if asked is None else asked
        row = -(-L // page_size)
        int32 = {"dtype": torch.int32}
        self.task = torch.zeros(32, dtype=torch.int64)  # it waits for nothing, and ranks are no distance away
        self.task[words.TASK_SIGNALS.value : words.TASK_SIGNALS.value + 2] = -1
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
        self.events = torch.zeros(1, **int32)
        self.constants = {
            "TICKETS": rings.tickets, "S": S, "BLOCK_S": next_power_of_2(max(S, 2)), "RANKS": len(self.asked),
        }  # fmt: skip

    def look(self) -> None:
        """The beginning of a step."""
        self.epoch += 1
        look_kernel[(1,)](
            self.task, self.events, self.control, self.mailbox, self.epoch, self.slots, self.counters, self.asked,
            self.rank * self.asked.shape[1], **self.constants,
        )  # fmt: skip

    def advance(self) -> bool:
        """The end of a step: whether the launch goes on."""
        advance_kernel[(1,)](
            self.control, self.mailbox, self.epoch,
            self.num_tokens, self.ids, self.positions, self.sequences,
            self.first, self.number, self.output, self.table, self.chosen, self.logprobs, self.asked, self.slots,
            self.counters, self.records, self.tokens, self.free, RESULTS=self.rings.results, PROMPTS=self.rings.prompts,
            T=self.T, L=self.L, PAGE_SIZE=self.page_size,
            BLOCK_PAGES=next_power_of_2(max(self.table.shape[1], 2)),
            BLOCK_TOKENS=4,  # several turns for a page, or several pages in a turn
            **self.constants,
        )  # fmt: skip
        assert int(self.control[words.CONTROL_LAST_EPOCH.value]) == self.epoch
        return int(self.control[words.CONTROL_STOP.value]) == 0


def new_asked(num_ranks: int, S: int) -> torch.Tensor:
    return torch.full((num_ranks, ASKED_SLOTS.value + 2 * S), -9, dtype=torch.int64)


def step_of_all(kernels: list[Kernel]) -> bool:
    """Whether the launch goes on, which all ranks must know from the same step on."""
    for kernel in kernels:
        kernel.look()
    (goes_on,) = {kernel.advance() for kernel in kernels}
    return goes_on


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
    num_ranks: int = 1
    slots: list[Sequence | None] = field(default_factory=list)
    queue: deque = field(default_factory=deque)  # (ticket, request), as handed over by the first host
    num_seen: int = 0  # of the queue: those that were there at the last look
    cancelled: set[int] = field(default_factory=set)  # tickets
    num_written: int = 0
    num_admitted: int = 0
    num_preempted: int = 0
    num_shared: int = 0
    num_steps: int = 0
    blocked_need: int = 0
    looks: bool = True
    plan: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, begin, number)
    # of the hosts: requests they have handed over, and results they have taken; the fewest of those at the last look
    num_handed: list[int] = field(default_factory=list)
    num_taken: list[int] = field(default_factory=list)
    num_taken_seen: int = 0

    def __post_init__(self) -> None:
        self.slots = [None] * self.S
        self.num_handed, self.num_taken = [0] * self.num_ranks, [0] * self.num_ranks

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
            self.num_seen, self.num_taken_seen = min(self.num_handed) - self.num_admitted, min(self.num_taken)
            if self.num_ranks > 1:  # so many are compared
                self.num_seen = min(self.num_seen, self.S)
        results = self.deliver(chosen)
        new = self.admit()
        self.share()
        self.looks = len(self.live) < self.S or not self.plan or self.num_steps % LOOK_INTERVAL.value == 0
        self.num_steps += 1
        self.new = new
        return results

    def deliver(self, chosen: dict[int, int]) -> list[Result]:
        looks_at_cancelled = self.looks and self.has_room
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


@dataclass
class Host:
    """Of one rank. All but the first come late, and all sleep now and then."""

    rings: HostRings
    backlog: deque = field(default_factory=deque)
    tickets: list[int] = field(default_factory=list)  # of all its requests
    expected: list[Result] = field(default_factory=list)
    sleeps: bool = False


def some_request(rng: np.random.Generator, L: int) -> GenerationRequest:
    length = int(rng.integers(1, L))
    prompt = torch.from_numpy(rng.integers(0, 50, length))
    if rng.random() < 0.8:  # the same beginning as others
        same = int(rng.integers(length // 2, length)) + 1
        prompt[:same] = torch.arange(same) % 7
    ends = tuple(rng.integers(0, 50, int(rng.integers(3))).tolist())
    return GenerationRequest(prompt, int(rng.integers(length + 1, L + 1)), ends)


def run(kernels: list[Kernel], ours: Reference, rng: np.random.Generator, num_steps: int, first: int = 0) -> int:
    """A launch with random requests, cancels and pauses of the hosts; until all is done. Returns how many requests."""
    hosts = [Host(HostRings(kernel.mailbox.numpy(), kernel.rings)) for kernel in kernels]
    for kernel, host in zip(kernels, hosts, strict=True):
        host.rings.num_requests = host.rings.num_taken = first  # counters near 2**31
        for word in (HOST_REQUESTS, HOST_RESULTS, KERNEL_REQUESTS, KERNEL_RESULTS):
            kernel.mailbox[word.value] = first
        for word in (NUM_ADMITTED, NUM_RESULTS):
            kernel.counters[word.value] = first
    open_tickets: set[int] = set()  # whose ends the first host has not seen
    number = 0
    for step in range(num_steps + 400):
        busy = step < num_steps
        for _ in range(int(rng.integers(4)) if busy and not hosts[0].backlog else 0):
            request = some_request(rng, kernels[0].L)
            number += 1
            for host in hosts:
                host.backlog.append(request)
        for rank, host in enumerate(hosts):
            if busy and rng.random() < 0.1:
                host.sleeps = not host.sleeps
            if busy and rank > 0 and rng.random() < 0.5:
                continue
            while host.backlog and (rank == 0 or len(host.tickets) < len(hosts[0].tickets)):
                ticket = host.rings.put(host.backlog[0])
                if ticket is None:
                    break
                request = host.backlog.popleft()
                host.tickets.append(ticket)
                ours.num_handed[rank] += 1
                if rank == 0:
                    assert ticket not in open_tickets
                    open_tickets.add(ticket)
                    ours.queue.append((ticket, request))
            if not busy and not host.backlog:
                host.rings.stop(when_done=True)
        if open_tickets and busy and rng.random() < 0.1 and len({len(host.tickets) for host in hosts}) == 1:
            ticket = int(rng.choice(sorted(open_tickets)))
            hosts[rng.integers(len(hosts))].rings.cancel(ticket)
            ours.cancelled.add(ticket)
        chosen = {  # often what prompts that begin alike go on with
            s: length % 7 if rng.random() < 0.7 else int(rng.integers(50)) for s, length in ours.outputs().items()
        }
        for kernel in kernels:
            for s in range(kernel.S):
                kernel.chosen[s] = chosen.get(s, -5)
        goes_on = step_of_all(kernels)
        results = ours.step(chosen)
        for rank, (kernel, host) in enumerate(zip(kernels, hosts, strict=True)):
            check(kernel, ours)
            host.expected += results
            if host.sleeps and busy:
                continue
            taken = host.rings.take()
            found, expected = ([(r.ticket, r.token, r.reason) for r in list_] for list_ in (taken, host.expected))
            assert found == expected
            ours.num_taken[rank] += len(taken)
            host.expected = []
            if rank == 0:
                ended = {r.ticket for r in taken if r.reason}
                open_tickets -= ended
                ours.cancelled -= ended
        if not goes_on:
            break
    assert not goes_on and not open_tickets and not ours.live and not ours.queue, "the launch does not end"
    assert not any(host.backlog for host in hosts) and not busy
    assert all(int(kernel.counters[MISMATCH.value]) == 0 for kernel in kernels)
    assert all(host.tickets == hosts[0].tickets for host in hosts)
    return number


def new_kernels(num_ranks: int, S: int, T: int, L: int, page_size: int, num_pages: int, rings: RingSizes):
    asked = new_asked(num_ranks, S)
    kernels = [Kernel(S, T, L, page_size, num_pages, rings, rank, asked) for rank in range(num_ranks)]
    return kernels, Reference(S, T, page_size, num_pages, rings.results, num_ranks)


def launch(S, more_tokens, L, page_size, more_pages, results, first, seed, num_ranks) -> None:
    num_pages = -(-L // page_size) + more_pages
    rings = RingSizes(tickets=8, results=results, prompts=next_power_of_2(2 * L))
    kernels, ours = new_kernels(num_ranks, S, S + more_tokens, L, page_size, num_pages, rings)
    number = run(kernels, ours, np.random.default_rng(seed), 20, first)
    what = f"{number} requests, {ours.num_preempted} preempted, {ours.num_shared} shared"
    print(f"{S=} {L=} {page_size=} {num_pages=}: {what}", flush=True)


@settings(max_examples=int(sys.argv[2]) if len(sys.argv) > 2 else 8, deadline=None, derandomize=True, database=None)
@given(
    S=st.integers(1, 5), more_tokens=st.integers(0, 9), L=st.integers(3, 20), page_size=st.integers(1, 6),
    more_pages=st.integers(0, 6), results=st.sampled_from([8, 32]),
    first=st.sampled_from([0, (1 << 31) - 4, (1 << 32) - 2]), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def random(**sizes: int) -> None:
    """Odd sizes, scarce pages, results rings that are often full, counters that wrap around."""
    launch(**sizes, num_ranks=1)


def alike() -> None:
    """Many sequences with the same beginning, at the same time."""
    rings = RingSizes(tickets=16, results=32, prompts=64)
    kernels, ours = new_kernels(1, 4, 6, 20, 3, 16, rings)
    number = run(kernels, ours, np.random.default_rng(0), 25)
    print(f"{number} requests, {ours.num_preempted} preempted, {ours.num_shared} shared")
    assert ours.num_shared > 8


def ranks() -> None:
    """Hosts that are late and that sleep, each for itself."""
    for num_ranks, first in ((2, (1 << 31) - 4), (3, 0)):
        launch(3, 4, 12, 2, 3, results=8, first=first, seed=num_ranks, num_ranks=num_ranks)


# ---- hosts that want different things ----


def two_hosts() -> tuple[list[Kernel], list[HostRings]]:
    kernels, _ = new_kernels(2, 2, 4, 12, 4, 6, RingSizes(8, 16, 64))
    return kernels, [HostRings(kernel.mailbox.numpy(), kernel.rings) for kernel in kernels]


def short(seed: int = 0, max_length: int = 5) -> GenerationRequest:
    return GenerationRequest(torch.tensor([seed, 1, 2]), max_length, ())


def steps_until_the_end(kernels: list[Kernel], most: int = 30) -> int:
    for step in range(most):
        if not step_of_all(kernels):
            return step + 1
    raise AssertionError("the launch does not end")


def mismatch(kernels: list[Kernel]) -> int:
    """Number of the request that differs, on all ranks; -1: none does."""
    (number,) = {int(kernel.counters[MISMATCH.value]) for kernel in kernels}
    return number - 1


def differ() -> None:
    """Requests that are not the same end the launch on all ranks, whoever is late; so does one that nobody else has."""
    kernels, hosts = two_hosts()
    for host, seeds in zip(hosts, ((0, 1, 2), (0, 1, 3)), strict=True):
        for seed in seeds[: 2 if host is hosts[1] else 3]:
            host.put(short(seed))
    assert step_of_all(kernels) and step_of_all(kernels)
    hosts[1].put(short(3))
    assert steps_until_the_end(kernels) <= LOOK_INTERVAL.value and mismatch(kernels) == 2

    for closes in (True, False):  # the host that has more may have closed, too
        kernels, hosts = two_hosts()
        for host, number in zip(hosts, (2, 3), strict=True):
            for seed in range(number):
                host.put(short(seed))
        assert step_of_all(kernels)
        hosts[0].stop(when_done=True)
        if closes:
            hosts[1].stop(when_done=True)
        steps_until_the_end(kernels)
        assert mismatch(kernels) == 2
        for host in hosts:  # those that all have submitted are done
            assert [r.ticket for r in host.take() if r.reason == "length"] == [0, 1]


def stop() -> None:
    """One host stops all at once; when done, all must say so."""
    kernels, hosts = two_hosts()
    for host in hosts:
        host.put(short())
    assert step_of_all(kernels)
    hosts[1].stop(when_done=False)
    assert steps_until_the_end(kernels) == 1 and mismatch(kernels) == -1

    kernels, hosts = two_hosts()
    hosts[1].stop(when_done=True)
    assert all(step_of_all(kernels) for _ in range(3))
    hosts[0].put(short())
    hosts[1].put(short())
    hosts[0].stop(when_done=True)
    assert steps_until_the_end(kernels) > 1 and mismatch(kernels) == -1


def look() -> None:
    """A row has the words of the host; they stay in steps that do not look, and are not acted upon."""
    kernels, hosts = two_hosts()
    kernel, host = kernels[1], hosts[1]
    tickets = [host.put(short(seed)) for seed in range(2)]
    kernel.look()
    row = kernel.asked[1]
    prints = [int(host.records[ticket, RECORD_FINGERPRINT.value]) for ticket in tickets]
    assert row.tolist() == [0, 2, 0, 0, 0, 0, *prints]
    assert (kernel.asked[0] == -9).all()
    kernel.counters[LOOKS.value] = 0
    host.put(short(2))
    kernel.look()
    assert row[HOST_REQUESTS.value] == 2

    kernels, hosts = two_hosts()
    for host in hosts:
        for seed in range(2):
            host.put(short(seed, max_length=12))
    assert step_of_all(kernels) and step_of_all(kernels)
    assert not kernels[0].counters[LOOKS.value]
    kernels[0].asked[1, ASKED_SLOTS.value + 1] = 1  # of a request that is over
    assert step_of_all(kernels)
    assert not any(result.reason for host in hosts for result in host.take())
    hosts[1].cancel(1)
    assert all(step_of_all(kernels) for _ in range(LOOK_INTERVAL.value))
    for host in hosts:
        assert [r.ticket for r in host.take() if r.reason == "cancelled"] == [1]


def order() -> None:
    """A host that submits and stops while its words are read: a stop never comes without the requests before it."""
    kernels, hosts = two_hosts()
    acquired = host_words.acquired_word

    def slowly(word_ptr: object, portable: bool) -> object:
        value = acquired(word_ptr, portable)
        hosts[0].put(short())
        hosts[0].stop(when_done=True)
        return value

    host_words.acquired_word = slowly
    kernels[0].look()
    row = kernels[0].asked[0]
    assert (int(row[HOST_STOP.value]), int(row[HOST_REQUESTS.value])) == (0, 1)
    kernels[0].look()
    assert (int(row[HOST_STOP.value]), int(row[HOST_REQUESTS.value])) == (STOP_WHEN_DONE.value, 3)


if __name__ == "__main__":
    tune_interpreter()
    {f.__name__: f for f in (random, alike, ranks, differ, stop, look, order)}[sys.argv[1]]()
