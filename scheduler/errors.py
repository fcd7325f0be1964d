"""What `verify` can find wrong. Every message names the tasks, the region, and what to change."""

from __future__ import annotations

from .boxes import intersect, region_text
from .graph import Events, Region, TaskGraph


class ScheduleError(ValueError):
    """A schedule that must not be launched."""


class MalformedScheduleError(ScheduleError):
    """The queues or the event table are no schedule of this graph at all."""


class CountError(ScheduleError):
    """A wait counts more or fewer increments than its event gets in one step."""


class DeadlockError(ScheduleError):
    """Workers wait for each other for ever."""


class StepOverlapError(ScheduleError):
    """A task may still be running when another worker begins the next step."""


class RaceError(ScheduleError):
    """Two tasks touch one region, at least one writes, and the program's order is not kept."""


class UnwrittenReadError(ScheduleError):
    """A task reads what no task has written before it."""


def shared_region(graph: TaskGraph, a: int, b: int) -> Region | None:
    """The first region for which the order of `a` and `b` matters."""
    first, second = graph.tasks[a], graph.tasks[b]
    pairs = [(x, y) for x in first.writes for y in (*second.reads, *second.writes)]
    pairs += [(x, y) for x in first.reads for y in second.writes]
    for x, y in pairs:
        if x.tensor == y.tensor and (box := intersect(x.box, y.box)) is not None:
            return Region(x.tensor, box)
    return None


def shared_text(graph: TaskGraph, a: int, b: int) -> str:
    """`L0 a t1 writes and L0 b t0 reads x[0:4]`"""
    region = shared_region(graph, a, b)
    if region is None:
        return f"{graph.task_name(a)} and {graph.task_name(b)} share no region"
    texts = [f"{graph.task_name(task)} {_deed(graph, task, region)}" for task in (a, b)]
    return f"{' and '.join(texts)} {region_text(region.tensor, region.box)}"


def missing_signal_text(graph: TaskGraph, events: Events, event: int, consumer: int) -> str:
    """The likely cause of a wrong count: a task that `consumer` needs does not signal `event`."""
    for task in range(consumer - 1, -1, -1):
        if event not in events.signals[task] and shared_region(graph, task, consumer) is not None:
            shared, name = shared_text(graph, task, consumer), graph.task_name(task)
            return f"; {shared}, but {name} does not signal it"
    return ""


def _deed(graph: TaskGraph, task: int, region: Region) -> str:
    def touches(regions: tuple[Region, ...]) -> bool:
        return any(r.tensor == region.tensor and intersect(r.box, region.box) for r in regions)

    return "writes" if touches(graph.tasks[task].writes) else "reads"
