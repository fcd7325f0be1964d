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
from .graph import (
    MAX_SIGNALS,
    STEP_EVENT,
    Address,
    Events,
    EventUse,
    PanelStream,
    Schedule,
    TaskGraph,
    Value,
    WeightStream,
    pool_entry,
)
from .peers import TASK_PEERS
from .pools import releases
from .ready import (
    POOL_DRAWN,
    POOL_NAME,
    POOL_RECORD,
    POOL_SIZE,
    POOL_SLOTS,
    POOL_TICKETS,
    POOL_VARIANT,
    RELEASE_COUNT,
    RELEASE_FIRST,
    RELEASE_NUM,
    RELEASE_SIZE,
    RELEASE_SLOTS,
    RELEASE_STAMP,
    RELEASE_TAIL,
    RELEASE_TARGET,
    RELEASES,
    SLOT_STRIDE,
)
from .tables import UseTables
from .timing import WORKER_RECORDS

EVENT_STRIDE = 32  # int32 counters between two events: a 128-byte line each, so that they do not contend
WORD_MASK = (1 << 32) - 1
STUCK_IN_POOL = 1 << 16  # a wait in a pool that is given up: -1 - worker - (pool + 1) * this in place of a task


@dataclass(frozen=True, slots=True)
class PackedQueues:
    words: np.ndarray  # [num_records, task_words] int64, worker after worker, then pool after pool
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


class CounterLayout:
    """What lies where in the array of counters: a line per event, then of each pool tickets, tasks released, slots.

    Behind those are the tables of who waits or signals by a value.
    """

    def __init__(self, events: Events, schedule: Schedule, values: dict[str, Value] | None = None) -> None:
        self.events, self.schedule = events, schedule
        self.release = {release.event: release for release in releases(events, schedule.pools)}
        self.starts = [len(events.events) * EVENT_STRIDE]
        for tasks in schedule.pools:
            lines = 2 + -(-len(tasks) * SLOT_STRIDE.value // EVENT_STRIDE)
            self.starts.append(self.starts[-1] + lines * EVENT_STRIDE)
        self.tables = UseTables(events, values or {}, self.starts[-1], EVENT_STRIDE)

    @property
    def size(self) -> int:
        return self.starts[-1] + len(self.tables.words)

    def tickets(self, pool: int) -> int:
        return self.starts[pool]

    def released(self, pool: int) -> int:
        return self.starts[pool] + EVENT_STRIDE

    def slots(self, pool: int) -> int:
        return self.starts[pool] + 2 * EVENT_STRIDE

    def step_count(self) -> int:
        """Signals of the step event per step: those of tasks, and of workers that have left their last pool."""
        return self.events.events[STEP_EVENT].count + self.schedule.num_leaving()

    def before(self, epoch: int) -> np.ndarray:
        """All counters when `epoch` (any int32) is the next one, as if the steps before it had run."""
        counters = np.zeros(self.size, dtype=np.int64)
        for index, event in enumerate(self.events.events):
            count = self.step_count() if index == STEP_EVENT else event.count
            counters[index * EVENT_STRIDE] = (epoch - 1) * count
        for index, release in self.release.items():
            line = counters[index * EVENT_STRIDE : (index + 1) * EVENT_STRIDE]
            size, count = len(self.schedule.pools[release.pool]), self.events.events[index].count
            line[RELEASE_TARGET.value] = epoch * count
            line[RELEASE_STAMP.value] = epoch * size
            line[RELEASE_COUNT.value] = count
            line[RELEASE_SIZE.value] = size
            line[RELEASE_FIRST.value] = release.first
            line[RELEASE_NUM.value] = release.num
            line[RELEASE_TAIL.value] = self.released(release.pool)
            line[RELEASE_SLOTS.value] = self.slots(release.pool)
        for pool, tasks in enumerate(self.schedule.pools):
            counters[self.tickets(pool)] = (epoch - 1) * (len(tasks) + self.schedule.num_entries(pool))
            counters[self.released(pool)] = (epoch - 1) * len(tasks)
            slots = self.slots(pool) + SLOT_STRIDE.value * np.arange(len(tasks))
            counters[slots] = (epoch - 1) * len(tasks)
        counters[self.starts[-1] :] = self.tables.array()
        return ((counters + (1 << 31)) % (1 << 32) - (1 << 31)).astype(np.int32)


def heap_name(rank: int) -> str:
    """What a rank's heap is called among the tensors that a queue is relocated by."""
    return f"heap@{rank}"


def pack(
    graph: TaskGraph,
    events: Events,
    schedule: Schedule,
    task_words: int,
    field_order: list[list[str]],
    itemsize: dict[str, int],
    rank: int = 0,
    num_ranks: int = 1,
) -> PackedQueues:
    """`field_order[variant]` lists the fields of a variant's descriptor, `itemsize[tensor]` is in bytes.

    On several ranks, `heap_name(r)` is the heap of rank r among the tensors.

    A worker without tasks gets one empty record, since every worker takes part in the step event. The last record of
    a pool in a worker's queue signals the step event, so that none draws tickets of a step that is over.
    """
    num_queued = sum(max(1, len(queue)) for queue in schedule.queues)
    num_records = num_queued + sum(map(len, schedule.pools))
    counters = CounterLayout(events, schedule, graph.values)
    counters.tables.check_fields(graph)
    words = [[0] * task_words for _ in range(num_records)]  # an array's elements are slow to set one by one
    starts = np.zeros(len(schedule.queues) + 1, dtype=np.int32)
    tensor_index: dict[str, int] = {}
    positions: list[int] = []
    tensors: list[int] = []
    signs: list[int] = []

    def put(record: int, word: int, value: int | Address, sign: int = 1) -> None:
        if isinstance(value, Address):
            positions.append(record * task_words + word)
            tensors.append(tensor_index.setdefault(value.tensor, len(tensor_index)))
            signs.append(sign)
            value = value.offset and value.offset * itemsize[value.tensor]  # heaps have no element size
        words[record][word] += sign * value

    def put_stream(record: int, stream: WeightStream) -> None:
        word, row_bytes = TASK_STREAM.value, stream.cols * itemsize[stream.start.tensor]
        assert stream.rows * row_bytes < 1 << 31, (
            f"a task reads {stream.rows * row_bytes} bytes; cut it into more tasks"
        )
        put(record, word, stream.start)
        put(record, word + 1, stream.second or 0)
        put(record, word + 2, stream.rows * row_bytes)
        put(record, word + 3, stream.slot_rows * row_bytes)

    def put_panels(record: int, stream: PanelStream, following: PanelStream | None) -> None:
        word, goes_on = TASK_STREAM.value, 0 if following is None else 1 + following.few_only
        put(record, word, stream.start)
        put(record, word + 1, stream.second or 0)
        put(record, word + 2, stream.row)
        put(record, word + 3, stream.panels | stream.request_bytes << 8 | goes_on << 32)

    def put_task(i: int, task_idx: int) -> None:
        task = graph.tasks[task_idx]
        words[i][TASK_VARIANT.value] = task.variant | task_idx << 32
        event = events.wait[task_idx]
        if event >= 0 and i < num_queued:  # a task of a pool is released when it has nothing to wait for any more
            words[i][TASK_WAIT.value] = event * EVENT_STRIDE
            words[i][TASK_WAIT_COUNT.value] = events.events[event].count
        put_signals(i, events.signals[task_idx])
        for word, name in enumerate(field_order[task.variant], TASK_FIELDS.value):
            value = task.fields[name]
            put(i, word, counters.tables.place(task_idx, value) if isinstance(value, EventUse) else value)
        if task.is_far:
            assert TASK_FIELDS.value + len(field_order[task.variant]) <= TASK_PEERS.value, graph.task_name(task_idx)
            for word, peer in enumerate(task.reached(rank, num_ranks), TASK_PEERS.value):
                put(i, word, Address(heap_name(peer)))
                put(i, word, Address(heap_name(rank)), sign=-1)

    def put_signals(i: int, targets: list[int]) -> None:
        signals = [e * EVENT_STRIDE + RELEASES.value * (e in counters.release) for e in targets]
        assert len(signals) <= MAX_SIGNALS, f"record {i} signals {len(signals)} events"
        a, b, c, d = signals + [-1] * (MAX_SIGNALS - len(signals))
        words[i][TASK_SIGNALS.value] = (a & WORD_MASK) | b << 32
        words[i][TASK_SIGNALS.value + 1] = (c & WORD_MASK) | d << 32

    def put_pool(i: int, worker: int, pool: int) -> None:
        words[i][TASK_VARIANT.value] = POOL_VARIANT.value
        size = len(schedule.pools[pool])
        fields = {
            POOL_TICKETS: counters.tickets(pool),
            POOL_DRAWN: size + schedule.num_entries(pool),
            POOL_SLOTS: counters.slots(pool),
            POOL_SIZE: size,
            POOL_RECORD: num_queued
            + sum(map(len, schedule.pools[:pool]))
            + (WORKER_RECORDS.value * len(schedule.queues) << 32),
            POOL_NAME: -1 - worker - (pool + 1) * STUCK_IN_POOL,
        }
        for word, value in fields.items():
            words[i][word.value] = value

    record = 0
    for worker, queue in enumerate(schedule.queues):
        end = record + max(1, len(queue))
        num_streams = sum(graph.tasks[task].stream is not None for task in queue if task >= 0)
        last_pool = max((slot for slot, entry in enumerate(queue) if entry < 0), default=-1)
        stream = 0
        for i in range(record, end):
            words[i][TASK_STREAM_INDEX.value] = WORD_MASK | num_streams << 32
            words[i][TASK_VARIANT.value] = -1
            words[i][TASK_SIGNALS.value : TASK_SIGNALS.value + 2] = -1, -1
            if not queue:
                continue
            entry = queue[i - record]
            if entry < 0:
                put_pool(i, worker, pool_entry(entry))
                if i - record == last_pool:
                    put_signals(i, [STEP_EVENT])
                continue
            put_task(i, entry)
            task = graph.tasks[entry]
            if task.panels:
                following = queue[i + 1 - record] if i + 1 < end else -1
                put_panels(i, task.panels, graph.tasks[following].panels if following >= 0 else None)
            if task.stream:
                put_stream(i, task.stream)
                words[i][TASK_STREAM_INDEX.value] = stream | num_streams << 32
                stream += 1
        record = end
        starts[worker + 1] = record
    for i, task_idx in enumerate((task for tasks in schedule.pools for task in tasks), num_queued):
        words[i][TASK_STREAM_INDEX.value] = WORD_MASK
        put_task(i, task_idx)
        if panels := graph.tasks[task_idx].panels:
            put_panels(i, panels, None)
    return PackedQueues(
        np.array(words, dtype=np.int64),
        starts,
        np.array(positions, dtype=np.int64),
        np.array(tensors, dtype=np.int32),
        np.array(signs, dtype=np.int64),
        list(tensor_index),
    )
