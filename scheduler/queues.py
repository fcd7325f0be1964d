"""Queues: which worker runs which task, decided on the host, and what is left to be decided in the kernel.

Queues are in program order, and events only ever point backwards in program order, so the first
unfinished task of the whole graph can always run: these queues never deadlock. A pool stands behind all
tasks of the ops it is made of, so the same holds for it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

from .graph import Events, Schedule, TaskGraph, pool_entry
from .pools import number_pools


def schedule(graph: TaskGraph, events: Events, num_workers: int, dynamic: Collection[int] = ()) -> Schedule:
    """Spread the tasks of each op evenly over the workers by cost.

    A task goes to the worker with the least cost within its op, then with the least cost so far (so
    that an op's remainder lands on workers that had none before), then by rotation. Any program order
    works with any derived events.

    Of the ops in `dynamic`, workers run the tasks as these become ready. Ops that follow each other share a pool. A
    task that waits for nothing has no event to become ready by, and stays in a queue; so does one that waits by a
    value.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} is not supported; choose at least 1")
    tasks_of_op: dict[int, list[int]] = defaultdict(list)
    by_value = {use.event for uses in events.signal_if.values() for use in uses}
    for index, task in enumerate(graph.tasks):
        if task.op not in dynamic or not _can_be_released(events, index, by_value):
            tasks_of_op[task.op].append(index)
    queues: list[list[int]] = [[] for _ in range(num_workers)]
    total = [0] * num_workers
    rotation = 0
    for tasks in tasks_of_op.values():
        costs = {task: graph.tasks[task].cost_bytes for task in tasks}
        for task, worker in _spread(costs, total, rotation):
            queues[worker].append(task)
            total[worker] += costs[task]
        rotation = (rotation + len(tasks)) % num_workers
    queues = [sorted(queue) for queue in queues]
    if not dynamic:
        return Schedule(queues)
    return _with_pools(graph, events, queues, sorted(dynamic))


def _can_be_released(events: Events, task: int, by_value: set[int]) -> bool:
    return events.wait[task] >= 0 and events.wait[task] not in by_value and task not in events.wait_if


def _with_pools(graph: TaskGraph, events: Events, queues: list[list[int]], dynamic: list[int]) -> Schedule:
    placed = {task for queue in queues for task in queue}
    ends: list[int] = []  # the last op of each pool
    pools: list[list[int]] = []
    for _, run in groupby(enumerate(dynamic), key=lambda pair: pair[1] - pair[0]):
        ops = {op for _, op in run}
        if tasks := [t for t, task in enumerate(graph.tasks) if task.op in ops and t not in placed]:
            pools.append(tasks)
            ends.append(max(ops))
    entries = [(end, 1, pool_entry(pool)) for pool, end in enumerate(ends)]
    queues = [sorted([(graph.tasks[t].op, 0, t) for t in queue] + entries) for queue in queues]
    return Schedule([[entry for _, _, entry in queue] for queue in queues], number_pools(events, pools))


def _spread(costs: dict[int, int], total: list[int], rotation: int) -> list[tuple[int, int]]:
    """(task, worker) pairs of one op, the costliest tasks first.

    Tasks of equal cost go to neighbouring workers in their order: 4 equal tasks on 4 workers always
    become 0 1 2 3, and the remainder of 6 tasks goes to two other workers than that of the op
    before.
    """
    num_workers = len(total)
    # (cost within the op, tasks within the op, cost before the op, place in the rotation, worker)
    least = [(0, 0, total[w], (w - rotation) % num_workers, w) for w in range(num_workers)]
    heapq.heapify(least)
    placed = []
    for cost, group in groupby(sorted(costs, key=lambda t: (-costs[t], t)), key=costs.__getitem__):
        tasks = list(group)
        slots = []
        for _ in tasks:
            op_cost, op_tasks, before, rank, worker = least[0]
            heapq.heapreplace(least, (op_cost + cost, op_tasks + 1, before, rank, worker))
            slots.append((op_tasks, worker))
        placed += [(task, worker) for task, (_, worker) in zip(tasks, sorted(slots), strict=True)]
    return placed


@dataclass(frozen=True, slots=True)
class OpBalance:
    """How evenly one op's bytes lie on the workers; `ratio` is 1.0 when all carry the same."""

    op: str
    num_tasks: int
    max_bytes: int
    mean_bytes: float

    @property
    def ratio(self) -> float:
        return self.max_bytes / self.mean_bytes if self.mean_bytes else 1.0


def imbalance(graph: TaskGraph, schedule: Schedule) -> list[OpBalance]:
    """Per op, in program order: the busiest worker against the mean over all, idle ones too."""
    num_workers = len(schedule.queues)
    num_tasks = [0] * len(graph.ops)
    op_bytes = [[0] * num_workers for _ in graph.ops]
    for worker, queue in enumerate(schedule.queues):
        for task in filter(lambda entry: entry >= 0, queue):
            op = graph.tasks[task].op
            num_tasks[op] += 1
            op_bytes[op][worker] += graph.tasks[task].cost_bytes
    return [
        OpBalance(name, num_tasks[op], max(op_bytes[op]), sum(op_bytes[op]) / num_workers)
        for op, name in enumerate(graph.ops)
    ]
