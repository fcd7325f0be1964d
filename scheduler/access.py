"""What has happened to one tensor so far: the accesses that the next one can conflict with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .boxes import cut_in_pieces
from .graph import Box


@dataclass(slots=True, eq=False)
class _Access:
    """A write, or all reads of a box between two writes of parts of it."""

    tasks: int  # bit set of the tasks that did it
    ancestors: int  # bit set of all tasks that those waited for
    is_whole: bool = True  # no part of it is forgotten


class AccessHistory:
    """The open accesses of one tensor, in program order.

    An access is forgotten where a later write covers it: whoever conflicts with it there conflicts with that write too,
    and the write already waits for it. All `boxes` that will come up are cut into common pieces beforehand, so that
    each piece has one last write and the reads since. So there are as many pieces as the tensor has tiles, however many
    layers reuse the tensor. Equal reads between two writes share an access and an answer.
    """

    def __init__(self, boxes: Iterable[Box]) -> None:
        self._pieces = cut_in_pieces(tuple(boxes))
        num_pieces = 1 + max(max(pieces) for pieces in self._pieces.values())
        self._write: list[_Access | None] = [None] * num_pieces
        self._reads: list[list[_Access]] = [[] for _ in range(num_pieces)]
        self._read_access: dict[Box, _Access] = {}
        self._read_answer: dict[Box, tuple[int, int]] = {}

    def before_read(self, box: Box) -> tuple[int, int]:
        """(tasks that a read of `box` must wait for, all tasks that those wait for)."""
        if box not in self._read_answer:
            self._read_answer[box] = _union({self._write[piece] for piece in self._pieces[box]})
        return self._read_answer[box]

    def before_write(self, box: Box) -> tuple[int, int]:
        """As `before_read`."""
        pieces = self._pieces[box]
        accesses = {self._write[piece] for piece in pieces}
        for piece in pieces:
            accesses.update(self._reads[piece])
        return _union(accesses)

    def record_read(self, box: Box, task: int, ancestors: int) -> None:
        access = self._read_access.get(box)
        if access is None or not access.is_whole:
            self._read_access[box] = access = _Access(1 << task, ancestors)
            for piece in self._pieces[box]:
                self._reads[piece].append(access)
            return
        access.tasks |= 1 << task
        if access.ancestors is not ancestors:
            access.ancestors |= ancestors

    def record_write(self, box: Box, task: int, ancestors: int) -> None:
        self._read_answer.clear()
        access = _Access(1 << task, ancestors)
        for piece in self._pieces[box]:
            self._write[piece] = access
            if self._reads[piece]:
                for read in self._reads[piece]:
                    read.is_whole = False
                self._reads[piece] = []


def _union(accesses: set[_Access | None]) -> tuple[int, int]:
    accesses.discard(None)
    tasks = ancestors = 0
    for access in accesses:
        tasks |= access.tasks
    for some in {id(access.ancestors): access.ancestors for access in accesses}.values():
        ancestors |= some
    return tasks, ancestors
