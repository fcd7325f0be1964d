"""Accesses that happen only in some steps: what they may conflict with, and under which condition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .boxes import intersect, subtract
from .graph import Box, Guard, Region, Task, TaskGraph

Conditional = tuple[int, Guard]  # a task to wait for in steps in which the guard holds


class _Access(NamedTuple):
    task: int
    guard: Guard | None
    ancestors: int  # bit set of the tasks that are done before `task` in every step


class GuardedHistory:
    """What `AccessHistory` is for other tensors: the open accesses in program order, by box.

    Only an unguarded write makes one forget what it covers.
    """

    def __init__(self) -> None:
        self._open: dict[Box, tuple[list[_Access], list[_Access]]] = {}  # (reads, writes)
        self._near: dict[Box, list[Box]] = {}  # boxes of `_open` that meet a box

    def _meeting(self, box: Box) -> list[Box]:
        if box not in self._near:
            self._near[box] = [other for other in self._open if intersect(other, box) is not None]
        return self._near[box]

    def _sides(self, box: Box) -> tuple[list[_Access], list[_Access]]:
        if box not in self._open:
            self._open[box] = [], []
            self._near.clear()
        return self._open[box]

    def before(self, region: Region, is_write: bool) -> tuple[dict[int, int], list[tuple[int, Guard, Guard | None]]]:
        """(tasks to wait for and all that those wait for, tasks to wait for in some steps with their own guards).

        The steps are those in which both guards hold.
        """
        sure = {}
        conditional = []
        guard = region.guard
        for reads, writes in map(self._open.__getitem__, self._meeting(region.box)):
            for task, own, ancestors in (*reads, *writes) if is_write else writes:
                if guard is None and own is None:
                    sure[task] = ancestors
                elif guard is None or own is None:
                    conditional.append((task, guard or own, own))
                elif own.value != guard.value:  # no guard says both: this is weaker than they, and so safe
                    conditional.append((task, guard, own))
                else:
                    lo = own.lo if own.lo > guard.lo else guard.lo
                    hi = own.hi if own.hi < guard.hi else guard.hi
                    if lo < hi:
                        conditional.append((task, Guard(own.value, lo, hi), own))
        return sure, conditional

    def record(self, region: Region, is_write: bool, task: int, ancestors: int) -> None:
        if is_write and region.guard is None:
            for box in list(self._meeting(region.box)):
                gone = [list(side) for side in self._open[box]]
                for side in self._open[box]:
                    side.clear()
                for rest in subtract(box, region.box):
                    for side, old in zip(self._sides(rest), gone, strict=True):
                        side += old
        self._sides(region.box)[is_write].append(_Access(task, region.guard, ancestors))


class WaitsSoFar:
    """Who has been made to wait for whom in which steps: what such a task implies for those behind it."""

    def __init__(self) -> None:
        self._waits: dict[tuple[int, str], dict[Guard, list[int]]] = defaultdict(lambda: defaultdict(list))

    def add(self, task: int, found: Resolved) -> None:
        for producer, guard in (*found.signals, *(pair for pairs in found.waits.values() for pair in pairs)):
            self._waits[producer, guard.value][guard].append(task)

    def imply(self, producer: int, guards: set[Guard | None], before: int) -> bool:
        """Whether one of the tasks `before` waits for `producer` whenever one of the guards holds."""
        return any(
            before >> task & 1
            for guard in guards
            if guard is not None and (producer, guard.value) in self._waits
            for held, tasks in self._waits[producer, guard.value].items()
            if held.lo <= guard.lo and guard.hi <= held.hi
            for task in tasks
        )


def guarded_tensors(graph: TaskGraph) -> set[str]:
    if not graph.values:
        return set()
    return {r.tensor for task in graph.tasks for r in (*task.reads, *task.writes) if r.guard is not None}


def knows(graph: TaskGraph, task: Task, value: str) -> bool:
    """Whether a task may look at a value: it says that it reads (or writes) it, in every step."""
    cell = graph.values[value].region
    return any(
        r.tensor == cell.tensor and r.guard is None and (r.box == cell.box or intersect(r.box, cell.box) == cell.box)
        for r in (*task.reads, *task.writes)
    )


def announcers(graph: TaskGraph) -> dict[str, int]:
    """Who gives the signals of the absent, per value."""
    return {value: index for index, task in enumerate(graph.tasks) for value in task.announces}


@dataclass(slots=True)
class Resolved:
    """How a task is made to wait for tasks that it needs only in some steps."""

    always: int  # bit set: waited for in every step, because nobody knows better
    signals: tuple[Conditional, ...]  # these signal its event in those steps, whoever announces the value in others
    waits: dict[str, list[Conditional]]  # it waits for these itself, once it knows the value


def resolve(graph: TaskGraph, consumer: int, conditional: list[Conditional], announced: dict[str, int]) -> Resolved:
    """A task that depends on one value and knows it waits by that value, if every number leads to other tasks: an
    index into the event tensor of those. Where numbers share tasks (the first 3 tiles, the first 4) or there are
    several values, the tasks signal by the value, and the counter is the same for all numbers.
    """
    waits: dict[str, list[Conditional]] = defaultdict(list)
    signals, always = [], 0
    pairs = {(task, guard.value) for producer, guard in conditional for task in (producer, consumer)}
    knowing = {pair: knows(graph, graph.tasks[pair[0]], pair[1]) for pair in pairs}
    is_index = len({guard.value for _, guard in conditional}) == 1 and _no_task_twice(conditional)
    for producer, guard in sorted(set(conditional), key=lambda pair: (pair[0], pair[1].value, pair[1].lo)):
        may_wait = knowing[consumer, guard.value]
        may_signal = announced.get(guard.value, consumer) < consumer and knowing[producer, guard.value]
        if may_signal and not (may_wait and is_index):
            signals.append((producer, guard))
        elif may_wait:
            waits[guard.value].append((producer, guard))
        else:
            always |= 1 << producer
    return Resolved(
        always,
        tuple((p, g) for p, g in signals if not always >> p & 1),
        {value: [(p, g) for p, g in pairs if not always >> p & 1] for value, pairs in waits.items()},
    )


def _no_task_twice(pairs: list[Conditional]) -> bool:
    sets = [tasks for tasks, _ in by_number(pairs)]
    return sum(tasks.bit_count() for tasks in sets) == len({task for task, _ in pairs})


def by_number(pairs: Iterable[Conditional]) -> list[tuple[int, Guard]]:
    """(bit set of the tasks whose guards hold, guard), for each stretch of numbers where they are the same."""
    pairs = list(pairs)
    ends = sorted({end for _, guard in pairs for end in (guard.lo, guard.hi)})
    found: list[tuple[int, Guard]] = []
    for lo, hi in zip(ends, ends[1:], strict=False):
        tasks = sum(1 << task for task in {task for task, guard in pairs if guard.lo <= lo < guard.hi})
        if found and found[-1][0] == tasks and found[-1][1].hi == lo:
            found[-1] = tasks, Guard(pairs[0][1].value, found[-1][1].lo, hi)
        elif tasks:
            found.append((tasks, Guard(pairs[0][1].value, lo, hi)))
    return found
