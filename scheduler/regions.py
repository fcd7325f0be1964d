"""Races and unwritten reads: all conflicting accesses of all tensors, against the derived order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .boxes import first_uncovered, intersect, is_empty, overlaps, region_text
from .errors import MalformedScheduleError, RaceError, UnwrittenReadError, shared_text
from .graph import Box, Events, TaskGraph
from .order import Order


class TensorAccesses:
    """All accesses of one tensor in program order, on numbered boxes: equal boxes have one
    number."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.boxes: list[Box] = []
        self.by_task: dict[int, tuple[list[int], list[int]]] = {}  # task -> numbers of boxes (read, written)
        self._numbers: dict[Box, int] = {}

    def add(self, task: int, box: Box, is_write: bool) -> None:
        number = self._numbers.get(box)
        if number is None:
            number = self._numbers[box] = len(self.boxes)
            self.boxes.append(box)
        if task not in self.by_task:
            self.by_task[task] = [], []
        numbers = self.by_task[task][is_write]
        if number not in numbers:
            numbers.append(number)

    def overlaps(self) -> list[np.ndarray]:
        """Per box the numbers of all boxes that it intersects, itself included."""
        return overlaps(tuple(self.boxes))


@dataclass(slots=True)
class _Batch:
    """Tasks in a row of which none conflicts with another, once for each of their accesses."""

    tasks: list[int] = field(default_factory=list)
    accesses: list[int] = field(default_factory=list)  # as they are numbered here
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)  # (number of a box, 1 for a write) -> its own


def _batches(accesses: TensorAccesses, overlaps: list[np.ndarray]) -> Iterator[_Batch]:
    """All accesses in program order."""
    batch, size = _Batch(), 0
    written: set[int] = set()  # boxes that meet one which the batch writes
    used: set[int] = set()  # or uses at all
    for task, sides in accesses.by_task.items():
        reads, writes = sides
        # what is looked at together fits the CPU's cache
        if size > 4096 or not (written.isdisjoint(reads) and used.isdisjoint(writes)):
            yield batch
            batch, size = _Batch(), 0
            written.clear()
            used.clear()
        for is_write, boxes in enumerate(sides):
            for box in boxes:
                num_known = len(batch.numbers)
                number = batch.numbers.setdefault((box, is_write), num_known)
                if number == num_known:
                    near = overlaps[box].tolist()
                    size += len(near)
                    used.update(near)
                    if is_write:
                        written.update(near)
                batch.tasks.append(task)
                batch.accesses.append(number)
    yield batch


def collect_accesses(graph: TaskGraph) -> list[TensorAccesses]:
    """One entry per tensor that can be used wrongly: weights, which nobody writes, cannot."""
    matters = {name for name, info in graph.tensors.items() if not info.initialised}
    matters.update(region.tensor for task in graph.tasks for region in task.writes)
    num_dims = {name: len(info.dims) for name, info in graph.tensors.items()}
    accesses: dict[str, TensorAccesses] = {}
    for index, task in enumerate(graph.tasks):
        for regions, is_write in ((task.reads, False), (task.writes, True)):
            for region in regions:
                tensor, box = region.tensor, region.box
                if num_dims.get(tensor) != len(box):
                    raise MalformedScheduleError(_coordinates_text(graph, index, tensor, box))
                if tensor in matters and not is_empty(box):
                    if tensor not in accesses:
                        accesses[tensor] = TensorAccesses(tensor)
                    accesses[tensor].add(index, box, is_write)
    return list(accesses.values())


def _coordinates_text(graph: TaskGraph, task: int, tensor: str, box: Box) -> str:
    uses = f"{graph.task_name(task)} uses {region_text(tensor, box)}"
    if tensor not in graph.tensors:
        return f"{uses}, but the graph has no such tensor; declare it in TaskGraph.tensors"
    dims = len(graph.tensors[tensor].dims)
    return f"{uses}, but {tensor} is declared with {dims} coordinates; all ops must agree on them"


class RegionCheck:
    """Proves that all conflicting accesses are ordered as in the program.

    Per box and chain it keeps the last position that wrote the box so far, and that used it at all. A queue
    runs in order, as any chain does, so whoever comes after that position comes after all earlier ones too: one
    comparison per chain settles all pairs. Tasks in a row that do not conflict with each other, as those of an op, are
    looked at together.
    """

    def __init__(self, graph: TaskGraph, events: Events, order: Order) -> None:
        self.graph, self.events, self.chains, self.order = graph, events, order.chains, order
        self.chain, self.reached = np.array(order.chain), np.array(order.position, dtype=np.int32) + 1  # per task
        self.num_pairs = 0
        self.num_regions_covered = 0

    def check(self, accesses: TensorAccesses) -> None:
        overlaps = accesses.overlaps()
        self._check_order(accesses, overlaps)
        if not self.graph.tensors[accesses.tensor].initialised:
            self._check_written(accesses, overlaps)

    def _check_order(self, accesses: TensorAccesses, overlaps: list[np.ndarray]) -> None:
        num_boxes = len(accesses.boxes)
        # of writes, and of reads and writes: what a read and what a write conflicts with
        last = np.zeros((2, num_boxes, len(self.chains)), dtype=np.int32)
        seen = np.zeros((2, num_boxes), dtype=np.int64)
        for batch in _batches(accesses, overlaps):
            tasks, which = np.array(batch.tasks), np.array(batch.accesses)
            boxes, is_write = np.array(list(batch.numbers)).T
            near = [overlaps[box] for box in boxes.tolist()]
            sizes = np.array([len(some) for some in near])
            starts = np.cumsum(sizes) - sizes
            conflicting = np.repeat(is_write, sizes), np.concatenate(near)
            self._require(tasks, np.maximum.reduceat(last[conflicting], starts)[which])
            self.num_pairs += int(np.add.reduceat(seen[conflicting], starts)[which].sum())
            boxes, is_write = boxes[which], is_write[which]
            for kind, some in enumerate((is_write == 1, is_write >= 0)):
                places = boxes[some] * len(self.chains) + self.chain[tasks[some]]
                np.maximum.at(last[kind].reshape(-1), places, self.reached[tasks[some]])
                seen[kind] += np.bincount(boxes[some], minlength=num_boxes)

    def _require(self, tasks: np.ndarray, needed: np.ndarray) -> None:
        """Each of `tasks` may run only when the first `needed` tasks of every chain are done."""
        late = self.order.done_before[tasks] < needed
        if late.any():
            row, chain = np.argwhere(late)[0].tolist()
            raise self._race(self.chains[chain][needed[row, chain] - 1], int(tasks[row]))

    def _race(self, first: int, second: int) -> RaceError:
        """`first` comes first in program order."""
        name, order = self.graph.task_name, self.order
        where = f"{order.place(first)} and {order.place(second)}".replace("any worker and any", "any")
        if max(order.chain[first], order.chain[second]) < order.num_workers:
            where = f"workers {order.chain[first]} and {order.chain[second]}"
        shared = shared_text(self.graph, first, second)
        if order.happens_before(second, first):
            return RaceError(
                f"race: {shared} ({where}), ordered backwards: {name(first)} comes first in the "
                f"program, but {name(second)} always runs first. Put {name(first)} before "
                f"{name(second)} in the queues, or change their order in the graph."
            )
        event = self.events.wait[second]
        waits = (
            "no event"
            if event < 0 or self.events.events[event].count <= 0
            else f"event {event}, which {name(first)} does not reach"
        )
        return RaceError(
            f"race: {shared} ({where}), but nothing makes {name(second)} run after {name(first)}: "
            f"it waits for {waits}. Let {name(first)} signal an event that {name(second)} waits "
            "for, or queue both on one worker."
        )

    def _check_written(self, accesses: TensorAccesses, overlaps: list[np.ndarray]) -> None:
        """Call after `_check_order`: what comes earlier in the program is then done before."""
        written: set[int] = set()
        covered: set[int] = set()  # stays so: nothing unwrites
        for task, (reads, writes) in accesses.by_task.items():
            for box in reads:
                if box not in covered and box not in written:
                    near = [accesses.boxes[i] for i in overlaps[box].tolist() if i in written]
                    hole = first_uncovered(accesses.boxes[box], near)
                    if hole is not None:
                        raise self._unwritten(task, accesses, hole)
                    covered.add(box)
                self.num_regions_covered += 1
            written.update(writes)

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
                f"{name(writer)} ({self.order.place(writer)}) writes it only "
                + ("itself" if writer == task else "later in the program")
                + "; move the writer ahead of the reader, or mark the tensor as initialised"
            )
        return UnwrittenReadError(
            f"unwritten read: {name(task)} ({self.order.place(task)}) reads "
            f"{region_text(accesses.tensor, hole)} before any task has written it: {advice}."
        )
