"""verify accepts what is safe, rejects what is not, and says what is wrong."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scheduler_helpers import GraphBuilder, chain, graphs, region, run_at_random
from tri_mpk.scheduler import (
    MAX_SIGNALS,
    STEP_EVENT,
    CountError,
    DeadlockError,
    Event,
    Events,
    MalformedScheduleError,
    RaceError,
    Region,
    Schedule,
    StepOverlapError,
    Task,
    TaskGraph,
    TooManySignals,
    UnwrittenReadError,
    derive_events,
    schedule,
    verify,
)
from tri_mpk.scheduler.examples import decoder_graph
from tri_mpk.scheduler.explore import explore


@pytest.fixture
def plan():
    """a writes x, b reads x and writes y, c reads y; two tasks each on two workers."""
    graph = chain(num_tiles=2)
    events = derive_events(graph)
    return graph, events, schedule(graph, events, 2)


def forget(events: Events, task: int, event: int) -> None:
    """`task` no longer signals `event`; counts stay right, and the task still precedes the step
    event."""
    events.signals[task].remove(event)
    events.events[event].count -= 1
    if not events.signals[task]:
        events.signals[task].append(STEP_EVENT)
        events.events[STEP_EVENT].count += 1


# ---- planted faults, one per error ----


def test_report_of_a_good_schedule(plan):
    report = verify(*plan)
    assert (report.num_tasks, report.num_events) == (6, 3)
    assert (report.num_pairs, report.num_regions_covered) == (8, 4)
    assert re.fullmatch(
        r"verified 6 tasks and 3 events in \S+ s: 8 conflicting pairs ordered, 4 reads covered",
        str(report),
    )


def test_deadlock_by_swapped_queue_order(plan):
    graph, events, queues = plan
    queues.queues[0].reverse()
    with pytest.raises(DeadlockError) as caught:
        verify(graph, events, queues)
    text = str(caught.value)
    assert "c t0 (worker 0, slot 0) waits for event 2: seen 0, wanted 2" in text
    assert "missing b t0 (worker 0, slot 1)" in text and "writes and c t0 reads y[0:1]" in text


def test_deadlock_across_workers_shows_the_cycle(plan):
    graph, events, _ = plan
    with pytest.raises(DeadlockError) as caught:
        verify(graph, events, Schedule([[0, 4, 2], [1, 5, 3]]))
    assert "c t0 (worker 0, slot 1)" in str(caught.value)
    assert "missing b t0" in str(caught.value) and "y[0:1]" in str(caught.value)


def test_missing_signal(plan):
    graph, events, queues = plan
    events.signals[1].remove(1)
    with pytest.raises(CountError) as caught:
        verify(graph, events, queues)
    assert "b t0 waits for 2 signals of event 1 per step, but a t0 give 1" in str(caught.value)
    assert "a t1 writes and b t0 reads x[1:2], but a t1 does not signal it" in str(caught.value)


def test_race_by_a_signal_that_is_not_counted(plan):
    graph, events, queues = plan
    forget(events, task=1, event=1)
    with pytest.raises(RaceError) as caught:
        verify(graph, events, queues)
    assert "a t1 writes and b t0 reads x[1:2] (workers 1 and 0)" in str(caught.value)
    assert "nothing makes b t0 run after a t1" in str(caught.value)


def test_race_by_dropped_wait(plan):
    graph, events, queues = plan
    events.wait[3] = -1
    with pytest.raises(RaceError) as caught:
        verify(graph, events, queues)
    assert "a t0 writes and b t1 reads x[0:1]" in str(caught.value)
    assert "waits for no event" in str(caught.value)


def test_race_by_aliasing(plan):
    graph, events, queues = plan
    graph.tasks[1].writes = (region("x[0:2]"),)  # now overlaps the tile of a t0
    with pytest.raises(RaceError) as caught:
        verify(graph, events, queues)
    assert "a t0 writes and a t1 writes x[0:1] (workers 0 and 1)" in str(caught.value)


def test_race_with_the_second_write_of_a_box():
    builder = GraphBuilder(x=((1,), True))
    for name, access in (("a", "writes"), ("b", "reads"), ("c", "writes"), ("d", "reads")):
        builder.op(name)
        builder.task(**{access: ["x[0:1]"]})
    waits_for_a_only = Events([Event([2, 3], [], 2), Event([0], [3], 1)], [-1, -1, -1, 1], [[1], [], [0], [0]])
    with pytest.raises(RaceError, match=r"c t0 writes and d t0 reads x\[0:1\]"):
        verify(builder.graph, waits_for_a_only, Schedule([[0, 1, 2], [3]]))


def test_race_ordered_backwards():
    builder = GraphBuilder(x=((1,), True))
    builder.op("old")
    builder.task(reads=["x[0:1]"])
    builder.op("new")
    builder.task(writes=["x[0:1]"])
    events = Events([Event([0, 1], [], 2)], [-1, -1], [[0], [0]])
    verify(builder.graph, events, Schedule([[0, 1]]))
    with pytest.raises(RaceError, match=r"old t0 reads and new t0 writes x\[0:1\].*backwards"):
        verify(builder.graph, events, Schedule([[1, 0]]))


def test_unwritten_read_names_the_hole_and_the_late_writer():
    builder = GraphBuilder(x=((2, 4), False))
    builder.op("a")
    builder.task(writes=["x[0:2, 0:3]"])
    builder.op("b")
    builder.task(reads=["x[0:2, 0:4]"])
    builder.op("c")
    builder.task(writes=["x[1:2, 3:4]"])
    events = derive_events(builder.graph)
    with pytest.raises(UnwrittenReadError) as caught:
        verify(builder.graph, events, schedule(builder.graph, events, 2))
    assert "b t0 (worker 1) reads x[0:2, 3:4] before any task has written it" in str(caught.value)
    assert "c t0 (worker 0) writes it only later" in str(caught.value)


@pytest.mark.parametrize("change", [-1, +1])
def test_count_error(plan, change):
    graph, events, queues = plan
    events.events[2].count += change
    outcome = "the wait never ends" if change > 0 else "the wait orders nothing"
    with pytest.raises(CountError, match=f"c t0 waits for {2 + change} .* give 2: .*{outcome}"):
        verify(graph, events, queues)


def test_count_error_of_the_step_event(plan):
    graph, events, queues = plan
    events.events[STEP_EVENT].count = 1
    with pytest.raises(CountError, match="every worker waits for 1 signals of event 0"):
        verify(graph, events, queues)


def test_signals_that_nobody_waits_for_are_reported(plan):
    graph, events, queues = plan
    events.signals[0].append(len(events.events))
    events.events.append(Event([0], [], 7))
    report = verify(graph, events, queues)
    assert report.num_unused_signals == 1 and str(report).endswith(", signals that nobody waits for: 1")


def test_wait_without_signals(plan):
    graph, events, queues = plan
    events.signals[0] = events.signals[1] = [STEP_EVENT]
    events.events[STEP_EVENT].count += 2
    with pytest.raises(CountError, match=r"b t0 .* event 1 .* no task gives one.*a t1 writes .* x\[1:2\]"):
        verify(graph, events, queues)


def test_a_count_of_zero_is_no_wait(plan):
    graph, events, queues = plan
    events.events[2].count = 0
    with pytest.raises(RaceError, match="it waits for no event"):
        verify(graph, events, queues)


def test_step_overlap():
    builder = GraphBuilder(x=((2,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.task(writes=["x[1:2]"])
    events = Events([Event([0], [], 1)], [-1, -1], [[0], []])
    verify(builder.graph, events, Schedule([[1, 0]]))  # the queue itself puts a t1 before the signal
    with pytest.raises(StepOverlapError, match=r"a t1 \(worker 1, slot 0\) may still run"):
        verify(builder.graph, events, Schedule([[0], [1]]))


@pytest.mark.parametrize(("queues", "safe"), [([[0, 1]], True), ([[0, 1], []], False), ([[0], [1]], False)])
def test_without_a_step_event_only_a_lone_worker_keeps_steps_apart(queues, safe):
    builder = GraphBuilder(x=((2,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.task(writes=["x[1:2]"])
    events = Events([Event([], [], 0)], [-1, -1], [[], []])
    if safe:
        verify(builder.graph, events, Schedule(queues))
    else:
        with pytest.raises(StepOverlapError, match=r"may still run when worker \d begins the next step"):
            verify(builder.graph, events, Schedule(queues))


@pytest.mark.parametrize(
    ("queues", "text"),
    [
        ([[0, 2, 4], [1, 3]], "c t1 is in no queue"),
        ([[0, 2, 4], [1, 3, 5, 0]], "a t0 is queued twice, on worker 0 and worker 1"),
        ([[0, 2, 4], [1, 3, 5, 6]], "worker 1 runs task 6, but the graph has 6 tasks"),
    ],
)
def test_malformed_queues(plan, queues, text):
    graph, events, _ = plan
    with pytest.raises(MalformedScheduleError, match=text):
        verify(graph, events, Schedule(queues))


def test_malformed_events(plan):
    graph, events, queues = plan
    events.wait[2] = 7
    with pytest.raises(MalformedScheduleError, match="b t0 waits for event 7"):
        verify(graph, events, queues)
    events.wait[2] = 1
    events.signals[5] = [0] * (MAX_SIGNALS + 1)
    with pytest.raises(MalformedScheduleError, match="c t1 signals 5 events"):
        verify(graph, events, queues)


def test_ops_that_disagree_on_coordinates(plan):
    graph, events, queues = plan
    graph.tasks[2].reads = (region("x[0:2, 0:1]"),)
    with pytest.raises(MalformedScheduleError, match=r"b t0 uses x\[0:2, 0:1\].*declared with 1"):
        verify(graph, events, queues)


def test_scalar_tensors_and_empty_boxes():
    builder = GraphBuilder(step=((), False), x=((4,), False))
    graph = builder.graph
    step, nothing = Region("step", ()), region("x[2:2]")
    for name, reads, writes in (("a", (), (step,)), ("b", (step, nothing), ()), ("c", (), (step,))):
        builder.op(name)
        graph.tasks.append(Task(len(graph.ops) - 1, (0,), reads, writes, 1))
    events = derive_events(graph)
    assert [events.events[wait].producers for wait in events.wait[1:]] == [[0], [1]]
    assert verify(graph, events, schedule(graph, events, 3)).num_pairs == 3


# ---- random schedules against judges that share nothing with verify ----


def derived(graph: TaskGraph, num_workers: int) -> tuple[Events, Schedule]:
    try:
        events = derive_events(graph)
    except TooManySignals:
        assume(False)
    return events, schedule(graph, events, num_workers)


@settings(max_examples=150, deadline=None)
@given(graphs(max_tasks=16, max_regions=3), st.integers(1, 5), st.integers(0, 999))
def test_derived_schedules_verify_and_run_as_the_program(graph, num_workers, seed):
    events, queues = derived(graph, num_workers)
    verify(graph, events, queues)
    run_at_random(graph, events, queues, num_epochs=3, seed=seed)


@settings(max_examples=30, deadline=None)
@given(graphs(max_tasks=6), st.integers(1, 3))
def test_the_judge_finds_derived_schedules_safe(graph, num_workers):
    assert not explore(graph, *derived(graph, num_workers)).faults


# ---- whole models ----


@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_whole_model_is_verified_in_seconds(reuse_buffers):
    graph = decoder_graph(num_layers=36, num_workers=132, reuse_buffers=reuse_buffers)
    events = derive_events(graph)
    report = verify(graph, events, schedule(graph, events, 132))
    print(report)
    assert report.seconds < 10


def test_one_missing_signal_in_a_whole_model_is_found():
    graph = decoder_graph(num_layers=8, num_workers=32, reuse_buffers=True)
    events = derive_events(graph)
    plan = schedule(graph, events, 32)
    task = next(t for t, task in enumerate(graph.tasks) if graph.ops[task.op] == "L05 gate_up")
    forget(events, task, events.signals[task][0])
    with pytest.raises(RaceError, match=r"L05 gate_up t0 writes and L05 down t1 reads act\[0:1\]"):
        verify(graph, events, plan)
