"""A graph with values, as it is in a step in which they have given numbers: tasks, waits and signals without guards."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from .boxes import intersect
from .errors import MalformedScheduleError
from .graph import Box, Events, Guard, GuardedEvent, Schedule, Task, TaskGraph
from .guards import knows

Numbers = dict[str, int]  # of values in one step


def all_guards(graph: TaskGraph, events: Events) -> Iterator[Guard]:
    for task in graph.tasks:
        yield from (region.guard for region in (*task.reads, *task.writes) if region.guard is not None)
    for uses in (*events.wait_if.values(), *events.signal_if.values()):
        yield from (use.guard for use in uses)


def representatives(graph: TaskGraph, events: Events) -> dict[str, list[int]]:
    """Of each value the numbers that matter: one of each stretch in which all guards say the same."""
    ends: dict[str, set[int]] = {name: {value.lo} for name, value in graph.values.items()}
    for guard in all_guards(graph, events):
        ends[guard.value].add(guard.lo)
        ends[guard.value].add(guard.hi)
    return {name: sorted(n for n in ends[name] if value.lo <= n < value.hi) for name, value in graph.values.items()}


def num_combinations(numbers: dict[str, list[int]]) -> int:
    return math.prod(map(len, numbers.values()))


def combinations(numbers: dict[str, list[int]]) -> Iterator[Numbers]:
    return (dict(zip(numbers, chosen, strict=True)) for chosen in itertools.product(*numbers.values()))


def numbers_text(numbers: Numbers) -> str:
    return ", ".join(f"{name} = {number}" for name, number in numbers.items())


def at_numbers(
    graph: TaskGraph, events: Events, schedule: Schedule, numbers: Numbers
) -> tuple[TaskGraph, Events, Schedule]:
    """The same step without values.

    A task that waits by values becomes several, one behind the other in its queue: the first waits for its static event
    and reads the values, each of the others waits for one event more, and the last one is the task itself.
    """
    made = _Concrete(graph, events, numbers)
    for index in range(len(graph.tasks)):
        made.add(index)

    def renumbered(entries: list[int]) -> list[int]:
        return [new for entry in entries for new in (made.parts[entry] if entry >= 0 else [entry])]

    queues, pools = ([renumbered(side) for side in sides] for sides in (schedule.queues, schedule.pools))
    return made.graph, made.events, Schedule(queues, pools)


class _Concrete:
    def __init__(self, graph: TaskGraph, events: Events, numbers: Numbers) -> None:
        self.source, self.source_events, self.numbers = graph, events, numbers
        self.graph = TaskGraph(graph.ops, [], graph.tensors)
        self.events = Events(events.events, [], [])
        self.parts: dict[int, list[int]] = defaultdict(list)

    def add(self, index: int) -> None:
        task, events = self.source.tasks[index], self.source_events
        waits = [events.wait[index]]
        if index in events.wait_if:
            uses = events.wait_if[index]
            cells = dict.fromkeys(self.source.values[use.guard.value].region for use in uses)
            self._append(index, Task(task.op, task.tile, tuple(cells), (), 0), waits[0], [])
            waits = self._active(uses) or [-1]
            for wait in waits[:-1]:
                self._append(index, Task(task.op, task.tile, (), (), 0), wait, [])
        signals = [*events.signals[index], *self._active(events.signal_if.get(index, ()))]
        reads, writes = (
            tuple(
                replace(r, guard=None) if r.guard else r
                for r in side
                if r.guard is None or r.guard.holds(self.numbers[r.guard.value])
            )
            for side in (task.reads, task.writes)
        )
        self._append(index, Task(task.op, task.tile, reads, writes, task.cost_bytes), waits[-1], signals)

    def _append(self, index: int, task: Task, wait: int, signals: list[int]) -> None:
        self.parts[index].append(len(self.graph.tasks))
        self.graph.tasks.append(task)
        self.events.wait.append(wait)
        self.events.signals.append(signals)

    def _active(self, uses: list[GuardedEvent] | tuple[()]) -> list[int]:
        return [use.event for use in uses if use.guard.holds(self.numbers[use.guard.value])]


# ---- what must hold before numbers are looked at ----


def guarded_signals(graph: TaskGraph, events: Events) -> dict[int, tuple[int, int]]:
    """The fewest and the most guarded signals that each event gets in a step.

    A guard asks for one value, and values are independent, so the extremes of the sum are the sums of the extremes.
    """
    terms: dict[tuple[int, str], list[Guard]] = defaultdict(list)
    for uses in events.signal_if.values():
        for use in uses:
            terms[use.event, use.guard.value].append(use.guard)
    found: dict[int, tuple[int, int]] = {}
    for (event, name), guards in terms.items():
        value = graph.values[name]
        ends = {value.lo, *(end for guard in guards for end in (guard.lo, guard.hi) if value.lo < end < value.hi)}
        sums = [sum(guard.holds(number) for guard in guards) for number in ends]
        fewest, most = found.get(event, (0, 0))
        found[event] = fewest + min(sums), most + max(sums)
    return found


def may_hold(graph: TaskGraph, guard: Guard) -> bool:
    value = graph.values[guard.value]
    return any(guard.holds(number) for number in (value.lo, guard.lo, guard.hi) if value.lo <= number < value.hi)


def check_values(graph: TaskGraph, events: Events, schedule: Schedule) -> None:
    """Raises MalformedScheduleError where somebody looks at a value that is not one of this step."""
    for name, value in graph.values.items():
        if value.lo >= value.hi:
            raise MalformedScheduleError(f"{name} has no number: it is to be from {value.lo} to less than {value.hi}")
    for guard in all_guards(graph, events):
        if guard.value not in graph.values:
            raise MalformedScheduleError(f"a guard asks for {guard.value}, but the graph has no such value")
    for use in (use for uses in (*events.wait_if.values(), *events.signal_if.values()) for use in uses):
        if not 0 <= use.event < len(events.events):
            raise MalformedScheduleError(f"event {use.event} does not exist; derive the events of this graph again")
    writer = writers_of(graph)
    for index, task in enumerate(graph.tasks):
        for name in sorted(_looks_at(task, index, events)):
            if writer[name] > index:
                raise MalformedScheduleError(
                    f"{graph.task_name(index)} looks at {name}, which {graph.task_name(writer[name])} writes later in"
                    " the program; put the writer first"
                )
        for name in sorted({use.guard.value for use in events.signal_if.get(index, ())}):
            if not knows(graph, task, name):
                raise MalformedScheduleError(
                    f"{graph.task_name(index)} signals by {name} without reading it; add its element to the reads"
                )
    _check_pools_without_values(graph, events, schedule)


def _looks_at(task: Task, index: int, events: Events) -> set[str]:
    uses = (*events.wait_if.get(index, ()), *events.signal_if.get(index, ()))
    return {use.guard.value for use in uses} | {r.guard.value for r in (*task.reads, *task.writes) if r.guard}


def writers_of(graph: TaskGraph) -> dict[str, int]:
    """The task that writes each value; -1 if it has its number before the step."""
    found = dict.fromkeys(graph.values, -1)
    at: dict[str, dict[Box, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, value in graph.values.items():
        at[value.region.tensor][value.region.box].append(name)
    for index, task in enumerate(graph.tasks):
        for region in (region for region in task.writes if region.tensor in at):
            cells = at[region.tensor]
            boxes = [region.box] if region.box in cells else [b for b in cells if intersect(b, region.box) is not None]
            for name in (name for box in boxes for name in cells[box]):
                if region.guard is not None or found[name] not in (-1, index):
                    raise MalformedScheduleError(
                        f"{graph.task_name(index)} writes {name} in some steps only, or after another task; a value"
                        " gets one number in every step"
                    )
                found[name] = index
    return found


def _check_pools_without_values(graph: TaskGraph, events: Events, schedule: Schedule) -> None:
    """A released task has nothing left to wait for, and who completes an event by a value releases nobody."""
    by_value = {use.event for uses in events.signal_if.values() for use in uses}
    for task in (task for tasks in schedule.pools for task in tasks):
        if task in events.wait_if or events.wait[task] in by_value:
            raise MalformedScheduleError(
                f"{graph.task_name(task)} is in a pool, but waits for somebody by a value; put it in a queue"
            )
