"""What holds for every profile, and profiles of launches that never happened, at the speed of plain Python."""

from __future__ import annotations

import numpy as np

from tri_mpk.profiler import BEGIN, END, RUN, SIGNAL, STEP_WAIT, Profile
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT

BYTES_PER_NS = 32  # of a worker
HOP_NS, SIGNAL_NS = 1200, 600


def simulated_profile(program: Program, steps: int = 2, first_step: int = 7, seed: int = 0) -> Profile:
    """A run of the queues in program order, which all of them follow; times as a GPU's, some of them random."""
    return Profile(
        program, range(first_step, first_step + steps), simulated_records(program, steps, seed), is_real_time=True
    )


def simulated_records(program: Program, steps: int, seed: int = 0) -> np.ndarray:
    """int64 [steps, records of a step, 4], in the order that scheduler/timing.py describes."""
    random = np.random.default_rng(seed)
    events, queues = program.events, program.schedule.queues
    first = np.cumsum([0] + [max(1, len(queue)) + 2 for queue in queues])
    place = {task: (worker, first[worker] + 1 + i) for worker, q in enumerate(queues) for i, task in enumerate(q)}
    records = np.zeros((steps, first[-1], 4), dtype=np.int64)
    now = np.full(len(queues), 10**9)
    for step in range(steps):
        records[step, first[:-1]] = now[:, None]
        signalled = np.zeros(len(place), dtype=np.int64)
        for index, task in enumerate(program.graph.tasks):
            worker, record = place[index]
            run = wait = now[worker] + random.integers(50, 200)
            if (event := events.wait[index]) >= 0:
                run = max(run, signalled[events.events[event].producers].max() + HOP_NS)
            signalled[index] = run + task.cost_bytes // BYTES_PER_NS + random.integers(200, 400)
            now[worker] = signalled[index] + SIGNAL_NS
            records[step, record] = wait, run, signalled[index], now[worker]
        end = np.maximum(now, signalled[events.events[STEP_EVENT].producers].max() + HOP_NS)
        records[step, first[1:] - 1] = np.stack([now, end, end, end], axis=-1)
        now = end
    return records


def assert_sound(profile: Profile) -> None:
    """What is true of every launch on every machine."""
    graph, events = profile.program.graph, profile.program.events
    assert profile.times.shape == (len(profile.steps), len(graph.tasks), 5)
    assert (profile.times >= 0).all() and (np.diff(profile.times, axis=-1) >= 0).all()
    assert (np.diff(profile.step_times, axis=-1) >= 0).all()
    for times, step_times in zip(profile.times, profile.step_times, strict=True):
        for worker, queue in enumerate(profile.program.schedule.queues):
            inside = times[queue].reshape(-1)  # fetch follows the task before, the first one the step's beginning
            assert (np.diff([step_times[worker, BEGIN], *inside, step_times[worker, STEP_WAIT]]) >= 0).all()
        for event in events.events:
            signalled = times[event.producers, SIGNAL].max()
            assert (times[event.consumers, RUN] >= signalled).all()
        last = times[events.events[STEP_EVENT].producers, SIGNAL].max()
        assert (step_times[:, END] >= last).all()
    assert (profile.step_times[1:, :, BEGIN] >= profile.step_times[:-1, :, END]).all()
