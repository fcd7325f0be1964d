"""The judge is judged: what is wrong with hand-made schedules, and nothing else, is found."""

import pytest

from scheduler_helpers import GraphBuilder, chain
from tri_mpk.scheduler import (
    STEP_EVENT,
    DeadlockError,
    Event,
    Events,
    RaceError,
    Schedule,
    StepOverlapError,
    TaskGraph,
    UnwrittenReadError,
    derive_events,
)
from tri_mpk.scheduler.explore import Machine, cells, conflict, explore, reads_unwritten


def faults(graph: TaskGraph, events: Events, queues: list[list[int]]) -> set[type]:
    return set(explore(graph, events, Schedule(queues)).faults)


@pytest.fixture
def pair() -> tuple[TaskGraph, Events]:
    """a writes x, b reads it."""
    builder = GraphBuilder(x=((1,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.op("b")
    builder.task(reads=["x[0:1]"])
    return builder.graph, derive_events(builder.graph)


@pytest.mark.parametrize("queues", [[[0, 1]], [[0], [1]], [[], [0], [1]]])
def test_safe(pair, queues):
    graph, events = pair
    assert faults(graph, events, queues) == set()


def test_deadlock(pair):
    graph, events = pair
    assert faults(graph, events, [[1, 0]]) == {DeadlockError}
    events.events[STEP_EVENT].count += 1
    assert faults(graph, events, [[0], [1]]) == {DeadlockError}


def test_race(pair):
    graph, events = pair
    events.wait[1] = -1
    events.signals[0] = [STEP_EVENT]
    events.events[STEP_EVENT].count = 2
    assert faults(graph, events, [[0], [1]]) == {RaceError}
    assert faults(graph, events, [[0, 1]]) == set()
    assert faults(graph, events, [[1, 0]]) == {RaceError}  # one order only, and the wrong one


def test_step_overlap(pair):
    graph, events = pair
    events.signals = [[1, STEP_EVENT], []]  # the next step may begin while b still reads
    assert StepOverlapError in faults(graph, events, [[0], [1]])
    assert faults(graph, events, [[0, 1]]) == set()
    assert StepOverlapError in faults(graph, events, [[0, 1], []])


def test_unwritten_read(pair):
    graph, events = pair
    graph.tasks[0].writes = ()
    assert faults(graph, events, [[0], [1]]) == {UnwrittenReadError}
    graph.tensors["x"].initialised = True
    assert not reads_unwritten(graph)


def test_a_surplus_signal_orders_nothing_after_some_epochs():
    """a and b signal, c waits for one of them: in the first step, neither is certain."""
    graph = chain(1)
    events = Events([Event([2], [], 1), Event([0, 1], [2], 1)], [-1, -1, 1], [[1], [1], [STEP_EVENT]])
    assert RaceError in faults(graph, events, [[0], [1], [2]])


def test_a_surplus_that_orders_nothing_wraps_around():
    """One worker needs no event at all, until the counter is half its range ahead of the wait."""
    graph = chain(1)
    events = Events([Event([2], [], 1), Event([0, 1], [2], 1)], [-1, -1, 1], [[1], [1], [STEP_EVENT]])
    assert faults(graph, events, [[0, 1, 2]]) == {DeadlockError}
    events.events[1].count = 2
    assert faults(graph, events, [[0, 1, 2]]) == set()


def test_every_interleaving_is_visited():
    """Neither, either or both tasks are done; or one worker is in the next step, and done there or not."""
    builder = GraphBuilder(x=((2,), True))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.task(writes=["x[1:2]"])
    graph = builder.graph
    exploration = explore(graph, derive_events(graph), Schedule([[0], [1]]))
    assert (set(exploration.faults), exploration.num_states) == (set(), 8)
    with pytest.raises(ValueError, match="more than 5 states"):
        explore(graph, derive_events(graph), Schedule([[0], [1]]), max_states=5)


def test_the_machine_counts_epochs(pair):
    _, events = pair
    machine = Machine(events, Schedule([[0], [1]]))
    state = machine.start()
    for epoch in (1, 2):
        assert machine.enabled(state) == [(0, epoch, 0)]
        state = machine.after(state, 0)
        assert machine.is_done(state, epoch, 0) and not machine.is_done(state, epoch, 1)
        assert machine.enabled(state) == [(1, epoch, 1)]
        state = machine.after(state, 1)
        assert machine.enabled(state) == [(0, epoch, None), (1, epoch, None)]
        state = machine.after(machine.after(state, 1), 0)
        assert machine.counters(state) == [epoch, epoch]


def test_cells_and_conflicts():
    builder = GraphBuilder(x=((4, 2), True), step=((), True))
    builder.op("a")
    builder.task(["x[0:2, 0:1]"], ["x[2:4, 0:2]"])
    builder.task(["x[1:2, 1:2]"], ["x[1:2, 0:1]"])
    builder.task(["x[0:1, 0:2]"])
    assert cells(builder.graph.tasks[0].reads[0]) == {("x", 0, 0), ("x", 1, 0)}
    assert conflict(builder.graph, 0, 1) and conflict(builder.graph, 1, 0) and not conflict(builder.graph, 0, 2)
