"""Traces: valid Chrome trace events, slices that nest, arrows that begin and end in slices."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from profiles import HOP_NS, simulated_profile
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.profiler import PHASES, Profile
from tri_mpk.trace import FIRST_WORKER_TRACK, PATH_TRACK, STEP_TRACK

# What the Trace Event Format asks of each phase of event, besides ph and pid.
REQUIRED = {
    "M": {"name", "args"},
    "X": {"name", "tid", "ts", "dur"},
    "s": {"name", "cat", "id", "tid", "ts"},
    "f": {"name", "cat", "id", "tid", "ts", "bp"},
}


@pytest.fixture(scope="module")
def profile() -> Profile:
    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 2
    return simulated_profile(plan_config(config, torch.bfloat16, 512, num_workers=12, profile=True), steps=3)


@pytest.fixture(scope="module")
def trace(profile, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    profile.to_perfetto(path)
    return json.loads(path.read_text())


def of_phase(trace: dict, phase: str) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def test_schema(trace):
    assert set(trace) == {"displayTimeUnit", "traceEvents"}
    for event in trace["traceEvents"]:
        assert REQUIRED[event["ph"]] <= event.keys(), event
        assert event["pid"] == 1 and isinstance(event["name"], str)
        assert isinstance(event.get("tid", 0), int) and event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
    assert all(event["bp"] == "e" for event in of_phase(trace, "f"))  # else the arrow ends in the next slice


def test_tracks_have_names(trace, profile):
    names = {event["tid"]: event["args"]["name"] for event in of_phase(trace, "M") if event["name"] == "thread_name"}
    workers = {FIRST_WORKER_TRACK + i: f"worker {i}" for i in range(profile.program.num_workers)}
    assert names == {STEP_TRACK: "steps", PATH_TRACK: "critical path"} | workers
    assert {event["tid"] for event in of_phase(trace, "X")} == set(names)


def test_every_task_has_a_slice_in_every_step(trace, profile):
    slices = Counter(event["name"] for event in of_phase(trace, "X") if event["tid"] >= FIRST_WORKER_TRACK)
    graph = profile.program.graph
    for task in range(len(graph.tasks)):
        assert slices[graph.task_name(task)] == 3
    assert slices["step event"] == 3 * profile.program.num_workers
    assert all(0 < slices[phase] <= 3 * len(graph.tasks) for phase in PHASES)
    assert [event["name"] for event in of_phase(trace, "X") if event["tid"] == STEP_TRACK] == [
        f"step {step}" for step in profile.steps
    ]


def test_slices_nest(trace):
    """Two slices of a track are one inside the other, or apart: what a viewer needs to stack them."""
    tracks = defaultdict(list)
    for event in of_phase(trace, "X"):
        tracks[event["tid"]].append((round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)))
    for slices in tracks.values():
        ends: list[int] = []
        for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)


def test_arrows_join_slices(trace, profile):
    """From a task that signals an event to a task that waits for it, a hop later, once per waiting task and step."""
    graph, events = profile.program.graph, profile.program.events
    slices = defaultdict(list)
    number = {graph.task_name(task): task for task in range(len(graph.tasks))}
    for event in of_phase(trace, "X"):
        if event["name"] in number and event["tid"] >= FIRST_WORKER_TRACK:
            slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"], number[event["name"]]))

    def task_at(arrow: dict) -> int:
        (task,) = (task for begin, end, task in slices[arrow["tid"]] if begin < arrow["ts"] < end)
        return task

    tails = {event["id"]: event for event in of_phase(trace, "s")}
    heads = {event["id"]: event for event in of_phase(trace, "f")}
    waiting = sum(event >= 0 for event in events.wait)
    assert tails.keys() == heads.keys() and len(tails) == 3 * waiting
    for number_of_arrow, tail in tails.items():
        head = heads[number_of_arrow]
        assert events.wait[task_at(head)] in events.signals[task_at(tail)]
        assert head["ts"] - tail["ts"] >= HOP_NS / 1e3 - 1e-6


def test_critical_path_is_one_line(trace):
    slices = [event for event in of_phase(trace, "X") if event["tid"] == PATH_TRACK]
    for before, after in zip(slices, slices[1:], strict=False):
        assert after["ts"] >= before["ts"] + before["dur"] - 1e-6
    assert {event["name"] for event in slices} >= {"hop", "embed t0", "sample t0"}


def test_some_steps_compressed(profile, tmp_path: Path):
    path = tmp_path / "trace.json.gz"
    profile.to_perfetto(path, steps=profile.steps[1:2])
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    assert [event["name"] for event in of_phase(trace, "X") if event["tid"] == STEP_TRACK] == ["step 8"]
    assert min(event["ts"] for event in of_phase(trace, "X")) == 0
    with pytest.raises(ValueError, match="step=99"):
        profile.to_perfetto(path, steps=range(99, 100))
