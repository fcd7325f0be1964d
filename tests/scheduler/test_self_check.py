"""verify agrees with brute force on random schedules, and a verify that misses something would be caught."""

import importlib
import time
from collections import defaultdict

import pytest

from tri_mpk.scheduler import CountError, Events, TaskGraph, regions, schedule, verify
from tri_mpk.scheduler.examples import NUM_WORKERS, large_graphs
from tri_mpk.scheduler.garbage import without_garbage_collection
from tri_mpk.scheduler.self_check import MUTATIONS, Tally, random_case, self_check

NUM_CASES = 1500


def test_verify_judges_as_trying_everything_does():
    tallies = defaultdict(Tally)
    for judgement in self_check(NUM_CASES, seed=11):
        assert judgement.agree, judgement
        tallies[judgement.case.mutation].add(judgement)
    assert list(tallies) == ["none", *MUTATIONS, "several"]
    assert all(tally.safe == tally.accepted for tally in tallies.values())
    both = {name for name, tally in tallies.items() if 0 < tally.safe < tally.cases}
    assert both == set(tallies) - {"drop_signal", "add_signal", "raise_count"}  # those are never safe
    errors = set().union(*(tally.rejected for tally in tallies.values()))
    assert errors == {"CountError", "DeadlockError", "RaceError", "StepOverlapError", "UnwrittenReadError"}


def test_a_case_is_made_again_from_seed_and_number():
    assert repr(random_case(3, 40).events) == repr(random_case(3, 40).events)
    assert repr(random_case(3, 40).events) != repr(random_case(4, 40).events)


# ---- a verify that is wrong in one place ----

verification = importlib.import_module("tri_mpk.scheduler.verify")  # the package has the function by that name
check_counts = verification._check_counts


def accept_surplus_signals(graph: TaskGraph, events: Events) -> int:
    try:
        return check_counts(graph, events)
    except CountError as error:
        if "surplus" not in str(error):
            raise
        return 0


def refuse_unused_signals(graph: TaskGraph, events: Events) -> int:
    if check_counts(graph, events):
        raise CountError("a signal that nobody waits for, which is safe")
    return 0


@pytest.mark.parametrize(
    ("where", "name", "replacement"),
    [
        (verification, "_check_counts", accept_surplus_signals),
        (verification, "_check_counts", refuse_unused_signals),
        (verification, "_check_steps", lambda *_: None),
        (regions.RegionCheck, "_check_order", lambda *_: None),
        (regions.RegionCheck, "_check_written", lambda *_: None),
    ],
)
def test_a_wrong_verify_is_caught(monkeypatch: pytest.MonkeyPatch, where: object, name: str, replacement: object):
    monkeypatch.setattr(where, name, replacement)
    assert any(not judgement.agree for judgement in self_check(600, seed=0))


# ---- large graphs ----


@without_garbage_collection()
def test_a_hundred_thousand_tasks_take_less_than_half_a_minute():
    for name, graph, events in large_graphs(100_000):
        queues = schedule(graph, events, NUM_WORKERS)
        started = time.process_time()  # other processes may be using this machine too
        report = verify(graph, events, queues)
        print(f"{name}: {report}")
        assert report.num_tasks >= 100_000 and time.process_time() - started < 30
