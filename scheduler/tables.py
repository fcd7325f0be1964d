"""The tables by which tasks wait for and signal events by a value: packing for `by_value.py`."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby

import numpy as np

from .by_value import ABSENT_WORDS, USE_WORDS
from .graph import Events, EventUse, GuardedEvent, TaskGraph, Value

KINDS = ("wait", "signal", "announce")


class UseTables:
    """One after another from index `start` of the counters on; the first is empty, for who has nothing to do."""

    def __init__(self, events: Events, values: dict[str, Value], start: int, event_stride: int) -> None:
        self.events, self.values, self.event_stride = events, values, event_stride
        self.words: list[int] = []
        self.start = start
        self._place: dict[tuple[int, EventUse], int] = {}
        if events.wait_if or events.signal_if:
            self._add([], USE_WORDS.value)
            self._add_uses("wait", events.wait_if)
            self._add_uses("signal", events.signal_if)
            self._add_announcements()

    def place(self, task: int, use: EventUse) -> int:
        if use.kind not in KINDS:
            raise ValueError(f"EventUse({use.kind!r}): choose one of {', '.join(KINDS)}")
        return self._place.get((task, use), self.start)

    def check_fields(self, graph: TaskGraph) -> None:
        """Raises ValueError if a task waits or signals by a value that its tile function has no field for."""
        for task, use in self._place:
            if use not in graph.tasks[task].fields.values():
                by = f" by {use.value}" if use.value else " values"
                raise ValueError(
                    f"{graph.task_name(task)} has to {use.kind}{by}, but its tile function has no field for that; give"
                    f" it one with {use}"
                )

    def _add(self, entries: list[tuple[int, ...]], size: int) -> int:
        place = self.start + len(self.words)
        self.words.append(len(entries))
        for entry in entries:
            self.words += [*entry, *[0] * (size - len(entry))]
        return place

    def _add_uses(self, kind: str, by_task: dict[int, list[GuardedEvent]]) -> None:
        for task, uses in by_task.items():
            by_value: dict[str, list[GuardedEvent]] = defaultdict(list)
            for use in uses:
                if not use.guard.absent:
                    by_value[use.guard.value].append(use)
            for value, some in by_value.items():
                self._place[task, EventUse(kind, value)] = self._add(self._stretches(some), USE_WORDS.value)

    def _stretches(self, uses: list[GuardedEvent]) -> list[tuple[int, ...]]:
        """(lo, hi, first, stride, count): numbers that follow each other and lead to counters at even distances.

        An id that is a coordinate of an event tensor is one stretch: ids 0, 1, 2 of events 6, 7, 8 are
        (0, 3, 6 * 32, 32, count).
        """
        found: list[list[int]] = []
        for use in sorted(uses, key=lambda use: (use.guard.lo, use.event)):
            lo, hi, event = use.guard.lo, use.guard.hi, use.event
            count = self.events.events[event].count
            last = found[-1] if found else None
            if last and last[1] == lo and hi == lo + 1 and last[4] == count and self._continues(last, event):
                last[3] = event - last[2] if last[1] == last[0] + 1 else last[3]
                last[1] = hi
            else:
                found.append([lo, hi, event, 0, count])
        step = self.event_stride
        return [(lo, hi, (e - stride * lo) * step, stride * step, count) for lo, hi, e, stride, count in found]

    def _continues(self, stretch: list[int], event: int) -> bool:
        lo, hi, first, stride, _ = stretch
        return hi == lo + 1 or event == first + stride * (hi - lo)

    def _add_announcements(self) -> None:
        absent = [(task, use) for task, uses in self.events.signal_if.items() for use in uses if use.guard.absent]
        for task, some in groupby(absent, key=lambda pair: pair[0]):
            uses = [use for _, use in some]
            tensors = {self.values[use.guard.value].region.tensor for use in uses}
            assert len(tensors) == 1, f"values announced by one task lie in {tensors}; put them into one tensor"
            entries = [
                (self.values[u.guard.value].offset, u.guard.lo, u.guard.hi, u.event * self.event_stride) for u in uses
            ]
            self._place[task, EventUse("announce")] = self._add(entries, ABSENT_WORDS.value)

    def array(self) -> np.ndarray:
        return np.array(self.words, dtype=np.int64)
