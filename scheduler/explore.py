"""Every state that a tiny schedule can reach, in any interleaving: the brute force that `verify` is checked against.

It knows the machine and what must never happen, but no proof: no clocks, no happens-before, no boxes (regions are
taken apart into cells). No reduction either: every interleaving's states are visited, so use it for a dozen tasks at
most.

The machine is the one `verify` describes, with counters of few bits instead of 32. Its states then repeat after
finitely many epochs, so that exploring ends and says what happens in all of them, the wrap-around of every counter
included.

Tasks of pools are explored twice. Once each is a worker of its own: what goes wrong then goes wrong if workers come to
pools when it suits, and as many as it takes. And one step of the workers that there are, with their tickets, shows who
waits for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import DeadlockError, RaceError, ScheduleError, StepOverlapError, UnwrittenReadError
from .graph import STEP_EVENT, Events, Region, Schedule, TaskGraph, pool_entry

Cell = tuple[object, ...]  # a tensor's name and a point in it
State = tuple[int, tuple[int, ...]]  # epochs that all workers have ended; steps of each worker since
# entries that each worker has left behind, workers that hold the ticket of a task, tasks that are done
PoolState = tuple[tuple[int, ...], frozenset[int], frozenset[int]]


class Machine:
    """Workers that go through their queues, once per epoch, and then wait for the step event.

    A worker's step is a task (its wait, its work and its signals at once: what may overlap shows as two orders) or its
    wait at the end of an epoch. Each task of a pool has a worker of its own, which comes to an epoch only after another
    worker.
    """

    def __init__(self, events: Events, schedule: Schedule) -> None:
        self.queues = [*schedule.static_queues(), *([task] for tasks in schedule.pools for task in tasks)]
        self.num_workers = len(schedule.queues)
        self.count = [event.count for event in events.events]
        self.wait = events.wait
        self.place = {task: (w, slot) for w, queue in enumerate(self.queues) for slot, task in enumerate(queue)}
        self.waited = {STEP_EVENT, *(event for event in self.wait if event >= 0 and self.count[event] > 0)}
        none = [0] * len(self.count)
        self._signalled = []  # [worker][slot][event]: signals of one epoch before that slot
        for queue in self.queues:
            sums = [none]
            for task in queue:
                sums.append([total + events.signals[task].count(e) for e, total in enumerate(sums[-1])])
            self._signalled.append(sums)
        self.per_epoch = [sum(sums[-1][e] for sums in self._signalled) for e in range(len(none))]
        # As few bits as keep one epoch's signals apart; the real counters have 32.
        self.modulus = 1 << (4 * max(map(abs, (1, *self.count, *self.per_epoch)))).bit_length()

    def start(self) -> State:
        return 0, (0,) * len(self.queues)

    def counters(self, state: State) -> list[int]:
        base, progress = state
        seen = [base * signals for signals in self.per_epoch]
        for queue, sums, steps in zip(self.queues, self._signalled, progress, strict=True):
            epochs, slot = divmod(steps, len(queue) + 1)
            for event, total in enumerate(sums[-1]):
                seen[event] += epochs * total + sums[slot][event]
        return seen

    def enabled(self, state: State) -> list[tuple[int, int, int | None]]:
        """What can happen next: (worker, epoch counted from 1, task or None for the step event)."""
        base, progress = state
        seen = self.counters(state)
        sides = list(zip(self.queues, progress, strict=True))[: self.num_workers]
        furthest = base + 1 + max(steps // (len(queue) + 1) for queue, steps in sides)
        found = []
        for worker, (queue, steps) in enumerate(zip(self.queues, progress, strict=True)):
            ahead, slot = divmod(steps, len(queue) + 1)
            epoch = base + ahead + 1
            task = queue[slot] if slot < len(queue) else None
            if task is None and worker >= self.num_workers and epoch >= furthest:
                continue
            event = STEP_EVENT if task is None else self.wait[task]
            if event not in self.waited or (seen[event] - epoch * self.count[event]) % self.modulus < self.modulus // 2:
                found.append((worker, epoch, task))
        return found

    def after(self, state: State, worker: int) -> State:
        """The state when `worker` has taken its next step. Workers without tasks are not waited for by anyone: where
        all others have passed a step event they have too, or could have.
        """
        base, progress = state
        progress = (*progress[:worker], progress[worker] + 1, *progress[worker + 1 :])
        sides = list(zip(self.queues, progress, strict=True))
        if all(steps > len(queue) for queue, steps in sides if queue):
            base += 1
            progress = tuple(max(0, steps - len(queue) - 1) for queue, steps in sides)
        return base, progress

    def is_done(self, state: State, epoch: int, task: int) -> bool:
        worker, slot = self.place[task]
        base, progress = state
        return progress[worker] > (epoch - 1 - base) * (len(self.queues[worker]) + 1) + slot

    def steps_overlap(self, state: State) -> bool:
        """Whether a worker has begun an epoch before all tasks of the last one were done."""
        _, progress = state
        sizes = [len(queue) + 1 for queue in self.queues]
        begun = max(steps // size for steps, size in zip(progress, sizes, strict=True))
        return any(steps + 1 < begun * size for steps, size in zip(progress, sizes, strict=True) if size > 1)

    def key(self, state: State) -> tuple[object, ...]:
        """Equal for states with the same future: how far each counter is ahead matters, not the epoch itself."""
        base, progress = state
        drift = (base * (signals - count) for signals, count in zip(self.per_epoch, self.count, strict=True))
        return progress, tuple(d % self.modulus for event, d in enumerate(drift) if event in self.waited)


@dataclass(frozen=True, slots=True)
class Exploration:
    """`faults`: what goes wrong in some interleaving, as the errors of `verify`; none: the schedule is safe."""

    faults: frozenset[type[ScheduleError]]
    num_states: int


def explore(graph: TaskGraph, events: Events, schedule: Schedule, max_states: int = 1_000_000) -> Exploration:
    """Visit every state. Raises ValueError when there are more than `max_states`.

    Deadlock: a state from which no worker can go on. Race: a task can start before one that it conflicts with and that
    precedes it in the program. Step overlap: a worker begins a step before every task of the last one is done; nothing
    is looked at beyond that. Unwritten read: the program itself reads what it has not written.
    """
    if graph.values:
        from .explore_values import explore_values  # which imports this module

        return explore_values(graph, events, schedule, max_states)
    machine = Machine(events, schedule)
    earlier = _earlier_conflicts(graph)
    faults: set[type[ScheduleError]] = {UnwrittenReadError} if reads_unwritten(graph) else set()
    pending, known = [machine.start()], {machine.key(machine.start())}
    while pending:
        state = pending.pop()
        if machine.steps_overlap(state):
            faults.add(StepOverlapError)
            continue
        enabled = machine.enabled(state)
        if not enabled:
            faults.add(DeadlockError)
        for worker, epoch, task in enabled:
            if task is not None and not all(machine.is_done(state, epoch, other) for other in earlier[task]):
                faults.add(RaceError)
            following = machine.after(state, worker)
            key = machine.key(following)
            if key not in known:
                known.add(key)
                pending.append(following)
        if len(known) > max_states:
            raise ValueError(f"more than {max_states} states; explore a smaller schedule, or raise max_states")
    pool_states = explore_pools(events, schedule, max_states) if schedule.pools else []
    if None in pool_states:
        faults.add(DeadlockError)
    return Exploration(frozenset(faults), len(known) + len(pool_states))


def explore_pools(events: Events, schedule: Schedule, max_states: int) -> list[PoolState | None]:
    """All states of the first step of the workers that there are; None among them: some wait for ever."""
    num_tasks = sum(map(len, schedule.static_queues() + schedule.pools))
    start: PoolState = (0,) * len(schedule.queues), frozenset(), frozenset()
    pending, known = [start], {start}
    stuck = False
    while pending:
        state = pending.pop()
        following = list(_pool_moves(events, schedule, state))
        stuck |= not following and len(state[2]) < num_tasks
        new = set(following) - known
        pending += new
        known |= new
        if len(known) > max_states:
            raise ValueError(f"more than {max_states} states; explore a smaller schedule, or raise max_states")
    return [*known, *[None] * stuck]


def _pool_moves(events: Events, schedule: Schedule, state: PoolState) -> Iterator[PoolState]:
    slots, holders, done = state

    def fired(task: int, needs_event: bool) -> bool:
        event = events.wait[task]
        if event < 0 or events.events[event].count <= 0:
            return not needs_event
        return sum(events.signals[other].count(event) for other in done) >= events.events[event].count

    for worker, queue in enumerate(schedule.queues):
        if slots[worker] == len(queue):
            continue
        entry = queue[slots[worker]]
        further = (*slots[:worker], slots[worker] + 1, *slots[worker + 1 :])
        if entry >= 0:
            if fired(entry, needs_event=False):
                yield further, holders, done | {entry}
            continue
        tasks = schedule.pools[pool_entry(entry)]
        held = sum(queue[slots[w]] == entry for w, queue in enumerate(schedule.queues) if w in holders)
        if worker in holders:
            for task in tasks:
                if task not in done and fired(task, needs_event=True):
                    yield slots, holders - {worker}, done | {task}
        elif len(done.intersection(tasks)) + held < len(tasks):
            yield slots, holders | {worker}, done
        else:
            yield further, holders, done


def cells(region: Region) -> set[Cell]:
    """`x[0:2]` is the cells (x, 0) and (x, 1)."""
    return {(region.tensor, *point) for point in itertools.product(*(range(*side) for side in region.box))}


def conflict(graph: TaskGraph, a: int, b: int) -> bool:
    """Whether the order of two tasks matters: they share a cell, and one of them writes it."""
    (reads_a, writes_a), (reads_b, writes_b) = (_touched(graph, task) for task in (a, b))
    return bool(writes_a & writes_b or writes_a & reads_b or reads_a & writes_b)


def reads_unwritten(graph: TaskGraph) -> bool:
    """Whether the program, run in its own order, reads a cell without data that it has not written in this step."""
    written: set[Cell] = set()
    for index in range(len(graph.tasks)):
        reads, writes = _touched(graph, index)
        if any(not graph.tensors[cell[0]].initialised for cell in reads - written):
            return True
        written |= writes
    return False


def _touched(graph: TaskGraph, task: int) -> tuple[set[Cell], set[Cell]]:
    regions = graph.tasks[task].reads, graph.tasks[task].writes
    reads, writes = (set().union(*map(cells, side)) for side in regions)
    return reads, writes


def _earlier_conflicts(graph: TaskGraph) -> list[list[int]]:
    return [[a for a in range(b) if conflict(graph, a, b)] for b in range(len(graph.tasks))]
