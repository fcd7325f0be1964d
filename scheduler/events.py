"""From reads and writes to events: who must wait for whom, fused into as few counters as possible.

1. A task depends on every earlier task whose regions conflict with its own (read after write, write
   after read, write after write). Sets of tasks are Python integers, one bit per task, so that
   union and difference cost microseconds.
2. A dependency that another one implies is dropped (exact transitive reduction).
3. Each distinct remaining set is one event. So every task waits for at most one event.
4. Where a task would signal more events than its descriptor has slots, events are merged.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from .access import AccessHistory
from .boxes import is_empty
from .graph import MAX_SIGNALS, STEP_EVENT, Event, Events, TaskGraph


class TooManySignals(ValueError):
    """A task would have to signal more events than a task descriptor holds, even after merging."""


def derive_events(graph: TaskGraph) -> Events:
    """The events that make any interleaving of `graph` mean the same as its program order."""
    consumers_of: dict[int, list[int]] = defaultdict(list)
    for task, producers in enumerate(_reduced_dependencies(graph)):
        if producers:
            consumers_of[producers].append(task)
    sizes = [producers.bit_count() for producers in consumers_of]
    num_pairs = sum(size * len(consumers) for size, consumers in zip(sizes, consumers_of.values(), strict=True))
    edges = {
        edge: Event(_members(producers), consumers, producers.bit_count())
        for edge, (producers, consumers) in enumerate(consumers_of.items())
    }
    _fit_signal_slots(graph, edges)
    events = _number(len(graph.tasks), edges)
    events.num_pairs, events.max_pairs = num_pairs, max(sizes, default=0)
    return events


def _reduced_dependencies(graph: TaskGraph) -> list[int]:
    """Per task the tasks it must wait for, without those that one of them waits for itself."""
    written = {region.tensor for task in graph.tasks for region in task.writes}
    histories: dict[str, AccessHistory] = defaultdict(AccessHistory)
    ancestors_of: dict[int, int] = {}  # equal sets share one object
    reduced = []
    for index, task in enumerate(graph.tasks):
        reads = [r for r in task.reads if r.tensor in written and not is_empty(r.box)]
        writes = [r for r in task.writes if not is_empty(r.box)]
        needed = implied = 0
        for region in reads:
            direct, beyond = histories[region.tensor].before_read(region.box)
            needed |= direct
            implied |= beyond
        overwritten = []
        for region in writes:
            entries, direct, beyond = histories[region.tensor].before_write(region.box)
            overwritten.append(entries)
            needed |= direct
            implied |= beyond
        producers = needed & ~implied
        ancestors = ancestors_of.setdefault(producers, needed | implied)
        for region, entries in zip(writes, overwritten, strict=True):
            histories[region.tensor].record_write(region.box, entries, index, ancestors)
        for region in reads:
            if region not in writes:  # its own write stands for the read
                histories[region.tensor].record_read(region.box, index, ancestors)
        reduced.append(producers)
    return reduced


def _members(tasks: int) -> list[int]:
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


def _number(num_tasks: int, edges: dict[int, Event]) -> Events:
    """Number the events by their first consumer, behind the step event."""
    ordered = sorted(edges.values(), key=lambda event: event.consumers[0])
    wait = [-1] * num_tasks
    signals: list[list[int]] = [[] for _ in range(num_tasks)]
    for number, event in enumerate(ordered, start=STEP_EVENT + 1):
        for task in event.consumers:
            wait[task] = number
        for task in event.producers:
            signals[task].append(number)
    sinks = [task for task in range(num_tasks) if not signals[task]]
    for task in sinks:
        signals[task].append(STEP_EVENT)
    return Events([Event(sinks, [], len(sinks)), *ordered], wait, signals)


# ---- merging events, for tasks that would signal too many ----


def _fit_signal_slots(graph: TaskGraph, edges: dict[int, Event]) -> None:
    producers = [np.array(event.producers) for event in edges.values()]
    num_signals = np.bincount(np.concatenate(producers)) if producers else np.zeros(0, dtype=np.int64)
    crowded = np.flatnonzero(num_signals > MAX_SIGNALS).tolist()
    if not crowded:
        return
    signals: dict[int, set[int]] = defaultdict(set)
    for edge, event in edges.items():
        for task in event.producers:
            signals[task].add(edge)
    edges_between = _edges_by_ops(graph, edges)
    for task in crowded:
        if len(signals[task]) > MAX_SIGNALS:  # an earlier merge may have been enough
            for same_ops in edges_between.values():
                if len(signals[task].intersection(same_ops)) > 1:
                    _merge_chain(same_ops, edges, signals)
        while len(signals[task]) > MAX_SIGNALS:
            _merge(_cheapest_pair(graph, task, edges, signals), edges, signals)


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
    graph: TaskGraph, task: int, edges: dict[int, Event], signals: dict[int, set[int]]
) -> tuple[int, int]:
    """The two events of `task` whose merging adds the fewest waits."""

    def added_waits(pair: tuple[int, int]) -> int:
        a, b = edges[pair[0]], edges[pair[1]]
        return len(a.producers) * len(b.consumers) + len(b.producers) * len(a.consumers)

    pairs = combinations(sorted(signals[task]), 2)
    allowed = [pair for pair in pairs if _may_merge(edges[pair[0]], edges[pair[1]])]
    if not allowed:
        raise TooManySignals(
            f"{graph.task_name(task)} would signal {len(signals[task])} events and no two of them "
            f"can be merged; a task descriptor holds {MAX_SIGNALS}. Cut the task into smaller "
            "writes, or its consumers into fewer ops."
        )
    return min(allowed, key=added_waits)


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
