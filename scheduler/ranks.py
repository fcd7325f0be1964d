"""Kernels on several ranks: the events of one rank's graph, and the proof over all ranks together.

All ranks run the same graph, each on its shard: task t of one rank has a counterpart t on every other. They meet in
symmetric tensors, whose first coordinate is the rank that writes it. A task that *pushes* writes its own rank's part
on every rank, and its signals go to the events of all ranks (`Task.to_all_ranks`), so an event counts its counterparts'
signals too:

    rank 0   o_proj t0 ──┬─ event 7 of rank 0 ── gate_up t0 ...     reads parts[0:2]
    rank 1   o_proj t0 ──┴─ event 7 of rank 1 ── gate_up t0 ...     count: 2 for each task that pushes

Or it reaches one rank only, so many after its own (`Task.ahead`): of every such task each rank hears once, from one of
its counterparts.

Events are derived from rank 0's graph, in which a task that pushes stands for its counterparts: it writes the parts
that reach this rank. That says who waits for whom; it is not trusted. What is proved is the graph of all ranks
(`join`): every rank's tasks, tensors, events and queues under names of their own, and signals where the kernel sends
them.

The step event gets the same signals on every rank, all of them from tasks that signal to all ranks. So in the proof it
is one event, and a rank begins a step only when all ranks are done with the last one: nobody can run into another's
data, however much faster it is, and no buffer has to alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .errors import MalformedScheduleError
from .events import derive_events
from .graph import MAX_SIGNALS, STEP_EVENT, Event, Events, Region, Schedule, Task, TaskGraph, TensorInfo
from .verify import Report, verify


def derive_rank_events(graph: TaskGraph, num_ranks: int) -> Events:
    """The events of each rank of `num_ranks` that run this graph."""
    stand_ins = [replace(task, writes=task.writes + _arriving(task, num_ranks)) for task in graph.tasks]
    events = derive_events(replace(graph, tasks=stand_ins))
    events.weights = [len(task.reached(0, num_ranks)) for task in graph.tasks]
    for event in events.events:
        event.count = sum(events.weights[task] for task in event.producers)
    return events


def _arriving(task: Task, num_ranks: int) -> tuple[Region, ...]:
    """What the task and its counterparts write on rank 0."""
    senders = (0, num_ranks)
    if task.ahead is not None:
        sender = -task.ahead % num_ranks
        senders = (sender, sender + 1)
    return tuple(Region(region.tensor, (senders, *region.box)) for region in task.pushes)


def waits_for_ranks(graph: TaskGraph, events: Events, task: int) -> bool:
    """Whether other ranks signal the event that a task waits for."""
    event = events.wait[task]
    return event >= 0 and any(graph.tasks[producer].is_far for producer in events.events[event].producers)


def verify_ranks(graph: TaskGraph, events: Events, schedule: Schedule, num_ranks: int) -> Report:
    """`verify` for all ranks together. Raises a `ScheduleError` whose names end in `@rank`.

    Where ranks are alike, whatever is true of rank 0's memory is true of that of each, with all ranks renumbered.
    """
    memories = range(1 if are_alike(graph, num_ranks) else num_ranks)
    return verify(*join(graph, events, schedule, num_ranks, memories), max_signals=MAX_SIGNALS * num_ranks)


def are_alike(graph: TaskGraph, num_ranks: int) -> bool:
    """Whether the graph of all ranks remains the same if each rank takes the place of the next one.

    It does if nobody tells one rank's part of a symmetric tensor from another's: tasks push their own, and read all.
    """
    pushed = {region.tensor for task in graph.tasks for region in task.pushes}
    return all(
        region.tensor not in pushed or region.box[0] == (0, num_ranks) for task in graph.tasks for region in task.reads
    ) and not any(region.tensor in pushed for task in graph.tasks for region in task.writes)


def join(
    graph: TaskGraph, events: Events, schedule: Schedule, num_ranks: int, memories: Sequence[int] | None = None
) -> tuple[TaskGraph, Events, Schedule]:
    """The graph of all ranks: task t of rank r is number t * num_ranks + r, event e > 0 is (e - 1) * num_ranks + r + 1.

    In program order all counterparts of a task come before the next one's. What no task writes is left out, and tensors
    of ranks that are not in `memories`; None: all are.
    """
    if schedule.pools:
        raise MalformedScheduleError("tasks in pools run on one rank only; make all ops static")
    for task in events.events[STEP_EVENT].producers:
        if not graph.tasks[task].to_all_ranks:
            raise MalformedScheduleError(
                f"{graph.task_name(task)} ends the step of its own rank only; a task that no other waits for must"
                " signal to all ranks. Let a layer whose output is symmetric read what it writes"
            )
    ranks = range(num_ranks)
    pushed = {region.tensor for task in graph.tasks for region in task.pushes}
    written = pushed | {region.tensor for task in graph.tasks for region in task.writes}
    used = [name for name, info in graph.tensors.items() if name in written or not info.initialised]
    memories = ranks if memories is None else memories
    own = {name: [f"{name}@{rank}" for rank in ranks] for name in used}
    joint = TaskGraph(
        [f"{op}@{rank}" for op in graph.ops for rank in ranks],
        tensors={own[name][rank]: graph.tensors[name] for name in used for rank in memories},
    )

    def of_rank(regions: tuple[Region, ...], rank: int) -> tuple[Region, ...]:
        if rank not in memories:
            return ()
        return tuple(Region(own[region.tensor][rank], region.box) for region in regions if region.tensor in own)

    def event_of(event: int, rank: int) -> int:
        return STEP_EVENT if event == STEP_EVENT else (event - 1) * num_ranks + rank + 1

    wait: list[int] = []
    signals: list[list[int]] = []
    for t, task in enumerate(graph.tasks):
        for rank in ranks:
            reached = task.reached(rank, num_ranks)
            pushes = tuple(
                Region(own[region.tensor][peer], ((rank, rank + 1), *region.box))
                for region in task.pushes
                for peer in reached
                if peer in memories
            )
            joint.tasks.append(
                Task(
                    task.op * num_ranks + rank,
                    task.tile,
                    of_rank(task.reads, rank),
                    of_rank(task.writes, rank) + pushes,
                    task.cost_bytes,
                )
            )
            wait.append(event_of(events.wait[t], rank) if events.wait[t] >= 0 else -1)
            signals.append([*dict.fromkeys(event_of(event, peer) for event in events.signals[t] for peer in reached)])
    counts = [events.events[STEP_EVENT].count]
    counts += [event.count for event in events.events[1:] for _ in ranks]
    queues = [[task * num_ranks + rank for task in queue] for rank in ranks for queue in schedule.queues]
    return joint, Events([Event([], [], count) for count in counts], wait, signals), Schedule(queues)


def symmetric_info(num_ranks: int, numel: int) -> TensorInfo:
    """A symmetric tensor as tasks address it: (rank, element)."""
    return TensorInfo((num_ranks, numel // num_ranks), initialised=False)
