"""Pools of tasks that workers take as they become ready: who releases what, and that none holds up another for ever."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .errors import DeadlockError, MalformedScheduleError
from .graph import Events, Schedule, TaskGraph, pool_entry


@dataclass(frozen=True, slots=True)
class Release:
    """An event lets `num` tasks of a pool run, which are neighbours in it from `first` on."""

    event: int
    pool: int
    first: int
    num: int


def number_pools(events: Events, pools: list[list[int]]) -> list[list[int]]:
    """The pools with tasks that one event releases side by side, otherwise in program order."""
    ordered = []
    for tasks in pools:
        by_event: dict[int, list[int]] = defaultdict(list)
        for task in sorted(tasks):
            by_event[events.wait[task]].append(task)
        ordered.append([task for group in by_event.values() for task in group])
    return ordered


def releases(events: Events, pools: list[list[int]]) -> list[Release]:
    """What each event releases, of pools as `number_pools` makes them."""
    found: dict[int, Release] = {}
    for pool, tasks in enumerate(pools):
        for first, task in enumerate(tasks):
            event = events.wait[task]
            old = found.get(event, Release(event, pool, first, 0))
            if (old.pool, old.first + old.num) != (pool, first):
                raise MalformedScheduleError(
                    f"event {event} releases tasks of pools {old.pool} and {pool} or not side by side; an event can"
                    " release neighbours in one pool: let the ops between them be dynamic too"
                )
            found[event] = Release(event, pool, old.first, old.num + 1)
    return list(found.values())


def check_pools(graph: TaskGraph, events: Events, schedule: Schedule) -> None:
    """Raises DeadlockError if workers can wait for ever in a pool.

    A worker that has taken a ticket stays until it gets a task by it, and that may be the last task of the pool. So at
    worst nobody gets past a pool's entry before all tasks of the pool are done, and that is what is run here; it needs
    counts that equal the number of signals. If this ends, every run does: look at the first task, in the order of this
    run, that another one leaves undone. If it is in a queue, all before it is done, pools included, so its worker has
    come there. If it is in a pool, it has been released, and a worker has come to the pool that goes on taking
    tickets, the oldest released task first. If it does not end, the same workers can be those with the last tickets.
    """
    run = _Barriers(events, schedule)
    run.to_the_end()
    for pool, tasks in enumerate(schedule.pools):
        for task in tasks:
            if task not in run.done:
                raise DeadlockError(_stuck_text(graph, events, schedule, run, pool, task))


class _Barriers:
    """The queues as they run when nobody leaves a pool before it is done."""

    def __init__(self, events: Events, schedule: Schedule) -> None:
        self.events, self.queues, self.pools = events, schedule.queues, schedule.pools
        self.slot = [0] * len(self.queues)
        self.seen = [0] * len(events.events)
        self.left = [len(tasks) for tasks in self.pools]
        self.pool_of = {task: pool for pool, tasks in enumerate(self.pools) for task in tasks}
        self.entered = [False] * len(self.pools)
        self.done: set[int] = set()
        self.released: dict[int, list[int]] = defaultdict(list)  # tasks of a pool that nobody has come for yet
        self.consumers: dict[int, list[int]] = defaultdict(list)
        for task in self.pool_of:
            self.consumers[events.wait[task]].append(task)

    def to_the_end(self) -> None:
        moved = True
        while moved:
            moved = False
            for worker, queue in enumerate(self.queues):
                while self.slot[worker] < len(queue) and self._step(queue[self.slot[worker]]):
                    self.slot[worker] += 1
                    moved = True

    def _step(self, entry: int) -> bool:
        """Whether a worker can go past this entry of its queue."""
        if entry >= 0:
            event = self.events.wait[entry]
            if event >= 0 and self.seen[event] < self.events.events[event].count:
                return False
            self._finish([entry])
            return True
        pool = pool_entry(entry)
        if not self.entered[pool]:
            self.entered[pool] = True
            self._finish(self.released.pop(pool, []))
        return self.left[pool] == 0

    def _finish(self, ready: list[int]) -> None:
        """These tasks run, and all tasks of pools that run because of them."""
        while ready:
            task = ready.pop()
            self.done.add(task)
            if task in self.pool_of:
                self.left[self.pool_of[task]] -= 1
            for event in self.events.signals[task]:
                self.seen[event] += 1
                if self.seen[event] == self.events.events[event].count:
                    for other in self.consumers[event]:
                        pool = self.pool_of[other]
                        (ready if self.entered[pool] else self.released[pool]).append(other)


def _stuck_text(graph: TaskGraph, events: Events, schedule: Schedule, run: _Barriers, pool: int, task: int) -> str:
    name, event = graph.task_name(task), events.wait[task]
    if event < 0 or events.events[event].count <= 0:
        return f"deadlock: {name} is in pool {pool} and waits for no event, so nothing releases it; put it in a queue"
    if not run.entered[pool]:
        return f"deadlock: no worker ever comes to pool {pool} with {name}; put its entries further ahead in the queues"
    for worker, queue in enumerate(schedule.queues):
        for other in queue[run.slot[worker] :]:
            if other >= 0 and event in events.signals[other]:
                return (
                    f"deadlock: {name} in pool {pool} waits for {graph.task_name(other)}, which comes behind"
                    f" {_entry_text(graph, queue[run.slot[worker]])} on worker {worker}, who may hold the ticket of a"
                    " task that is never released. Put each queue in program order."
                )
    return (
        f"deadlock: {name} in pool {pool} waits for event {event}, which never fires while workers wait in pools for"
        " tasks that need it. Put each queue in program order."
    )


def _entry_text(graph: TaskGraph, entry: int) -> str:
    return graph.task_name(entry) if entry >= 0 else f"pool {pool_entry(entry)}"
