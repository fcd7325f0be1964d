"""The kernels that process many tokens in a step, compiled ahead of time for Hopper: what ptxas makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_aot import MAX_REGISTERS, MAX_SHARED_BYTES, clean_environment

FEW_SPILLS = 24  # words stored and loaded: the thread index, addresses of outer loops; none in the loop over weights
TILE_BYTES = 32 << 10  # of weights that a product takes at a time

# Two layers have all variants. In a process of its own: see test_aot.py.
REPORT = """
import dataclasses, json, re, sys
import torch
from repeat_step import REPEAT_STEP
from tri_mpk.aot import compile_for, resources
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.generator import write_source
from tri_mpk.geometries import geometry
from tri_mpk.loading import empty_model
from tri_mpk.models import describe
from tri_mpk.models.batch_decoder import build_batch
from tri_mpk.program import SharedMemoryPlan
config = geometry(sys.argv[1])
config.num_hidden_layers = 2
sequences, tokens = int(sys.argv[2]), int(sys.argv[3])
step = torch.zeros(1, dtype=torch.int32, device="meta")
text = torch.zeros(8192, dtype=torch.int64, device="meta")
kernel = BatchKernel(
    meta_tensors=[step, text], max_batch_size=sequences, max_tokens_per_step=tokens, policy=sys.argv[4]
)
model = empty_model(config, torch.bfloat16)
output = build_batch(kernel, describe(config, 8192), model, page_size=128, progress=False)
kernel.op_layer(REPEAT_STEP, logits=output.logits)
program = kernel.plan()
compiled = compile_for(write_source(program.source), "sm_90")
plan = SharedMemoryPlan.divide(program, compiled.metadata.shared, 227 << 10)
ptx = compiled.asm["ptx"]
copies = [int(size, 0) for size in re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global [^;]*?, (0x[0-9a-f]+)", ptx)]
widths = {str(size): copies.count(size) for size in set(copies)}
counts = {what: ptx.count(what) for what in ("wgmma.mma", "mma.sync")}
print(json.dumps(resources(compiled) | dataclasses.asdict(plan) | {"copies": widths} | counts))
"""


@pytest.mark.parametrize(
    ("name", "sequences", "tokens", "policy"),
    [
        ("Qwen3-8B", 64, 64, "static"),
        pytest.param("Qwen3-8B", 8, 64, "hybrid", marks=pytest.mark.slow),
        pytest.param("Llama-3.2-1B", 8, 64, "static", marks=pytest.mark.slow),
        pytest.param("Llama-3.2-1B", 64, 64, "static", marks=pytest.mark.slow),
        pytest.param("Qwen2.5-1.5B", 16, 256, "static", marks=pytest.mark.slow),
    ],
)
def test_batch_kernels_fit_hopper(name: str, sequences: int, tokens: int, policy: str):
    environment = clean_environment()
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    command = [sys.executable, "-c", REPORT, name, str(sequences), str(tokens), policy]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["registers"] <= MAX_REGISTERS and report["spills"] <= FEW_SPILLS
    assert 3 * TILE_BYTES < report["shared_bytes"] < report["num_bytes"] <= MAX_SHARED_BYTES
    assert report["ring_slots"] == report["bulk_copies"] == 0
    assert list(report["copies"]) == ["16"] and report["copies"]["16"] > 100, "weights, activations, keys and values"
    assert report["wgmma.mma"] == 0 < report["mma.sync"], "one kind of product for any number of tokens"
