"""Proof that a schedule is free of deadlock and races, before any launch.

What the kernel does, and all that is trusted here: worker w runs `queues[w]` in order, once per step. Task t waits
until counter[wait[t]] - epoch * count >= 0 (a count of 0 or less is no wait), runs, then increments the counter of
every event in signals[t]. After its queue a worker waits for counter[0], whatever its count, then begins the next
step. Counters have 32 bits, compared as a signed difference, and none is ever reset. `Event.producers` and
`Event.consumers` are not looked at.

In a graph with values, task t then also waits for the events of wait_if[t] whose guards hold, one after another, and
signals those of signal_if[t] whose guards hold too. It looks at the values of wait_if after wait[t] is over, and at
those of signal_if while it runs. Values may have other numbers in every step.

The tasks of a pool are in no queue. Task t of a pool is released by the signal that brings counter[wait[t]] to epoch *
count. A worker that comes to a pool's entry takes tickets, as many as the pool has tasks among all workers, runs the
task that is released as that ticket's, and goes on when no ticket is left. After its last pool it signals event 0 once
more, which the count at the end of the step includes.

A schedule is safe if, in every interleaving and however long the kernel runs,

- no worker waits for ever;
- a worker begins a step only when all tasks of the last one are done: between steps it reads whether to stop, and a
  launch may end there;
- no task starts before one that it conflicts with and that precedes it in the program (else a reader sees the wrong
  version);
- nothing is read from a tensor without data before it is written;
- which worker runs the task of a pool, and when a worker comes to a pool, matters for none of it but the first.

What is checked, in this order:

a. counts: of n signals per step, a wait must count n. With count > n it never ends. With 0 < count < n the surplus
   adds up over the epochs: the wait orders nothing, and after 2^31 / (n - count) steps the difference wraps around
   and it never ends either. So the wait comes after all n signals.
b. deadlock: signals only add, so one greedy run finds every task that can ever run.
c. steps: vector clocks tell exactly which tasks are done when a worker begins the next step; all must be. Each step
   is then like the first one, and a proof for one step is a proof for all.
d. order: the same clocks tell exactly which tasks are done before a task starts.
e. races: conflicting accesses must be ordered as in the program.
f. unwritten reads: the boxes that earlier tasks wrote must cover the box that is read.
g. pools: the worst that waiting in them can do to the queues. In all other checks a task of a pool starts when its
   event lets it, and nothing but events puts it before or after another.

With values, (a) is decided for all numbers at once: each guard asks for one value, so an event's signals are a sum of
one term per value, and a sum of such terms is the same for all numbers exactly if each term is. Counters then stand at
epoch * count between steps, whatever the numbers have been, and each step can be looked at by itself: (b) to (g) are
decided for its numbers, one from each stretch in which all guards say the same. `values.py` turns such a step into
one without values. Where that would be too many combinations, see `apart.py`.

Each check rejects a schedule only if it is unsafe, and together they let no unsafe one pass. `self_check` tests both
halves against all interleavings of small schedules.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .apart import Apart, check_guarded_regions, check_steps
from .errors import (
    CountError,
    MalformedScheduleError,
    ScheduleError,
    StepOverlapError,
    missing_signal_text,
)
from .garbage import without_garbage_collection
from .graph import MAX_SIGNALS, STEP_EVENT, Events, Schedule, TaskGraph, pool_entry
from .order import Order, derive_order
from .pools import check_pools
from .regions import RegionCheck, collect_accesses
from .values import (
    Numbers,
    at_numbers,
    check_values,
    combinations,
    guarded_signals,
    may_hold,
    num_combinations,
    numbers_text,
    representatives,
)

MAX_COMBINATIONS = 512  # of numbers that are tried one by one


@dataclass(frozen=True, slots=True)
class Report:
    """What has been proved."""

    num_tasks: int
    num_events: int
    num_pairs: int  # of conflicting accesses, all ordered
    num_regions_covered: int  # reads of tensors without initial data, all written before
    num_unused_signals: int  # that no wait counts: harmless, but never made by `derive_events`
    seconds: float
    num_values: int = 0
    num_steps: int = 1  # that differ in what guards say, each of which was looked at; 0: too many, see `apart.py`

    def __str__(self) -> str:
        unused = f", signals that nobody waits for: {self.num_unused_signals}" if self.num_unused_signals else ""
        cases = f"{self.num_steps} cases" if self.num_steps else "one value at a time"
        values = f", for all numbers of {self.num_values} values ({cases})" if self.num_values else ""
        return (
            f"verified {self.num_tasks} tasks and {self.num_events} events in {self.seconds:.2f} "
            f"s: {self.num_pairs} conflicting pairs ordered, {self.num_regions_covered} reads "
            f"covered{unused}{values}"
        )


@without_garbage_collection()
def verify(
    graph: TaskGraph,
    events: Events,
    schedule: Schedule,
    max_combinations: int = MAX_COMBINATIONS,
    max_signals: int = MAX_SIGNALS,
) -> Report:
    """Raise a `ScheduleError` that says what to change, or report what has been proved.

    Up to `max_combinations` of the numbers that values may have are tried one by one.
    """
    start = time.perf_counter()
    _check_queues(graph, schedule)
    _check_event_table(graph, events, max_signals)
    if graph.values:
        check_values(graph, events, schedule)
    num_unused_signals = _check_counts(graph, events)
    numbers = representatives(graph, events) if graph.values else {}
    num_steps = num_combinations(numbers)
    if num_steps <= max_combinations or not graph.values:
        checks = [_check_step(graph, events, schedule, chosen) for chosen in combinations(numbers)]
        num_pairs, num_regions_covered = (max(sizes) for sizes in zip(*checks, strict=True))
    else:
        num_steps = 0
        num_pairs, num_regions_covered = _check_apart(graph, events, schedule, numbers)
    return Report(
        num_tasks=len(graph.tasks),
        num_events=len(events.events),
        num_pairs=num_pairs,
        num_regions_covered=num_regions_covered,
        num_unused_signals=num_unused_signals,
        seconds=time.perf_counter() - start,
        num_values=len(graph.values),
        num_steps=num_steps,
    )


def _check_step(graph: TaskGraph, events: Events, schedule: Schedule, numbers: Numbers) -> tuple[int, int]:
    """All that is left to check when the counts are right: one step, in which values have these numbers.

    Returns how many pairs are ordered and how many reads are covered.
    """
    if not graph.values:
        return _check_order(graph, events, schedule)
    try:
        return _check_order(*at_numbers(graph, events, schedule, numbers))
    except ScheduleError as error:
        raise type(error)(f"{error} (in a step with {numbers_text(numbers)})") from None


def _check_apart(
    graph: TaskGraph, events: Events, schedule: Schedule, numbers: dict[str, list[int]]
) -> tuple[int, int]:
    """The same for all numbers at once, where they are too many: see `apart.py`."""
    apart = Apart(graph, events, schedule, numbers)
    everything = apart.everything()
    derive_order(*everything)
    if schedule.pools:
        check_pools(*everything)
    order, sure = apart.order()
    check_steps(apart, order)
    regions = RegionCheck(apart.parts, sure, order)
    for tensor in collect_accesses(apart.parts):
        regions.check(tensor)
    num_pairs, num_reads = check_guarded_regions(apart, order)
    return regions.num_pairs + num_pairs, regions.num_regions_covered + num_reads


def _check_order(graph: TaskGraph, events: Events, schedule: Schedule) -> tuple[int, int]:
    accesses = collect_accesses(graph)
    order = derive_order(graph, events, schedule)
    if schedule.pools:
        check_pools(graph, events, schedule)
    _check_steps(graph, order)
    regions = RegionCheck(graph, events, order)
    for tensor in accesses:
        regions.check(tensor)
    return regions.num_pairs, regions.num_regions_covered


def _check_queues(graph: TaskGraph, schedule: Schedule) -> None:
    placed: dict[int, str] = {}
    places = [*(f"worker {w}" for w in range(len(schedule.queues))), *(f"pool {p}" for p in range(len(schedule.pools)))]
    for place, tasks in zip(places, [*schedule.static_queues(), *schedule.pools], strict=True):
        for task in tasks:
            if not 0 <= task < len(graph.tasks):
                raise MalformedScheduleError(
                    f"{place} runs task {task}, but the graph has {len(graph.tasks)} tasks; schedule this graph again"
                )
            if task in placed:
                raise MalformedScheduleError(
                    f"{graph.task_name(task)} is queued twice, on {placed[task]} and {place}; remove one"
                )
            placed[task] = place
    if len(placed) < len(graph.tasks):
        lost = next(task for task in range(len(graph.tasks)) if task not in placed)
        raise MalformedScheduleError(f"{graph.task_name(lost)} is in no queue; append it to one")
    entries = {entry for queue in schedule.queues for entry in queue if entry < 0}
    if entries != {pool_entry(pool) for pool in range(len(schedule.pools))} or not all(schedule.pools):
        raise MalformedScheduleError(
            f"queues name pools {sorted(map(pool_entry, entries))}, but there are {len(schedule.pools)}; every pool"
            " needs tasks and a worker that comes to it"
        )


def _check_event_table(graph: TaskGraph, events: Events, max_signals: int) -> None:
    num_tasks, num_events = len(graph.tasks), len(events.events)
    if not len(events.wait) == len(events.signals) == num_tasks:
        raise MalformedScheduleError(
            f"{len(events.wait)} waits and {len(events.signals)} signal lists for {num_tasks} "
            "tasks; derive the events of this graph again"
        )
    if num_events == 0:
        raise MalformedScheduleError("there is no step event; event 0 must exist")
    for task in range(num_tasks):
        wait, signals = events.wait[task], events.signals[task]
        if not -1 <= wait < num_events or not all(0 <= event < num_events for event in signals):
            raise MalformedScheduleError(
                f"{graph.task_name(task)} waits for event {wait} and signals {signals}, but only "
                f"events 0 to {num_events - 1} exist; derive the events of this graph again"
            )
        if len(signals) > max_signals:
            raise MalformedScheduleError(
                f"{graph.task_name(task)} signals {len(signals)} events, but a descriptor holds "
                f"{max_signals}; merge some of them"
            )


def _check_counts(graph: TaskGraph, events: Events) -> int:
    """Every wait must count the signals of its event; returns how many signals no wait counts."""
    num_signals = Counter(event for signals in events.signals for event in signals)
    by_value = guarded_signals(graph, events)
    waiter: dict[int, int | None] = {}  # the first task that waits for each event
    waits = [(event, task) for task, event in enumerate(events.wait) if event >= 0]
    waits += [(use.event, task) for task, uses in events.wait_if.items() for use in uses if may_hold(graph, use.guard)]
    for event, task in waits:
        if events.events[event].count > 0:
            waiter.setdefault(event, task)
    waiter.setdefault(STEP_EVENT, None)
    for event, task in waiter.items():
        for some in set(by_value.get(event, (0, 0))):
            if events.events[event].count != num_signals[event] + some:
                raise CountError(_count_text(graph, events, event, task, num_signals[event] + some))
    unused = sum(number for event, number in num_signals.items() if event not in waiter)
    return unused + sum(most for event, (_, most) in by_value.items() if event not in waiter)


def _count_text(graph: TaskGraph, events: Events, event: int, waiter: int | None, signalled: int) -> str:
    count = events.events[event].count
    who = "every worker" if waiter is None else graph.task_name(waiter)
    outcome = "the wait never ends" if count > signalled else "the surplus adds up until the wait orders nothing"
    by_value = {t for t, uses in events.signal_if.items() if any(use.event == event for use in uses)}
    producers = [graph.task_name(t) for t, signals in enumerate(events.signals) if event in signals or t in by_value]
    some = " for some numbers" if by_value else ""
    given = f"{', '.join(producers[:3])}{', ...' if len(producers) > 3 else ''} give {signalled}{some}"
    suspect = "" if waiter is None else missing_signal_text(graph, events, event, waiter)
    return (
        f"{who} waits for {count} signals of event {event} per step, but {given if producers else 'no task gives one'}:"
        f" {outcome}{suspect}. Set the count to {signalled}, or change the signals."
    )


def _check_steps(graph: TaskGraph, order: Order) -> None:
    lengths = np.array([len(chain) for chain in order.chains])
    late = np.argwhere(order.done_in_step < lengths)
    if len(late):
        ahead, chain = late[0].tolist()
        slot = int(order.done_in_step[ahead, chain])
        task = order.chains[chain][slot]
        where = order.place(task) + (f", slot {slot}" if chain < order.num_workers else "")
        raise StepOverlapError(
            f"{graph.task_name(task)} ({where}) may still run when "
            f"worker {ahead} begins the next step: nothing makes it precede the step event. Let it signal event "
            f"{STEP_EVENT} (and raise that count by 1), or an event that leads there."
        )
