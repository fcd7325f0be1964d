"""What has happened to one tensor so far: the accesses that the next one can conflict with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from operator import or_

from .boxes import cut_in_pieces
from .graph import Box


@dataclass(slots=True, eq=False)
class Access:
    """A write, or all reads of a box between two writes of parts of it."""

    tasks: int  # bit set of the tasks that did it
    ancestors: int  # bit set of all tasks that those waited for
    is_whole: bool = True  # no part of it is forgotten


class AccessHistory:
    """The open accesses of one tensor, in program order.

    An access is forgotten where a later write covers it: whoever conflicts with it there conflicts with that write too,
    and the write already waits for it. All boxes that will come up are cut into common pieces beforehand, so that each
    piece has one last write and the reads since: as many pieces as the tensor has tiles, however many layers reuse the
    tensor. Equal reads between two writes share an access and an answer.
    """

    def __init__(self) -> None:
        self.boxes: dict[Box, None] = {}  # all that will come up; to be filled in before the first question
        self._pieces: dict[Box, list[int]] = {}
        self._write: list[Access | None] = []  # per piece
        self._reads: list[list[Access]] = []
        self._read_access: dict[Box, Access] = {}
        self._read_answer: dict[Box, list[Access]] = {}

    def cut(self) -> None:
        """Call when all boxes are known."""
        self._pieces = cut_in_pieces(tuple(self.boxes))
        num_pieces = 1 + max(map(max, self._pieces.values()), default=-1)
        self._write, self._reads = [None] * num_pieces, [[] for _ in range(num_pieces)]

    def before_read(self, box: Box) -> list[Access]:
        """Accesses that a read of `box` must wait for."""
        if box not in self._read_answer:
            accesses = {self._write[piece] for piece in self._pieces[box]} - {None}
            self._read_answer[box] = [Access(*union(accesses))] if len(accesses) > 1 else [*accesses]
        return self._read_answer[box]

    def before_write(self, box: Box) -> set[Access]:
        """Accesses that a write of `box` must wait for."""
        pieces = self._pieces[box]
        accesses = {self._write[piece] for piece in pieces}
        for piece in pieces:
            accesses.update(self._reads[piece])
        accesses.discard(None)
        return accesses

    def record_read(self, box: Box, task: int, ancestors: int) -> None:
        access = self._read_access.get(box)
        if access is None or not access.is_whole:
            self._read_access[box] = access = Access(1 << task, ancestors)
            for piece in self._pieces[box]:
                self._reads[piece].append(access)
            return
        access.tasks |= 1 << task
        if access.ancestors is not ancestors:
            access.ancestors |= ancestors

    def record_write(self, box: Box, task: int, ancestors: int) -> None:
        self._read_answer.clear()
        access = Access(1 << task, ancestors)
        for piece in self._pieces[box]:
            self._write[piece] = access
            if self._reads[piece]:
                for read in self._reads[piece]:
                    read.is_whole = False
                self._reads[piece] = []


def union(accesses: Collection[Access]) -> tuple[int, int]:
    """(tasks that did them, all tasks that those waited for)."""
    tasks = 0
    for access in accesses:
        tasks |= access.tasks
    ancestors = {id(access.ancestors): access.ancestors for access in accesses}  # few, and long
    return tasks, reduce(or_, ancestors.values()) if ancestors else 0
