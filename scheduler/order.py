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

    A chain is a list of tasks each of which is certainly done before the next one starts: the tasks in a worker's
    queue, and behind those chains of tasks from pools, which events alone put in order.
    `done_before[t, c]`: how many tasks of chain c are done before task t starts, whatever the interleaving.
    `done_in_step[v, c]`: how many of them are done when worker v begins the next step.
    """

    chains: list[list[int]]
    num_workers: int
    chain: list[int]  # per task
    position: list[int]  # per task, within its chain
    done_before: np.ndarray
    done_in_step: np.ndarray

    def happens_before(self, a: int, b: int) -> bool:
        return bool(self.done_before[b, self.chain[a]] > self.position[a])

    def place(self, task: int) -> str:
        """`worker 3`, or `any worker` for a task of a pool."""
        chain = self.chain[task]
        return f"worker {chain}" if chain < self.num_workers else "any worker"


def derive_order(graph: TaskGraph, events: Events, schedule: Schedule) -> Order:
    """Vector clocks of one step; raises DeadlockError when the step cannot end.

    Signals only add, so a task that can run stays able to run: one greedy run finds every task that
    any run can reach. Needs counts that equal the number of signals; a passed wait then means that
    all producers are done. A count of 0 or less is no wait. Tasks of pools run here when their event lets
    them, and hold up nobody: `check_pools` proves that they get the chance to.
    """
    run = _Run(graph, events, schedule)
    run.to_the_end()
    if run.num_done < len(graph.tasks):
        raise run.deadlock()
    chain = [0] * len(graph.tasks)
    position = [0] * len(graph.tasks)
    for c, tasks in enumerate(run.chains):
        for slot, task in enumerate(tasks):
            chain[task], position[task] = c, slot
    in_step = np.maximum(run.clock, run.event_clock[STEP_EVENT])
    width = len(run.chains)
    return Order(run.chains, len(run.queues), chain, position, run.done_before[:, :width], in_step[:, :width])


class _Run:
    def __init__(self, graph: TaskGraph, events: Events, schedule: Schedule) -> None:
        self.graph, self.events, self.queues = graph, events, schedule.static_queues()
        self.chains = [list(queue) for queue in self.queues]
        num_workers, num_events = len(schedule.queues), len(events.events)
        self.counts = [event.count for event in events.events]
        self.wait = [event if event >= 0 and self.counts[event] > 0 else -1 for event in events.wait]
        self.next_slot = [0] * num_workers
        self.seen = [0] * num_events
        self.num_done = 0
        self.pooled: dict[int, list[int]] = defaultdict(list)  # tasks of pools by the event that lets them run
        for tasks in schedule.pools:
            for task in tasks:
                self.pooled[self.wait[task]].append(task)
        width = num_workers + (64 if schedule.pools else 0)
        self.event_clock = np.zeros((num_events, width), dtype=np.int32)
        self.clock = np.zeros((num_workers, width), dtype=np.int32)
        self.done_before = np.zeros((len(graph.tasks), width), dtype=np.int32)
        self.lengths = np.zeros(width, dtype=np.int32)  # of the chains behind those of workers

    def to_the_end(self) -> None:
        sleeping: dict[int, list[int]] = defaultdict(list)
        awake = list(range(len(self.queues)))
        ready = self.pooled.pop(-1, [])
        while awake or ready:
            if ready:
                task = ready.pop()
                self._run_pooled(task)
                self._wake(task, sleeping, awake, ready)
                continue
            worker = awake.pop()
            for task in self.queues[worker][self.next_slot[worker] :]:
                event = self.wait[task]
                if event >= 0 and self.seen[event] < self.counts[event]:
                    sleeping[event].append(worker)
                    break
                self._run_task(worker, task, event)
                self._wake(task, sleeping, awake, ready)

    def _wake(self, task: int, sleeping: dict[int, list[int]], awake: list[int], ready: list[int]) -> None:
        for signal in self.events.signals[task]:
            if self.seen[signal] == self.counts[signal]:
                awake += sleeping.pop(signal, ())
                ready += self.pooled.pop(signal, ())

    def _run_task(self, worker: int, task: int, event: int) -> None:
        clock = self.clock[worker]
        if event >= 0:
            np.maximum(clock, self.event_clock[event], out=clock)
        self.done_before[task] = clock
        clock[worker] += 1
        self.next_slot[worker] += 1
        self._signal(task, clock)

    def _run_pooled(self, task: int) -> None:
        """A task that no queue puts in order: only its event does. It extends a chain whose end is done before it."""
        event = self.wait[task]
        clock = self.event_clock[event].copy() if event >= 0 else np.zeros_like(self.lengths)
        ended = np.flatnonzero((self.lengths > 0) & (clock == self.lengths))
        if len(ended):
            chain = int(ended[0])
        else:
            chain = len(self.chains)
            self.chains.append([])
            if chain == len(self.lengths):
                self._widen()
                clock = np.pad(clock, (0, len(clock)))
        self.done_before[task] = clock
        self.chains[chain].append(task)
        self.lengths[chain] += 1
        clock[chain] += 1
        self._signal(task, clock)

    def _signal(self, task: int, clock: np.ndarray) -> None:
        self.num_done += 1
        for signal in self.events.signals[task]:
            self.seen[signal] += 1
            np.maximum(self.event_clock[signal], clock, out=self.event_clock[signal])

    def _widen(self) -> None:
        for name in ("event_clock", "clock", "done_before"):
            old = getattr(self, name)
            setattr(self, name, np.pad(old, ((0, 0), (0, old.shape[1]))))
        self.lengths = np.pad(self.lengths, (0, len(self.lengths)))

    def deadlock(self) -> DeadlockError:
        """Follow who waits for whom until a task comes up twice: that cycle is the deadlock."""
        place = {task: (worker, slot) for worker, queue in enumerate(self.queues) for slot, task in enumerate(queue)}
        pending = {t for w, queue in enumerate(self.queues) for t in queue[self.next_slot[w] :]}
        pending.update(task for tasks in self.pooled.values() for task in tasks)
        visited: dict[int, str] = {}
        task = min(pending)
        while (blocked := self._blocked(task, place)) not in visited:
            event = self.events.wait[blocked]
            missing = [task for task in sorted(pending) if event in self.events.signals[task]]
            # Prefer a producer that the blocked task really needs: its region explains the wait.
            missing.sort(key=lambda task: shared_region(self.graph, task, blocked) is None)
            visited[blocked] = self._blocked_text(blocked, event, missing, place)
            task = missing[0]
        cycle = list(visited.values())[list(visited).index(blocked) :]
        return DeadlockError(
            f"deadlock: {'; '.join(cycle)}. Put each queue in program order, or remove the wait "
            "that points forwards in program order."
        )

    def _blocked(self, task: int, place: dict[int, tuple[int, int]]) -> int:
        """What keeps `task` from running: the task that its worker stands at, or itself."""
        if task not in place:
            return task
        worker, _ = place[task]
        return self.queues[worker][self.next_slot[worker]]

    def _blocked_text(self, blocked: int, event: int, missing: list[int], place: dict[int, tuple[int, int]]) -> str:
        def where(task: int) -> str:
            return "worker {}, slot {}".format(*place[task]) if task in place else "any worker"

        name = self.graph.task_name
        producer = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return (
            f"{name(blocked)} ({where(blocked)}) waits for event "
            f"{event}: seen {self.seen[event]}, wanted {self.events.events[event].count}, missing "
            f"{name(producer)} ({where(producer)}){more}; "
            f"{shared_text(self.graph, producer, blocked)}"
        )
