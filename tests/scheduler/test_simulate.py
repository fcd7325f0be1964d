"""The model of a step's time: by hand on small graphs, and what must hold on any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_helpers import GraphBuilder, chain, graphs
from tri_mpk.scheduler import TaskGraph, derive_events, schedule
from tri_mpk.scheduler.examples import decoder_graph
from tri_mpk.scheduler.simulate import StepTime, Work, WorkerRates, step_time

RATES = WorkerRates(
    stream_bytes_per_s=1.0,
    multiply_bytes_per_s=2.0,
    ring_bytes=0,
    slot_bytes=0,
    slot_s=0.0,
    hop_s=10.0,
    queue_s=0.0,
    task_s=4.0,
)
INFINITE = float("inf")


def simulate(graph: TaskGraph, num_workers: int, work: Work, rates: WorkerRates) -> StepTime:
    events = derive_events(graph)
    return step_time(events, schedule(graph, events, num_workers), work, rates)


def test_tasks_of_a_pool_go_to_who_is_free_and_cost_a_ticket():
    """One task of a, and two of b that nobody has a queue for: both workers take one, 10 after a's signal."""
    builder = GraphBuilder(x=((1,), False), y=((2,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    builder.op("b")
    for i in range(2):
        builder.task(["x[0:1]"], [f"y[{i}:{i + 1}]"])
    events = derive_events(builder.graph)
    rates = replace(RATES, ticket_s=3.0)
    for num_workers, expected in ((1, 4 + 10 + 2 * (4 + 3) + 10), (2, 4 + 10 + 4 + 3 + 10)):
        queues = schedule(builder.graph, events, num_workers, dynamic=[1])
        time = step_time(events, queues, three(0, 0, 0), rates)
        assert time.step_s == time.chain_s == expected
        loaded = step_time(events, queues, replace(three(0, 0, 0), load_bytes=[0, 30, 30]), rates)
        assert loaded.stream_s == 60 / num_workers


def three(*stream_bytes: int) -> Work:
    return Work(list(stream_bytes), [1] * 3, [0] * 3, [0.0] * 3)


def test_three_tasks_in_a_row_by_hand():
    """a, b and c each wait for the one before; the third hop is the end of the step."""
    assert simulate(chain(), 1, three(0, 0, 0), RATES).step_s == 3 * 4 + 3 * 10
    # without a ring, weights come after the wait: 2 for the head is hidden behind them, 2 for the tail is not
    time = simulate(chain(), 1, three(100, 0, 0), RATES)
    assert time == StepTime(100 + 2 + 2 * 4 + 3 * 10, stream_s=100.0, chain_s=50 + 3 * 4 + 3 * 10)


def test_the_ring_hides_weights_behind_waits():
    rates = replace(RATES, ring_bytes=20)
    # all of them are there when the step starts, and are multiplied at 2 per second
    assert simulate(chain(), 1, three(20, 0, 0), rates).step_s == 10 + 3 * 4 + 3 * 10
    # c's weights come during the tasks and waits before it
    assert simulate(chain(), 1, three(0, 0, 20), rates).step_s == 10 + 3 * 4 + 3 * 10
    # 20 more than the ring holds: they come at 1 per second while the others are multiplied
    assert simulate(chain(), 1, three(0, 0, 40), rates).step_s == 2 * 4 + 2 * 10 + max(4 + 20, 20 + 2) + 10
    assert simulate(chain(), 1, three(0, 0, 60), rates).step_s == 2 * 4 + 2 * 10 + (40 + 2) + 10


def test_a_hop_waits_behind_weights_under_way_for_a_while():
    quiet = replace(RATES, ring_bytes=20)
    busy = replace(quiet, queue_s=3.0)
    work = three(20, 0, 0)  # a empties the ring within 14 s, of which as many bytes come back
    assert simulate(chain(), 1, work, busy).step_s == simulate(chain(), 1, work, quiet).step_s + 3
    assert simulate(chain(), 1, three(0, 0, 0), busy) == simulate(chain(), 1, three(0, 0, 0), quiet)


def test_loads_and_latency_come_after_the_wait():
    work = Work([0] * 3, [0] * 3, [0, 7, 0], [0.0, 0.0, 5.0])
    time = simulate(chain(), 1, work, replace(RATES, ring_bytes=100))
    assert time == StepTime(3 * 4 + 3 * 10 + 7 + 5, stream_s=7.0, chain_s=3 * 4 + 3 * 10 + 5)


def test_each_slot_costs_its_time():
    work = Work([20, 0, 0], [5, 0, 0], [0] * 3, [0.0] * 3)
    rates = replace(RATES, ring_bytes=20, slot_s=3.0)
    assert simulate(chain(), 1, work, rates).step_s == 10 + 5 * 3 + 3 * 4 + 3 * 10


def random_work(draw: st.DrawFn, num_tasks: int) -> Work:
    def numbers(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=num_tasks, max_size=num_tasks))

    sizes = st.integers(0, 1000)
    return Work(numbers(sizes), numbers(st.integers(0, 9)), numbers(sizes), numbers(st.floats(0, 50)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[TaskGraph, int, Work, WorkerRates]:
    graph = draw(graphs())
    rates = WorkerRates(
        stream_bytes_per_s=draw(st.floats(0.5, 50)),
        multiply_bytes_per_s=draw(st.floats(0.5, 50)),
        ring_bytes=draw(st.integers(0, 500)),
        slot_bytes=draw(st.integers(0, 50)),
        slot_s=draw(st.floats(0, 5)),
        hop_s=draw(st.floats(0, 20)),
        queue_s=draw(st.floats(0, 20)),
        task_s=draw(st.floats(0, 20)),
    )
    return graph, draw(st.integers(1, 4)), random_work(draw, len(graph.tasks)), rates


def at_most(a: float, b: float) -> bool:
    return a <= b * (1 + 1e-9) + 1e-9


@settings(deadline=None, max_examples=200)
@given(case=cases(), faster=st.floats(1, 10))
def test_bounds_hold_and_faster_machines_are_not_slower(case, faster: float):
    graph, num_workers, work, rates = case
    time = simulate(graph, num_workers, work, rates)
    total = sum(work.stream_bytes) + sum(work.load_bytes)
    assert at_most(total / (num_workers * rates.stream_bytes_per_s), time.stream_s)
    assert at_most(time.stream_s, time.step_s) and at_most(time.chain_s, time.step_s)
    better = [
        replace(rates, stream_bytes_per_s=rates.stream_bytes_per_s * faster),
        replace(rates, stream_bytes_per_s=INFINITE),
        replace(rates, multiply_bytes_per_s=rates.multiply_bytes_per_s * faster),
        replace(rates, multiply_bytes_per_s=INFINITE),
        replace(rates, slot_s=rates.slot_s / faster),
        replace(rates, hop_s=rates.hop_s / faster),
        replace(rates, queue_s=rates.queue_s / faster),
    ]
    for changed in better:
        assert at_most(simulate(graph, num_workers, work, changed).step_s, time.step_s), changed


@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_decoder_is_never_faster_than_its_longest_chain(reuse_buffers: bool):
    num_layers, num_workers = 3, 8
    graph = decoder_graph(num_layers, num_workers, reuse_buffers)
    work = Work.none(len(graph.tasks))
    time = simulate(graph, num_workers, work, RATES)
    assert time.chain_s == time.step_s == 6 * num_layers * (RATES.hop_s + RATES.task_s)
