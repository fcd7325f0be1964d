"""Packing: the words of a task descriptor that say which weights come through the ring, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tri_mpk.generator import field_names, task_words
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.program import Program
from tri_mpk.scheduler.descriptor import PackedQueues, pack
from tri_mpk.scheduler.device import (
    DESCRIPTOR_BYTES,
    TASK_FIELDS,
    TASK_SIGNALS,
    TASK_STREAM,
    TASK_STREAM_INDEX,
    TASK_VARIANT,
    TASK_WAIT_COUNT,
)
from tri_mpk.scheduler.graph import Address, Event, Events, Schedule, Task, TaskGraph, WeightStream

ITEMSIZE = {"w": 2, "x": 4}


def signed_low(word: np.int64) -> int:
    """What the kernel makes of a word with .to(tl.int32)."""
    return int(np.int64(word).astype(np.int32))


def task(stream: WeightStream | None = None) -> Task:
    return Task(0, (0,), (), (), 1, fields={"x_ptr": Address("x", 3)}, stream=stream)


def packed(tasks: list[Task], queues: list[list[int]]) -> PackedQueues:
    events = Events([Event(list(range(len(tasks))), [], len(tasks))], [-1] * len(tasks), [[0]] * len(tasks))
    return pack(TaskGraph(["op"], tasks), events, Schedule(queues), 16, [["x_ptr"]], ITEMSIZE)


def test_words_of_a_stream():
    one = task(WeightStream(Address("w", 100), rows=7, cols=24, slot_rows=4))
    two = task(WeightStream(Address("w", 8), rows=5, cols=40, slot_rows=16, second=Address("w", 1008)))
    queues = packed([one, two, task()], [[0, 1, 2]])
    words = queues.relocate({"w": 1 << 40, "x": 1 << 20})
    start, second, num_bytes, slot_bytes = words[:, TASK_STREAM.value : TASK_STREAM.value + 4].T
    assert start.tolist() == [(1 << 40) + 200, (1 << 40) + 16, 0]
    assert second.tolist() == [0, (1 << 40) + 2016, 0]  # 0: one matrix
    assert num_bytes.tolist() == [7 * 48, 5 * 80, 0]  # of each matrix
    assert slot_bytes.tolist() == [4 * 48, 16 * 80, 0]
    assert words[:, TASK_FIELDS.value].tolist() == [(1 << 20) + 12] * 3


def test_the_template_is_left_alone():
    """It is packed once and relocated in every process."""
    queues = packed([task(WeightStream(Address("w", 100), 7, 24, 4))], [[0]])
    before = queues.words.copy()
    assert np.array_equal(queues.relocate({"w": 0, "x": 0}), before)
    assert not np.array_equal(queues.relocate({"w": 64, "x": 0}), before)
    assert np.array_equal(queues.words, before)


def test_streams_are_numbered_by_worker():
    stream = WeightStream(Address("w"), 1, 8, 1)
    tasks = [task(stream if i in (0, 2, 3, 4) else None) for i in range(6)]
    index = packed(tasks, [[0, 1, 2, 4], [], [3], [5]]).words[:, TASK_STREAM_INDEX.value]
    assert [signed_low(word) for word in index] == [0, -1, 1, 2, -1, 0, -1]
    assert (index >> 32).tolist() == [3, 3, 3, 3, 0, 1, 0]


def test_a_worker_without_tasks_has_one_record():
    queues = packed([task()], [[], [0]])
    assert queues.queue_start.tolist() == [0, 1, 2]
    assert queues.words[0, TASK_VARIANT.value] == -1 and queues.words[0, TASK_WAIT_COUNT.value] == 0
    assert queues.words[1, TASK_VARIANT.value] == 0


def test_a_worker_without_tasks_signals_nothing():
    """Least of all the step event, event 0: workers would begin the next step before this one has ended."""
    words = packed([task()], [[], [0]]).words[:, TASK_SIGNALS.value : TASK_SIGNALS.value + 2]
    assert words[0].view(np.int32).tolist() == [-1] * 4
    assert words[1].view(np.int32).tolist() == [0, -1, -1, -1]


@pytest.fixture(scope="module")
def program() -> Program:
    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 2
    return plan_config(config, torch.bfloat16, 256, num_workers=132)


def test_every_worker_of_a_model_reads_its_streams_in_order(program: Program):
    assert program.constants.ring
    queues = program.pack()
    graph = program.graph
    for worker, queue in enumerate(program.schedule.queues):
        first, last = queues.queue_start[worker : worker + 2]
        index = queues.words[first:last, TASK_STREAM_INDEX.value]
        has_stream = [graph.tasks[t].stream is not None for t in queue]
        numbers = [signed_low(word) for word in index]
        assert [n >= 0 for n in numbers] == has_stream and any(has_stream)
        assert [n for n in numbers if n >= 0] == list(range(sum(has_stream)))
        assert set(index >> 32) == {sum(has_stream)}


def test_streams_are_whole_rows_that_bulk_copies_can_reach(program: Program):
    """A copy is a multiple of 16 bytes, from an address that is one too; tensors are aligned to 16 bytes at least."""
    words = program.pack().words
    words = words[words[:, TASK_STREAM_INDEX.value].astype(np.int32) >= 0]
    start, second, num_bytes, slot_bytes = words[:, TASK_STREAM.value : TASK_STREAM.value + 4].T
    assert len(words) > 0 and (num_bytes > 0).all() and (slot_bytes > 0).all()
    assert not ((start | second | num_bytes | slot_bytes) % 16).any()
    assert (second != 0).any() and (second == 0).any()


def test_a_descriptor_fits_its_place_in_shared_memory(program: Program):
    words = task_words(v.op for v in program.variants)
    assert TASK_FIELDS.value == 10 > TASK_STREAM_INDEX.value == TASK_STREAM.value + 4
    assert all(TASK_FIELDS.value + len(field_names(v.op)) <= words for v in program.variants)
    assert 8 * words <= DESCRIPTOR_BYTES.value
