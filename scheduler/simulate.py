"""How long a step takes on a model of the machine: queues, events with a cost per hop, one weight stream per worker.

A worker's stream brings the weights of its tasks one after another at a constant rate, also while the worker waits,
until its ring is full; a task multiplies weights as they come. The step starts with full rings, since its end, a few
short tasks and hops, leaves time to fill them. No step is shorter than its bytes take.

A task of a pool runs on the worker that is free first, of those that take part, in program order, and costs a ticket.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .graph import STEP_EVENT, Events, Schedule, pool_entry


@dataclass(frozen=True, slots=True)
class WorkerRates:
    """How fast one worker is."""

    stream_bytes_per_s: float  # from memory; may be infinite
    multiply_bytes_per_s: float  # weights that are there
    ring_bytes: int  # weights that can be under way or waiting to be used
    slot_bytes: int  # the last slot of a task is used when all of it is there
    slot_s: float  # of a slot, beyond its bytes
    hop_s: float  # from an event's last signal to the first instruction behind a wait for it, in quiet memory
    queue_s: float  # a hop also waits behind the weights under way, at most for so long
    task_s: float  # of a task without weights: half of it before their first use, half after their last
    ticket_s: float = 0.0  # of a task of a pool, more: its ticket, and a descriptor that is fetched only then


@dataclass(slots=True)
class Work:
    """What each task has to do."""

    stream_bytes: list[int]  # weights, through the ring
    stream_slots: list[int]  # that they fill
    load_bytes: list[int]  # what else it loads from memory, after its wait
    latency_s: list[float]  # beyond bytes and `task_s`

    @classmethod
    def none(cls, num_tasks: int) -> Work:
        return cls([0] * num_tasks, [0] * num_tasks, [0] * num_tasks, [0.0] * num_tasks)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds per step, and two bounds below it."""

    step_s: float
    stream_s: float  # the busiest worker's bytes at its share of the bandwidth
    chain_s: float  # tasks and hops, if memory were infinitely fast


def step_time(events: Events, schedule: Schedule, work: Work, rates: WorkerRates) -> StepTime:
    """Queues have to be in program order and events to point backwards in it, as `schedule` and `derive_events` do."""
    loads = [sum(work.stream_bytes[t] + work.load_bytes[t] for t in queue) for queue in schedule.static_queues()]
    pooled = sum(work.stream_bytes[t] + work.load_bytes[t] for tasks in schedule.pools for t in tasks)
    most = max(max(loads, default=0), (sum(loads) + pooled) / max(len(loads), 1))  # pools fill up who has less
    stream_s = most / rates.stream_bytes_per_s
    chain_s = _end_of_step(events, schedule, work, replace(rates, stream_bytes_per_s=float("inf")))
    end_s = _end_of_step(events, schedule, work, rates)
    return StepTime(max(stream_s, end_s), stream_s, chain_s)


def _end_of_step(events: Events, schedule: Schedule, work: Work, rates: WorkerRates) -> float:
    """When the step event's waiters go on, if all workers start at 0."""
    worker_of = {task: worker for worker, queue in enumerate(schedule.static_queues()) for task in queue}
    takers = _takers(schedule)
    streams = [_Stream(rates) for _ in schedule.queues]
    signalled = [0.0] * len(events.events)  # the last signal of each event
    for task in range(len(events.wait)):
        if task in takers:
            stream = min((streams[worker] for worker in takers[task]), key=lambda stream: stream.free)
        else:
            stream = streams[worker_of[task]]
        event = events.wait[task]
        ready = stream.hop(signalled[event]) if event >= 0 else 0.0
        busy = (
            rates.task_s
            + rates.ticket_s * (task in takers)
            + work.stream_slots[task] * rates.slot_s
            + work.latency_s[task]
        )
        done = stream.run(ready, work.stream_bytes[task], work.load_bytes[task], busy)
        for signal in events.signals[task]:
            if done > signalled[signal]:
                signalled[signal] = done
    return signalled[STEP_EVENT] + rates.hop_s


def _takers(schedule: Schedule) -> dict[int, list[int]]:
    """Per task of a pool the workers that may run it."""
    found = {}
    for pool, tasks in enumerate(schedule.pools):
        workers = [w for w, queue in enumerate(schedule.queues) if pool_entry(pool) in queue]
        found |= dict.fromkeys(tasks, workers)
    return found


class _Stream:
    """One worker: when it is free, and how many bytes ahead of it its stream is."""

    __slots__ = ("rates", "free", "ahead", "seen")

    def __init__(self, rates: WorkerRates):
        self.rates = rates
        self.free = 0.0  # end of the task before
        self.ahead = float(rates.ring_bytes)  # bytes in the ring at the time `free`

    def ahead_at(self, time: float) -> float:
        """Bytes in the ring at a time after the task before, if no task begins until then."""
        if time <= self.free:  # infinity times 0 is not a number
            return self.ahead
        return min(self.ahead + (time - self.free) * self.rates.stream_bytes_per_s, self.rates.ring_bytes)

    def hop(self, signalled: float) -> float:
        """When this worker sees an event that was signalled: messages queue behind the weights under way."""
        rates = self.rates
        under_way = rates.ring_bytes - self.ahead_at(signalled)
        return signalled + rates.hop_s + min(under_way / rates.stream_bytes_per_s, rates.queue_s)

    def run(self, ready: float, stream_bytes: int, load_bytes: int, busy: float) -> float:
        """Runs a task that may go on at `ready` and is busy for so long beyond its bytes. Returns when it is done."""
        rates = self.rates
        start = max(ready, self.free)
        rate = rates.stream_bytes_per_s
        ahead = self.ahead_at(start)
        done = start + busy + load_bytes / rate
        if stream_bytes:
            done += stream_bytes / rates.multiply_bytes_per_s
            missing = stream_bytes - ahead
            if missing > 0:
                last = min(rates.slot_bytes, stream_bytes)
                arrived = start + missing / rate
                done = max(done, arrived + last / rates.multiply_bytes_per_s + rates.slot_s + rates.task_s / 2)
        # from here on the ring may hold what the next tasks need
        self.ahead = min(ahead - stream_bytes + (done - start) * rate, rates.ring_bytes)
        self.free = done
        return done
