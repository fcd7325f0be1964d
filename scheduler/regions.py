"""Races and unwritten reads: all conflicting accesses of all tensors, against the derived order."""

from __future__ import annotations

import numpy as np

from .boxes import first_uncovered, intersect, is_empty, region_text
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
        number = self._numbers.setdefault(box, len(self.boxes))
        if number == len(self.boxes):
            self.boxes.append(box)
        numbers = self.by_task.setdefault(task, ([], []))[is_write]
        if number not in numbers:
            numbers.append(number)

    def overlaps(self) -> list[np.ndarray]:
        """Per box the numbers of all boxes that it intersects, itself included.

        Boxes are sorted along the dimension in which they differ most, so that a chunk of them meets a short stretch of
        the others when tiles are small, and at worst all of them.
        """
        bounds = np.array(self.boxes, dtype=np.int64).reshape(len(self.boxes), -1, 2)
        if not bounds.size:  # scalars
            return [np.zeros(1, dtype=np.int64)]
        lo, hi = bounds[..., 0].T.copy(), bounds[..., 1].T.copy()
        dim = max(range(len(lo)), key=lambda dim: len(np.unique(lo[dim])))
        order = np.argsort(lo[dim], kind="stable")
        lo, hi = lo[:, order], hi[:, order]
        reach = np.maximum.accumulate(hi[dim])
        found: list[np.ndarray] = [order] * len(order)
        for start in range(0, len(order), 256):  # in chunks: memory stays linear
            rows = slice(start, start + 256)
            near = slice(
                np.searchsorted(reach, lo[dim, start], side="right"),
                np.searchsorted(lo[dim], hi[dim, rows].max(), side="left"),
            )
            hit = np.ones((len(order[rows]), len(order[near])), dtype=bool)
            for i in range(len(lo)):
                hit &= lo[i, rows, None] < hi[i, near]
                hit &= hi[i, rows, None] > lo[i, near]
            for box, row in zip(order[rows].tolist(), hit, strict=True):
                found[box] = order[near][np.flatnonzero(row)]
        return found


def collect_accesses(graph: TaskGraph) -> list[TensorAccesses]:
    """One entry per tensor that can be used wrongly: weights, which nobody writes, cannot."""
    written = {region.tensor for task in graph.tasks for region in task.writes}
    accesses: dict[str, TensorAccesses] = {}
    for index, task in enumerate(graph.tasks):
        for regions, is_write in ((task.reads, False), (task.writes, True)):
            for tensor, box in ((region.tensor, region.box) for region in regions):
                info = graph.tensors.get(tensor)
                if info is None or len(info.dims) != len(box):
                    raise MalformedScheduleError(_coordinates_text(graph, index, tensor, box))
                if (tensor in written or not info.initialised) and not is_empty(box):
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

    Per box and chain it keeps the last position that read or wrote the box so far. A queue
    runs in order, as any chain does, so whoever comes after that position comes after all earlier ones too: one
    comparison per chain settles all pairs.
    """

    def __init__(self, graph: TaskGraph, events: Events, order: Order) -> None:
        self.graph, self.events, self.chains, self.order = graph, events, order.chains, order
        self.num_pairs = 0
        self.num_regions_covered = 0

    def check(self, accesses: TensorAccesses) -> None:
        overlaps = accesses.overlaps()
        self._check_order(accesses, overlaps)
        if not self.graph.tensors[accesses.tensor].initialised:
            self._check_written(accesses, overlaps)

    def _check_order(self, accesses: TensorAccesses, overlaps: list[np.ndarray]) -> None:
        num_boxes = len(accesses.boxes)
        last = np.zeros((2, num_boxes, len(self.chains)), dtype=np.int32)  # [0] reads, [1] writes
        seen = np.zeros((2, num_boxes), dtype=np.int64)
        num_accesses = [0] * num_boxes
        before_read: dict[int, tuple[np.ndarray, int]] = {}  # holds until the next write
        for task, (reads, writes) in accesses.by_task.items():
            for box in reads:
                if box not in before_read:
                    near = overlaps[box]
                    before_read[box] = last[1, near].max(axis=0), int(seen[1, near].sum())
                self._require(task, *before_read[box])
            for box in writes:
                near = overlaps[box]
                if any(num_accesses[i] for i in near.tolist()):  # most tiles are written before anybody else comes
                    self._require(task, last[:, near].max(axis=(0, 1)), int(seen[:, near].sum()))
            chain, reached = self.order.chain[task], self.order.position[task] + 1
            for kind, boxes in enumerate((reads, writes)):
                for box in boxes:
                    last[kind, box, chain] = max(last[kind, box, chain], reached)
                    seen[kind, box] += 1
                    num_accesses[box] += 1
            if writes:
                before_read.clear()

    def _require(self, task: int, needed: np.ndarray, num_pairs: int) -> None:
        """`task` may run only when the first `needed` tasks of every chain are done."""
        late = self.order.done_before[task] < needed
        if late.any():
            chain = int(late.argmax())
            raise self._race(self.chains[chain][needed[chain] - 1], task)
        self.num_pairs += num_pairs

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
                f"{name(writer)} ({self.order.place(writer)}) writes it only "
                + ("itself" if writer == task else "later in the program")
                + "; move the writer ahead of the reader, or mark the tensor as initialised"
            )
        return UnwrittenReadError(
            f"unwritten read: {name(task)} ({self.order.place(task)}) reads "
            f"{region_text(accesses.tensor, hole)} before any task has written it: {advice}."
        )
