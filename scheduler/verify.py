"""Proof that a schedule is free of deadlock and races, before any launch.

What the kernel does, and all that is trusted here: worker w runs `queues[w]` in order, once per
step. Task t waits until counter[wait[t]] >= epoch * count, runs, then increments the counter of
every event in signals[t]. After its queue a worker waits until counter[0] >= epoch *
events[0].count, then begins the next step. No counter is ever reset. `Event.producers` and
`Event.consumers` are not looked at.

What follows from that, in the order in which it is checked:

a. counts: with n signals per step, count > n never comes true. With count < n the surplus adds up
   over the epochs, until the wait orders nothing. So count must be n, and the wait then comes after
   all n signals.
b. deadlock: signals only add, so one greedy run finds every task that can ever run.
c. steps: the epochs are separate if every task comes before the step event, so that must hold. Each
   step is then like the first one, and a proof for one step is a proof for all.
d. order: vector clocks tell exactly which tasks are done before a task starts.
e. races: conflicting accesses must be ordered, and as in the program (else a reader sees the wrong
   version).
f. unwritten reads: what is read from a tensor that is not initialised must have been written in
   this step.
g. orphans: an event that is signalled must be waited for, and the other way round.

b, d, e and f are exact: they reject a schedule only if some interleaving goes wrong. a, c and g are
stricter, on purpose: they also reject schedules that happen to be safe, e.g. one worker that never
waits for the step event.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .errors import (
    CountError,
    MalformedScheduleError,
    OrphanSignalError,
    StepOverlapError,
    missing_signal_text,
)
from .graph import MAX_SIGNALS, STEP_EVENT, Events, Schedule, TaskGraph
from .order import Order, derive_order
from .regions import RegionCheck, collect_accesses


@dataclass(frozen=True, slots=True)
class Report:
    """What has been proved."""

    num_tasks: int
    num_events: int
    num_pairs: int  # of conflicting accesses, all ordered
    num_regions_covered: int  # reads of tensors without initial data, all written before
    seconds: float

    def __str__(self) -> str:
        return (
            f"verified {self.num_tasks} tasks and {self.num_events} events in {self.seconds:.2f} "
            f"s: {self.num_pairs} conflicting pairs ordered, {self.num_regions_covered} reads "
            "covered"
        )


def verify(graph: TaskGraph, events: Events, schedule: Schedule) -> Report:
    """Raise a `ScheduleError` that says what to change, or report what has been proved."""
    start = time.perf_counter()
    _check_queues(graph, schedule)
    _check_event_table(graph, events)
    _check_counts(graph, events)
    accesses = collect_accesses(graph)
    order = derive_order(graph, events, schedule)
    _check_steps(graph, events, schedule, order)
    regions = RegionCheck(graph, events, schedule, order)
    for tensor in accesses:
        regions.check(tensor)
    return Report(
        num_tasks=len(graph.tasks),
        num_events=len(events.events),
        num_pairs=regions.num_pairs,
        num_regions_covered=regions.num_regions_covered,
        seconds=time.perf_counter() - start,
    )


def _check_queues(graph: TaskGraph, schedule: Schedule) -> None:
    placed: dict[int, int] = {}
    for worker, queue in enumerate(schedule.queues):
        for task in queue:
            if not 0 <= task < len(graph.tasks):
                raise MalformedScheduleError(
                    f"worker {worker} runs task {task}, but the graph has {len(graph.tasks)} "
                    "tasks; schedule this graph again"
                )
            if task in placed:
                raise MalformedScheduleError(
                    f"{graph.task_name(task)} is queued twice, on workers {placed[task]} and {worker}; remove one"
                )
            placed[task] = worker
    if len(placed) < len(graph.tasks):
        lost = next(task for task in range(len(graph.tasks)) if task not in placed)
        raise MalformedScheduleError(f"{graph.task_name(lost)} is in no queue; append it to one")


def _check_event_table(graph: TaskGraph, events: Events) -> None:
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
        if len(signals) > MAX_SIGNALS:
            raise MalformedScheduleError(
                f"{graph.task_name(task)} signals {len(signals)} events, but a descriptor holds "
                f"{MAX_SIGNALS}; merge some of them"
            )


def _check_counts(graph: TaskGraph, events: Events) -> None:
    num_signals = Counter(event for signals in events.signals for event in signals)
    waiter = {event: task for task, event in reversed(list(enumerate(events.wait))) if event >= 0}
    for event, task in waiter.items():
        if event not in num_signals:
            raise OrphanSignalError(
                f"{graph.task_name(task)} waits for event {event}, which no task "
                f"signals{missing_signal_text(graph, events, event, task)}. Add the signals or "
                "remove the wait."
            )
    for event, signalled in sorted(num_signals.items()):
        if event != STEP_EVENT and event not in waiter:
            task = next(t for t, signals in enumerate(events.signals) if event in signals)
            raise OrphanSignalError(
                f"{graph.task_name(task)} signals event {event}, which no task waits for. Remove "
                "the signal, or add the wait that was meant."
            )
        count = events.events[event].count
        if count != signalled:
            raise CountError(_count_text(graph, events, event, waiter.get(event), signalled))
    if events.events[STEP_EVENT].count != num_signals[STEP_EVENT]:
        raise CountError(_count_text(graph, events, STEP_EVENT, None, 0))


def _count_text(graph: TaskGraph, events: Events, event: int, waiter: int | None, signalled: int) -> str:
    count = events.events[event].count
    who = "every worker" if waiter is None else graph.task_name(waiter)
    outcome = "the wait never ends" if count > signalled else "the surplus adds up until the wait orders nothing"
    producers = [graph.task_name(t) for t, signals in enumerate(events.signals) if event in signals]
    signallers = ", ".join(producers[:3]) + (", ..." if len(producers) > 3 else "") or "no task"
    suspect = "" if waiter is None else missing_signal_text(graph, events, event, waiter)
    return (
        f"{who} waits for {count} signals of event {event} per step, but {signallers} give "
        f"{signalled}: {outcome}{suspect}. Set the count to {signalled}, or change the signals."
    )


def _check_steps(graph: TaskGraph, events: Events, schedule: Schedule, order: Order) -> None:
    lengths = np.array([len(queue) for queue in schedule.queues])
    unfinished = np.flatnonzero(order.done_in_step < lengths)
    if len(unfinished):
        worker = int(unfinished[0])
        task = schedule.queues[worker][order.done_in_step[worker]]
        raise StepOverlapError(
            f"{graph.task_name(task)} (worker {worker}, slot {order.position[task]}) may still run "
            "when other workers begin the next step: nothing makes it precede the step event. Let "
            f"it signal event {STEP_EVENT} (and raise that count by 1), or an event that leads "
            "there."
        )
