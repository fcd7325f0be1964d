"""Graphs of several ranks: derived events are safe over all ranks, and what is not safe is refused, as brute force
sees it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import astuple

import pytest

from tri_mpk.scheduler.errors import MalformedScheduleError, RaceError, ScheduleError
from tri_mpk.scheduler.explore import explore
from tri_mpk.scheduler.graph import Events, Region, Task, TaskGraph, TensorInfo
from tri_mpk.scheduler.queues import schedule
from tri_mpk.scheduler.ranks import (
    are_alike,
    derive_rank_events,
    join,
    symmetric_info,
    verify_ranks,
    waits_for_ranks,
)

SYMMETRIC = ("s", "t")


def rank_graph(num_ranks: int = 2, size: int = 2) -> TaskGraph:
    tensors = {name: symmetric_info(num_ranks, num_ranks * size) for name in SYMMETRIC}
    return TaskGraph(tensors=tensors | {name: TensorInfo((1, size), False) for name in "xy"})


def add(
    graph: TaskGraph,
    op: str,
    reads=(),
    writes=(),
    pushes=(),
    to_all_ranks: bool | None = None,
    ahead: int | None = None,
) -> None:
    """A task on elements 0:2 of these tensors; of symmetric ones it reads the rows of all ranks."""
    graph.ops.append(op)

    def regions(names):
        for name in names:
            num_rows, size = graph.tensors[name].dims
            yield Region(name, ((0, num_rows), (0, size)))

    graph.tasks.append(
        Task(
            len(graph.ops) - 1,
            (0,),
            tuple(regions(reads)),
            tuple(regions(writes)),
            1,
            pushes=tuple(Region(name, ((0, graph.tensors[name].dims[1]),)) for name in pushes),
            to_all_ranks=bool(pushes) and ahead is None if to_all_ranks is None else to_all_ranks,
            ahead=ahead,
        )
    )


def two_layers(num_ranks: int = 2) -> TaskGraph:
    """As a decoder: two symmetric tensors that take turns."""
    graph = rank_graph(num_ranks)
    add(graph, "embed", pushes="s")
    for _ in range(2):
        add(graph, "up", reads="s", writes="x")
        add(graph, "down", reads="x", pushes="t")
        add(graph, "up", reads="t", writes="y")
        add(graph, "down", reads="y", pushes="s")
    add(graph, "argmax", reads="s", to_all_ranks=True)
    return graph


def proved(graph: TaskGraph, num_ranks: int) -> Events:
    """The events of a graph that verify finds to be in order, whose totals are their counts."""
    events = derive_rank_events(graph, num_ranks)
    report = verify_ranks(graph, events, schedule(graph, events, 2), num_ranks)
    assert report.num_tasks == num_ranks * len(graph.tasks)
    assert events.totals() == {index: event.count for index, event in enumerate(events.events)}
    return events


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_layers_that_take_turns_are_safe(num_ranks):
    graph = two_layers(num_ranks)
    events = proved(graph, num_ranks)
    for task, event in enumerate(events.wait):
        if event >= 0:
            far = graph.tasks[events.events[event].producers[0]].to_all_ranks
            assert events.events[event].count == (num_ranks if far else 1)
            assert waits_for_ranks(graph, events, task) == far


def test_brute_force_agrees_that_they_are_safe():
    graph = two_layers()
    del graph.tasks[5:9], graph.ops[5:9]
    for op, task in enumerate(graph.tasks):
        task.op = op
    events = derive_rank_events(graph, 2)
    queues = schedule(graph, events, 1)
    verify_ranks(graph, events, queues, 2)
    assert not explore(*join(graph, events, queues, 2)).faults


def scattered_layers(num_ranks: int = 2) -> TaskGraph:
    """As a decoder of many tokens: parts go to the rank that adds them up, sums to all ranks."""
    graph = rank_graph(num_ranks)
    for op in ("embed", "down"):
        for ahead in range(num_ranks):
            add(graph, f"{op} {ahead}", reads="x" if op == "down" else "", pushes="s", ahead=ahead)
        add(graph, "sum", reads="s", pushes="t")
        add(graph, "up", reads="t", writes="x")
    add(graph, "end", reads="x", to_all_ranks=True)
    return graph


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_parts_for_one_rank_are_heard_of_once(num_ranks):
    graph = scattered_layers(num_ranks)
    events = proved(graph, num_ranks)
    for task, name in enumerate(graph.ops):
        if name == "sum":
            assert events.events[events.wait[task]].count == num_ranks and waits_for_ranks(graph, events, task)


def test_brute_force_agrees_on_parts_for_one_rank():
    graph = scattered_layers()
    events = derive_rank_events(graph, 2)
    queues = schedule(graph, events, 1)
    assert not explore(*join(graph, events, queues, 2)).faults


@pytest.mark.parametrize("fault", ["the same rank twice", "parts too early"])
def test_parts_that_go_astray(fault):
    graph = scattered_layers()
    if fault == "the same rank twice":
        graph.tasks[1].ahead = 0
    else:
        graph.tasks[2].to_all_ranks = False  # the next parts come while another rank adds up the last ones
    events = derive_rank_events(graph, 2)
    with pytest.raises(ScheduleError):
        verify_ranks(graph, events, schedule(graph, events, 1), 2)


def test_one_buffer_is_a_race():
    """A fast rank pushes the next part while a slow one still reads the last: nothing makes it wait for that rank."""
    graph = rank_graph()
    add(graph, "a", pushes="s")
    add(graph, "read", reads="s", writes="x")
    add(graph, "b", reads="x", pushes="s")
    add(graph, "end", reads="s", to_all_ranks=True)
    events = derive_rank_events(graph, 2)
    queues = schedule(graph, events, 1)
    with pytest.raises(RaceError, match=r"read@\d t0.*b@\d t0.*s@\d"):
        verify_ranks(graph, events, queues, 2)
    assert RaceError in explore(*join(graph, events, queues, 2)).faults


def test_a_signal_that_stays_at_home_is_a_race():
    graph = two_layers()
    graph.tasks[2].to_all_ranks = False
    events = derive_rank_events(graph, 2)
    with pytest.raises(ScheduleError):
        verify_ranks(graph, events, schedule(graph, events, 1), 2)


def test_a_step_that_ends_on_one_rank_only():
    graph = two_layers()
    graph.tasks[-1].to_all_ranks = False
    events = derive_rank_events(graph, 2)
    with pytest.raises(MalformedScheduleError, match="must signal to all ranks"):
        verify_ranks(graph, events, schedule(graph, events, 1), 2)


def random_rank_graph(rng: random.Random) -> TaskGraph:
    graph = rank_graph(size=1)
    add(graph, "first", writes="xy", pushes="st")
    for i in range(rng.randint(1, 3)):
        kinds = {
            "reads": rng.sample(["x", "y", "s", "t"], rng.randint(0, 2)),
            "writes": rng.sample("xy", rng.randint(0, 1)),
            "pushes": rng.sample(SYMMETRIC, rng.randint(0, 1)),
        }
        ahead = rng.choice([None, None, 0, 1]) if kinds["pushes"] else None
        add(graph, f"op{i}", **kinds, to_all_ranks=ahead is None and (bool(kinds["pushes"]) or rng.random() < 0.2))
        graph.tasks[-1].ahead = ahead
        if rng.random() < 0.3:  # only one rank's part of symmetric tensors
            rank = rng.randint(0, 1)
            graph.tasks[-1].reads = tuple(
                Region(name, ((rank, rank + 1), box[1]) if name in SYMMETRIC else box)
                for name, box, _ in map(astuple, graph.tasks[-1].reads)
            )
    add(graph, "last", reads="xyst", writes="xy", to_all_ranks=True)
    return graph


def test_verify_agrees_with_brute_force_on_random_graphs():
    """Events derived from one rank's graph may be too few; then verify refuses, and some interleaving shows why."""
    rng = random.Random(0)
    verdicts, alike = Counter(), Counter()
    for _ in range(400):
        graph = random_rank_graph(rng)
        events = derive_rank_events(graph, 2)
        queues = schedule(graph, events, rng.randint(1, 2))
        try:
            verify_ranks(graph, events, queues, 2)
            refused = None
        except MalformedScheduleError:
            continue
        except ScheduleError as error:
            refused = type(error)
        alike[are_alike(graph, 2)] += 1
        found = explore(*join(graph, events, queues, 2)).faults
        assert bool(found) == (refused is not None), (graph, refused, found)
        assert refused is None or refused in found
        verdicts[refused] += 1
    assert min(verdicts[None], verdicts[RaceError]) > 20, verdicts
    assert min(alike[True], alike[False]) > 20, alike
