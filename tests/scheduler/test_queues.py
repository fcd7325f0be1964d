"""Queues are balanced, deterministic and in program order."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_helpers import GraphBuilder, graphs
from tri_mpk.scheduler import TaskGraph, derive_events, imbalance, schedule
from tri_mpk.scheduler.examples import decoder_graph
from tri_mpk.scheduler.graph import Events


def ops(*costs: list[int]) -> TaskGraph:
    builder = GraphBuilder(x=((1,), True))
    for op, op_costs in enumerate(costs):
        builder.op(f"op{op}")
        for cost in op_costs:
            builder.task(reads=["x[0:1]"], cost=cost)
    return builder.graph


def queues(graph: TaskGraph, num_workers: int) -> list[list[int]]:
    return schedule(graph, derive_events(graph), num_workers).queues


def test_as_many_tasks_as_workers_in_order():
    assert queues(ops([5] * 4, [5] * 4), 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_as_many_tasks_as_workers_even_if_some_cost_nothing():
    assert sorted(map(len, queues(ops([0, 9, 0, 9]), 4))) == [1, 1, 1, 1]


def test_remainders_rotate():
    total = [len(queue) for queue in queues(ops(*[[1] * 6] * 4), 4)]
    assert total == [6, 6, 6, 6]


def test_the_remainder_goes_to_the_least_loaded():
    assert queues(ops([1] * 3, [1]), 4)[3] == [3]


def test_costly_tasks_are_spread_first():
    found = queues(ops([1, 1, 1, 3]), 2)
    assert sorted(found) == [[0, 1, 2], [3]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=5), st.integers(1, 6))
def test_every_task_once_in_program_order_and_balanced(costs, num_workers):
    graph = ops(*costs)
    found = queues(graph, num_workers)
    assert found == queues(graph, num_workers)
    assert sorted(task for queue in found for task in queue) == list(range(len(graph.tasks)))
    assert all(queue == sorted(queue) for queue in found)
    for op, op_costs in enumerate(costs):
        load = [sum(graph.tasks[t].cost_bytes for t in q if graph.tasks[t].op == op) for q in found]
        assert max(load) - min(load) <= max(op_costs, default=0)


@given(graphs(), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_imbalance_counts_every_byte(graph, num_workers):
    plan = schedule(graph, Events([], [], []), num_workers)
    balances = imbalance(graph, plan)
    assert [balance.op for balance in balances] == graph.ops
    assert sum(balance.num_tasks for balance in balances) == len(graph.tasks)
    total = sum(balance.mean_bytes for balance in balances) * num_workers
    assert total == pytest.approx(sum(task.cost_bytes for task in graph.tasks))


def test_imbalance_of_an_uneven_op():
    graph = ops([4, 4, 4], [0])
    even, nothing = imbalance(graph, schedule(graph, derive_events(graph), 2))
    assert (even.max_bytes, even.mean_bytes, even.ratio) == (8, 6.0, 8 / 6)
    assert nothing.ratio == 1.0


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="num_workers=0"):
        queues(ops([1]), 0)


def test_a_whole_model_takes_no_time():
    graph = decoder_graph(num_layers=36, num_workers=132, reuse_buffers=True)
    start = time.perf_counter()
    found = schedule(graph, Events([], [], []), 132).queues
    seconds = time.perf_counter() - start
    print(f"{len(graph.tasks)} tasks queued in {seconds:.3f} s")
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert seconds < 3
