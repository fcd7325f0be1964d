"""The estimated time of real models' steps: its bounds, its ingredients, and how far it is from what was measured."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tri_mpk.cost_model import estimate, kv_blocks, work_of, worker_rates
from tri_mpk.geometries import geometry, weight_bytes
from tri_mpk.gpu_profile import default_profile
from tri_mpk.inspect import plan_config
from tri_mpk.program import Program
from tri_mpk.tuning import choose_tuning

H200 = default_profile()
# ms per token of bench/NOTES.md, of the kernel that still had a hop per layer more: it bounds today's from above
MEASURED = {
    "Llama-3.2-1B": {64: 0.751, 512: 0.758, 4096: 0.845, 32768: 1.456},
    "Qwen3-8B": {64: 3.903, 512: 3.969, 4096: 4.251, 32768: 6.686},
}
SMALL_CONTEXT = 2048


def small(num_layers: int = 2, **knobs: int) -> Program:
    config = geometry("Llama-3.2-1B")
    config.num_hidden_layers = num_layers
    tuning = replace(choose_tuning(H200, config.num_key_value_heads, config.head_dim), **knobs)
    return plan_config(config, torch.bfloat16, SMALL_CONTEXT, tuning=tuning)


@pytest.fixture(scope="module")
def program() -> Program:
    return small()


@pytest.fixture(scope="module", params=MEASURED)
def real(request: pytest.FixtureRequest) -> tuple[str, Program]:
    return request.param, plan_config(geometry(request.param), torch.bfloat16, 32896)


def test_estimates_are_below_what_was_measured_and_quick(real: tuple[str, Program]):
    name, program = real
    for context, measured in MEASURED[name].items():
        started = time.perf_counter()
        estimated = estimate(program, H200, context).step_s * 1e3
        assert time.perf_counter() - started < 1.0
        assert 0.65 * measured < estimated < measured, (context, estimated)


def test_work_adds_up_to_the_bytes_of_a_token(real: tuple[str, Program]):
    name, program = real
    config = geometry(name)
    work = work_of(program, H200, 4097)
    assert sum(work.stream_bytes) == weight_bytes(config)
    kv = 2 * 2 * 4096 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert sum(work.load_bytes) == kv


@settings(deadline=None, max_examples=20)
@given(
    faster=st.floats(1, 4), context=st.integers(1, SMALL_CONTEXT),
    name=st.sampled_from(["bandwidth_bytes_per_s", "multiply_bytes_per_s", "slot_s", "hop_s", "queue_s", "task_s"]),
)  # fmt: skip
def test_a_better_gpu_is_not_slower(program: Program, faster: float, context: int, name: str):
    value = getattr(H200, name)
    better = replace(H200, **{name: value * faster if name.endswith("per_s") else value / faster})
    time, other = estimate(program, H200, context), estimate(program, better, context)
    assert other.step_s <= time.step_s * (1 + 1e-9)
    assert max(other.stream_s, other.chain_s) <= other.step_s
    total = weight_bytes(geometry("Llama-3.2-1B"))  # of all layers: more than here
    assert time.stream_s < total / H200.bandwidth_bytes_per_s


def test_a_longer_context_takes_longer(program: Program):
    times = [estimate(program, H200, context).step_s for context in (1, 64, 512, SMALL_CONTEXT)]
    assert times == sorted(times) and times[-1] > times[0]


def test_more_layers_take_longer_in_proportion():
    one, two, three = (estimate(small(n), H200, 512).step_s for n in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=0.1)


def test_kv_blocks_are_all_blocks_once(program: Program):
    heads, layers = 8, 2
    for context, active in ((1, 0), (2, 1), (129, 1), (130, 2), (512, 4), (SMALL_CONTEXT, 16)):
        blocks = kv_blocks(program, context)
        assert sum(blocks.values()) == heads * layers * -(-(context - 1) // 32)
        assert sum(count > 0 for count in blocks.values()) == heads * layers * active
        assert len(blocks) == heads * layers * program.tuning.num_splits
    with pytest.raises(ValueError, match="context=0"):
        kv_blocks(program, 0)


def test_slots_are_counted_as_the_ring_counts_them(program: Program):
    """Of 132 workers' 2048 / 132 rows of o_proj, each slot of 32 KiB holds eight: two slots, one of them not full."""
    work = work_of(program, H200, 1)
    o_proj = [i for i, task in enumerate(program.graph.tasks) if program.graph.ops[task.op] == "L00 o_proj"]
    assert {work.stream_slots[i] for i in o_proj} == {2}
    gate_up = [i for i, task in enumerate(program.graph.tasks) if program.graph.ops[task.op] == "L00 gate_up"]
    assert {work.stream_slots[i] for i in gate_up} == {16}  # 62 or 63 rows of each matrix


def test_knobs_move_the_ring(program: Program):
    rates = worker_rates(program, H200)
    assert (rates.slot_bytes, rates.ring_bytes) == (32 << 10, 5 * (32 << 10))  # of six slots one is being read
    finer = worker_rates(small(slot_bytes=16 << 10), H200)
    assert finer.slot_bytes == 16 << 10 and finer.ring_bytes > rates.ring_bytes
    assert worker_rates(small(num_workers=66), H200).stream_bytes_per_s == 2 * rates.stream_bytes_per_s


def test_without_a_ring_weights_come_after_the_wait():
    config = geometry("Llama-3.2-1B")
    config.num_hidden_layers = 1
    plain = plan_config(config, torch.float32, 256)
    assert worker_rates(plain, H200).ring_bytes == 0
    assert estimate(plain, H200, 64).step_s > estimate(plain, H200, 64).stream_s
