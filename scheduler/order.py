"""Run the queues once, symbolically: which tasks are certainly done before a task starts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .errors import DeadlockError, shared_region, shared_text
from .graph import STEP_EVENT, Events, Schedule, TaskGraph


@dataclass(slots=True)
class Order:
    """The order that queues and events guarantee, as vector clocks.

    `done_before[t, w]`: how many tasks of worker w's queue are done before task t starts, whatever
    the interleaving.
    `done_in_step[v, w]`: how many of them are done when worker v begins the next step.
    """

    worker: list[int]  # per task
    position: list[int]  # per task, within its queue
    done_before: np.ndarray
    done_in_step: np.ndarray

    def happens_before(self, a: int, b: int) -> bool:
        return bool(self.done_before[b, self.worker[a]] > self.position[a])


def derive_order(graph: TaskGraph, events: Events, schedule: Schedule) -> Order:
    """Vector clocks of one step; raises DeadlockError when the step cannot end.

    Signals only add, so a task that can run stays able to run: one greedy run finds every task that
    any run can reach. Needs counts that equal the number of signals; a passed wait then means that
    all producers are done. A count of 0 or less is no wait.
    """
    run = _Run(graph, events, schedule)
    run.to_the_end()
    if any(slot < len(queue) for slot, queue in zip(run.next_slot, schedule.queues, strict=True)):
        raise run.deadlock()
    worker = [0] * len(graph.tasks)
    position = [0] * len(graph.tasks)
    for w, queue in enumerate(schedule.queues):
        for slot, task in enumerate(queue):
            worker[task], position[task] = w, slot
    return Order(worker, position, run.done_before, np.maximum(run.clock, run.event_clock[STEP_EVENT]))


class _Run:
    def __init__(self, graph: TaskGraph, events: Events, schedule: Schedule) -> None:
        self.graph, self.events, self.queues = graph, events, schedule.queues
        num_workers, num_events = len(schedule.queues), len(events.events)
        counts = [event.count for event in events.events]
        self.wait = [event if event >= 0 and counts[event] > 0 else -1 for event in events.wait]
        self.next_slot = [0] * num_workers
        self.seen = [0] * num_events
        self.event_clock = np.zeros((num_events, num_workers), dtype=np.int32)
        self.clock = np.zeros((num_workers, num_workers), dtype=np.int32)
        self.done_before = np.zeros((len(graph.tasks), num_workers), dtype=np.int32)

    def to_the_end(self) -> None:
        counts = [event.count for event in self.events.events]
        sleeping: dict[int, list[int]] = defaultdict(list)
        awake = list(range(len(self.queues)))
        while awake:
            worker = awake.pop()
            for task in self.queues[worker][self.next_slot[worker] :]:
                event = self.wait[task]
                if event >= 0 and self.seen[event] < counts[event]:
                    sleeping[event].append(worker)
                    break
                self._run_task(worker, task, event)
                for signal in self.events.signals[task]:
                    if self.seen[signal] == counts[signal]:
                        awake += sleeping.pop(signal, ())

    def _run_task(self, worker: int, task: int, event: int) -> None:
        clock = self.clock[worker]
        if event >= 0:
            np.maximum(clock, self.event_clock[event], out=clock)
        self.done_before[task] = clock
        clock[worker] += 1
        self.next_slot[worker] += 1
        for signal in self.events.signals[task]:
            self.seen[signal] += 1
            np.maximum(self.event_clock[signal], clock, out=self.event_clock[signal])

    def deadlock(self) -> DeadlockError:
        """Follow who waits for whom until a worker comes up twice: that cycle is the deadlock."""
        worker_of = {task: worker for worker, queue in enumerate(self.queues) for task in queue}
        pending = {t for w, queue in enumerate(self.queues) for t in queue[self.next_slot[w] :]}
        visited: dict[int, str] = {}
        worker = worker_of[min(pending)]
        while worker not in visited:
            blocked = self.queues[worker][self.next_slot[worker]]
            event = self.events.wait[blocked]
            missing = [task for task in sorted(pending) if event in self.events.signals[task]]
            # Prefer a producer that the blocked task really needs: its region explains the wait.
            missing.sort(key=lambda task: shared_region(self.graph, task, blocked) is None)
            visited[worker] = self._blocked_text(worker, blocked, event, missing, worker_of)
            worker = worker_of[missing[0]]
        cycle = list(visited.values())[list(visited).index(worker) :]
        return DeadlockError(
            f"deadlock: {'; '.join(cycle)}. Put each queue in program order, or remove the wait "
            "that points forwards in program order."
        )

    def _blocked_text(
        self, worker: int, blocked: int, event: int, missing: list[int], worker_of: dict[int, int]
    ) -> str:
        name = self.graph.task_name
        producer = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return (
            f"{name(blocked)} (worker {worker}, slot {self.next_slot[worker]}) waits for event "
            f"{event}: seen {self.seen[event]}, wanted {self.events.events[event].count}, missing "
            f"{name(producer)} (worker {worker_of[producer]}, slot "
            f"{self.queues[worker_of[producer]].index(producer)}){more}; "
            f"{shared_text(self.graph, producer, blocked)}"
        )
