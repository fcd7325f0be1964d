"""After a launch that hung: which task is at fault, from what the counters say.

The worker that gives up first is the one that has waited longest, which may be far downstream of the fault. What the
host can read is that wait, and all counters after every worker has left. A worker whose wait gives up still goes
through the rest of its queue and signals (see device.py), so by then the tasks that were only late or held up have
signalled, and what is missing is lost for good: it belongs to a fault, not to the consequences of one.

Counters do not say who gave a signal. So one missing signal of an event with many producers leaves many suspects; the
culprit is always among them. The host may know more: `damaged` are tasks whose descriptors are not what was packed,
`absent` are workers that never left.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from .graph import STEP_EVENT, Events, Schedule


@dataclass(frozen=True, slots=True)
class StuckWait:
    """The wait that exceeded its bound first, as the kernel recorded it."""

    worker: int
    task: int | None  # that waited; None: the end of the step
    event: int
    seen: int
    wanted: int
    pool: int | None = None  # the worker waited for any task of this pool; see `wait_in_pool`


class Cause(Enum):
    """What the root cause is."""

    DAMAGED = "a task's descriptor is not what was packed"
    STOPPED = "a worker that never left stopped there"
    LOST = "a task could run, but a signal of it is missing"
    LATE = "no signal is lost: they came after the bound, or a worker had not begun the step by then"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`chain`: tasks that each waited for the next one, the stuck one first and the root cause last, if that is known.

    `suspects`: the tasks one of which is at fault. A single one ends the chain; several may each have failed to give
    what the last task of the chain waits for. `event` and `missing`: whose signals are lost, and how many.
    """

    cause: Cause
    chain: list[int]
    suspects: list[int]
    event: int | None = None
    missing: int = 0


def diagnose(
    events: Events,
    schedule: Schedule,
    counters: Sequence[int],
    first_epoch: int,
    stuck: StuckWait,
    damaged: Collection[int] = (),
    absent: Collection[int] = (),
) -> Diagnosis:
    """The root cause of a launch that hung and began with epoch `first_epoch`.

    `counters[e]` is the counter of event e when all workers had left. Exact for one fault; of several, the nearest.
    """
    chains = _Chains(events, schedule, stuck)
    epochs, missing = missing_signals(events, counters, first_epoch, stuck, schedule.num_leaving())
    threshold = wrap_int32((first_epoch - 1 + epochs) * events.events[stuck.event].count)
    if stuck.task is not None and stuck.wanted != threshold:
        return Diagnosis(Cause.DAMAGED, [stuck.task], [stuck.task])
    if damaged and (chain := chains.to_damaged(damaged, missing)):
        return Diagnosis(Cause.DAMAGED, chain, chain[-1:])
    chain, event = chains.to_wait_for(missing)
    if event is None:
        return Diagnosis(Cause.LATE, chains.start, [])
    chain, event = chains.to_released(schedule, chain, event, missing)
    queues = schedule.static_queues()
    stops = [task for w in absent if (task := stopped_at(events, queues[w], missing)) is not None]
    behind = [] if absent else not_begun(events, schedule, missing)
    if stops or behind:
        chain = (chains.to(stops or behind) if len(stops or behind) == 1 else []) or chain
        return Diagnosis(Cause.STOPPED if stops else Cause.LATE, chain, stops or behind)
    suspects = suspects_of(events, event, missing)
    return Diagnosis(Cause.LOST, chain + suspects * (len(suspects) == 1), suspects, event, missing[event])


def wait_in_pool(
    events: Events, schedule: Schedule, counters: Sequence[int], first_epoch: int, stuck: StuckWait
) -> StuckWait:
    """Of a worker that waited for any task of a pool: the wait of the first one there that was not released."""
    epochs, missing = missing_signals(events, counters, first_epoch, stuck, schedule.num_leaving())
    tasks = sorted(schedule.pools[stuck.pool])
    task = next((task for task in tasks if events.wait[task] in missing), tasks[0])
    event = events.wait[task]
    wanted = wrap_int32((first_epoch - 1 + epochs) * events.events[event].count)
    return StuckWait(stuck.worker, task, event, counters[event], wanted)


def waited_event(events: Events, task: int, wanted: int, counters: Sequence[int]) -> int:
    """Which event a task was stuck at: of those that values may make it wait for, one that still lacks a signal."""
    waits = events.may_wait(task) or [events.wait[task]]
    return next((event for event in waits if wrap_int32(counters[event] - wanted) < 0), waits[0])


def wrap_int32(n: int) -> int:
    return (n + (1 << 31)) % (1 << 32) - (1 << 31)


def missing_signals(
    events: Events, counters: Sequence[int], first_epoch: int, stuck: StuckWait, num_leaving: int = 0
) -> tuple[int, Counter[int]]:
    """(epochs that the launch began, signals that each event lacks in them).

    The last epoch is the one that some signal belongs to, since all workers but those at fault have gone through it;
    or the one whose end is waited for. `num_leaving` workers signal the step event when they have left their last pool.
    """
    totals = events.totals()
    totals[STEP_EVENT] += num_leaving
    base = first_epoch - 1
    given = {event: wrap_int32(counters[event] - base * total) for event, total in totals.items()}
    epochs = max([1, *(-(-given[event] // total) for event, total in totals.items())])
    if stuck.task is None and stuck.pool is None and totals[STEP_EVENT]:
        epochs = max(epochs, wrap_int32(stuck.wanted - base * totals[STEP_EVENT]) // totals[STEP_EVENT])
    if events.weights and (count := events.events[stuck.event].count):  # other ranks may have gone on to the next one
        epochs = wrap_int32(stuck.wanted - base * count) // count
    lacking = {event: epochs * total - given[event] for event, total in totals.items()}
    return epochs, Counter({event: number for event, number in lacking.items() if number > 0})


def stopped_at(events: Events, queue: list[int], missing: Counter[int]) -> int | None:
    """The task from which on the worker with this queue did nothing, if that is exactly what is missing."""
    lacking: Counter[int] = Counter()
    for task in reversed(queue):
        lacking.update(events.signals[task])
        if lacking == missing:
            return task
    return None


def not_begun(events: Events, schedule: Schedule, missing: Counter[int]) -> list[int]:
    """First tasks of the workers that may have left before this step, if such workers explain all that is missing.

    One that reaches the end of the last step when another has given up already leaves there. Queues of a single task
    do not count: that one may as well have run and lost its signals. Greedy, the longest queue first.
    """
    rest, first = missing.copy(), []
    for queue in sorted(schedule.static_queues(), key=len, reverse=True):
        signals = Counter(event for task in queue for event in events.signals[task])
        if len(queue) > 1 and signals <= missing:
            first.append(queue[0])
            if signals <= rest:
                rest -= signals
    return [] if rest else sorted(first)


def suspects_of(events: Events, event: int, missing: Counter[int]) -> list[int]:
    """The producers of `event` that explain all that is missing, or all of its producers if none does alone."""
    producers = [task for task in range(len(events.signals)) if event in events.may_signal(task)]
    silent = [task for task in producers if Counter(events.signals[task]) == missing]
    return producers if missing == {event: 1} else silent or producers


class _Chains:
    """Shortest ways from the stuck wait back to tasks that it could not do without.

    Where such a way leads to a task that is not done, no task on it was: each waits for the next one's signal, or comes
    after it in its queue.
    """

    def __init__(self, events: Events, schedule: Schedule, stuck: StuckWait) -> None:
        self.events, self.stuck = events, stuck
        self.start = [] if stuck.task is None else [stuck.task]
        self.before = {b: a for queue in schedule.static_queues() for a, b in zip(queue, queue[1:], strict=False)}
        self.producers: dict[int, list[int]] = {event: [] for event in range(len(events.events))}
        for task in range(len(events.signals)):
            for event in set(events.may_signal(task)):
                self.producers[event].append(task)

    def to(self, targets: Collection[int]) -> list[int]:
        """The tasks from the stuck one to the nearest target; empty if none can be reached."""
        targets = set(targets)
        roots = self.producers[STEP_EVENT] if self.stuck.task is None else [self.stuck.task]
        came_from: dict[int, int | None] = dict.fromkeys(roots)
        pending = deque(roots)
        while targets and pending:
            task = pending.popleft()
            if task in targets:
                chain = [task]
                while (task := came_from[task]) is not None:
                    chain.append(task)
                return chain[::-1]
            for earlier in self._needs(task):
                if earlier not in came_from:
                    came_from[earlier] = task
                    pending.append(earlier)
        return []

    def to_wait_for(self, lacking: Collection[int]) -> tuple[list[int], int | None]:
        """(the way to the nearest task that waits for one of these events, that event), or ([], None)."""
        if self.stuck.event in lacking:
            return self.start, self.stuck.event
        waits = map(self.events.may_wait, range(len(self.events.wait)))
        chain = self.to([task for task, events in enumerate(waits) if any(event in lacking for event in events)])
        return chain, next(e for e in self.events.may_wait(chain[-1]) if e in lacking) if chain else None

    def to_released(
        self, schedule: Schedule, chain: list[int], event: int, missing: Counter[int]
    ) -> tuple[list[int], int]:
        """Goes on over tasks of pools that never ran because they were not released: those signals are not lost."""
        pooled = {task for tasks in schedule.pools for task in tasks}
        while held := [t for t in self.producers[event] if t in pooled and self.events.wait[t] in missing]:
            if held[0] in chain:
                break
            chain, event = [*chain, held[0]], self.events.wait[held[0]]
        return chain, event

    def to_damaged(self, damaged: Collection[int], missing: Counter[int]) -> list[int]:
        """The way to the nearest of these tasks: over an event that lacks its signal, or, if none does, to its wait."""
        silent = {task for task in damaged if any(event in missing for event in self.events.signals[task])}
        chain, event = self.to_wait_for(
            {event for task in silent for event in self.events.signals[task]} & set(missing)
        )
        if event is not None:
            return [*chain, min(silent.intersection(self.producers[event]))]
        return self.to(set(damaged) - silent)

    def _needs(self, task: int) -> list[int]:
        waited = [producer for event in self.events.may_wait(task) for producer in self.producers[event]]
        return [*waited, *([self.before[task]] if task in self.before else [])]
