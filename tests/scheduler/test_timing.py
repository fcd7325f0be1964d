"""Time stamps in PTX: where the clock is read, that nothing is stored before the signal, who takes them."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from triton.compiler import ASTSource

from tri_mpk.aot import parse_target
from tri_mpk.scheduler import device, timing
from tri_mpk.scheduler.timing import begin_record, timed_signal, timed_wait


@triton.jit
def timed_task(task, event_ptr, control_ptr, data_ptr, epoch, PORTABLE: tl.constexpr):
    begin_record(task, epoch, control_ptr, PORTABLE)
    timed_wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    cells = data_ptr + tl.arange(0, 1024)
    tl.store(cells, tl.load(cells) + 1)
    timed_signal(task, event_ptr, PORTABLE)


def places(ptx: str, pattern: str) -> list[int]:
    return [match.start() for match in re.finditer(pattern, ptx)]


@pytest.fixture(scope="module")
def ptx() -> str:
    signature = {
        "task": "i32", "event_ptr": "*i32", "control_ptr": "*i64", "data_ptr": "*fp32", "epoch": "i32",
        "PORTABLE": "constexpr",
    }  # fmt: skip
    source = ASTSource(fn=timed_task, signature=signature, constexprs={(5,): False})
    return triton.compile(source, target=parse_target("sm_90"), options={"num_warps": 16}).asm["ptx"]


def test_the_order_of_stamps(ptx):
    """clock, acquire, clock, work, barrier, clock, release, clock, record."""
    clock = places(ptx, r"@p mov\.u64 \S+, %globaltimer")
    acquire, release = places(ptx, r"ld\.acquire\.gpu"), places(ptx, r"red\.release\.gpu")
    work = places(ptx, r"st\.global(\.v\d)?\.b32")[-1]
    barriers = places(ptx, r"bar\.sync")
    records = places(ptx, r"@p st\.global\.v2\.b64")
    assert len(clock) == 4 and len(release) == 1 and len(records) == 2
    assert clock[0] < acquire[0] < acquire[-1] < clock[1] < work < clock[2] < release[0] < clock[3] < records[0]
    assert any(work < barrier < clock[2] for barrier in barriers)  # all warps have done their work
    assert any(clock[2] < barrier < release[0] for barrier in barriers)  # the signal's own


def test_stamps_are_read_back_before_the_barrier(ptx):
    """Behind it another descriptor may be on its way to their place."""
    work = places(ptx, r"st\.global(\.v\d)?\.b32")[-1]
    clock = places(ptx, r"@p mov\.u64 \S+, %globaltimer")
    offsets = [8 * (timing.TASK_STAMPS.value + i) for i in range(3)]
    between = ptx[work : clock[2]]
    assert all(re.search(rf"\b{offset};", ptx) for offset in offsets)
    assert between.count("ld.shared.b64") >= 3
    assert between.rindex("ld.shared.b64") < between.rindex("bar.sync")


def test_the_layout_fits():
    assert device.DESCRIPTOR_BYTES.value >= timing.TIMED_TASK_WORDS * 8
    assert timing.TASK_CLOCK.value == timing.TIMED_TASK_WORDS - 1
    assert timing.TASK_STAMPS.value + 2 == timing.TASK_RECORD.value < timing.TASK_CLOCK.value
    words = {name: word.value for name, word in vars(device).items() if name.startswith("CONTROL_")}
    assert len(set(words.values())) == len(words), "two control words lie in one place"
    assert max(words.values()) == words["CONTROL_RECORDS"]
    assert not words["CONTROL_RECORDS"] * 8 % 32, "a record is written 16 bytes at a time"
