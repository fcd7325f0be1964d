"""Brute force for graphs with values: in every epoch they have any numbers, whatever they had before.

Nothing is concluded from guards: numbers are tried one by one, and counters are added up as the epochs go.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .errors import (
    DeadlockError,
    MalformedScheduleError,
    RaceError,
    ScheduleError,
    StepOverlapError,
    UnwrittenReadError,
)
from .explore import Cell, Exploration, cells
from .graph import STEP_EVENT, Events, Schedule, TaskGraph

# steps of each worker since the last epoch that all have ended; the numbers of this epoch and of the next (which of
# the combinations); by how many signals each counter is ahead of epoch * count, modulo a power of two
State = tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]]


@dataclass(slots=True)
class _Numbers:
    """An epoch in which values have given numbers."""

    waits: list[list[int]]  # per task, static one first
    sums: list[list[list[int]]]  # [worker][slot][event]: signals of the epoch before that slot
    earlier: list[list[int]]  # per task, those that it conflicts with
    writers: list[list[int]]  # per task, those of the values that it waits by
    reads_unwritten: bool


class ValueMachine:
    """`explore.Machine`, whose worker's steps are the same, without pools."""

    def __init__(self, graph: TaskGraph, events: Events, schedule: Schedule) -> None:
        if schedule.pools:
            raise ValueError("graphs with values and pools are not explored; leave one of them out")
        self.graph, self.events, self.queues = graph, events, schedule.queues
        self.count = [event.count for event in events.events]
        ranges = (range(value.lo, value.hi) for value in graph.values.values())
        self.epochs = [self._epoch(dict(zip(graph.values, n, strict=True))) for n in itertools.product(*ranges)]
        waited = {event for epoch in self.epochs for waits in epoch.waits for event in waits}
        self.waited = [event == STEP_EVENT or event in waited for event in range(len(self.count))]
        self.totals = [[sum(sums[-1][e] for sums in n.sums) for e in range(len(self.count))] for n in self.epochs]
        most = max(map(abs, itertools.chain([1], self.count, *self.totals)))
        self.modulus = 1 << (4 * most).bit_length()

    def _epoch(self, numbers: dict[str, int]) -> _Numbers:
        graph, events = self.graph, self.events
        held = {
            kind: [
                [use.event for use in uses.get(task, ()) if use.guard.holds(numbers[use.guard.value])]
                for task in range(len(graph.tasks))
            ]
            for kind, uses in (("wait", events.wait_if), ("signal", events.signal_if))
        }
        waits = [
            [event for event in [events.wait[task], *held["wait"][task]] if event >= 0 and self.count[event] > 0]
            for task in range(len(graph.tasks))
        ]
        sums = []
        for queue in self.queues:
            before = [[0] * len(self.count)]
            for task in queue:
                given = [*events.signals[task], *held["signal"][task]]
                before.append([total + given.count(event) for event, total in enumerate(before[-1])])
            sums.append(before)
        touched = [self._touched(task, numbers) for task in range(len(graph.tasks))]
        looked_at = [self._looked_at(task) for task in range(len(graph.tasks))]
        earlier, writers, written, unwritten = [], [], set(), False
        for b, (reads, writes) in enumerate(touched):
            earlier.append([a for a in range(b) if touched[a][1] & (reads | writes) or touched[a][0] & writes])
            writers.append([a for a in range(b) if touched[a][1] & looked_at[b]])
            missing = (reads | looked_at[b]) - written
            unwritten |= any(not graph.tensors[cell[0]].initialised for cell in missing)
            written |= writes
        return _Numbers(waits, sums, earlier, writers, unwritten)

    def _touched(self, task: int, numbers: dict[str, int]) -> tuple[set[Cell], set[Cell]]:
        found: list[set[Cell]] = []
        for side in (self.graph.tasks[task].reads, self.graph.tasks[task].writes):
            held = (r for r in side if r.guard is None or r.guard.holds(numbers[r.guard.value]))
            found.append(set().union(*map(cells, held)))
        return found[0], found[1]

    def _looked_at(self, task: int) -> set[Cell]:
        """Cells of the values that a task waits by."""
        names = {use.guard.value for use in self.events.wait_if.get(task, ())}
        return set().union(*(cells(self.graph.values[name].region) for name in names))

    def starts(self) -> list[State]:
        choices = range(len(self.epochs))
        none = (0,) * len(self.count)
        return [((0,) * len(self.queues), pair, none) for pair in itertools.product(choices, choices)]

    def ahead(self, state: State, epoch: int) -> list[int]:
        """By how many signals each counter is ahead of its threshold in this epoch (0) or the next (1)."""
        progress, (now, following), drift = state
        found = [d - (epoch + 1) * count for d, count in zip(drift, self.count, strict=True)]
        for worker, (queue, steps) in enumerate(zip(self.queues, progress, strict=True)):
            done, slot = divmod(steps, len(queue) + 1)
            parts = [self.epochs[now].sums[worker][slot if done == 0 else -1]]
            if done:
                parts.append(self.epochs[following].sums[worker][slot])
            for part in parts:
                found = [a + b for a, b in zip(found, part, strict=True)]
        return found

    def passes(self, ahead: list[int], event: int) -> bool:
        return ahead[event] % self.modulus < self.modulus // 2

    def moves(self, state: State) -> tuple[list[tuple[int, int | None]], bool]:
        """(what can happen next: (worker, task or None for the step event)), whether a value may be looked at early."""
        progress, pair, _ = state
        ahead = [self.ahead(state, epoch) for epoch in (0, 1)]
        found, early = [], False
        for worker, (queue, steps) in enumerate(zip(self.queues, progress, strict=True)):
            epoch, slot = divmod(steps, len(queue) + 1)
            if slot == len(queue):
                if self.passes(ahead[epoch], STEP_EVENT):
                    found.append((worker, None))
                continue
            task, numbers = queue[slot], self.epochs[pair[epoch]]
            first = self.events.wait[task]
            if first < 0 or self.count[first] <= 0 or self.passes(ahead[epoch], first):
                early |= not all(self.is_done(state, epoch, writer) for writer in numbers.writers[task])
            if all(self.passes(ahead[epoch], event) for event in numbers.waits[task]):
                found.append((worker, task))
        return found, early

    def after(self, state: State, worker: int) -> list[State]:
        """The states when `worker` has taken its next step: one per choice of numbers where a new epoch comes up."""
        progress, (now, following), drift = state
        progress = (*progress[:worker], progress[worker] + 1, *progress[worker + 1 :])
        sides = list(zip(self.queues, progress, strict=True))
        if not all(steps > len(queue) for queue, steps in sides if queue):
            return [(progress, (now, following), drift)]
        progress = tuple(max(0, steps - len(queue) - 1) for queue, steps in sides)
        sums = zip(drift, self.totals[now], self.count, self.waited, strict=True)
        drift = tuple((d + total - count) % self.modulus * waited for d, total, count, waited in sums)
        return [(progress, (following, choice), drift) for choice in range(len(self.epochs))]

    def is_done(self, state: State, epoch: int, task: int) -> bool:
        worker = next(w for w, queue in enumerate(self.queues) if task in queue)
        queue = self.queues[worker]
        return state[0][worker] > epoch * (len(queue) + 1) + queue.index(task)

    def steps_overlap(self, state: State) -> bool:
        """Whether a worker has begun an epoch before all tasks of the last one were done."""
        sizes = [len(queue) + 1 for queue in self.queues]
        begun = max(steps // size for steps, size in zip(state[0], sizes, strict=True))
        return any(steps + 1 < begun * size for steps, size in zip(state[0], sizes, strict=True) if size > 1)


def explore_values(graph: TaskGraph, events: Events, schedule: Schedule, max_states: int) -> Exploration:
    """As `explore.explore`. A race is also: a task can look at a value before that is written."""
    if not _values_are_sound(graph, events):
        return Exploration(frozenset({MalformedScheduleError}), 0)
    machine = ValueMachine(graph, events, schedule)
    unwritten = any(epoch.reads_unwritten for epoch in machine.epochs)
    faults: set[type[ScheduleError]] = {UnwrittenReadError} if unwritten else set()
    pending = machine.starts()
    known = set(pending)
    while pending:
        state = pending.pop()
        if machine.steps_overlap(state):
            faults.add(StepOverlapError)
            continue
        moves, early = machine.moves(state)
        if not moves:
            faults.add(DeadlockError)
        if early:
            faults.add(RaceError)
        for worker, task in moves:
            if task is not None:
                epoch = state[0][worker] // (len(schedule.queues[worker]) + 1)
                earlier = machine.epochs[state[1][epoch]].earlier[task]
                if not all(machine.is_done(state, epoch, other) for other in earlier):
                    faults.add(RaceError)
            new = [following for following in machine.after(state, worker) if following not in known]
            known.update(new)
            pending += new
        if len(known) > max_states:
            raise ValueError(f"more than {max_states} states; explore a smaller schedule, or raise max_states")
    return Exploration(frozenset(faults), len(known))


def _values_are_sound(graph: TaskGraph, events: Events) -> bool:
    """Whether each value has one number per step before anybody looks at it, and is read by who signals by it."""
    for name, value in graph.values.items():
        (cell,) = cells(value.region)
        writes = [(t, r) for t, task in enumerate(graph.tasks) for r in task.writes if cell in cells(r)]
        if any(region.guard for _, region in writes) or len({task for task, _ in writes}) > 1:
            return False
        for index, task in enumerate(graph.tasks):
            signals = any(use.guard.value == name for use in events.signal_if.get(index, ()))
            waits = any(use.guard.value == name for use in events.wait_if.get(index, ()))
            regions = [*task.reads, *task.writes]
            if (signals or waits or any(r.guard and r.guard.value == name for r in regions)) and any(
                writer > index for writer, _ in writes
            ):
                return False
            if signals and not any(r.guard is None and cell in cells(r) for r in regions):
                return False
    return True
