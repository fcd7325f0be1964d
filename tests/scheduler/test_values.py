"""Graphs whose waits and signals depend on values: what is derived, and that it is proved for all numbers."""

from __future__ import annotations

import importlib
from collections import defaultdict
from dataclasses import replace

import pytest

from tri_mpk.scheduler import (
    CountError,
    DeadlockError,
    Events,
    MalformedScheduleError,
    RaceError,
    Schedule,
    TaskGraph,
    derive_events,
    schedule,
    verify,
)
from tri_mpk.scheduler.apart import Apart
from tri_mpk.scheduler.examples import experts_graph
from tri_mpk.scheduler.explore import explore
from tri_mpk.scheduler.graph import Guard, GuardedEvent, Region, Task, TensorInfo, Value
from tri_mpk.scheduler.self_check import MUTATIONS, VALUE_MUTATIONS, Tally, self_check

verification = importlib.import_module("tri_mpk.scheduler.verify")  # the package has the function by that name


def experts(num_layers: int = 1, num_tokens: int = 2, num_experts: int = 3) -> tuple[TaskGraph, Events, Schedule]:
    graph = experts_graph(num_layers, num_tokens, num_experts, num_tiles=1)
    events = derive_events(graph)
    return graph, events, schedule(graph, events, num_workers=3)


def tasks_of(graph: TaskGraph, op: str) -> list[int]:
    return [i for i, task in enumerate(graph.tasks) if graph.ops[task.op].endswith(op)]


def extent(num_tiles: int) -> TaskGraph:
    """n tiles write their part each, and one task reads n parts."""
    tensors = {"n": TensorInfo((1,), False), "parts": TensorInfo((num_tiles,), False)}
    graph = TaskGraph(["n", "part", "total"], [], tensors)
    cell = Region("n", ((0, 1),))
    graph.values["n"] = Value(cell, 0, num_tiles + 1)
    parts = [Region("parts", ((t, t + 1),), Guard("n", t + 1, num_tiles + 1)) for t in range(num_tiles)]
    graph.tasks.append(Task(0, (0,), (), (cell,), 1, announces=("n",)))
    graph.tasks += [Task(1, (t,), (cell,), (part,), 1) for t, part in enumerate(parts)]
    graph.tasks.append(Task(2, (0,), (cell, *parts), (), 1))
    return graph


# ---- what is derived ----


def test_an_id_is_an_index_into_an_event_tensor():
    graph, events, _ = experts()
    tensors = {(t.producer[4:], t.consumer[4:]): t for t in events.tensors[:4]}
    dispatched, done = tensors["dispatch", "expert"], tensors["expert", "combine"]
    assert dispatched.size == done.size == 3
    for token, task in enumerate(tasks_of(graph, "dispatch")):
        uses = [(use.event - dispatched.first, use.guard) for use in events.signal_if[task]]
        assert uses == [(e, Guard(f"id0.{token}", e, e + 1)) for e in range(3)]
    for token, task in enumerate(tasks_of(graph, "combine")):
        uses = [(use.event - done.first, use.guard) for use in events.wait_if[task]]
        assert uses == [(e, Guard(f"id0.{token}", e, e + 1)) for e in range(3)]
    for expert, task in enumerate(tasks_of(graph, "expert")):
        assert events.wait[task] == dispatched.first + expert and done.first + expert in events.signals[task]
        assert task not in events.wait_if and task not in events.signal_if


def test_whoever_announces_gives_the_signals_of_the_absent():
    graph, events, _ = experts()
    (router,) = tasks_of(graph, "router")
    assert all(use.guard.absent for use in events.signal_if[router]) and len(events.signal_if[router]) == 2 * 3
    for task in tasks_of(graph, "expert"):
        assert events.events[events.wait[task]].count == 2  # one per token, whatever the ids are


def test_an_extent_is_one_counter():
    events = derive_events(extent(4))
    assert events.events[events.wait[5]].count == 4 and not events.wait_if
    assert [use.guard for task in range(1, 5) for use in events.signal_if[task]] == [
        Guard("n", t + 1, 5) for t in range(4)
    ]


def test_without_announcer_everybody_is_waited_for():
    graph = extent(3)
    graph.tasks[0].announces = ()
    graph.tasks[-1].reads = graph.tasks[-1].reads[1:]  # and it does not know n
    events = derive_events(graph)
    assert not events.wait_if and not events.signal_if
    assert events.events[events.wait[4]].producers == [1, 2, 3]
    assert verify(graph, events, schedule(graph, events, 2)).num_steps == 4


# ---- what is proved ----


@pytest.mark.parametrize("num_layers", [1, 2])
def test_experts_are_proved_for_all_ids(num_layers: int):
    graph, events, queues = experts(num_layers)
    assert verify(graph, events, queues).num_steps == 3 ** (2 * num_layers)
    report = verify(graph, events, queues, max_combinations=0)
    assert report.num_steps == 0 and "one value at a time" in str(report)
    if num_layers == 1:
        assert not explore(graph, events, queues).faults


@pytest.mark.parametrize("max_combinations", [512, 0])
def test_an_expert_that_misses_a_token_is_found(max_combinations: int):
    graph, events, queues = experts()
    task = tasks_of(graph, "dispatch")[1]
    lost = events.signal_if[task].pop(1)
    with pytest.raises(CountError, match=r"L00 expert t1.0 waits for 2 signals .* give 1 for some numbers"):
        verify(graph, events, queues, max_combinations)
    (router,) = tasks_of(graph, "router")  # who announces gives it instead: too early
    events.signal_if[router].append(lost)
    with pytest.raises(RaceError, match=r"L00 dispatch t1 writes and L00 expert t1.0 reads xin\[1:2\].*id0.1 = 1"):
        verify(graph, events, queues, max_combinations)


@pytest.mark.parametrize("max_combinations", [512, 0])
def test_a_wait_by_a_value_that_leads_astray_is_found(max_combinations: int):
    graph, events, queues = experts()
    task = tasks_of(graph, "combine")[0]
    first, second, third = events.wait_if[task]
    events.wait_if[task] = [first, replace(second, event=third.event), third]
    with pytest.raises(RaceError, match=r"L00 expert t1.0 writes and L00 combine t0 reads y.* id0.0 = 1"):
        verify(graph, events, queues, max_combinations)


def test_a_deadlock_of_one_number_is_found():
    graph, events, queues = experts()
    task, later = tasks_of(graph, "dispatch")[0], tasks_of(graph, "combine")[1]
    events.signals[later].append(event := events.wait_if[tasks_of(graph, "combine")[0]][2].event)
    events.events[event].count += 1
    events.wait_if[task] = [GuardedEvent(event, Guard("id0.0", 2, 3))]
    with pytest.raises(DeadlockError, match=r"^deadlock: L00 combine t1 .*\(in a step with id0.0 = 0, id0.1 = 2\)$"):
        verify(graph, events, queues)


def test_a_value_is_not_looked_at_before_it_is_written():
    graph, events, _ = experts()
    task = tasks_of(graph, "combine")[0]
    events.wait[task] = -1
    alone = Schedule([[other for other in range(len(graph.tasks)) if other != task], [task]])
    for max_combinations in (512, 0):
        with pytest.raises(RaceError, match=r"and L00 combine t0 (reads|writes)"):
            verify(graph, events, alone, max_combinations)
    assert RaceError in explore(graph, events, alone).faults
    graph, events, queues = experts()
    graph.tasks[0].writes, graph.tasks[-1].writes = (), (*graph.tasks[-1].writes, *graph.tasks[0].writes)
    with pytest.raises(MalformedScheduleError, match=r"looks at id0.0, which L00 combine t1 writes later"):
        verify(graph, events, queues)


def test_numbers_between_which_no_guard_tells_are_one_case():
    graph = extent(3)
    graph.values["n"] = replace(graph.values["n"], hi=1000)
    for task in graph.tasks:
        task.reads, task.writes = (
            tuple(replace(r, guard=r.guard and r.guard._replace(hi=1000)) for r in side)
            for side in (task.reads, task.writes)
        )
    events = derive_events(graph)
    assert verify(graph, events, schedule(graph, events, 2)).num_steps == 4  # 0, 1, 2, and all from 3 to 999


# ---- the proofs on trial ----


def test_verify_judges_values_as_trying_everything_does():
    tallies = defaultdict(Tally)
    for judgement in self_check(720, seed=11, values=True):
        assert judgement.agree, judgement
        tallies[judgement.case.mutation].add(judgement)
    assert list(tallies) == ["none", *MUTATIONS, *VALUE_MUTATIONS, "several"]
    for name in VALUE_MUTATIONS:
        assert 0 < tallies[name].safe == tallies[name].accepted
        assert tallies[name].rejected or name == "change_region_guard", name  # where it is one in twenty


def test_one_value_at_a_time_is_sound_and_refuses_little():
    safe = refused = 0
    for judgement in self_check(600, seed=5, values=True, apart=True):
        assert judgement.agree, judgement
        safe += judgement.is_safe
        refused += judgement.is_safe and judgement.error is not None
    assert safe > 200 and refused <= 0.04 * safe


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("guarded_signals", lambda graph, events: {}),
        ("combinations", lambda numbers: [{name: chosen[0] for name, chosen in numbers.items()}]),
        ("check_values", lambda *_: None),
    ],
)
def test_a_verify_that_forgets_values_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, replacement: object):
    monkeypatch.setattr(verification, name, replacement)
    assert any(not judgement.agree for judgement in self_check(400, seed=0, values=True))


def anybody_first(apart: Apart) -> dict[int, list[int]]:
    """As if all who signal an event by a value came before it, whatever the value is."""
    uses = [(task, use.event) for task, uses in apart.events.signal_if.items() for use in uses]
    return {event: [task for task, other in uses if other == event] for _, event in uses}


@pytest.mark.parametrize(
    ("where", "name", "replacement"),
    [
        (verification, "check_guarded_regions", lambda *_: (0, 0)),
        (verification, "check_steps", lambda *_: None),
        (Apart, "_announced_first", lambda apart, order: anybody_first(apart)),
        (Apart, "numbers_of", lambda apart, guard: apart.numbers[guard.value][:1]),
    ],
)
def test_a_proof_by_one_value_that_forgets_something_is_caught(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, replacement: object
):
    monkeypatch.setattr(where, name, replacement)
    assert any(not judgement.agree for judgement in self_check(500, seed=0, values=True, apart=True))
