"""Races and reads of nothing: every pair of conflicting accesses of every tensor, against the derived order."""

from __future__ import annotations

import numpy as np

from .boxes import first_uncovered, intersect, is_empty, region_text
from .errors import MalformedScheduleError, RaceError, UnwrittenReadError, shared_text
from .graph import Box, Events, Schedule, TaskGraph
from .order import Order


class TensorAccesses:
    """All accesses of one tensor in program order, on numbered boxes: equal boxes have one number."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.boxes: list[Box] = []
        self.by_task: dict[
            int, tuple[list[int], list[int]]
        ] = {}  # task -> numbers of boxes (read, written)
        self._numbers: dict[Box, int] = {}

    def add(self, task: int, box: Box, is_write: bool) -> None:
        number = self._numbers.setdefault(box, len(self.boxes))
        if number == len(self.boxes):
            self.boxes.append(box)
        numbers = self.by_task.setdefault(task, ([], []))[is_write]
        if number not in numbers:
            numbers.append(number)

    def overlaps(self) -> list[np.ndarray]:
        """Per box the numbers of all boxes that it intersects, itself included."""
        bounds = np.array(self.boxes, dtype=np.int64).reshape(len(self.boxes), -1, 2)
        lo, hi = bounds[..., 0].T.copy(), bounds[..., 1].T.copy()
        found = []
        for start in range(0, len(self.boxes), 256):  # in chunks: memory stays linear
            rows = slice(start, start + 256)
            hit = np.ones((len(self.boxes[rows]), len(self.boxes)), dtype=bool)
            for dim in range(len(lo)):
                hit &= lo[dim, rows, None] < hi[dim]
                hit &= hi[dim, rows, None] > lo[dim]
            found += [np.flatnonzero(row) for row in hit]
        return found


def collect_accesses(graph: TaskGraph) -> list[TensorAccesses]:
    """One entry per tensor that can be used wrongly: weights, which nobody writes, cannot."""
    written = {region.tensor for task in graph.tasks for region in task.writes}
    accesses: dict[str, TensorAccesses] = {}
    num_dims: dict[str, tuple[int, int]] = {}  # of the first access, and the task that did it
    for index, task in enumerate(graph.tasks):
        for regions, is_write in ((task.reads, False), (task.writes, True)):
            for region in regions:
                dims, first = num_dims.setdefault(region.tensor, (len(region.box), index))
                if region.tensor not in graph.tensors or dims != len(region.box):
                    raise MalformedScheduleError(
                        f"{graph.task_name(index)} uses {region_text(region.tensor, region.box)}, but "
                        + (
                            f"{graph.task_name(first)} gives {region.tensor} {dims} coordinates; all ops must agree"
                            if region.tensor in graph.tensors
                            else "the graph has no such tensor; declare it in TaskGraph.tensors"
                        )
                    )
                usable = region.tensor in written or not graph.tensors[region.tensor].initialised
                if usable and not is_empty(region.box):
                    entry = accesses.setdefault(region.tensor, TensorAccesses(region.tensor))
                    entry.add(index, region.box, is_write)
    return list(accesses.values())


class RegionCheck:
    """Proves that all conflicting accesses are ordered as in the program, without visiting every pair.

    Per box and worker it keeps the last queue position that read or wrote the box so far. A queue runs in order, so
    whoever comes after that position comes after all earlier ones too: one comparison per worker settles all pairs.
    """

    def __init__(self, graph: TaskGraph, events: Events, schedule: Schedule, order: Order) -> None:
        self.graph, self.events, self.queues, self.order = graph, events, schedule.queues, order
        self.num_pairs = 0
        self.num_regions_covered = 0

    def check(self, accesses: TensorAccesses) -> None:
        overlaps = accesses.overlaps()
        self._check_order(accesses, overlaps)
        if not self.graph.tensors[accesses.tensor].initialised:
            self._check_written(accesses, overlaps)

    def _check_order(self, accesses: TensorAccesses, overlaps: list[np.ndarray]) -> None:
        shape = (len(accesses.boxes), len(self.queues))
        last_read, last_write = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        num_reads, num_writes = (
            np.zeros(shape[0], dtype=np.int64),
            np.zeros(shape[0], dtype=np.int64),
        )
        before_read: dict[
            int, tuple[np.ndarray, int]
        ] = {}  # answers that hold until the next write
        for task, (reads, writes) in accesses.by_task.items():
            worker, reached = self.order.worker[task], self.order.position[task] + 1
            done = self.order.done_before[task]
            for box in reads:
                if box not in before_read:
                    near = overlaps[box]
                    before_read[box] = last_write[near].max(axis=0), int(num_writes[near].sum())
                self._require(task, done, *before_read[box])
            for box in writes:
                near = overlaps[box]
                needed = np.maximum(last_read[near].max(axis=0), last_write[near].max(axis=0))
                self._require(
                    task, done, needed, int(num_reads[near].sum() + num_writes[near].sum())
                )
            for boxes, last, count in (
                (reads, last_read, num_reads),
                (writes, last_write, num_writes),
            ):
                for box in boxes:
                    last[box, worker] = max(last[box, worker], reached)
                    count[box] += 1
            if writes:
                before_read.clear()

    def _require(self, task: int, done: np.ndarray, needed: np.ndarray, num_pairs: int) -> None:
        late = done < needed
        if late.any():
            worker = int(late.argmax())
            raise self._race(self.queues[worker][needed[worker] - 1], task)
        self.num_pairs += num_pairs

    def _race(self, first: int, second: int) -> RaceError:
        """`first` comes first in program order."""
        name, order = self.graph.task_name, self.order
        where = f"workers {order.worker[first]} and {order.worker[second]}"
        shared = shared_text(self.graph, first, second)
        if order.happens_before(second, first):
            return RaceError(
                f"race: {shared} ({where}), ordered backwards: {name(first)} comes first in the program, but "
                f"{name(second)} always runs first. Put {name(first)} before {name(second)} in the queues, "
                "or change their order in the graph."
            )
        event = self.events.wait[second]
        waits = f"waits for event {event}, which" if event >= 0 else "waits for no event;"
        return RaceError(
            f"race: {shared} ({where}), but nothing makes {name(second)} run after {name(first)}: it {waits} "
            f"{name(first)} does not reach. Let {name(first)} signal an event that {name(second)} waits for, "
            "or queue both on one worker."
        )

    def _check_written(self, accesses: TensorAccesses, overlaps: list[np.ndarray]) -> None:
        """Call after `_check_order`: the writes before a read are then those earlier in the program."""
        written = np.zeros(len(accesses.boxes), dtype=bool)
        covered: set[int] = set()  # stays so: nothing unwrites
        for task, (reads, writes) in accesses.by_task.items():
            for box in reads:
                if box not in covered and not written[box]:
                    near = [accesses.boxes[i] for i in overlaps[box] if written[i]]
                    hole = first_uncovered(accesses.boxes[box], near)
                    if hole is not None:
                        raise self._unwritten(task, accesses, hole)
                    covered.add(box)
                self.num_regions_covered += 1
            written[writes] = True

    def _unwritten(self, task: int, accesses: TensorAccesses, hole: Box) -> UnwrittenReadError:
        name = self.graph.task_name
        writers = [
            task
            for task, (_, writes) in accesses.by_task.items()
            if any(intersect(accesses.boxes[box], hole) for box in writes)
        ]
        advice = "no task writes it; add its writer, or mark the tensor as initialised"
        if writers:
            writer = writers[0]
            advice = (
                f"{name(writer)} (worker {self.order.worker[writer]}) writes it only "
                + ("itself" if writer == task else "later in the program")
                + "; move the writer ahead of the reader, or mark the tensor as initialised"
            )
        return UnwrittenReadError(
            f"unwritten read: {name(task)} (worker {self.order.worker[task]}) reads "
            f"{region_text(accesses.tensor, hole)} before any task has written it: {advice}."
        )
