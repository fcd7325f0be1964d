"""A profile as a Chrome trace, the JSON that https://ui.perfetto.dev and chrome://tracing read.

Tracks: the steps, the critical path, and every worker with its tasks, whose phases (fetch, wait, run, signal) nest in
them. Flow arrows lead from the producer whose signal completed an event to all tasks that waited for it: arrows from
all producers, a hundred thousand per step, would hide those that matter.
Source: Trace Event Format, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import count
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from tri_mpk.labels import split_label

if TYPE_CHECKING:
    from tri_mpk.profiler import Profile

PID = 1
STEP_TRACK, PATH_TRACK, FIRST_WORKER_TRACK = 1, 2, 3


def write_trace(profile: Profile, path: str | PathLike, steps: range) -> None:
    path = Path(path)
    compress = gzip.open if path.suffix == ".gz" else open
    with compress(path, "wt") as file:
        json.dump({"displayTimeUnit": "ns", "traceEvents": list(trace_events(profile, steps))}, file)


def trace_events(profile: Profile, steps: range) -> Iterator[dict[str, object]]:
    """Metadata, slices and arrows; times in `profile.unit`, from the beginning of the first of `steps`."""
    from tri_mpk.profiler import BEGIN, END

    yield from _metadata(profile)
    origin = int(profile.step_times[profile.index(steps[0]), :, BEGIN].min())
    arrows = count(1)
    for step in steps:
        at = profile.index(step)
        clock = _Clock(origin, profile.scale)
        begin, end = int(profile.step_times[at, :, BEGIN].min()), int(profile.step_times[at, :, END].max())
        yield clock.slice(STEP_TRACK, f"step {step}", begin, end, {})
        yield from _critical_path(profile, step, clock)
        yield from _workers(profile, step, clock)
        yield from _arrows(profile, step, clock, arrows)


class _Clock:
    """Turns the kernel's times into the trace's."""

    def __init__(self, origin: int, scale: float):
        self.origin, self.scale = origin, scale

    def at(self, time: int) -> float:
        return round((int(time) - self.origin) / self.scale, 3)

    def slice(self, track: int, name: str, begin: int, end: int, arguments: dict) -> dict[str, object]:
        length = round((int(end) - int(begin)) / self.scale, 3)
        event = {"name": name, "ph": "X", "pid": PID, "tid": track, "ts": self.at(begin), "dur": length}
        return event | ({"args": arguments} if arguments else {})


def _metadata(profile: Profile) -> Iterator[dict[str, object]]:
    unit = "time" if profile.is_real_time else "time in readings of the clock, not us"
    workers = [f"worker {worker}" for worker in range(profile.program.num_workers)]
    yield {"name": "process_name", "ph": "M", "pid": PID, "args": {"name": f"tri_mpk megakernel ({unit})"}}
    for track, name in enumerate(["steps", "critical path", *workers], STEP_TRACK):
        yield {"name": "thread_name", "ph": "M", "pid": PID, "tid": track, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": PID, "tid": track, "args": {"sort_index": track}}


def _critical_path(profile: Profile, step: int, clock: _Clock) -> Iterator[dict[str, object]]:
    for entry in profile.critical_path(step):
        name = profile.program.graph.task_name(entry.task)
        worker = int(profile.worker_of[profile.index(step), entry.task])
        if entry.run > entry.begin:
            hop = "hop" if entry.via == "event" else "fetch and wait"
            yield clock.slice(PATH_TRACK, hop, entry.begin, entry.run, {})
        yield clock.slice(PATH_TRACK, name, entry.run, entry.end, {"worker": worker})


def _workers(profile: Profile, step: int, clock: _Clock) -> Iterator[dict[str, object]]:
    from tri_mpk.profiler import END, PHASES, STEP_WAIT

    graph, events = profile.program.graph, profile.program.events
    at = profile.index(step)
    tasks = zip(profile.times[at].tolist(), profile.worker_of[at].tolist(), strict=True)
    for index, (times, worker) in enumerate(tasks):
        task = graph.tasks[index]
        track = FIRST_WORKER_TRACK + worker
        arguments = {"op": split_label(graph.ops[task.op])[1], "step": step, "bytes": task.cost_bytes}
        arguments |= {"waits for": events.wait[index]} if events.wait[index] >= 0 else {}
        yield clock.slice(track, graph.task_name(index), times[0], times[-1], arguments)
        for phase, begin, end in zip(PHASES, times, times[1:], strict=False):
            if end > begin:
                yield clock.slice(track, phase, begin, end, {})
    for worker, times in enumerate(profile.step_times[at].tolist()):
        yield clock.slice(FIRST_WORKER_TRACK + worker, "step event", times[STEP_WAIT], times[END], {})


def _arrows(profile: Profile, step: int, clock: _Clock, numbers: Iterator[int]) -> Iterator[dict[str, object]]:
    """From the beginning of a signal to where the waiting task begins to run."""
    from tri_mpk.profiler import RUN, SIGNAL

    times, worker_of = profile.times[profile.index(step)], profile.worker_of[profile.index(step)]
    for number, event in enumerate(profile.program.events.events):
        if not event.consumers:
            continue
        producer = profile.last_producer(number, step)
        for consumer in event.consumers:
            arrow = {"name": "event", "cat": "event", "id": next(numbers), "pid": PID}
            tail = {"tid": FIRST_WORKER_TRACK + int(worker_of[producer]), "ts": clock.at(times[producer, SIGNAL])}
            head = {"tid": FIRST_WORKER_TRACK + int(worker_of[consumer]), "ts": clock.at(times[consumer, RUN])}
            yield arrow | {"ph": "s"} | tail
            yield arrow | {"ph": "f", "bp": "e"} | head
