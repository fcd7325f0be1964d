"""Packing: task descriptors as int64 words, with the addresses of tensors left open.

Addresses differ between the processes of a CPU run, so a packed queue is a template of words plus relocations: word
`positions[i]` still needs `signs[i]` times the base address of tensor `tensors[i]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .device import (
    TASK_FIELDS,
    TASK_SIGNALS,
    TASK_STREAM,
    TASK_STREAM_INDEX,
    TASK_VARIANT,
    TASK_WAIT,
    TASK_WAIT_COUNT,
)
from .graph import MAX_SIGNALS, Address, Events, Schedule, TaskGraph, WeightStream

EVENT_STRIDE = 32  # int32 counters between two events: a 128-byte line each, so that they do not contend
WORD_MASK = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class PackedQueues:
    words: np.ndarray  # [num_records, task_words] int64, worker after worker
    queue_start: np.ndarray  # [num_workers + 1] int32, in records
    positions: np.ndarray  # [n] int64, flat indices into words
    tensors: np.ndarray  # [n] int32, indices into tensor_names
    signs: np.ndarray  # [n] int64, +1 or -1
    tensor_names: list[str]

    def relocate(self, base_addresses: dict[str, int]) -> np.ndarray:
        """The words with the given base address of every tensor put in."""
        bases = np.array([base_addresses[name] for name in self.tensor_names], dtype=np.int64)
        words = self.words.copy()
        np.add.at(words.reshape(-1), self.positions, self.signs * bases[self.tensors])
        return words


def pack(
    graph: TaskGraph,
    events: Events,
    schedule: Schedule,
    task_words: int,
    field_order: list[list[str]],
    itemsize: dict[str, int],
) -> PackedQueues:
    """`field_order[variant]` lists the fields of a variant's descriptor, `itemsize[tensor]` is in bytes.

    A worker without tasks gets one empty record, since every worker takes part in the step event.
    """
    num_records = sum(max(1, len(queue)) for queue in schedule.queues)
    words = np.zeros((num_records, task_words), dtype=np.int64)
    starts = np.zeros(len(schedule.queues) + 1, dtype=np.int32)
    tensor_index: dict[str, int] = {}
    relocations: list[tuple[int, int, int]] = []

    def put(record: int, word: int, value: int | Address, sign: int = 1) -> None:
        if isinstance(value, Address):
            index = tensor_index.setdefault(value.tensor, len(tensor_index))
            relocations.append((record * task_words + word, index, sign))
            value = value.offset * itemsize[value.tensor]
        words[record, word] += sign * value

    def put_stream(record: int, stream: WeightStream) -> None:
        word, row_bytes = TASK_STREAM.value, stream.cols * itemsize[stream.start.tensor]
        assert stream.rows * row_bytes < 1 << 31, (
            f"a task reads {stream.rows * row_bytes} bytes; cut it into more tasks"
        )
        put(record, word, stream.start)
        put(record, word + 1, stream.second or 0)
        put(record, word + 2, stream.rows * row_bytes)
        put(record, word + 3, stream.slot_rows * row_bytes)

    record = 0
    for worker, queue in enumerate(schedule.queues):
        end = record + max(1, len(queue))
        num_streams = sum(graph.tasks[task].stream is not None for task in queue)
        stream = 0
        for i in range(record, end):
            words[i, TASK_STREAM_INDEX.value] = WORD_MASK | num_streams << 32
            words[i, TASK_VARIANT.value] = words[i, TASK_SIGNALS.value : TASK_SIGNALS.value + 2] = -1
            if not queue:
                continue
            task_idx = queue[i - record]
            task = graph.tasks[task_idx]
            words[i, TASK_VARIANT.value] = task.variant | task_idx << 32
            event = events.wait[task_idx]
            if event >= 0:
                words[i, TASK_WAIT.value] = event * EVENT_STRIDE
                words[i, TASK_WAIT_COUNT.value] = events.events[event].count
            signals = [e * EVENT_STRIDE for e in events.signals[task_idx]]
            assert len(signals) <= MAX_SIGNALS, f"{graph.task_name(task_idx)} signals {len(signals)} events"
            a, b, c, d = signals + [-1] * (MAX_SIGNALS - len(signals))
            words[i, TASK_SIGNALS.value] = (a & WORD_MASK) | b << 32
            words[i, TASK_SIGNALS.value + 1] = (c & WORD_MASK) | d << 32
            for word, name in enumerate(field_order[task.variant], TASK_FIELDS.value):
                put(i, word, task.fields[name])
            if task.stream:
                put_stream(i, task.stream)
                words[i, TASK_STREAM_INDEX.value] = stream | num_streams << 32
                stream += 1
        record = end
        starts[worker + 1] = record
    columns = np.array(relocations, dtype=np.int64).reshape(-1, 3)
    return PackedQueues(words, starts, columns[:, 0], columns[:, 1].astype(np.int32), columns[:, 2], list(tensor_index))
