"""`verify` on trial: random schedules, damaged in known ways, against the brute force of `explore`.

A case is a random graph with its derived events and queues, changed by one of MUTATIONS (or by none, or by several),
and made from nothing but the seed and its number. `verify` must accept it if no interleaving goes wrong, and reject
it otherwise, for a reason that some interleaving shows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from .errors import CountError, DeadlockError, ScheduleError, StepOverlapError
from .events import TooManySignals, derive_events
from .explore import Exploration, explore
from .graph import (
    MAX_SIGNALS,
    STEP_EVENT,
    Box,
    Events,
    Guard,
    GuardedEvent,
    Region,
    Schedule,
    Task,
    TaskGraph,
    TensorInfo,
    Value,
)
from .queues import schedule
from .verify import MAX_COMBINATIONS, verify

MAX_TASKS = 7  # of a random graph: some hundred states to explore
MAX_WORKERS = 3


@dataclass(slots=True)
class Case:
    """A schedule to judge. `mutation` says how it was damaged, and `number` and the seed make it again."""

    number: int
    mutation: str
    graph: TaskGraph
    events: Events
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Judgement:
    """What `verify` (its error, or None) and `explore` say about a case."""

    case: Case
    error: ScheduleError | None
    exploration: Exploration
    may_refuse: bool = False  # what is safe: where values are proved one at a time

    @property
    def is_safe(self) -> bool:
        return not self.exploration.faults

    @property
    def agree(self) -> bool:
        """Whether both judge alike, and some interleaving shows what the error says.

        A wrong count may show as any fault, and where some workers wait for ever, others may run on into the next step.
        """
        if self.error is None or self.is_safe:
            return self.is_safe and (self.error is None or self.may_refuse)
        if self.may_refuse:
            return True
        faults = self.exploration.faults
        if isinstance(self.error, DeadlockError):
            return not faults.isdisjoint({DeadlockError, StepOverlapError})
        return isinstance(self.error, CountError) or type(self.error) in faults

    def __str__(self) -> str:
        verdict = "accepts it" if self.error is None else f"says {type(self.error).__name__}: {self.error}"
        found = ", ".join(sorted(fault.__name__ for fault in self.exploration.faults)) or "no fault"
        return f"case {self.case.number} ({self.case.mutation}): verify {verdict}; exploring it finds {found}"


def self_check(
    num_cases: int, seed: int, dynamic: bool = False, values: bool = False, apart: bool = False
) -> Iterator[Judgement]:
    """Judge `num_cases` random cases, one after another; with `dynamic`, of schedules with pools; with `values`, of
    graphs whose regions, waits and signals depend on numbers of the step; with `apart`, by one value at a time.
    """
    return (judge(random_case(seed, number, dynamic, values), apart) for number in range(num_cases))


def judge(case: Case, apart: bool = False) -> Judgement:
    error = None
    try:
        verify(case.graph, case.events, case.schedule, 0 if apart else MAX_COMBINATIONS)
    except ScheduleError as caught:
        error = caught
    return Judgement(case, error, explore(case.graph, case.events, case.schedule), apart)


@dataclass(slots=True)
class Tally:
    """Counts of one kind of mutation, or of all."""

    cases: int = 0
    safe: int = 0
    accepted: int = 0
    disagreements: int = 0
    states: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # by name of the error

    def add(self, judgement: Judgement) -> None:
        self.cases += 1
        self.safe += judgement.is_safe
        self.accepted += judgement.error is None
        self.disagreements += not judgement.agree
        self.states += judgement.exploration.num_states
        if judgement.error is not None:
            self.rejected[type(judgement.error).__name__] += 1


# ---- random graphs ----


def random_case(seed: int, number: int, dynamic: bool = False, values: bool = False) -> Case:
    rng = random.Random(f"{seed}/{number}")
    mutations = MUTATIONS | VALUE_MUTATIONS if values else MUTATIONS
    names = list(mutations)
    mutation = ["none", *names, "several"][number % (len(names) + 2)]
    num_tasks, num_workers = rng.randint(2, MAX_TASKS - values), rng.randint(1, MAX_WORKERS)
    graph, events, queues = random_schedule(rng, num_tasks, num_workers, dynamic, values)
    case = Case(number, mutation, graph, events, queues)
    several = [rng.choice(names) for _ in range(rng.randint(2, 3))]
    for name in {"none": [], "several": several}.get(mutation, [mutation]):
        mutations[name](rng, case)
    return case


def random_schedule(
    rng: random.Random, num_tasks: int, num_workers: int, dynamic: bool = False, values: bool = False
) -> tuple[TaskGraph, Events, Schedule]:
    """A random graph with its derived events and queues. All are sound, but for reads of what nobody wrote.

    `dynamic`: tasks of random ops are in pools.
    """
    while True:
        graph = random_graph(rng, num_tasks)
        if values:
            add_values(rng, graph)
        try:
            events = derive_events(graph)
        except TooManySignals:
            continue
        if values and not (events.wait_if or events.signal_if) and rng.random() < 0.9:
            continue
        ops = [op for op in range(len(graph.ops)) if dynamic and rng.random() < 0.7]
        return graph, events, schedule(graph, events, num_workers, ops)


def add_values(rng: random.Random, graph: TaskGraph) -> None:
    """One or two values, written by a first task or known before the step; regions that they guard; who reads them."""
    names = ["n", "e"][: rng.randint(1, 2)]
    written = rng.random() < 0.7
    graph.tensors["v"] = TensorInfo((len(names),), not written or rng.random() < 0.1)
    for i, name in enumerate(names):
        graph.values[name] = Value(Region("v", ((i, i + 1),)), 0, rng.randint(2, 3) if i == 0 else 2)
    first = graph.tasks[0]
    whole = Region("v", ((0, len(names)),))
    if written:
        first.writes += (whole,)
    else:
        first.reads += (whole,)
    first.announces = tuple(name for name in names if rng.random() < 0.7)
    for task in graph.tasks[1:]:
        cells = tuple(graph.values[name].region for name in names if rng.random() < 0.6)
        task.reads, task.writes = (tuple(_guarded(rng, graph, r) for r in side) for side in (task.reads, task.writes))
        task.reads += cells


def _guarded(rng: random.Random, graph: TaskGraph, region: Region) -> Region:
    if rng.random() < 0.35:
        return region
    return replace(region, guard=_random_guard(rng, graph))


def _random_guard(rng: random.Random, graph: TaskGraph, absent: bool = False) -> Guard:
    name = rng.choice(list(graph.values))
    lo = rng.randint(0, graph.values[name].hi - 1)
    return Guard(name, lo, rng.randint(lo + 1, graph.values[name].hi), absent)


def random_graph(rng: random.Random, num_tasks: int) -> TaskGraph:
    """Tasks on random boxes of up to three small tensors, reused in place, with many readers and writers."""
    shapes = [rng.choice([(4,), (3,), (2, 3)]) for _ in range(rng.randint(1, 3))]
    graph = TaskGraph(tensors={f"x{i}": TensorInfo(dims, rng.random() < 0.5) for i, dims in enumerate(shapes)})
    empty = [name for name, info in graph.tensors.items() if not info.initialised]
    for index in range(num_tasks):
        if index == 0 or rng.random() < 0.5:
            graph.ops.append(f"op{len(graph.ops)}")
        reads, writes = random_regions(rng, graph), random_regions(rng, graph)
        if index == 0 and empty and rng.random() < 0.9:  # mostly a first task writes what has no data
            reads, writes = (), tuple(Region(name, whole_box(graph.tensors[name])) for name in empty)
        graph.tasks.append(Task(len(graph.ops) - 1, (index,), reads, writes, cost_bytes=rng.randint(0, 3)))
    return graph


def random_regions(rng: random.Random, graph: TaskGraph) -> tuple[Region, ...]:
    def interval(size: int) -> tuple[int, int]:
        lo = rng.randrange(size)
        return lo, rng.randint(lo + 1, size)

    names = [rng.choice(list(graph.tensors)) for _ in range(rng.randint(0, 2))]
    return tuple(Region(name, tuple(map(interval, graph.tensors[name].dims))) for name in names)


def whole_box(info: TensorInfo) -> Box:
    return tuple((0, size) for size in info.dims)


# ---- mutations: `MUTATIONS[name](rng, case)` changes the case in place ----


def drop_signal(rng: random.Random, case: Case) -> None:
    """A task no longer signals one of its events."""
    signals = rng.choice([signals for signals in case.events.signals if signals] or [[0]])
    signals.pop(rng.randrange(len(signals)))


def drop_signal_and_count(rng: random.Random, case: Case) -> None:
    """As before, and nobody waits for that signal. The task still precedes the step event."""
    signals = rng.choice([signals for signals in case.events.signals if signals] or [[0]])
    _forget(case.events, signals, signals[rng.randrange(len(signals))])


def leave_step(rng: random.Random, case: Case) -> None:
    """A task no longer signals the step event, and nobody waits for that."""
    events = case.events
    task = _random_task(rng, case, lambda task: STEP_EVENT in events.signals[task])
    if STEP_EVENT in events.signals[task]:
        events.signals[task].remove(STEP_EVENT)
        events.events[STEP_EVENT].count -= 1


def add_signal(rng: random.Random, case: Case) -> None:
    """A signal more than the waits count."""
    event = rng.randrange(len(case.events.events))
    _add_signal(rng, case, event)


def add_signal_and_count(rng: random.Random, case: Case) -> None:
    """A signal more, and a wait for it."""
    event = rng.randrange(len(case.events.events))
    case.events.events[event].count += _add_signal(rng, case, event)


def lower_count(rng: random.Random, case: Case) -> None:
    rng.choice(case.events.events).count -= 1


def raise_count(rng: random.Random, case: Case) -> None:
    rng.choice(case.events.events).count += 1


def remove_wait(rng: random.Random, case: Case) -> None:
    """A task no longer waits."""
    case.events.wait[_random_task(rng, case, lambda task: case.events.wait[task] >= 0)] = -1


def redirect_wait(rng: random.Random, case: Case) -> None:
    """A task waits for another event."""
    case.events.wait[_random_task(rng, case)] = rng.randrange(len(case.events.events))


def remove_event(rng: random.Random, case: Case) -> None:
    """Nobody signals an event or waits for it any more. Its producers still precede the step event."""
    events = case.events
    gone = rng.randrange(len(events.events))
    events.wait[:] = [-1 if event == gone else event for event in events.wait]
    for signals in events.signals:
        if gone in signals and gone != STEP_EVENT:
            _forget(events, signals, gone)


def swap_tasks(rng: random.Random, case: Case) -> None:
    """Two tasks change places, in one queue or between two."""
    places = [(queue, slot) for queue in case.schedule.queues for slot in range(len(queue))]
    if len(places) < 2:
        return
    (a, i), (b, j) = rng.sample(places, 2)
    a[i], b[j] = b[j], a[i]


def move_task(rng: random.Random, case: Case) -> None:
    """A task goes to any place of any queue."""
    task = _random_task(rng, case)
    sides = [*case.schedule.queues, *case.schedule.pools]
    home = next(side for side in sides if task in side)
    if home in case.schedule.pools and len(home) == 1:  # a pool without tasks is no schedule
        return
    home.remove(task)
    queue = rng.choice(case.schedule.queues)
    queue.insert(rng.randint(0, len(queue)), task)


def alias_regions(rng: random.Random, case: Case) -> None:
    """One task's region turns out to be another one's memory."""
    graph = case.graph
    task = graph.tasks[_random_task(rng, case, lambda task: bool(graph.tasks[task].reads or graph.tasks[task].writes))]
    regions = [region for other in graph.tasks for region in (*other.reads, *other.writes)]
    side = rng.choice([name for name in ("reads", "writes") if getattr(task, name)] or ["reads"])
    old = list(getattr(task, side))
    if old:
        old[rng.randrange(len(old))] = rng.choice(regions)
    setattr(task, side, tuple(old))


def change_regions(rng: random.Random, case: Case) -> None:
    """A task uses other memory than its events were derived for."""
    task = case.graph.tasks[_random_task(rng, case)]
    task.reads, task.writes = random_regions(rng, case.graph), random_regions(rng, case.graph)


MUTATIONS: dict[str, Callable[[random.Random, Case], None]] = {
    mutation.__name__: mutation
    for mutation in (
        drop_signal, drop_signal_and_count, leave_step, add_signal, add_signal_and_count, lower_count, raise_count,
        remove_wait, redirect_wait, remove_event, swap_tasks, move_task, alias_regions, change_regions,
    )
}  # fmt: skip


# ---- mutations of what depends on values ----


def drop_guarded_signal(rng: random.Random, case: Case) -> None:
    """A task no longer signals an event by a value."""
    _drop_one(rng, case.events.signal_if)


def drop_guarded_wait(rng: random.Random, case: Case) -> None:
    """A task no longer waits for an event by a value."""
    _drop_one(rng, case.events.wait_if)


def change_guarded_signal(rng: random.Random, case: Case) -> None:
    """A signal is given for other numbers."""
    _change_one(rng, case.events.signal_if, lambda old: GuardedEvent(old.event, _other_guard(rng, case, old.guard)))


def change_guarded_wait(rng: random.Random, case: Case) -> None:
    """A task waits for other numbers."""
    _change_one(rng, case.events.wait_if, lambda old: GuardedEvent(old.event, _other_guard(rng, case, old.guard)))


def redirect_by_value(rng: random.Random, case: Case) -> None:
    """A value leads to another counter of the event tensor, or of another one."""
    uses = rng.choice([case.events.signal_if, case.events.wait_if])
    event = rng.randrange(len(case.events.events))
    _change_one(rng, uses, lambda old: GuardedEvent(event, old.guard))


def change_region_guard(rng: random.Random, case: Case) -> None:
    """A task touches a region for other numbers."""
    tasks = case.graph.tasks
    task = tasks[_random_task(rng, case, lambda t: any(r.guard for r in (*tasks[t].reads, *tasks[t].writes)))]
    side = rng.choice([name for name in ("reads", "writes") if any(r.guard for r in getattr(task, name))] or ["reads"])
    regions = list(getattr(task, side))
    for i in rng.sample(range(len(regions)), len(regions)):
        if regions[i].guard is not None:
            guard = None if rng.random() < 0.3 else _other_guard(rng, case, regions[i].guard)
            regions[i] = replace(regions[i], guard=guard)
            break
    setattr(task, side, tuple(regions))


def announce_twice(rng: random.Random, case: Case) -> None:
    """A task gives an event's signal whatever the value is, which is then one too many."""
    guarded = [use.event for uses in case.events.signal_if.values() for use in uses]
    if guarded:
        _add_signal(rng, case, rng.choice(guarded))


VALUE_MUTATIONS: dict[str, Callable[[random.Random, Case], None]] = {
    mutation.__name__: mutation
    for mutation in (
        drop_guarded_signal, drop_guarded_wait, change_guarded_signal, change_guarded_wait, redirect_by_value,
        change_region_guard, announce_twice,
    )
}  # fmt: skip


def _drop_one(rng: random.Random, uses: dict[int, list[GuardedEvent]]) -> None:
    if uses:
        some = rng.choice(list(uses.values()))
        if some:
            some.pop(rng.randrange(len(some)))


def _change_one(
    rng: random.Random, uses: dict[int, list[GuardedEvent]], change: Callable[[GuardedEvent], GuardedEvent]
) -> None:
    if uses:
        some = rng.choice(list(uses.values()))
        if some:
            place = rng.randrange(len(some))
            some[place] = change(some[place])


def _other_guard(rng: random.Random, case: Case, old: Guard) -> Guard:
    """Of the same value: whoever knows that may not know another."""
    return _random_guard(rng, case.graph, old.absent)._replace(value=old.value)


def _random_task(rng: random.Random, case: Case, wanted: Callable[[int], bool] = lambda task: True) -> int:
    """One of the wanted tasks, or any where there is none."""
    tasks = range(len(case.graph.tasks))
    return rng.choice([task for task in tasks if wanted(task)] or tasks)


def _add_signal(rng: random.Random, case: Case, event: int) -> bool:
    signals = case.events.signals[_random_task(rng, case, lambda task: len(case.events.signals[task]) < MAX_SIGNALS)]
    if len(signals) < MAX_SIGNALS:
        signals.append(event)
        return True
    return False


def _forget(events: Events, signals: list[int], event: int) -> None:
    signals.remove(event)
    events.events[event].count -= 1
    if not signals:
        signals.append(STEP_EVENT)
        events.events[STEP_EVENT].count += 1
