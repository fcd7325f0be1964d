"""What a task declares is what it does: alone, with NaN in all it does not read, it writes its regions and no more."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness, region_mask
from tri_mpk.ops.op import TensorHandle

NUM_ROWS, SIZE, TASKS = 70, 300, 3
NAN = float("nan")
OPS = (
    "embed_layer", "rmsnorm_linear_layer", "rmsnorm_gated_linear_layer", "linear_with_residual_layer",
    "attention_output_layer",
)  # fmt: skip


def tensors_of(harness: OpHarness, op: str, seed: int) -> dict[str, TensorHandle | tuple[TensorHandle, ...]]:
    """Inputs (the same for equal seeds; a pair is read whole) and new outputs."""
    torch.manual_seed(seed)
    if op == "embed_layer":
        return {"weight": harness.input(5, SIZE), "output": harness.output(SIZE)}
    if op == "linear_with_residual_layer":
        return {
            "input": harness.input(512), "weight": harness.input(NUM_ROWS, 512), "bias": harness.input(NUM_ROWS),
            "residual": harness.input(NUM_ROWS), "output": harness.output(NUM_ROWS),
        }  # fmt: skip
    if op == "attention_output_layer":
        return {
            "input": (harness.input(2, 3, 34), harness.input(2, 3)), "weight": harness.input(NUM_ROWS, 102),
            "bias": harness.input(NUM_ROWS), "residual": harness.input(NUM_ROWS), "output": harness.output(NUM_ROWS),
        }  # fmt: skip
    common = {"input": harness.input(SIZE), "weight_norm": harness.gain(SIZE)}
    if op == "rmsnorm_gated_linear_layer":
        weights = {"weight_gate": harness.input(NUM_ROWS, SIZE), "weight_up": harness.input(NUM_ROWS, SIZE)}
        return common | weights | {"output": harness.output(NUM_ROWS)}
    bias = {"bias": harness.input(NUM_ROWS)} if op == "rmsnorm_linear_layer" else {}
    return common | {"weight_linear": harness.input(NUM_ROWS, SIZE), "output": harness.output(NUM_ROWS)} | bias


@pytest.fixture(scope="module")
def alone():
    """Every task of every op in a call of its own, after the whole op: one kernel, one step."""
    harness = OpHarness()
    harness.cases = {}
    for op in OPS:
        add = getattr(harness.mpk, op)
        whole = tensors_of(harness, op, seed=1)
        add(**whole, grid_dim=TASKS)
        num_tasks = count_tasks(op)
        for i in range(num_tasks):
            tensors = tensors_of(harness, op, seed=1)
            add(**tensors, grid_dim=TASKS)
            harness.cases[op, i] = (whole, tensors, harness.keep_only(i))
    harness.compile()
    for _, tensors, op_idx in harness.cases.values():
        (task,) = harness.tasks(op_idx)
        for name, handle in tensors.items():
            if name != "output" and isinstance(handle, TensorHandle):
                unread = ~region_mask(handle, task.reads)
                handle.data.view(unread.shape)[unread] = NAN
    harness.run(token=3)
    return harness


def count_tasks(op: str) -> int:
    harness = OpHarness()
    getattr(harness.mpk, op)(**tensors_of(harness, op, seed=1), grid_dim=TASKS)
    harness.mpk.argmax_layer(input=(harness.attach(torch.zeros(1)), harness.attach(torch.zeros(1, dtype=torch.int32))))
    return len(harness.tasks(0))


def test_each_task_writes_what_it_declares_from_what_it_declares(alone):
    for (op, i), (whole, tensors, op_idx) in alone.cases.items():
        (task,) = alone.tasks(op_idx)
        output = tensors["output"]
        declared = region_mask(output, task.writes)
        data, expected = (t["output"].data.view(declared.shape) for t in (tensors, whole))
        assert bool(declared.any()), (op, i)
        assert bool(data[~declared].isnan().all()), f"{op} task {i} writes more than {task.writes}"
        assert torch.equal(data[declared], expected[declared]), f"{op} task {i} reads more than {task.reads}"


def test_the_tasks_of_an_op_write_every_element_once(alone):
    written: dict[str, torch.Tensor] = {}
    for (op, _), (_, tensors, op_idx) in alone.cases.items():
        (task,) = alone.tasks(op_idx)
        written[op] = written.get(op, 0) + region_mask(tensors["output"], task.writes).int()
    assert written.keys() == set(OPS)
    assert all(bool((times == 1).all()) for times in written.values())
