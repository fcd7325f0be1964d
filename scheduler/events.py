"""From reads and writes to events, by named passes: who must wait for whom, fused into as few counters as possible.

derive     A task depends on every earlier task whose regions conflict with its own (read after write, write after read,
           write after write). Sets of tasks are Python integers, a bit per task: union and difference are fast.
reduce     A dependency that another one implies is dropped (exact transitive reduction).
fuse       Each distinct set that remains is one event. So every task waits for at most one, and for one more per value.
fit        Where a task would signal more events than its descriptor has slots, events are merged.
linearise  Events get their numbers, in the order of their consumers: those of an edge lie side by side, as an event
           tensor. Tasks nobody waits for signal the step event.

Dependencies that hold in some steps only, because a region is guarded by a value, become waits or signals by that
value: `guards.resolve` says which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, groupby

import numpy as np

from .access import Access, AccessHistory, union
from .boxes import is_empty
from .graph import (
    MAX_SIGNALS,
    STEP_EVENT,
    Event,
    Events,
    EventTensor,
    Guard,
    GuardedEvent,
    Region,
    TaskGraph,
)
from .guards import Conditional, GuardedHistory, WaitsSoFar, announcers, by_number, guarded_tensors, resolve


class TooManySignals(ValueError):
    """A task would have to signal more events than a task descriptor holds, even after merging."""


@dataclass(slots=True)
class Draft:
    """Events in the making: what the passes work on. Each pass fills in what the next one needs."""

    graph: TaskGraph
    # of each task: tasks that it must wait for (bit sets), of which `implied` are waited for by others among them
    direct: list[int] = field(default_factory=list)
    implied: list[int] = field(default_factory=list)
    # of tasks with dependencies by a value: those that are signalled, and those that are waited for
    signalled: dict[int, tuple[Conditional, ...]] = field(default_factory=dict)
    awaited: dict[int, list[tuple[int, Guard]]] = field(default_factory=dict)
    # from `fuse` on, numbered as they come up; producers and consumers without guards
    edges: dict[int, Event] = field(default_factory=dict)
    edge_signals: dict[int, tuple[Conditional, ...]] = field(default_factory=dict)
    edge_waits: dict[int, list[Conditional]] = field(default_factory=dict)
    num_pairs: int = 0
    max_pairs: int = 0
    events: Events | None = None  # from `linearise` on


def derive_events(graph: TaskGraph, observe: Callable[[str, Draft], None] | None = None) -> Events:
    """The events that make any interleaving of `graph` mean the same as its program order.

    `observe(name, draft)` is called after each pass.
    """
    draft = Draft(graph)
    for name, run_pass in PASSES.items():
        run_pass(draft)
        if observe is not None:
            observe(name, draft)
    return draft.events


# ---- derive, reduce ----


def _derive(draft: Draft) -> None:
    """Per task the tasks it conflicts with, but for those that a later writer of the same region hides."""
    tasks = draft.graph.tasks
    by_value = _ByValue(draft)
    written = {region.tensor for task in tasks for region in task.writes} - by_value.tensors
    histories: dict[str, AccessHistory] = defaultdict(AccessHistory)
    accesses = []
    for task in tasks:
        sides = [], []
        for side, regions in zip(sides, (task.reads, task.writes), strict=True):
            for region in regions:
                if region.tensor in written and not is_empty(region.box):
                    history = histories[region.tensor]
                    history.boxes[region.box] = None
                    side.append((history, region.box))
        accesses.append(sides)
    for history in histories.values():
        history.cut()
    ancestors_of: dict[int, int] = {}  # equal sets share one object
    for index, (reads, writes) in enumerate(accesses):
        before: set[Access] = set()
        for history, box in reads:
            before.update(history.before_read(box))
        for history, box in writes:
            before |= history.before_write(box)
        needed, implied = union(before)
        if by_value.tensors:
            needed, implied = by_value.needs(index, needed, implied)
        reduced = needed & ~implied
        ancestors = ancestors_of.get(reduced)
        if ancestors is None:
            ancestors = ancestors_of[reduced] = needed | implied
        for history, box in writes:
            history.record_write(box, index, ancestors)
        for history, box in reads:
            if (history, box) not in writes:  # its own write stands for the read
                history.record_read(box, index, ancestors)
        if by_value.tensors:
            by_value.record(index, ancestors)
        draft.direct.append(needed)
        draft.implied.append(implied)


class _ByValue:
    """`_derive`, for the tensors with regions that values guard."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        written = {region.tensor for task in draft.graph.tasks for region in task.writes}
        self.tensors = guarded_tensors(draft.graph) & written
        self.announced = announcers(draft.graph)
        self.histories: dict[str, GuardedHistory] = defaultdict(GuardedHistory)
        self.so_far = WaitsSoFar()
        self.ancestors: list[int] = []  # per task
        self.regions: list[tuple[Region, bool]] = []  # of the present task, and whether it writes them

    def needs(self, task: int, needed: int, implied: int) -> tuple[int, int]:
        """Adds what this task needs because of those regions, and notes what it needs in some steps."""
        regions = self.draft.graph.tasks[task]
        sides = (
            (regions.writes, True),
            (regions.reads, False),
        )  # own writes are recorded first: they hide others
        self.regions = [
            (r, is_write) for side, is_write in sides for r in side if r.tensor in self.tensors and not is_empty(r.box)
        ]
        conditional = []
        for region, is_write in self.regions:
            sure, some = self.histories[region.tensor].before(region, is_write)
            for producer, ancestors in sure.items():
                needed |= 1 << producer
                implied |= ancestors
            conditional += some
        if not conditional:
            return needed, implied
        before, imply = needed | implied, self.so_far.imply
        rest = [(t, guard) for t, guard, own in conditional if not (before >> t & 1 or imply(t, {guard, own}, before))]
        found = resolve(self.draft.graph, task, rest, self.announced)
        self.so_far.add(task, found)
        if found.signals:
            self.draft.signalled[task] = found.signals
        if waits := [wait for pairs in found.waits.values() for wait in by_number(pairs)]:
            self.draft.awaited[task] = waits
        return needed | found.always, implied | self._before_signals(found.signals)

    def _before_signals(self, signals: tuple[Conditional, ...]) -> int:
        """Who signals by a value comes after who announces it, and so does whoever waits for that."""
        implied = 0
        for producer, guard in signals:
            announcer = self.announced[guard.value]
            if self.ancestors[producer] >> announcer & 1:
                implied |= self.ancestors[announcer] | 1 << announcer
        return implied

    def record(self, task: int, ancestors: int) -> None:
        self.ancestors.append(ancestors)
        for region, is_write in self.regions:
            self.histories[region.tensor].record(region, is_write, task, ancestors)


def _reduce(draft: Draft) -> None:
    draft.direct = [needed & ~implied for needed, implied in zip(draft.direct, draft.implied, strict=True)]


# ---- fuse ----


def _fuse(draft: Draft) -> None:
    """One event per distinct set of producers, those by value included."""
    number_of: dict[tuple[int, tuple[Conditional, ...]], int] = {}
    consumers_of: dict[int, list[int]] = defaultdict(list)

    def edge(producers: int, signals: tuple[Conditional, ...]) -> int:
        return number_of.setdefault((producers, signals), len(number_of))

    for task, producers in enumerate(draft.direct):
        signals = draft.signalled.get(task, ())
        if producers or signals:
            consumers_of[edge(producers, signals)].append(task)
        for some, guard in draft.awaited.get(task, ()):
            draft.edge_waits.setdefault(edge(some, ()), []).append((task, guard))
    for (producers, signals), number in number_of.items():
        size, consumers = producers.bit_count() + len(signals), consumers_of[number]
        draft.edges[number] = Event(members(producers), consumers, size)
        draft.num_pairs += size * (len(consumers) + len(draft.edge_waits.get(number, ())))
        draft.max_pairs = max(draft.max_pairs, size)
        if signals:
            draft.edge_signals[number] = signals


def members(tasks: int) -> list[int]:
    """The set bits of `tasks`, ascending."""
    if tasks.bit_count() > 16:
        raw = np.frombuffer(tasks.to_bytes(tasks.bit_length() // 8 + 1, "little"), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist()
    found = []
    while tasks:
        lowest = tasks & -tasks
        found.append(lowest.bit_length() - 1)
        tasks ^= lowest
    return found


# ---- linearise ----


def _linearise(draft: Draft) -> None:
    """Number the events by their first consumer, behind the step event."""
    num_tasks = len(draft.graph.tasks)
    numbers = sorted(draft.edges, key=lambda n: _first_consumer(draft, n))
    ordered = [draft.edges[number] for number in numbers]
    wait = [-1] * num_tasks
    signals: list[list[int]] = [[] for _ in range(num_tasks)]
    for number, event in enumerate(ordered, start=STEP_EVENT + 1):
        for task in event.consumers:
            wait[task] = number
        for task in event.producers:
            signals[task].append(number)
    # an event that only values make somebody wait for may have no waiter in this step
    waited = set(wait) if draft.edge_waits else None
    sinks = [t for t in range(num_tasks) if (not signals[t] if waited is None else waited.isdisjoint(signals[t]))]
    for task in sinks:
        signals[task].append(STEP_EVENT)
        if len(signals[task]) > MAX_SIGNALS:
            raise TooManySignals(_crowded_text(draft.graph, task, len(signals[task]), "a value chooses among them"))
    draft.events = Events([Event(sinks, [], len(sinks)), *ordered], wait, signals)
    draft.events.num_pairs, draft.events.max_pairs = draft.num_pairs, draft.max_pairs
    if draft.edge_signals or draft.edge_waits:
        _add_guarded(draft, {number: place for place, number in enumerate(numbers, start=STEP_EVENT + 1)})
    draft.events.tensors = event_tensors(draft.graph, draft.events.events)


def _first_consumer(draft: Draft, number: int) -> tuple[int, int]:
    """Where a value chooses among a task's events, they lie in the order of their producers."""
    event = draft.edges[number]
    consumers = [*event.consumers[:1], *(task for task, _ in draft.edge_waits.get(number, ())[:1])]
    return min(consumers), event.producers[0] if event.producers else -1


def _add_guarded(draft: Draft, place: dict[int, int]) -> None:
    events, announced = draft.events, announcers(draft.graph)
    wait_if, signal_if = defaultdict(list), defaultdict(list)
    for number, waits in draft.edge_waits.items():
        for task, guard in waits:
            wait_if[task].append(GuardedEvent(place[number], guard))
        event = events.events[place[number]]
        event.consumers = sorted({*event.consumers, *(task for task, _ in waits)})
    for number, signals in draft.edge_signals.items():
        event = events.events[place[number]]
        for task, guard in signals:
            absent = Guard(guard.value, guard.lo, guard.hi, absent=True)
            signal_if[task].append(GuardedEvent(place[number], guard))
            signal_if[announced[guard.value]].append(GuardedEvent(place[number], absent))
            event.producers = sorted({*event.producers, task, announced[guard.value]})
    events.wait_if, events.signal_if = dict(wait_if), dict(signal_if)


def event_tensors(graph: TaskGraph, events: list[Event]) -> list[EventTensor]:
    """One per edge of the op graph: neighbours in the numbering whose producers and consumers are of the same ops."""

    def ops(numbered: tuple[int, Event]) -> tuple[int, int]:
        event = numbered[1]
        return graph.tasks[event.producers[-1]].op, graph.tasks[event.consumers[0]].op

    numbered = enumerate(events[STEP_EVENT + 1 :], start=STEP_EVENT + 1)
    tensors = []
    for (producer, consumer), run in groupby(numbered, key=ops):
        first, *others = (number for number, _ in run)
        tensors.append(EventTensor(graph.ops[producer], graph.ops[consumer], first, 1 + len(others)))
    return tensors


# ---- fit: merging events, for tasks that would signal too many ----


def _fit(draft: Draft) -> None:
    graph, edges = draft.graph, draft.edges
    producers = [np.array(event.producers, dtype=np.int64) for event in edges.values()]
    num_signals = np.bincount(np.concatenate(producers)) if producers else np.zeros(0, dtype=np.int64)
    crowded = np.flatnonzero(num_signals > MAX_SIGNALS).tolist()
    if not crowded:
        return
    signals: dict[int, set[int]] = defaultdict(set)
    for edge, event in edges.items():
        for task in event.producers:
            signals[task].add(edge)
    fixed = {*draft.edge_signals, *draft.edge_waits}  # a value chooses among these: they stay apart
    edges_between = _edges_by_ops(graph, {number: event for number, event in edges.items() if number not in fixed})
    for task in crowded:
        if len(signals[task]) > MAX_SIGNALS:  # an earlier merge may have been enough
            for same_ops in edges_between.values():
                if len(signals[task].intersection(same_ops)) > 1:
                    _merge_chain(same_ops, edges, signals)
        while len(signals[task]) > MAX_SIGNALS:
            _merge(_cheapest_pair(graph, task, edges, signals, fixed), edges, signals)


def _edges_by_ops(graph: TaskGraph, edges: dict[int, Event]) -> dict[tuple, list[int]]:
    """The events between the same ops: merging those keeps the shape of the graph, op by op."""
    classes = defaultdict(list)
    for edge, event in edges.items():
        ops = [frozenset(graph.tasks[t].op for t in side) for side in (event.producers, event.consumers)]
        classes[tuple(ops)].append(edge)
    return classes


def _may_merge(a: Event, b: Event) -> bool:
    """Whether all producers of the union come before all its consumers in program order.

    Then every wait of the merged graph still points backwards in program order, so program order
    stays one way to run it: merging can never close a cycle. Without this rule, merging a -> b with
    b -> c would make b wait for itself.
    """
    last_producer = max(a.producers[-1], b.producers[-1])
    return last_producer < min(a.consumers[0], b.consumers[0])


def _merge_chain(same_ops: list[int], edges: dict[int, Event], signals: dict[int, set[int]]) -> None:
    alive = sorted((e for e in same_ops if e in edges), key=lambda e: edges[e].consumers[0])
    for edge, following in zip(alive, alive[1:], strict=False):
        if _may_merge(edges[edge], edges[following]):
            _merge((edge, following), edges, signals)


def _cheapest_pair(
    graph: TaskGraph, task: int, edges: dict[int, Event], signals: dict[int, set[int]], fixed: set[int]
) -> tuple[int, int]:
    """The two events of `task` whose merging adds the fewest waits."""

    def added_waits(pair: tuple[int, int]) -> int:
        a, b = edges[pair[0]], edges[pair[1]]
        return len(a.producers) * len(b.consumers) + len(b.producers) * len(a.consumers)

    pairs = combinations(sorted(signals[task] - fixed), 2)
    allowed = [pair for pair in pairs if _may_merge(edges[pair[0]], edges[pair[1]])]
    if not allowed:
        raise TooManySignals(_crowded_text(graph, task, len(signals[task]), "no two of them can be merged"))
    return min(allowed, key=added_waits)


def _crowded_text(graph: TaskGraph, task: int, num_signals: int, why: str) -> str:
    return (
        f"{graph.task_name(task)} would signal {num_signals} events and {why}; a task descriptor holds {MAX_SIGNALS}."
        " Cut the task into smaller writes, or its consumers into fewer ops."
    )


def _merge(pair: tuple[int, int], edges: dict[int, Event], signals: dict[int, set[int]]) -> None:
    """Fuse both events into the second one."""
    gone, kept = pair
    old, new = edges.pop(gone), edges[kept]
    for task in old.producers:
        signals[task].discard(gone)
        signals[task].add(kept)
    new.producers = sorted({*new.producers, *old.producers})
    new.consumers = sorted({*new.consumers, *old.consumers})
    new.count = len(new.producers)


PASSES: dict[str, Callable[[Draft], None]] = {
    "derive": _derive, "reduce": _reduce, "fuse": _fuse, "fit": _fit, "linearise": _linearise,
}  # fmt: skip
