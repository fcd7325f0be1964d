"""Events say exactly what reads and writes need, in few counters."""

import time

import pytest
from hypothesis import given, settings

from scheduler_helpers import GraphBuilder, chain, graphs
from tri_mpk.scheduler import (
    MAX_SIGNALS,
    STEP_EVENT,
    Events,
    TaskGraph,
    TooManySignals,
    derive_events,
)
from tri_mpk.scheduler.examples import butterfly_events, butterfly_graph, decoder_graph
from tri_mpk.scheduler.explore import conflict


def ancestors(graph: TaskGraph, events: Events) -> list[set[int]]:
    """All tasks that must be done before each task, by the events alone."""
    found: list[set[int]] = []
    for wait in events.wait:
        producers = set(events.events[wait].producers) if wait >= 0 else set()
        found.append(producers.union(*(found[p] for p in producers)))
    return found


def test_equal_dependencies_become_one_event():
    events = derive_events(chain(num_tiles=3))
    assert [(e.producers, e.consumers, e.count) for e in events.events[1:]] == [
        ([0, 1, 2], [3, 4, 5], 3),
        ([3, 4, 5], [6, 7, 8], 3),
    ]
    assert events.wait == [-1, -1, -1, 1, 1, 1, 2, 2, 2]
    assert (events.num_pairs, events.max_pairs) == (18, 3)  # before they became two events


def test_step_event_collects_the_tasks_nobody_waits_for():
    events = derive_events(chain(num_tiles=2))
    step = events.events[STEP_EVENT]
    assert (step.producers, step.consumers, step.count) == ([4, 5], [], 2)
    assert events.signals == [[1], [1], [2], [2], [STEP_EVENT], [STEP_EVENT]]


def test_an_implied_dependency_is_dropped():
    builder = GraphBuilder(x=((1,), False), y=((1,), False), z=((1,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.op("b")
    builder.task(["x[0:1]"], ["y[0:1]"])
    builder.op("c")
    builder.task(["x[0:1]", "y[0:1]"], ["z[0:1]"])  # needs a and b; b has waited for a
    events = derive_events(builder.graph)
    assert events.events[events.wait[2]].producers == [1]


def test_writes_wait_for_the_readers_of_what_they_overwrite():
    builder = GraphBuilder(x=((4,), True))
    builder.op("read")
    builder.task(reads=["x[0:2]"])
    builder.task(reads=["x[2:4]"])
    builder.op("write")
    builder.task(writes=["x[0:2]"])
    builder.task(writes=["x[1:3]"])  # both readers, but the write before has waited for one
    events = derive_events(builder.graph)
    producers = [events.events[events.wait[task]].producers for task in (2, 3)]
    assert producers == [[0], [1, 2]]


def test_weights_need_no_event():
    builder = GraphBuilder(w=((4,), True), y=((4,), False))
    builder.op("a")
    builder.task(["w[0:4]"], ["y[0:2]"])
    builder.task(["w[0:4]"], ["y[2:4]"])
    events = derive_events(builder.graph)
    assert events.wait == [-1, -1] and len(events.events) == 1


def fan_out(num_consumers: int) -> TaskGraph:
    """One task of `a` that all tasks of `c` read, each beside a tile of its own from `b`."""
    size = (num_consumers,)
    builder = GraphBuilder(x=((1,), False), y=(size, False), z=(size, False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.op("b")
    for i in range(num_consumers):
        builder.task(writes=[f"y[{i}:{i + 1}]"])
    builder.op("c")
    for i in range(num_consumers):
        builder.task(["x[0:1]", f"y[{i}:{i + 1}]"], [f"z[{i}:{i + 1}]"])
    return builder.graph


def test_events_are_merged_where_a_task_would_signal_too_many():
    assert len(derive_events(fan_out(MAX_SIGNALS)).events) == 1 + MAX_SIGNALS
    events = derive_events(fan_out(MAX_SIGNALS + 1))
    assert len(events.events) == 2
    assert events.events[1].count == MAX_SIGNALS + 2  # a, and every task of b


def test_events_of_different_ops_are_merged_when_there_is_no_other_way():
    builder = GraphBuilder(x=((1,), False), y=((8,), False), z=((8,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    for i in range(8):
        builder.op(f"b{i}")
        builder.task(writes=[f"y[{i}:{i + 1}]"])
    for i in range(8):
        builder.op(f"c{i}")
        builder.task(["x[0:1]", f"y[{i}:{i + 1}]"], [f"z[{i}:{i + 1}]"])
    events = derive_events(builder.graph)
    assert len(events.signals[0]) == MAX_SIGNALS


def test_too_many_signals_names_the_task():
    builder = GraphBuilder(x=((1,), False), y=((8,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    for i in range(MAX_SIGNALS + 1):  # each b comes before the next one's consumer: no merge keeps the order
        builder.op(f"b{i}")
        builder.task(writes=[f"y[{i}:{i + 1}]"])
        builder.op(f"c{i}")
        builder.task(["x[0:1]", f"y[{i}:{i + 1}]"])
    with pytest.raises(TooManySignals, match=r"^a t0 would signal 5 events"):
        derive_events(builder.graph)


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_events_order_every_conflict_and_nothing_else(graph):
    try:
        events = derive_events(graph)
    except TooManySignals:
        return
    before = ancestors(graph, events)
    needed: list[set[int]] = []
    for task in range(len(graph.tasks)):
        direct = {earlier for earlier in range(task) if conflict(graph, earlier, task)}
        needed.append(direct.union(*(needed[p] for p in direct)))
    assert all(want <= have for want, have in zip(needed, before, strict=True))
    assert all(len(signals) <= MAX_SIGNALS for signals in events.signals)
    merged = len({frozenset(_reduced(needed, task)) for task in range(len(needed))} - {frozenset()})
    if len(events.events) == 1 + merged:  # no event was merged: then nothing may be ordered in vain
        assert before == needed
        for task, wait in enumerate(events.wait):
            producers = set(events.events[wait].producers) if wait >= 0 else set()
            assert producers == _reduced(needed, task)


def _reduced(needed: list[set[int]], task: int) -> set[int]:
    return {p for p in needed[task] if not any(p in needed[q] for q in needed[task])}


@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_whole_model_takes_seconds(reuse_buffers):
    graph = decoder_graph(num_layers=36, num_workers=132, reuse_buffers=reuse_buffers)
    start = time.perf_counter()
    events = derive_events(graph)
    seconds = time.perf_counter() - start
    print(f"{len(graph.tasks)} tasks, {len(events.events)} events in {seconds:.2f} s")
    assert len(events.events) < 20 * 36
    assert seconds < 10


def test_the_events_of_a_butterfly_need_no_derivation():
    graph = butterfly_graph(num_stages=7, log2_width=3)
    assert butterfly_events(graph, log2_width=3) == derive_events(graph)
