"""What a hung launch left behind, in words: from control words and counters to a MegakernelTimeout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tri_mpk.errors import MegakernelTimeout
from tri_mpk.labels import split_label
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler.descriptor import STUCK_IN_POOL
from tri_mpk.scheduler.watchdog import Cause, Diagnosis, StuckWait, diagnose, wait_in_pool, waited_event


def timeout_error(
    program: Program,
    control: Sequence[int],
    counters: Sequence[int],
    damaged: Collection[int] = (),
    absent: Collection[int] = (),
    silent_ranks: Sequence[int] = (),
    said: Mapping[int, str] | None = None,
) -> MegakernelTimeout:
    """The error for a launch that was aborted, with the control block and all event counters as it left them.

    `silent_ranks` did not leave the launch; `said` is what other ranks have to say about it.
    """
    names = _Names(program)
    stuck = stuck_wait(program, control, counters, names.worker_of)
    first_epoch = control[words.CONTROL_FIRST_EPOCH.value]
    if stuck.pool is not None:
        stuck = wait_in_pool(program.events, program.schedule, counters, first_epoch, stuck)
    found = diagnose(program.events, program.schedule, counters, first_epoch, stuck, damaged, absent)
    where = {}
    if stuck.task is not None:
        task = program.graph.tasks[stuck.task]
        where["op"] = program.variants[task.variant].op.name
        where["layer"], _ = split_label(program.graph.ops[task.op])
        where["tile"] = task.tile
    root_cause = names.root_cause(stuck, found)
    if silent_ranks:
        who = f"rank{'s' if len(silent_ranks) > 1 else ''} {', '.join(map(str, silent_ranks))}"
        root_cause = f"{who} stopped or ended before the launch was over; here {root_cause}"
    root_cause += "".join(f"; rank {rank} {text}" for rank, text in (said or {}).items())
    several = {} if program.num_ranks == 1 else {"rank": program.rank, "silent_ranks": silent_ranks}
    return MegakernelTimeout(
        "the end of the step" if stuck.task is None else program.graph.task_name(stuck.task),
        stuck.worker,
        stuck.event,
        stuck.seen,
        stuck.wanted,
        chain=tuple(map(names.task, found.chain)),
        root_cause=root_cause,
        **where,
        **several,
    )


def stuck_text(program: Program, control: Sequence[int], counters: Sequence[int]) -> str:
    """For other ranks: the wait that was given up here."""
    stuck = stuck_wait(program, control, counters, _Names(program).worker_of)
    task = "the end of the step" if stuck.task is None else program.graph.task_name(stuck.task)
    return f"gave up before {task}, where event {stuck.event} stood at {stuck.seen} of {stuck.wanted}"


def stuck_wait(
    program: Program, control: Sequence[int], counters: Sequence[int], worker_of: dict[int, int]
) -> StuckWait:
    """What the worker that gave up first has recorded."""
    task = control[words.CONTROL_STUCK_TASK.value]
    seen, wanted = control[words.CONTROL_STUCK_SEEN.value], control[words.CONTROL_STUCK_WANTED.value]
    if task < 0:
        pool, worker = divmod(-1 - task, STUCK_IN_POOL)
        return StuckWait(worker, None, STEP_EVENT, seen, wanted, pool=pool - 1 if pool else None)
    event = waited_event(program.events, task, wanted, counters)
    return StuckWait(worker_of[task], task, event, seen, wanted)


def differing_tasks(program: Program, found: np.ndarray, packed: np.ndarray) -> set[int]:
    """The tasks whose descriptors differ: records of all workers one after another, at least one each."""
    records = [task for queue in program.schedule.queues for task in queue or [-1]]
    records += [task for tasks in program.schedule.pools for task in tasks]
    return {records[row] for row in np.flatnonzero((found != packed).any(axis=1)) if records[row] >= 0}


class _Names:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.worker_of = {task: w for w, queue in enumerate(program.schedule.static_queues()) for task in queue}

    def task(self, task: int) -> str:
        where = f"worker {self.worker_of[task]}" if task in self.worker_of else "any worker"
        if self.program.graph.tasks[task].is_far:
            where += " of some rank"
        return f"{self.program.graph.task_name(task)} ({where})"

    def tasks(self, tasks: list[int]) -> str:
        shown = ", ".join(map(self.task, tasks[:4]))
        return shown if len(tasks) <= 4 else f"{shown} or {len(tasks) - 4} more"

    def root_cause(self, stuck: StuckWait, found: Diagnosis) -> str:
        who = self.tasks(found.suspects)
        if found.cause is Cause.STOPPED:
            return f"a worker that did not leave stopped before it had done {who}"
        if found.cause is Cause.LOST:
            total = self.program.events.totals()[found.event]
            lost = f"{found.missing} of {total} signals of event {found.event} never came"
            return f"{lost}, to be given by {'one of ' if len(found.suspects) > 1 else ''}{who}"
        if found.cause is Cause.LATE:
            if stuck.task is not None and stuck.seen == stuck.wanted:
                return (
                    f"no signal is lost: event {stuck.event} is complete, but its tasks in the pool were released after"
                    " the bound, or not at all"
                )
            late = f"those of event {stuck.event} came after the bound: some worker was slow"
            behind = f"a worker had not begun this step by then, in which it comes to {who} first"
            return f"no signal is lost, {behind if found.suspects else late}"
        count = self.program.events.events[stuck.event].count
        wait = f"; it wants {stuck.wanted} of event {stuck.event}, where the schedule says {count} per step"
        return f"the descriptor of {who} is not what was packed{wait if found.suspects == [stuck.task] else ''}"
