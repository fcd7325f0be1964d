"""The knobs, and the cost model's choice of them for any GPU and any heads."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tri_mpk import PersistentKernel
from tri_mpk.gpu_profile import default_profile, estimated
from tri_mpk.tuning import (
    MAX_SLOT_BYTES,
    MIN_RING_SLOTS,
    MIN_SLOT_BYTES,
    Tuning,
    choose_slot_bytes,
    choose_tuning,
)

H200 = default_profile()
SMALL = Tuning(num_workers=4, slot_bytes=8 << 10, block_kv=32, num_splits=2, split_tokens=256)


def test_the_choice_for_known_models():
    """Llama-3.2-1B and Qwen3-8B on an H200: what their measurements in bench/NOTES.md were made with."""
    assert choose_tuning(H200, num_kv_heads=8, head_dim=64) == Tuning(132, 32 << 10, 32, 16, 128, 512 << 10)
    assert choose_tuning(H200, num_kv_heads=8, head_dim=128) == Tuning(132, 32 << 10, 16, 16, 64, 512 << 10)


@given(
    num_kv_heads=st.integers(1, 64), head_dim=st.integers(16, 128).map(lambda n: 2 * n),
    num_workers=st.none() | st.integers(1, 160), clock=st.integers(100_000, 3_000_000),
    memory_clock=st.integers(0, 4_000_000), shared_bytes=st.integers(48 << 10, 256 << 10),
)  # fmt: skip
def test_a_choice_for_any_gpu(num_kv_heads, head_dim, num_workers, clock, memory_clock, shared_bytes):
    gpu = estimated(
        "any",
        {
            "multiprocessor_count": 100, "sm_clock_rate": clock, "mem_clock_rate": memory_clock,
            "mem_bus_width": 4096, "max_shared_mem": shared_bytes,
        },
    )  # fmt: skip
    tuning = choose_tuning(gpu, num_kv_heads, head_dim, num_workers)
    workers = num_workers or 100
    assert tuning.num_workers == workers
    assert MIN_SLOT_BYTES <= tuning.slot_bytes <= MAX_SLOT_BYTES
    assert tuning.slot_bytes * MIN_RING_SLOTS <= shared_bytes
    assert tuning.num_splits * num_kv_heads >= 0.95 * workers
    assert 128 % tuning.block_kv == 0
    assert tuning.split_tokens >= tuning.block_kv, "a split may have no block of tokens"
    assert tuning.block_kv == 16 or tuning.block_kv * head_dim <= 2048


@given(factor=st.floats(1, 4))
def test_faster_memory_wants_larger_slots(factor: float):
    faster = replace(H200, bandwidth_bytes_per_s=factor * H200.bandwidth_bytes_per_s)
    assert choose_slot_bytes(faster) >= choose_slot_bytes(H200)


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 0}, {"slot_bytes": 3000}, {"slot_bytes": 2 << 10}, {"slot_bytes": 1 << 20},
        {"block_kv": 24}, {"block_kv": 8}, {"block_kv": 64}, {"num_splits": 0}, {"split_tokens": 0},
        {"split_tokens": 31}, {"num_splits": 2.0}, {"num_workers": True}, {"block_kv": None},
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(change: dict):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        replace(SMALL, **change)


def test_parse():
    assert Tuning.parse(asdict(SMALL)) == SMALL
    for bad in ({}, [], asdict(SMALL) | {"x": 1}, {"num_workers": 1}):
        with pytest.raises(ValueError, match="has the knobs"):
            Tuning.parse(bad)
    names = "slot_bytes 8192, block_kv 32, num_splits 2, split_tokens 256, prefetch_bytes 0"
    assert str(SMALL) == f"num_workers 4, {names}"
    assert [field.name for field in fields(Tuning)] == list(asdict(SMALL))


def meta_kernel(**options: object) -> PersistentKernel:
    step = torch.zeros(1, dtype=torch.int32, device="meta")
    return PersistentKernel(meta_tensors=[step, torch.zeros(64, dtype=torch.int64, device="meta")], **options)


def add_layers(mpk: PersistentKernel) -> None:
    """A projection of k = 1024, and attention of 4 heads of 32 on top."""

    def attach(name: str, *dims: int, dtype: torch.dtype = torch.bfloat16):
        return mpk.attach_input(torch.empty(dims, dtype=dtype, device="meta"), name=name)

    qkv = mpk.new_tensor((8 * 32,), torch.bfloat16, name="qkv")
    mpk.rmsnorm_linear_layer(
        input=attach("x", 1024), weight_norm=attach("norm", 1024), weight_linear=attach("w", 256, 1024), output=qkv
    )
    caches = {name: attach(name, 1, 2, 128, 32) for name in ("k_cache", "v_cache")}
    tables = {name: attach(name, 64, 32, dtype=torch.float32) for name in ("cos_pos_embed", "sin_pos_embed")}
    pages = attach("pages", 1, dtype=torch.int32)
    parts = mpk.new_attention_parts(4, 2, 32, torch.bfloat16, name="parts")
    mpk.attention_layer(input=qkv, **caches, **tables, page_table=pages, output=parts)
    output = mpk.new_tensor((64,), torch.float32, name="output")
    residual = attach("residual", 64, dtype=torch.float32)
    mpk.attention_output_layer(input=parts, weight=attach("o", 64, 128), residual=residual, output=output)
    best = attach("value", 1, dtype=torch.float32), attach("index", 1, dtype=torch.int32)
    mpk.argmax_layer(input=best)


@settings(deadline=None, max_examples=10)
@given(
    num_workers=st.integers(1, 8), slot_bytes=st.sampled_from([4096, 8192, 65536]),
    block_kv=st.sampled_from([16, 32]), num_splits=st.integers(1, 5), split_tokens=st.integers(32, 300),
)  # fmt: skip
def test_every_knob_reaches_the_cuts(num_workers, slot_bytes, block_kv, num_splits, split_tokens):
    tuning = Tuning(num_workers, slot_bytes, block_kv, num_splits, split_tokens)
    mpk = meta_kernel(tuning=tuning)
    add_layers(mpk)
    program = mpk.plan()
    assert program.tuning == tuning and program.num_workers == num_workers
    constants = {v.op.name: dict(v.constants) for v in program.variants}
    assert constants["attention"]["BLOCK_KV"] == block_kv and constants["attention"]["NUM_SPLITS"] == num_splits
    for op in ("attention", "attention_output"):
        assert constants[op]["SPLIT_TOKENS"] == split_tokens and constants[op]["NUM_SPLITS"] == num_splits
    assert constants["rmsnorm_linear"]["SLOT_ROWS"] == min(16, slot_bytes // 2048)


def test_without_a_tuning_the_cost_model_chooses():
    mpk = meta_kernel(num_workers=6)
    add_layers(mpk)
    assert mpk.plan().tuning == choose_tuning(H200, num_kv_heads=2, head_dim=32, num_workers=6)


def test_two_numbers_of_workers_are_refused():
    assert meta_kernel(tuning=SMALL, num_workers=4).num_workers == 4
    with pytest.raises(ValueError, match="num_workers=5, but the tuning has num_workers=4"):
        meta_kernel(tuning=SMALL, num_workers=5)
