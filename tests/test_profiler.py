"""Profiles: what workers record on a CPU, and what is computed from records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from decoders import prompt, tiny_pair
from profiles import HOP_NS, assert_sound, simulated_profile, simulated_records
from tri_mpk import CausalLM, MegakernelTimeout
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.ops.argmax import STOP_INTERVAL
from tri_mpk.profiler import DONE, FETCH, PHASES, RUN, SIGNAL, WAIT, Profile, read_profile
from tri_mpk.runtime import RECORDED_STEPS
from tri_mpk.scheduler import STEP_EVENT

PROMPT = prompt(2)


# ---- launches on a CPU ----


@pytest.fixture(scope="module")
def launched() -> tuple[CausalLM, torch.Tensor]:
    """A profiled model, two worker processes, and what it is to answer."""
    ours, theirs = tiny_pair(max_seq_len=64, profile=True)
    return ours, theirs.generate(PROMPT, max_new_tokens=3)


@pytest.fixture
def profile(launched) -> Profile:
    model, expected = launched
    assert torch.equal(model.generate(PROMPT, max_new_tokens=3), expected)
    return model.profile()


def test_every_task_of_every_step_has_a_record(profile):
    assert profile.steps == range(4) and not profile.is_real_time
    assert_sound(profile)
    stamps = profile.times[..., WAIT:].reshape(-1)
    assert len(set(stamps.tolist())) == stamps.size  # no two readings of this clock are equal


def test_signals_come_before_the_waits_they_end(profile):
    """Strictly: the clock of the interpreter has no two equal readings."""
    for times in profile.times:
        for event in profile.program.events.events:
            if event.consumers:
                assert times[event.producers, SIGNAL].max() < times[event.consumers, RUN].min()


def test_only_the_last_steps_are_kept(launched):
    model, _ = launched
    new_tokens = RECORDED_STEPS + 3
    model.generate(PROMPT, max_new_tokens=new_tokens)
    profile = model.profile()
    assert profile.steps == range(4, new_tokens + 1) and len(profile.steps) == RECORDED_STEPS
    assert_sound(profile)


def test_more_workers_than_tasks():
    """A worker without tasks leaves no record of any, only its own."""
    model, _ = tiny_pair(max_seq_len=16, num_workers=3, num_attention_heads=1, vocab_size=2, profile=True)
    program = model.kernel.plan()
    program.schedule.queues[:] = [list(range(len(program.graph.tasks))), [], []]
    model.generate(torch.tensor([[1]]), max_new_tokens=2)
    assert_sound(model.profile())


def test_a_launch_that_was_stopped(launched):
    model, _ = launched
    from transformers.generation.streamers import BaseStreamer

    class Stop(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=60, streamer=Stop())
    profile = model.profile()
    assert 2 <= len(profile.steps) <= 3 + STOP_INTERVAL.value
    assert_sound(profile)


def test_no_profile_of_an_aborted_launch(launched):
    model, _ = launched
    runtime = model.kernel.runtime
    runtime.wait_bound_s, before = 0.0, runtime.wait_bound_s  # whoever waits at all gives up
    try:
        with pytest.raises(MegakernelTimeout):
            model.generate(PROMPT, max_new_tokens=2)
    finally:
        runtime.wait_bound_s = before
    with pytest.raises(ValueError, match="no finished launch"):
        model.profile()


def test_without_profiling():
    model, _ = tiny_pair(max_seq_len=16)
    with pytest.raises(ValueError, match="profile=True"):
        model.profile()
    model, _ = tiny_pair(max_seq_len=16, profile=True)
    with pytest.raises(ValueError, match="call generate first"):
        read_profile(model.kernel)


# ---- what is computed ----


@pytest.fixture(scope="module")
def simulated() -> Iterator[Profile]:
    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 2
    return simulated_profile(plan_config(config, torch.bfloat16, 512, num_workers=12, profile=True), steps=3)


def test_the_simulation_is_sound(simulated):
    assert_sound(simulated)


def test_table_adds_up(simulated):
    """Every phase of every worker is in one row; with the waits for the step event they make the step."""
    rows, facts = simulated.table(), simulated.summary()
    graph = simulated.program.graph
    assert sum(row.tasks for row in rows) == len(graph.tasks)
    assert sum(row.bytes for row in rows) == sum(task.cost_bytes for task in graph.tasks)
    for phase in PHASES:
        assert sum(getattr(row, phase) for row in rows) == pytest.approx(facts[phase])
    parts = sum(facts[phase] for phase in PHASES) + facts["step_event_wait"]
    assert parts == pytest.approx(facts["step"]) and facts["utilisation"] == pytest.approx(facts["run"] / parts)
    assert sum(row.share for row in rows) == pytest.approx(1 - facts["step_event_wait"] / facts["step"])
    assert sum(row.hops for row in rows) == pytest.approx(facts["path_hops"])
    paths = [simulated.critical_path(step) for step in simulated.steps]
    length = np.mean([path[-1].end - path[0].begin for path in paths]) / 1e3
    assert sum(row.critical for row in rows) == pytest.approx(length)


def test_table_by_hand(simulated):
    (row,) = (row for row in simulated.table() if row.op == "lm_head")
    tasks = [i for i, t in enumerate(simulated.program.graph.tasks) if simulated.program.graph.ops[t.op] == "lm_head"]
    assert row.tasks == len(tasks) == 12
    times = simulated.times[:, tasks]
    run_us = (times[..., SIGNAL] - times[..., RUN]).mean() / 1e3  # a task per worker
    assert row.run == pytest.approx(run_us) and row.gbps == pytest.approx(row.bytes / run_us / 1e3)
    assert row.signal == pytest.approx(0.6)


def test_the_interpreter_has_no_bandwidth(profile):
    assert profile.unit == "readings" and all(row.gbps is None for row in profile.table())


@pytest.mark.parametrize("which", ["simulated", "profile"])
def test_critical_path_is_consecutive(which, request):
    """Each task is handed over to by a producer of its event or by its worker's task before, the later of the two."""
    profile = request.getfixturevalue(which)
    events, times = profile.program.events, profile.times
    for at, step in enumerate(profile.steps):
        path = profile.critical_path(step)
        assert path[0].via == "queue" and path[0].begin == times[at, path[0].task, FETCH]
        last = events.events[STEP_EVENT].producers
        assert path[-1].task in last and path[-1].end == times[at, last, DONE].max()
        for before, entry in zip(path, path[1:], strict=False):
            queue = profile.program.schedule.queues[profile.worker_of[0, entry.task]]
            neighbour = queue[queue.index(entry.task) - 1] if entry.task != queue[0] else None
            producers = events.events[events.wait[entry.task]].producers if events.wait[entry.task] >= 0 else []
            assert before.task == neighbour if entry.via == "queue" else before.task in producers
            candidates = [*producers, *([] if neighbour is None else [neighbour])]
            assert times[at, before.task, DONE] == times[at, candidates, DONE].max()
            assert before.end == entry.begin <= entry.run == times[at, entry.task, RUN] <= entry.end


def test_hops_take_what_was_put_in(simulated):
    for entry in simulated.critical_path():
        if entry.via == "event":
            assert HOP_NS <= entry.run - entry.begin < HOP_NS + 800  # it may not have been waiting yet


def test_typical_step(simulated):
    records = simulated_records(simulated.program, 3)
    records[1:] += 10**6  # the first step of three is now the longest
    records[0, :, :] = np.where(records[0] == records[0].max(), records[0] + 10**6, records[0])
    profile = Profile(simulated.program, range(20, 23), records, True)
    lengths = profile.step_lengths
    assert np.sort(lengths)[1] == lengths[profile.index(None)] == lengths[profile.typical_step - 20]
    with pytest.raises(ValueError, match="step=23 was not recorded; choose 20 to 22"):
        profile.critical_path(23)
