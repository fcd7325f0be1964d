"""The kernels that process many tokens in a step, compiled ahead of time for Hopper: what ptxas makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from ahead import ahead
from panel_programs import serving_program
from test_aot import MAX_REGISTERS, MAX_SHARED_BYTES, clean_environment
from tri_mpk.generator import generate, write_source
from tri_mpk.ops.batch_gemm import TILES_BYTES
from tri_mpk.ops.panels import OTHER_BYTES

# The last two numbers of a case: ranks, and the instructions that write or read spilled words. Some are in `advance`, a
# task a step; beside panels most are in products, which are inlined then, since none with `wgmma` may be called.

# Two layers have all variants. In a process of its own: see test_aot.py.
REPORT = """
import dataclasses, json, re, subprocess, sys, tempfile
import torch
import triton
from transformers import LlamaConfig
from tri_mpk.aot import compile_for, resources
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.generator import write_source
from tri_mpk.geometries import geometry
from tri_mpk.loading import empty_model
from tri_mpk.models import describe
from tri_mpk.models.batch_decoder import build_serving
from tri_mpk.program import SharedMemoryPlan
from tri_mpk.sharding import Shard
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
small = LlamaConfig(**sizes, vocab_size=997, max_position_embeddings=8192)
config = small if sys.argv[1] == "small" else geometry(sys.argv[1])
config.num_hidden_layers = 2
sequences, tokens = int(sys.argv[2]), int(sys.argv[3])
step = torch.zeros(1, dtype=torch.int32, device="meta")
text = torch.zeros(8192, dtype=torch.int64, device="meta")
ranks = int(sys.argv[5])
shard = Shard(config, 0, ranks) if ranks > 1 else None
local = config if shard is None else shard.local_config()
kernel = BatchKernel(
    ranks, meta_tensors=[step, text], max_batch_size=sequences, max_tokens_per_step=tokens, policy=sys.argv[4]
)
model = empty_model(local, torch.bfloat16)
build_serving(kernel, describe(local, 8192), model, 128, sequences * 8192 // 128, False, shard)
program = kernel.plan()
compiled = compile_for(write_source(program.source), "sm_90")
plan = SharedMemoryPlan.divide(program, compiled.metadata.shared, 227 << 10)
ptx = compiled.asm["ptx"]
copies = [int(size, 0) for size in re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global [^;]*?, (0x[0-9a-f]+)", ptx)]
widths = {str(size): copies.count(size) for size in set(copies)}
counts = {what: ptx.count(what) for what in ("wgmma.mma", "mma.sync", "cp.async.bulk.tensor")}
with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
    cubin.write(compiled.asm["cubin"])
    cubin.flush()
    dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin.name]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
counts |= {what: len(re.findall(rf"\\b{what}\\b", sass)) for what in ("HGMMA", "WARPGROUP.ARRIVE")}
print(json.dumps(resources(compiled) | dataclasses.asdict(plan) | {"copies": widths} | counts))
"""


def compiled(name: str, sequences: int, tokens: int, policy: str, ranks: int, spills: int) -> dict[str, Any]:
    command = [sys.executable, "-c", REPORT, name, str(sequences), str(tokens), policy, str(ranks)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout) | {"known_spills": spills}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[tuple, Future]]:
    with ahead(request, "report", compiled) as reports:
        yield reports


@pytest.fixture(
    scope="module",
    params=[
        ("Qwen3-8B", 64, 256, "static", 1, 335),
        ("Qwen3-8B", 64, 256, "static", 2, 222),
        ("small", 8, 64, "static", 1, 28),  # matrices whose K is a single tile
        pytest.param(("Qwen3-8B", 8, 64, "hybrid", 1, 210), marks=pytest.mark.slow),
        pytest.param(("Llama-3.2-1B", 8, 256, "static", 1, 178), marks=pytest.mark.slow),
        pytest.param(("Llama-3.2-1B", 64, 64, "static", 1, 300), marks=pytest.mark.slow),
        pytest.param(("Qwen2.5-1.5B", 16, 256, "static", 1, 224), marks=pytest.mark.slow),
        pytest.param(("Qwen3-32B", 32, 256, "static", 4, 248), marks=pytest.mark.slow),
    ],
    ids=lambda parameters: " ".join(map(str, parameters)),
)
def report(request: pytest.FixtureRequest, reports: dict[tuple, Future]) -> dict[str, Any]:
    return reports[request.param].result()


def test_batch_kernels_fit_hopper(report: dict[str, Any]):
    assert report["registers"] <= MAX_REGISTERS and report["spills"] <= report["known_spills"]
    assert TILES_BYTES.value <= report["shared_bytes"] < report["num_bytes"] <= MAX_SHARED_BYTES
    assert report["ring_slots"] == report["bulk_copies"] == 0
    few_bytes = [size for size in report["copies"] if size != "16"]
    assert few_bytes in (["8"], ["4"]) and report["copies"][few_bytes[0]] == 3, "queries: an item has few rows"
    assert report["copies"]["16"] >= 36, "keys and values: two blocks ahead, and in the loop"
    assert report["wgmma.mma"] > 0 and report["mma.sync"] > 0, "matrices; attention"


def has_panels(request: pytest.FixtureRequest) -> bool:
    name, *_ = request.node.callspec.params["report"]
    return name != "small"


def test_weights_of_long_rows_come_in_panels(request: pytest.FixtureRequest, report: dict[str, Any]):
    assert (report["cp.async.bulk.tensor"] > 0) == has_panels(request)


def test_matrix_instructions_beside_panels_do_not_wait_for_each_other(
    request: pytest.FixtureRequest, report: dict[str, Any]
):
    """Where ptxas serialises them, for want of registers or behind a call, each has a fence of its own."""
    assert report["HGMMA"] >= report["WARPGROUP.ARRIVE"] > 0
    assert (report["HGMMA"] >= 4 * report["WARPGROUP.ARRIVE"]) == has_panels(request)


# The compiler's shared memory in a kernel in a file.
SHARED = """
import sys
from pathlib import Path
from tri_mpk.aot import compile_for
print(compile_for(Path(sys.argv[1]), "sm_90").metadata.shared)
"""


def test_products_leave_the_rings_alone():
    """Those lie in what is the compiler's, too, and stay filled from one product to the next."""
    programs = [serving_program(hidden_size=2048, ranks=ranks) for ranks in (1, 2)]
    products = {variant: None for program in programs for variant in program.variants if variant.reads_panels}
    assert {variant.op.name for variant in products} == {
        "batch_linear", "batch_linear_residual", "batch_gated_linear", "batch_linear_parts", "batch_lm_head"
    }  # fmt: skip
    source = generate(list(products), programs[1].constants)
    many_tokens = "if few == 0:"  # of the head, without panels: no ring goes on there
    assert source.count(many_tokens) == 1
    path = write_source(source.replace(many_tokens, "if not PANELS:"))
    command = [sys.executable, "-c", SHARED, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=280)
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout) <= OTHER_BYTES.value
