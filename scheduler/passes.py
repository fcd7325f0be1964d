"""What each pass of `derive_events` does to a graph: events, waits, signals, and the longest chain of hops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .events import Draft, derive_events, members
from .graph import TaskGraph


@dataclass(frozen=True, slots=True)
class PassEffect:
    """A graph after a pass. Before tasks are fused into events, each pair of tasks is an event of its own."""

    name: str
    num_events: int
    num_waits: int  # of all tasks
    max_waits: int  # of one task
    num_signals: int
    max_signals: int
    chain: list[int]  # tasks at the end of each hop of a longest chain; the step event adds one hop


def pass_effects(graph: TaskGraph) -> list[PassEffect]:
    """Derives the events anew and looks at them after each pass."""
    found: list[PassEffect] = []
    derive_events(graph, lambda name, draft: found.append(_effect(name, draft)))
    return found


def _effect(name: str, draft: Draft) -> PassEffect:
    num_tasks = len(draft.graph.tasks)
    if not draft.edges:
        needed = [list(_needs(draft, task)) for task in range(num_tasks)]
        waits = [sum(tasks.bit_count() for tasks in sets) for sets in needed]
        signals = [0] * num_tasks
        for tasks, times in _counted(needed).items():
            for task in members(tasks):
                signals[task] += times
        return _summary(name, sum(waits), waits, signals, _longest_chain(needed))
    waits, signals = [0] * num_tasks, [0] * num_tasks
    needed = [[] for _ in range(num_tasks)]
    for number, event in draft.edges.items():
        by_value = draft.edge_signals.get(number, ())
        producers = sum(1 << task for task in {*event.producers, *(task for task, _ in by_value)})
        for task in [*event.consumers, *(task for task, _ in draft.edge_waits.get(number, ()))]:
            waits[task] += 1
            needed[task].append(producers)
        for task in members(producers):
            signals[task] += 1
    num_events = len(draft.edges)
    if draft.events is not None:  # the step event, and those who announce values
        num_events = len(draft.events.events)
        signals = [len(draft.events.may_signal(task)) for task in range(num_tasks)]
    return _summary(name, num_events, waits, signals, _longest_chain(needed))


def _needs(draft: Draft, task: int) -> Iterator[int]:
    """Bit sets of the tasks it waits for, in all steps or in some."""
    yield draft.direct[task]
    yield sum(1 << other for other in {other for other, _ in draft.signalled.get(task, ())})
    for tasks, _ in draft.awaited.get(task, ()):
        yield tasks


def _counted(needed: list[list[int]]) -> dict[int, int]:
    times: dict[int, int] = {}
    for tasks in (tasks for sets in needed for tasks in sets if tasks):
        times[tasks] = times.get(tasks, 0) + 1
    return times


def _summary(name: str, num_events: int, waits: list[int], signals: list[int], chain: list[int]) -> PassEffect:
    return PassEffect(name, num_events, sum(waits), max(waits), sum(signals), max(signals), chain)


def _longest_chain(needed: list[list[int]]) -> list[int]:
    """Each task one hop behind the deepest of those it waits for. Queues are not looked at."""
    depth, previous = [0] * len(needed), [-1] * len(needed)
    deepest: dict[int, int] = {}  # of each set: it comes up once per consumer
    for task, sets in enumerate(needed):
        for tasks in sets:
            if not tasks:
                continue
            if tasks not in deepest:
                deepest[tasks] = max(members(tasks), key=depth.__getitem__)
            if depth[deepest[tasks]] >= depth[task]:
                previous[task], depth[task] = deepest[tasks], depth[deepest[tasks]] + 1
    task = max(range(len(needed)), key=depth.__getitem__, default=-1)
    chain = []
    while task >= 0 and depth[task]:  # the first one has nothing to wait for
        chain.append(task)
        task = previous[task]
    return chain[::-1]
