"""Pools: what goes into them, what releases their tasks, and that verify judges them as trying everything does."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from scheduler_helpers import GraphBuilder, chain, run_at_random
from tri_mpk.scheduler import (
    DeadlockError,
    MalformedScheduleError,
    RaceError,
    Schedule,
    StepOverlapError,
    TaskGraph,
    derive_events,
    schedule,
    verify,
)
from tri_mpk.scheduler.descriptor import EVENT_STRIDE, SLOT_STRIDE, CounterLayout, pack
from tri_mpk.scheduler.device import TASK_FIELDS, TASK_SIGNALS, TASK_VARIANT, TASK_WAIT_COUNT
from tri_mpk.scheduler.explore import explore
from tri_mpk.scheduler.graph import STEP_EVENT
from tri_mpk.scheduler.pools import releases
from tri_mpk.scheduler.ready import POOL_DRAWN, POOL_RECORD, POOL_SIZE, POOL_VARIANT, RELEASE_STAMP, RELEASE_TARGET
from tri_mpk.scheduler.self_check import MUTATIONS, random_case, self_check

verification = importlib.import_module("tri_mpk.scheduler.verify")


def two_chains() -> TaskGraph:
    """a t0 -> b t0, b t1 and a t1 -> b t2, b t3, in an order in which the consumers alternate."""
    builder = GraphBuilder(x=((2,), False), y=((4,), False))
    builder.op("a")
    for tile in range(2):
        builder.task(writes=[f"x[{tile}:{tile + 1}]"])
    builder.op("b")
    for tile in range(4):
        builder.task([f"x[{tile % 2}:{tile % 2 + 1}]"], [f"y[{tile}:{tile + 1}]"])
    return builder.graph


# ---- what goes where ----


def test_one_dynamic_op_between_static_ones():
    graph = chain(2)
    queues = schedule(graph, derive_events(graph), 2, dynamic=[1])
    assert queues == Schedule([[0, -1, 4], [1, -1, 5]], [[2, 3]])
    assert queues.static_queues() == [[0, 4], [1, 5]] and queues.num_entries(0) == queues.num_leaving() == 2


def test_neighbours_share_a_pool_and_others_do_not():
    graph = chain(2)
    events = derive_events(graph)
    assert schedule(graph, events, 2, dynamic=[1, 2]) == Schedule([[0, -1], [1, -1]], [[2, 3, 4, 5]])
    assert schedule(graph, events, 1, dynamic=[0, 2]) == Schedule([[0, 1, 2, 3, -1]], [[4, 5]])  # a waits for nothing


def test_what_an_event_releases_lies_side_by_side():
    graph = two_chains()
    events = derive_events(graph)
    pools = schedule(graph, events, 2, dynamic=[1]).pools
    assert pools == [[2, 4, 3, 5]]
    assert [(r.first, r.num) for r in releases(events, pools)] == [(0, 2), (2, 2)]
    with pytest.raises(MalformedScheduleError, match="or not side by side"):
        releases(events, [[2, 3, 4, 5]])
    with pytest.raises(MalformedScheduleError, match="of pools 0 and 1"):
        releases(events, [[2], [4, 3, 5]])


def test_records_and_counters():
    graph = chain(2)
    events = derive_events(graph)
    queues = schedule(graph, events, 3, dynamic=[1])
    queues.queues[2].remove(5)
    queues.queues[0].append(5)
    packed = pack(graph, events, queues, 16, [[]], {})
    words, (lo, hi) = packed.words, packed.queue_start[2:4]
    (record,) = words[lo:hi]
    assert record[TASK_VARIANT.value] == POOL_VARIANT.value and record[TASK_SIGNALS.value] == -1 << 32 | STEP_EVENT
    assert (record[POOL_SIZE.value], record[POOL_DRAWN.value]) == (2, 2 + 3)
    assert divmod(int(record[POOL_RECORD.value]), 1 << 32) == (2 * 3, hi)  # behind two of each worker
    assert [word >> 32 for word in words[hi:, TASK_VARIANT.value]] == [2, 3]
    assert not words[hi:, TASK_WAIT_COUNT.value].any() and TASK_FIELDS.value == 10
    layout = CounterLayout(events, queues)
    released = events.wait[2]
    assert (words[0, TASK_SIGNALS.value] & 0xFFFFFFFF) == released * EVENT_STRIDE + 1
    assert layout.step_count() == 2 + 3
    counters = layout.before(8)
    assert counters[STEP_EVENT] == 7 * 5 and counters[layout.tickets(0)] == 7 * 5 and counters[layout.released(0)] == 14
    assert counters[released * EVENT_STRIDE + RELEASE_TARGET.value] == 8 * 2
    assert counters[released * EVENT_STRIDE + RELEASE_STAMP.value] == 8 * 2
    assert (counters[layout.slots(0) : layout.size : SLOT_STRIDE.value][:2] == 14).all()
    per_step = (counters - layout.before(7)).astype(np.int64)
    for epoch in (2**31 - 1, -(2**31)):
        assert ((layout.before(epoch) - counters - (epoch - 8) * per_step) % 2**32 == 0).all()


# ---- verify ----


@pytest.mark.parametrize("dynamic", [[1], [2], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_what_is_scheduled_is_safe(dynamic: list[int], num_workers: int):
    graph = chain(2)
    events = derive_events(graph)
    queues = schedule(graph, events, num_workers, dynamic)
    assert verify(graph, events, queues).num_pairs > 0
    assert not explore(graph, events, queues).faults
    for seed in range(20):
        run_at_random(graph, events, queues, num_epochs=3, seed=seed)


@pytest.mark.parametrize(
    ("queues", "pools", "says"),
    [
        ([[-1, 0, 2]], [[1]], "b t0 in pool 0 waits for a t0, which comes behind pool 0 on worker 0"),
        ([[0, 2, -1], [-1]], [[1]], None),  # the other worker runs b
        ([[0, 2, -1]], [[1]], "no worker ever comes to pool 0 with b t0"),
        ([[-1, 1, 2]], [[0]], "a t0 is in pool 0 and waits for no event"),
        ([[-1, -2, 0]], [[1], [2]], "b t0 in pool 0 waits for a t0, which comes behind pool 0 on worker 0"),
        ([[0, -2, -1]], [[1], [2]], "c t0 in pool 1 waits for event|no worker ever comes to pool 0"),
    ],
)
def test_who_waits_for_ever(queues: list[list[int]], pools: list[list[int]], says: str | None):
    graph = chain(1)
    events = derive_events(graph)
    made = Schedule(queues, pools)
    assert (DeadlockError in explore(graph, events, made).faults) == (says is not None)
    if says is None:
        verify(graph, events, made)
    else:
        with pytest.raises(DeadlockError, match=says):
            verify(graph, events, made)


def test_queues_put_tasks_of_pools_in_no_order():
    """On one worker nothing goes wrong by luck; that is not relied on."""
    graph = chain(1)
    events = derive_events(graph)
    events.wait[2], events.signals[1] = events.wait[1], [STEP_EVENT]
    events.signals[0] *= 1
    events.events[STEP_EVENT].count += 1
    events.events[events.wait[1]].count = 1
    with pytest.raises(RaceError, match="any worker"):
        verify(graph, events, Schedule([[0, -1]], [[1, 2]]))
    events.signals[2].remove(STEP_EVENT)
    events.events[STEP_EVENT].count -= 1
    with pytest.raises(StepOverlapError, match=r"c t0 \(any worker\) may still run"):
        verify(graph, events, Schedule([[0, -1], []], [[1, 2]]))


@pytest.mark.parametrize(
    ("queues", "pools", "says"),
    [
        ([[0, 1, -1]], [[1, 2]], "b t0 is queued twice, on worker 0 and pool 0"),
        ([[0, 1, 2, -1]], [], "worker 0 runs task -1, but"),
        ([[0, 1, 2, -1]], [[]], "needs tasks"),
        ([[0, 1]], [[2]], "queues name pools"),
    ],
)
def test_malformed(queues: list[list[int]], pools: list[list[int]], says: str):
    graph = chain(1)
    with pytest.raises(MalformedScheduleError, match=says):
        verify(graph, derive_events(graph), Schedule(queues, pools))


def test_verify_judges_pools_as_trying_everything_does():
    mutations, errors = set(), set()
    for judgement in self_check(900, seed=5, dynamic=True):
        assert judgement.agree, judgement
        mutations.add(judgement.case.mutation)
        errors.add(type(judgement.error).__name__)
    assert mutations == {"none", *MUTATIONS, "several"}
    assert errors >= {"NoneType", "DeadlockError", "RaceError", "StepOverlapError", "UnwrittenReadError"}
    assert any(random_case(5, number, dynamic=True).schedule.pools for number in range(20))


def test_a_verify_without_the_check_of_pools_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verification, "check_pools", lambda *_: None)
    assert any(not judgement.agree for judgement in self_check(600, seed=0, dynamic=True))
