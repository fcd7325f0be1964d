"""What a GPU runs instead of the portable forms, on a CPU: inline PTX emulated in the interpreter's processes."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from decoders import tiny_config, transformers_model
from tri_mpk.model import PAGE_SIZE
from tri_mpk.models import describe
from tri_mpk.models.decoder import build
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.program import SharedMemoryPlan
from tri_mpk.runtime import InterpreterRuntime, LaunchRequest

TESTS = Path(__file__).resolve().parents[1]
EMULATED_SHARED_BYTES = 216_064  # behind the streams: what tests/ptx_emulator.py has


def test_attention_and_merge_equal_their_references():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "by_warps.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.count("attention") == 13 and result.stdout.count("merge of") == 12


CONFIGS = {
    "llama": tiny_config("llama", hidden_size=64, intermediate_size=104, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, vocab_size=200),
    "qwen3, long rows": tiny_config("qwen3", hidden_size=264, intermediate_size=1048, num_hidden_layers=1,
                                    num_attention_heads=3, num_key_value_heads=1, head_dim=64, vocab_size=72),
    "llama, two rows": tiny_config("llama", hidden_size=520, intermediate_size=64, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=40),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "slots", "slot_bytes", "slot_rows", "prefetch_bytes"),
    [
        ("llama", 3, 32768, {16}, 0),
        ("qwen3, long rows", 6, 4096, {1, 7, 8}, 40960),
        ("llama, two rows", 9, 4096, {3, 16}, 65536),
    ],
)
def test_a_decoder_on_weight_rings_equals_transformers(
    name: str, slots: int, slot_bytes: int, slot_rows: set[int], prefetch_bytes: int
):
    """Two workers, a prompt (lm_head's rows are skipped) and some tokens; logits of the last step."""
    config = CONFIGS[name]
    exact = transformers_model(config)
    theirs = copy.deepcopy(exact).half()
    exact.load_state_dict({key: value.float() for key, value in theirs.state_dict().items()})
    tokens = torch.zeros(PAGE_SIZE, dtype=torch.int64)
    prompt = torch.tensor([3, 14, 15, 9])
    tokens[: len(prompt)] = prompt
    kernel = PersistentKernel(num_workers=2, meta_tensors=[torch.zeros(1, dtype=torch.int32), tokens])
    kernel.has_bulk_copies = True
    tuning = kernel._tuned(config.num_key_value_heads, config.head_dim)
    kernel.tuning = dataclasses.replace(tuning, slot_bytes=slot_bytes, prefetch_bytes=prefetch_bytes)
    build(kernel, describe(config, PAGE_SIZE), theirs, PAGE_SIZE, progress=False)
    program = kernel.plan()
    assert program.constants.ring and program.constants.portable
    assert {task.stream.slot_rows for task in program.graph.tasks if task.stream} == slot_rows
    with mock.patch.object(InterpreterRuntime, "worker_script", TESTS / "emulated_worker.py"):
        kernel.compile()
    runtime = kernel.runtime
    plan = SharedMemoryPlan.divide(program, 0, EMULATED_SHARED_BYTES)
    fewer = plan.num_bytes - (plan.ring_slots - slots) * plan.slot_bytes
    assert plan.ring_slots >= slots
    runtime.shared_memory = SharedMemoryPlan.divide(program, 0, fewer)
    assert runtime.shared_memory.ring_slots == slots
    num_new = 3
    last = len(prompt) + num_new - 2
    chosen = list(kernel.launch(LaunchRequest(num_known=len(prompt), last_step=last, logits_from=len(prompt) - 1)))
    with torch.no_grad():
        logits = exact(torch.cat((prompt, torch.tensor(chosen[:-1])))[None]).logits[0, -1]
    difference = (runtime.default_logits - logits).norm() / logits.norm()
    assert 0 < difference < 5e-3, difference
    assert chosen[-1] == int(runtime.default_logits.argmax())
