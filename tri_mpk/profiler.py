"""What the last steps of a launch did: when every task was fetched, waited, ran and signalled, and what came of it.

    model = tri_mpk.from_pretrained("Qwen/Qwen3-8B", profile=True)
    model.generate(input_ids, max_new_tokens=32)
    profile = model.profile()
    profile.to_perfetto("trace.json")        # for https://ui.perfetto.dev or chrome://tracing
    profile.picture("step.svg")              # one step: workers by time, coloured by op
    for row in profile.table(): print(row)   # per op; profile.summary() is the whole step

The stamps come from the kernel itself (scheduler/timing.py): nanoseconds on a GPU, readings of a common counter in the
interpreter, where only the order means something.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from os import PathLike

import numpy as np

from tri_mpk.inspect import split_label
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT
from tri_mpk.scheduler.timing import WORKER_RECORDS

# The last axis of `Profile.times`: when a task was taken up, began to wait, to run, to signal, and was done.
FETCH, WAIT, RUN, SIGNAL, DONE = range(5)
PHASES = ("fetch", "wait", "run", "signal")  # phase i lies between times i and i + 1
# The last axis of `Profile.step_times`: when a worker began the step, to wait for the step event, and was done.
BEGIN, STEP_WAIT, END = range(3)


@dataclass(frozen=True, slots=True)
class OpTimes:
    """An op, all layers together. Times are per step, as the mean over all workers, so that all ops' fetch, wait, run
    and signal and the waits for the step event add up to the step. They are in `Profile.unit`, as is `critical`.
    """

    op: str
    tasks: int  # per step
    fetch: float  # from the end of the task before, to the wait
    wait: float
    run: float
    signal: float
    share: float  # of the step, all four together
    bytes: int  # that its tasks read and write per step
    gbps: float | None  # while its tasks run, as if all workers ran them at once; None in the interpreter
    critical: float  # of the critical path: hops to its tasks, and their running and signalling
    hops: float  # of the critical path that end in it


@dataclass(frozen=True, slots=True)
class PathTask:
    """A task on the critical path, from the clock's time `begin`, when the one before it on the path handed over."""

    task: int
    via: str  # "event": a hop, from when the last producer began to signal; "queue": from the end of the task before
    begin: int
    run: int  # when it began to run
    end: int  # when it handed over to the next one


class Profile:
    """The recorded steps of one launch of a kernel with profile=True. Made by `model.profile()` or `read_profile`.

    Attributes:
        program: the graph, events and queues that `task` indices and worker numbers refer to.
        steps: the positions that were recorded, a range.
        times: int64 [steps, tasks, 5], in the clock's own unit; the last axis is FETCH, WAIT, RUN, SIGNAL, DONE.
        worker_of, task_before: int64 [steps, tasks], who ran a task, and what it ran before (-1: nothing).
        step_times: int64 [steps, workers, 3]; the last axis is BEGIN, STEP_WAIT, END.
        is_real_time: whether the clock counts nanoseconds (a GPU) or its own readings (the interpreter).
    """

    def __init__(self, program: Program, steps: range, records: np.ndarray, is_real_time: bool):
        """`records`: int64 [steps, records of a step, 4] as `Runtime.read_records` returns them."""
        self.program = program
        self.steps = steps
        self.is_real_time = is_real_time
        queues = program.schedule.queues
        lengths = np.array([max(1, len(queue)) + WORKER_RECORDS.value for queue in queues])
        last = np.cumsum(lengths) - 1  # each worker's record of its wait for the step event
        first = last - lengths + 1
        pooled = [task for tasks in program.schedule.pools for task in tasks]
        num_tasks = len(program.graph.tasks)
        assert records.shape == (len(steps), lengths.sum() + len(pooled), 4), records.shape
        self.step_times = np.stack([records[:, first, 0], records[:, last, 0], records[:, last, 1]], axis=-1)
        self.worker_of = np.zeros((len(steps), num_tasks), dtype=np.int64)
        place = np.zeros(num_tasks, dtype=np.int64)
        for worker, queue in enumerate(queues):
            slots = [slot for slot, entry in enumerate(queue) if entry >= 0]
            tasks = [queue[slot] for slot in slots]
            self.worker_of[:, tasks] = worker
            place[tasks] = first[worker] + 1 + np.array(slots, dtype=np.int64)
        place[pooled] = lengths.sum() + np.arange(len(pooled))
        self.worker_of[:, pooled] = records[:, place[pooled], 0]  # there instead of when it began to wait
        self.task_before = self._tasks_before(records[:, place, 1:])
        fetched = np.take_along_axis(records[:, place, 3], self.task_before, axis=1)
        begun = np.take_along_axis(self.step_times[..., BEGIN], self.worker_of, axis=1)
        fetched = np.where(self.task_before >= 0, fetched, begun)[..., None]
        self.times = np.concatenate([fetched, records[:, place]], axis=-1)
        self.times[:, pooled, WAIT] = self.times[:, pooled, FETCH]  # for a ticket, and to be released

    def _tasks_before(self, stamps: np.ndarray) -> np.ndarray:
        """[steps, tasks]: the task before on the same worker, or -1. `stamps` are RUN, SIGNAL and DONE.

        Queues say so; where tasks came out of pools, the time does.
        """
        before = np.full(self.worker_of.shape, -1)
        for worker, queue in enumerate(self.program.schedule.static_queues()):
            for at in range(len(before)):
                order = np.array(queue, dtype=np.int64)
                if self.program.schedule.pools:
                    tasks = np.flatnonzero(self.worker_of[at] == worker)
                    order = tasks[np.lexsort((stamps[at, tasks, 2], stamps[at, tasks, 0]))]
                before[at, order[1:]] = order[:-1]
        return before

    @property
    def unit(self) -> str:
        """Of all times in tables and traces: "us", or "readings" of the interpreter's clock."""
        return "us" if self.is_real_time else "readings"

    @property
    def scale(self) -> float:
        """The clock's ticks per `unit`."""
        return 1e3 if self.is_real_time else 1.0

    @property
    def step_lengths(self) -> np.ndarray:
        """Length of each step, [steps], in the clock's own unit: mean over the workers."""
        return (self.step_times[..., END] - self.step_times[..., BEGIN]).mean(axis=1)

    @property
    def typical_step(self) -> int:
        """Position of the step of median length."""
        order = np.argsort(self.step_lengths, kind="stable")
        return self.steps[int(order[(len(order) - 1) // 2])]

    def index(self, step: int | None) -> int:
        """Place of a position in `times`; None: of the typical step. ValueError if it was not recorded."""
        step = self.typical_step if step is None else step
        if step not in self.steps:
            raise ValueError(f"step={step} was not recorded; choose {self.steps[0]} to {self.steps[-1]}")
        return self.steps.index(step)

    def last_producer(self, event: int, step: int | None = None) -> int:
        """The task whose signal completed an event in that step."""
        producers = self.program.events.events[event].producers
        return producers[int(np.argmax(self.times[self.index(step), producers, DONE]))]

    # ---- summaries ----

    def critical_path(self, step: int | None = None) -> list[PathTask]:
        """What the end of a step waited for, backwards from the last task: the last producer of the task's event, or
        the task before it on its worker, whichever was done later. First task first; each begins where the one before
        it ends.
        """
        at = self.index(step)
        times = self.times[at]
        path = []
        task = self.last_producer(STEP_EVENT, self.steps[at])
        end = int(times[task, DONE])
        while task >= 0:
            before, via = int(self.task_before[at, task]), "queue"
            event = self.program.events.wait[task]
            if event >= 0:
                producer = self.last_producer(event, self.steps[at])
                if before < 0 or times[producer, DONE] > times[before, DONE]:
                    before, via = producer, "event"
            began = times[task, FETCH] if via == "queue" else times[before, SIGNAL]
            path.append(PathTask(task, via, int(began), int(times[task, RUN]), end))
            task, end = before, int(began)
        return path[::-1]

    def table(self) -> list[OpTimes]:
        """One row per kind of op, in program order."""
        graph = self.program.graph
        kinds = [split_label(label)[1] for label in graph.ops]
        tasks_of = defaultdict(list)
        for index, task in enumerate(graph.tasks):
            tasks_of[kinds[task.op]].append(index)
        per_step = len(self.steps) * self.scale
        critical, hops = Counter(), Counter()
        for step in self.steps:
            for entry in self.critical_path(step):
                kind = kinds[graph.tasks[entry.task].op]
                critical[kind] += (entry.end - entry.begin) / per_step
                hops[kind] += (entry.via == "event") / len(self.steps)
        step_length = self.step_lengths.mean() / self.scale
        rows = []
        for kind, tasks in tasks_of.items():
            phases = np.diff(self.times[:, tasks], axis=-1).sum(axis=(0, 1)) / per_step / self.program.num_workers
            num_bytes = sum(graph.tasks[t].cost_bytes for t in tasks)
            rows.append(
                OpTimes(
                    op=kind,
                    tasks=len(tasks),
                    **dict(zip(PHASES, phases.tolist(), strict=True)),
                    share=float(phases.sum() / step_length),
                    bytes=num_bytes,
                    gbps=float(num_bytes / phases[RUN] / 1e3) if self.is_real_time and phases[RUN] else None,
                    critical=critical[kind],
                    hops=hops[kind],
                )
            )
        return rows

    def summary(self) -> dict[str, float | int | str]:
        """Means over the recorded steps: length of a step, what the workers did meanwhile, the critical path."""
        length = self.step_lengths.mean() / self.scale
        phases = np.diff(self.times, axis=-1).sum(axis=(0, 1)) / len(self.steps) / self.scale / self.program.num_workers
        step_wait = (self.step_times[..., END] - self.step_times[..., STEP_WAIT]).mean() / self.scale
        paths = [self.critical_path(step) for step in self.steps]
        hops = [entry for path in paths for entry in path if entry.via == "event"]
        return {
            "unit": self.unit,
            "steps": len(self.steps),
            "first_step": self.steps[0],
            "num_workers": self.program.num_workers,
            "step": float(length),
            **dict(zip(PHASES, phases.tolist(), strict=True)),
            "step_event_wait": float(step_wait),
            "utilisation": float(phases[RUN] / length),  # of the workers' time, running
            "path_tasks": sum(map(len, paths)) / len(paths),
            "path_hops": len(hops) / len(paths),
            "path_hop_time": sum(entry.run - entry.begin for entry in hops) / len(paths) / self.scale,
        }

    # ---- files ----

    def to_perfetto(self, path: str | PathLike, steps: range | None = None) -> None:
        """Writes a Chrome trace for https://ui.perfetto.dev; compressed if the name ends in .gz. None: all steps."""
        from tri_mpk.trace import write_trace

        write_trace(self, path, self.steps if steps is None else steps)

    def picture(self, path: str | PathLike, step: int | None = None) -> None:
        """Draws one step, workers by time, coloured by op, to a .svg, .png or .pdf. None: the typical step.

        Raises ValueError without matplotlib (`pip install 'tri_mpk[profile]'`).
        """
        from tri_mpk.picture import draw_step

        draw_step(self, path, step)


def read_profile(kernel: PersistentKernel) -> Profile:
    """The profile of a kernel's last launch: of its last steps, 32 at most. ValueError if there is none."""
    if not kernel.profile:
        raise ValueError("this kernel takes no time stamps; load the model (or make the kernel) with profile=True")
    runtime = kernel.runtime
    if runtime is None or not runtime.last_steps:
        raise ValueError("there is no finished launch to profile; call generate first")
    records = runtime.read_records().numpy()
    steps = runtime.last_steps[-len(records) :]
    return Profile(runtime.program, steps, records, kernel.device.type == "cuda")
