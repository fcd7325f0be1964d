"""Packing: the words of a task descriptor that say which weights come through the rings, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from panel_programs import serving_program
from tri_mpk.generator import field_names, task_words
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.ops.op import TENSOR_MAP_WORDS, TENSOR_MAPS
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
from tri_mpk.scheduler.graph import (
    Address,
    Event,
    Events,
    PanelStream,
    Schedule,
    Task,
    TaskGraph,
    WeightStream,
    pool_entry,
)

ITEMSIZE = {"w": 2, "x": 4, TENSOR_MAPS: 8}
NOT_AT_ALL, ALWAYS, FEW = 0, 1, 2  # how a task goes on with the ring of panels


def signed_low(word: np.int64) -> int:
    """What the kernel makes of a word with .to(tl.int32)."""
    return int(np.int64(word).astype(np.int32))


def task(stream: WeightStream | None = None, panels: PanelStream | None = None) -> Task:
    return Task(0, (0,), (), (), 1, fields={"x_ptr": Address("x", 3)}, stream=stream, panels=panels)


def packed(tasks: list[Task], queues: list[list[int]], pools: list[list[int]] = ()) -> PackedQueues:
    """Nobody waits, but tasks of pools: for event 1."""
    wait = [1 if any(i in pool for pool in pools) else -1 for i in range(len(tasks))]
    events = Events([Event(list(range(len(tasks))), [], len(tasks)), Event([0], [], 1)], wait, [[0]] * len(tasks))
    return pack(TaskGraph(["op"], tasks), events, Schedule(queues, list(pools)), 16, [["x_ptr"]], ITEMSIZE)


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


# ---- panels ----


def panels(row: int, few_only: bool = False, second: Address | None = None) -> PanelStream:
    return PanelStream(Address(TENSOR_MAPS, 3 * TENSOR_MAP_WORDS), second, row, 4, 4096, few_only)


def goes_on(words: np.ndarray) -> list[int]:
    return (words[..., TASK_STREAM.value + 3] >> 32).tolist()


def test_words_of_panels():
    one = task(panels=PanelStream(Address(TENSOR_MAPS), None, 7, 4, 1024, False))
    two = task(panels=PanelStream(Address(TENSOR_MAPS, 16), Address(TENSOR_MAPS, 32), 70_000, 2, 4096, False))
    words = packed([one, two, task()], [[0, 1, 2]]).relocate({TENSOR_MAPS: 1 << 40, "x": 1 << 20})
    first, second, row, shape = words[:, TASK_STREAM.value : TASK_STREAM.value + 4].T
    assert first.tolist() == [1 << 40, (1 << 40) + 128, 0]
    assert second.tolist() == [0, (1 << 40) + 256, 0]  # 0: one matrix
    assert row.tolist() == [7, 70_000, 0]
    assert shape.tolist() == [4 | 1024 << 8 | ALWAYS << 32, 2 | 4096 << 8 | NOT_AT_ALL << 32, 0]
    assert {signed_low(word) for word in words[:, TASK_STREAM_INDEX.value]} == {-1}, "not of the ring of weights"


def test_a_ring_goes_on_if_the_next_task_of_the_worker_has_panels():
    tasks = [task(panels=panels(0)), task(panels=panels(1)), task(), task(panels=panels(3))]
    assert goes_on(packed(tasks, [[0, 1, 2, 3]]).words) == [ALWAYS, NOT_AT_ALL, 0, NOT_AT_ALL]
    assert goes_on(packed(tasks, [[0, 2, 1, 3]]).words) == [NOT_AT_ALL, 0, ALWAYS, NOT_AT_ALL]


def test_a_ring_does_not_go_on_in_the_next_step_or_on_another_worker():
    """A step may have another number of tokens, or none."""
    tasks = [task(panels=panels(i)) for i in range(3)]
    assert goes_on(packed(tasks, [[0], [1, 2]]).words) == [NOT_AT_ALL, ALWAYS, NOT_AT_ALL]
    assert goes_on(packed(tasks, [[0], [], [1, 2]]).words) == [NOT_AT_ALL, 0, ALWAYS, NOT_AT_ALL]


def test_a_ring_goes_on_with_few_tokens_if_the_next_task_has_panels_only_then():
    tasks = [task(panels=panels(0)), task(panels=panels(1, few_only=True)), task(panels=panels(2))]
    assert goes_on(packed(tasks, [[0, 1, 2]]).words) == [FEW, ALWAYS, NOT_AT_ALL]


def test_a_ring_neither_goes_on_into_a_pool_nor_within_one():
    """Which task comes is not known."""
    tasks = [task(panels=panels(i)) for i in range(5)]
    queues = packed(tasks, [[0, pool_entry(0), 1, 2]], [[3, 4]])
    assert goes_on(queues.words) == [NOT_AT_ALL, 0, ALWAYS, NOT_AT_ALL, NOT_AT_ALL, NOT_AT_ALL]
    of_pool = queues.relocate({TENSOR_MAPS: 1 << 40, "x": 0})[4:, TASK_STREAM.value : TASK_STREAM.value + 4]
    assert of_pool.tolist() == [[(1 << 40) + 3 * 128, 0, row, 4 | 4096 << 8] for row in (3, 4)]


@pytest.mark.parametrize("policy", ["static", "hybrid", "dynamic"])
def test_every_worker_of_a_batch_kernel_goes_on_where_panels_follow(policy):
    program = serving_program(policy=policy)
    tasks, queues = program.graph.tasks, program.pack()
    streams = [task.panels for task in tasks]
    record, seen = 0, set()
    for queue in program.schedule.queues:
        for entry, following in zip(queue, [*queue[1:], -1], strict=True):
            if entry >= 0 and streams[entry]:
                later = streams[following] if following >= 0 else None
                wanted = NOT_AT_ALL if later is None else FEW if later.few_only else ALWAYS
                assert goes_on(queues.words[record]) == wanted, program.graph.task_name(entry)
                seen.add(wanted)
            record += 1
    assert policy != "static" or seen == {NOT_AT_ALL, ALWAYS, FEW}
    of_pools = [streams[entry] for pool in program.schedule.pools for entry in pool]
    assert len(queues.words) == record + len(of_pools) and (policy != "dynamic" or any(of_pools))
    assert not any(goes_on(queues.words[record:]))


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
