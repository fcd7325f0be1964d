"""What has happened to one tensor so far: the accesses that the next one can conflict with."""

from __future__ import annotations

import numpy as np

from .boxes import subtract
from .graph import Box

DEAD, READ, WRITE = 0, 1, 2


class AccessHistory:
    """The open accesses of one tensor, in program order.

    An access is forgotten where a later write covers it: whoever conflicts with it there conflicts
    with that write too, and the write already waits for it. So the history stays as short as the
    tensor has tiles, however many layers reuse the tensor. Reads of equal boxes share an entry, and
    equal reads between two writes share one answer.
    """

    def __init__(self) -> None:
        self._kind = np.zeros(16, dtype=np.int8)
        self._lo = self._hi = np.zeros((0, 16), dtype=np.int64)
        self._boxes: list[Box] = []
        self._tasks: list[int] = []  # per entry: bit set of the tasks that did it
        self._ancestors: list[int] = []  # per entry: bit set of all tasks that those waited for
        self._read_entry: dict[Box, int] = {}
        self._read_answer: dict[Box, tuple[int, int]] = {}
        self._num_dead = 0

    def before_read(self, box: Box) -> tuple[int, int]:
        """(tasks that a read of `box` must wait for, all tasks that those wait for)."""
        if box not in self._read_answer:
            self._read_answer[box] = self._union(self._entries(box, WRITE))
        return self._read_answer[box]

    def before_write(self, box: Box) -> tuple[list[int], int, int]:
        """(entries that a write of `box` overwrites), then as `before_read`."""
        entries = self._entries(box, READ)
        return entries, *self._union(entries)

    def record_read(self, box: Box, task: int, ancestors: int) -> None:
        entry = self._read_entry.get(box)
        if entry is None:
            self._read_entry[box] = self._append(READ, box, 1 << task, ancestors)
            return
        self._tasks[entry] |= 1 << task
        if self._ancestors[entry] is not ancestors:
            self._ancestors[entry] |= ancestors

    def record_write(self, box: Box, overwritten: list[int], task: int, ancestors: int) -> None:
        self._read_answer.clear()
        for entry in overwritten:
            self._cut(entry, box)
        self._append(WRITE, box, 1 << task, ancestors)

    def _entries(self, box: Box, least_kind: int) -> list[int]:
        if not self._boxes:
            return []
        if len(box) != len(self._lo):
            raise ValueError(f"one tensor is addressed with {len(self._lo)} and with {len(box)} coordinates: {box}")
        # Never between the questions and the records of one task: nothing dies in between.
        if self._num_dead > 64 + len(self._boxes) // 2:
            self._compact()
        size = len(self._boxes)
        hit = self._kind[:size] >= least_kind
        for dim, (lo, hi) in enumerate(box):
            hit &= self._lo[dim, :size] < hi
            hit &= self._hi[dim, :size] > lo
        return hit.nonzero()[0].tolist()

    def _union(self, entries: list[int]) -> tuple[int, int]:
        tasks = ancestors = 0
        previous = None
        for entry in entries:
            tasks |= self._tasks[entry]
            if self._ancestors[entry] is not previous:
                previous = self._ancestors[entry]
                ancestors |= previous
        return tasks, ancestors

    def _append(self, kind: int, box: Box, tasks: int, ancestors: int) -> int:
        entry = len(self._boxes)
        if len(self._lo) != len(box):
            self._lo, self._hi = (np.zeros((len(box), len(self._kind)), dtype=np.int64) for _ in "lh")
        if entry == len(self._kind):
            self._kind = np.concatenate([self._kind, np.zeros_like(self._kind)])
            self._lo = np.concatenate([self._lo, self._lo], axis=1)
            self._hi = np.concatenate([self._hi, self._hi], axis=1)
        self._boxes.append(box)
        self._tasks.append(tasks)
        self._ancestors.append(ancestors)
        self._place(entry, kind, box)
        return entry

    def _place(self, entry: int, kind: int, box: Box) -> None:
        self._kind[entry] = kind
        self._boxes[entry] = box
        for dim, (lo, hi) in enumerate(box):
            self._lo[dim, entry] = lo
            self._hi[dim, entry] = hi

    def _cut(self, entry: int, written: Box) -> None:
        """Forget the part of an entry that has just been overwritten."""
        kind, box = int(self._kind[entry]), self._boxes[entry]
        if kind == DEAD:
            return
        if self._read_entry.get(box) == entry:
            del self._read_entry[box]
        rest = [] if box == written else subtract(box, written)
        if not rest:
            self._kind[entry] = DEAD
            self._num_dead += 1
            return
        self._place(entry, kind, rest[0])
        for part in rest[1:]:
            self._append(kind, part, self._tasks[entry], self._ancestors[entry])

    def _compact(self) -> None:
        alive = np.flatnonzero(self._kind[: len(self._boxes)]).tolist()
        renumbered = {old: new for new, old in enumerate(alive)}
        self._read_entry = {box: renumbered[old] for box, old in self._read_entry.items()}
        for name in ("_boxes", "_tasks", "_ancestors"):
            setattr(self, name, [getattr(self, name)[old] for old in alive])
        for array in (self._kind, self._lo, self._hi):
            array[..., : len(alive)] = array[..., alive]
        self._kind[len(alive) :] = DEAD
        self._num_dead = 0
