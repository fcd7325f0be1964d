"""Cuts are balanced and complete, for any sizes and number of workers. Planned on the meta device: no kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tri_mpk import PersistentKernel
from tri_mpk.geometries import geometry
from tri_mpk.loading import empty_model
from tri_mpk.model import CausalLM
from tri_mpk.ops.gemv import block_rows
from tri_mpk.ops.op import Machine, TensorHandle
from tri_mpk.ops.rmsnorm_gated_linear import cut_rmsnorm_gated_linear
from tri_mpk.program import Program
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.queues import imbalance

META = torch.device("meta")
SMS = 132  # of an H100 or H200
SMALL_OP_BYTES = 4 << 20


def meta_kernel(num_workers: int) -> PersistentKernel:
    step = torch.zeros(1, dtype=torch.int32, device=META)
    return PersistentKernel(
        num_workers=num_workers, meta_tensors=[step, torch.zeros(64, dtype=torch.int64, device=META)]
    )


def weight(mpk: PersistentKernel, name: str, *dims: int):
    return mpk.attach_input(torch.empty(dims, dtype=torch.bfloat16, device=META), name=name)


def plan(mpk: PersistentKernel) -> Program:
    """The planned (and thereby verified) program, ended by an argmax of nothing."""
    best = torch.empty(1, device=META), torch.empty(1, dtype=torch.int32, device=META)
    mpk.argmax_layer(input=tuple(mpk.attach_input(t, name=f"best{i}") for i, t in enumerate(best)))
    return mpk.plan()


def bytes_per_worker(program: Program, op: int) -> list[int]:
    tasks = program.graph.tasks
    return [sum(tasks[t].cost_bytes for t in queue if tasks[t].op == op) for queue in program.schedule.queues]


def check_complete(tasks: list[Task], output) -> None:
    """Every element is written by one task, all of it at once."""
    boxes = sorted(region.box for task in tasks for region in task.writes if region.tensor == output.name)
    end = 0
    for outer, (lo, hi) in boxes:
        assert outer == (0, 1) and lo == end and hi > lo
        end = hi
    assert end == output.numel


def check_balanced(program: Program, op: int, row_bytes: int) -> None:
    """Large ops: at most 4 % over the mean. Small ones: at most one row over."""
    loads = bytes_per_worker(program, op)
    mean = sum(loads) / len(loads)
    allowed = mean * 1.04 if sum(loads) >= SMALL_OP_BYTES else mean + row_bytes
    assert max(loads) <= max(allowed, mean + row_bytes), (max(loads), mean)


sizes = {"num_rows": st.integers(1, 5000), "k": st.integers(1, 1200), "num_workers": st.integers(1, 160)}


@settings(deadline=None, max_examples=25)
@given(**sizes)
def test_rmsnorm_linear(num_rows, k, num_workers):
    mpk = meta_kernel(num_workers)
    x, y = (mpk.new_tensor((size,), torch.float32, name=name) for name, size in (("x", k), ("y", num_rows)))
    mpk.embed_layer(weight=weight(mpk, "table", 3, k), output=x)
    mpk.rmsnorm_linear_layer(
        input=x, weight_norm=weight(mpk, "norm", k), weight_linear=weight(mpk, "w", num_rows, k), output=y
    )
    program = plan(mpk)
    check_complete([t for t in program.graph.tasks if t.op == 1], y)
    check_balanced(program, 1, row_bytes=2 * k)


@settings(deadline=None, max_examples=25)
@given(**sizes)
def test_rmsnorm_gated_linear(num_rows, k, num_workers):
    mpk = meta_kernel(num_workers)
    x, y = (mpk.new_tensor((size,), torch.float32, name=name) for name, size in (("x", k), ("y", num_rows)))
    mpk.embed_layer(weight=weight(mpk, "table", 3, k), output=x)
    gate, up = (weight(mpk, name, num_rows, k) for name in ("gate", "up"))
    mpk.rmsnorm_gated_linear_layer(
        input=x, weight_norm=weight(mpk, "norm", k), weight_gate=gate, weight_up=up, output=y
    )
    program = plan(mpk)
    check_complete([t for t in program.graph.tasks if t.op == 1], y)
    check_balanced(program, 1, row_bytes=4 * k)


@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(1, 40_000),
    k=st.integers(1, 2600).map(lambda n: 8 * n),
    num_workers=st.integers(1, 160),
    grid_dim=st.none() | st.integers(1, 200),
)
@example(num_rows=14336, k=4096, num_workers=132, grid_dim=None)
@example(num_rows=200, k=16384, num_workers=1, grid_dim=None)  # one row per slot
def test_a_gated_task_with_a_ring_is_one_block(num_rows, k, num_workers, grid_dim):
    """Gate and up wait for each other in the block's sums: rows beyond them would overwrite others."""
    machine = Machine(num_workers, block_n=16, slot_bytes=32 << 10)
    handles = {
        name: TensorHandle(name, dims, torch.bfloat16)
        for name, dims in {
            "input": (k,), "weight_norm": (k,), "weight_gate": (num_rows, k), "weight_up": (num_rows, k),
            "output": (num_rows,),
        }.items()
    }  # fmt: skip
    cut = cut_rmsnorm_gated_linear(machine, **handles, eps=1e-6, grid_dim=grid_dim)
    check_complete(cut.tasks, handles["output"])
    limit = block_rows(machine, matrices=2)
    assert cut.constants["BLOCK_N"] == limit
    for task in cut.tasks:
        rows = task.fields["num_rows"]
        slot = task.stream.slot_rows
        assert 0 < rows <= limit and task.stream.rows == rows
        assert cut.constants["SLOT_ROWS"] == slot and -(-rows // slot) * slot <= limit
        assert task.stream.start == task.fields["gate_addr"] and task.stream.second == task.fields["up_addr"]
    wanted = min(num_rows, grid_dim or num_workers)
    assert len(cut.tasks) == num_rows or len(cut.tasks) % wanted == 0  # whole rounds of equal tasks


@settings(deadline=None, max_examples=50)
@given(
    num_rows=st.integers(1, 400) | st.integers(160, 5000),
    k=st.integers(1, 9000) | st.integers(1, 20).map(lambda n: 512 * n),
    num_workers=st.integers(1, 160),
)
@example(num_rows=64, k=8192, num_workers=132)  # fewer rows than workers
def test_linear_residual(num_rows, k, num_workers):
    mpk = meta_kernel(num_workers)
    x, residual = weight(mpk, "x", k), weight(mpk, "residual", num_rows)
    y = mpk.new_tensor((num_rows,), torch.float32, name="y")
    mpk.linear_with_residual_layer(input=x, weight=weight(mpk, "w", num_rows, k), residual=residual, output=y)
    program = plan(mpk)
    check_complete([t for t in program.graph.tasks if t.op == 0], y)
    check_balanced(program, 0, row_bytes=2 * k)


@settings(deadline=None, max_examples=25)
@given(vocab_size=st.integers(1, 20000), k=st.sampled_from([64, 70, 1000]), num_workers=st.integers(1, 160))
def test_lm_head(vocab_size, k, num_workers):
    mpk = meta_kernel(num_workers)
    best = (
        mpk.new_tensor((num_workers,), torch.float32, name="value"),
        mpk.new_tensor((num_workers,), torch.int32, name="index"),
    )
    x = mpk.attach_input(torch.empty(k, device=META), name="x")
    mpk.lm_head_layer(
        input=x, weight_norm=weight(mpk, "norm", k), weight_linear=weight(mpk, "w", vocab_size, k), output=best
    )
    mpk.argmax_layer(input=best)
    program = mpk.plan()
    tasks = [t for t in program.graph.tasks if t.op == 0]
    for handle in best:
        check_complete(tasks, handle)
    rows = sorted((t.fields["row0"], t.fields["num_rows"]) for t in tasks)
    assert sum(n for _, n in rows) == vocab_size
    assert all(row + n == following for (row, n), (following, _) in zip(rows, rows[1:], strict=False))
    check_balanced(program, 0, row_bytes=2 * k)


@settings(deadline=None, max_examples=25)
@given(
    num_kv_heads=st.integers(1, 9), group=st.integers(1, 8), head_dim=st.sampled_from([32, 80, 128]),
    num_workers=st.integers(1, 160),
)  # fmt: skip
def test_attention(num_kv_heads, group, head_dim, num_workers):
    mpk = meta_kernel(num_workers)
    num_q_heads = num_kv_heads * group
    caches = {name: weight(mpk, name, 32, num_kv_heads, 128, head_dim) for name in ("k_cache", "v_cache")}
    tables = {
        name: mpk.attach_input(torch.empty(4096, head_dim, device=META), name=name)
        for name in ("cos_pos_embed", "sin_pos_embed")
    }
    page_table = mpk.attach_input(torch.empty(32, dtype=torch.int32, device=META), name="pages")
    qkv = weight(mpk, "qkv", (num_q_heads + 2 * num_kv_heads) * head_dim)
    parts, lse = mpk.new_attention_parts(num_q_heads, num_kv_heads, head_dim, torch.bfloat16, name="parts")
    mpk.attention_layer(input=qkv, **caches, **tables, page_table=page_table, output=(parts, lse))
    program = plan(mpk)
    tasks = [t for t in program.graph.tasks if t.op == 0]
    num_splits = parts.dims[0]
    tiles = [t.tile for t in tasks]
    assert sorted(tiles) == [(head, split) for head in range(num_kv_heads) for split in range(num_splits)]
    for handle in (parts, lse):
        boxes = [region.box for t in tasks for region in t.writes if region.tensor == handle.name]
        cells = [(split, head) for (s0, s1), (h0, h1) in boxes for split in range(s0, s1) for head in range(h0, h1)]
        assert sorted(cells) == [(split, head) for split in range(num_splits) for head in range(num_q_heads)]
    idle = sum(load == 0 for load in bytes_per_worker(program, 0))
    assert idle <= 0.05 * num_workers


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 400) | st.integers(160, 5000), num_heads=st.integers(1, 40),
    head_dim=st.sampled_from([34, 64, 128]), num_splits=st.integers(1, 20), num_workers=st.integers(1, 160),
)  # fmt: skip
@example(num_rows=2048, num_heads=32, head_dim=64, num_splits=16, num_workers=132)
def test_attention_output(num_rows, num_heads, head_dim, num_splits, num_workers):
    mpk = meta_kernel(num_workers)
    k = num_heads * head_dim
    parts, residual = weight(mpk, "parts", num_splits, num_heads, head_dim), weight(mpk, "residual", num_rows)
    y = mpk.new_tensor((num_rows,), torch.float32, name="y")
    mpk.attention_output_layer(
        input=(parts, weight(mpk, "lse", num_splits, num_heads)), weight=weight(mpk, "w", num_rows, k),
        residual=residual, output=y,
    )  # fmt: skip
    program = plan(mpk)
    check_complete([t for t in program.graph.tasks if t.op == 0], y)
    check_balanced(program, 0, row_bytes=2 * k)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.1-8B", "Qwen3-0.6B", "Qwen3-8B", "Qwen2.5-1.5B"])
def test_real_geometries_on_132_workers(name):
    config = geometry(name)
    config.num_hidden_layers = 2
    model = empty_model(config, torch.bfloat16).to(META)
    program = CausalLM(model, META, max_seq_len=4096, num_workers=SMS, progress=False).kernel.plan()
    balances = imbalance(program.graph, program.schedule)
    assert len(balances) == 2 * 5 + 3
    for balance in balances:
        if balance.mean_bytes * SMS >= SMALL_OP_BYTES:
            assert balance.ratio <= 1.04, balance
        elif balance.num_tasks > 1:
            largest = max(t.cost_bytes for t in program.graph.tasks if program.graph.ops[t.op] == balance.op)
            assert balance.max_bytes <= balance.mean_bytes + largest, balance
