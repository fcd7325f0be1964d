"""Accesses that happen only in some steps: what they may conflict with, and under which condition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .boxes import intersect, subtract
from .graph import Box, Guard, Region, Task, TaskGraph

Conditional = tuple[int, Guard]  # a task to wait for in steps in which the guard holds


@dataclass(slots=True)
class _Access:
    task: int
    box: Box
    is_write: bool
    guard: Guard | None
    ancestors: int  # bit set of the tasks that are done before `task` in every step


class GuardedHistory:
    """What `AccessHistory` is for other tensors: the open accesses in program order. One by one: such tensors are few
    and small. Only an unguarded write makes one forget what it covers.
    """

    def __init__(self) -> None:
        self._open: list[_Access] = []

    def before(self, region: Region, is_write: bool) -> tuple[int, int, list[Conditional]]:
        """(tasks to wait for, all that those wait for, tasks to wait for in some steps)."""
        direct = beyond = 0
        conditional = []
        for access in self._open:
            if not (is_write or access.is_write) or intersect(access.box, region.box) is None:
                continue
            if access.guard is None and region.guard is None:
                direct |= 1 << access.task
                beyond |= access.ancestors
            elif (guard := both(access.guard, region.guard)) is not None:
                conditional.append((access.task, guard))
        return direct, beyond, conditional

    def record(self, region: Region, is_write: bool, task: int, ancestors: int) -> None:
        if is_write and region.guard is None:
            for access in [a for a in self._open if intersect(a.box, region.box) is not None]:
                self._open.remove(access)
                rest = subtract(access.box, region.box)
                self._open += [_Access(access.task, b, access.is_write, access.guard, access.ancestors) for b in rest]
        self._open.append(_Access(task, region.box, is_write, region.guard, ancestors))


def both(first: Guard | None, second: Guard | None) -> Guard | None:
    """A guard that holds wherever both do; None if they never do. At least one is given.

    Guards of two values have no common one: the second is weaker than both, and so safe.
    """
    if first is None or second is None or first.value != second.value:
        return second or first
    lo, hi = max(first.lo, second.lo), min(first.hi, second.hi)
    return Guard(first.value, lo, hi) if lo < hi else None


def guarded_tensors(graph: TaskGraph) -> set[str]:
    if not graph.values:
        return set()
    return {r.tensor for task in graph.tasks for r in (*task.reads, *task.writes) if r.guard is not None}


def knows(graph: TaskGraph, task: Task, value: str) -> bool:
    """Whether a task may look at a value: it says that it reads (or writes) it, in every step."""
    cell = graph.values[value].region
    return any(
        r.tensor == cell.tensor and r.guard is None and intersect(r.box, cell.box) == cell.box
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
    """A task that depends on one value and knows it waits by that value: one wait, at a counter of its own choice.
    With several values its producers choose, which costs it no wait at all.
    """
    waits: dict[str, list[Conditional]] = defaultdict(list)
    signals, always = [], 0
    several = len({guard.value for _, guard in conditional}) > 1
    for producer, guard in sorted(set(conditional), key=lambda pair: (pair[0], pair[1].value, pair[1].lo)):
        may_wait = knows(graph, graph.tasks[consumer], guard.value)
        may_signal = announced.get(guard.value, consumer) < consumer and knows(
            graph, graph.tasks[producer], guard.value
        )
        if may_signal and (several or not may_wait):
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


def by_number(pairs: Iterable[Conditional]) -> list[tuple[int, Guard]]:
    """(bit set of the tasks, guard): the tasks whose guards hold, for each stretch of numbers where they are the same."""
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
