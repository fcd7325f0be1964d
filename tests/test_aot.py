"""The kernels of real models, compiled ahead of time for Hopper: what ptxas makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from ahead import ahead
from tri_mpk.aot import SIGNATURE, has_bulk_copies, parse_target
from tri_mpk.geometries import GEOMETRIES

KEYS = ["registers", "spills", "stack_bytes", "shared_bytes", "bulk_copies", "seconds"]
MAX_SHARED_BYTES = 227 << 10  # of a block on Hopper
FEW_SPILLS = 6  # of kernels with time stamps or pools: the thread index kept for the end of a step, as ptxas likes it
# Of plain kernels, by geometry and ranks: one word, stored once a step and loaded where a stream ends; and rows of over
# 16384 columns, whose part of x and words of two slots are more than a thread's registers.
KNOWN_SPILLS = {("Llama-3.2-3B", 1): 2, ("Qwen3-32B", 1): 92, ("Llama-3.1-70B", 1): 101}
MAX_REGISTERS = 128  # 64 Ki registers for 16 warps

# Work by warps is [16, 32] tensors of which warp w has row w and lane l column l: shuffles, and what the tensor cores
# and the ring take as PTX, are wrong in any other layout, and Triton is free to choose one.
BY_WARPS = "#ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [16, 1], order = [1, 0]}>"

# The kernel of a geometry: two layers have all its variants. In a process of its own, see below.
REPORT = """
import dataclasses, json, re, sys
import torch
from tri_mpk.aot import compile_for, resources
from tri_mpk.generator import write_source
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.program import SharedMemoryPlan
config = geometry(sys.argv[1])
config.num_hidden_layers = 2
kind, policy, ranks = sys.argv[2], sys.argv[3], int(sys.argv[4])
program = plan_config(config, torch.bfloat16, 8192, profile=kind == "profile", policy=policy, world_size=ranks)
kernel = compile_for(write_source(program.source), "sm_90")
plan = SharedMemoryPlan.divide(program, kernel.metadata.shared, 227 << 10)
ttgir = kernel.asm["ttgir"]
names = set(re.findall(r"tensor<16x32x[^,]+, (#[^>]+)>", ttgir))
layouts = sorted(layout for name in names for layout in re.findall(rf"^{name} = (.*)$", ttgir, re.MULTILINE))
counts = {what: kernel.asm["ptx"].count(what) for what in ("red.release.sys", "ld.acquire.sys", "multimem")}
print(json.dumps(resources(kernel) | dataclasses.asdict(plan) | {"layouts": layouts} | counts))
"""

# What the runtime's launch would make of its arguments, against what the ahead-of-time compiler assumes. It runs in a
# process of its own, because a Triton that interprets can do neither.
SAME_KERNEL = """
import sys
from pathlib import Path
import torch
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from tri_mpk.aot import SIGNATURE, kernel_source, parse_target
from tri_mpk.program import COMPILE_OPTIONS
source = kernel_source(Path(sys.argv[1]))
kernel, backend = source.fn, make_backend(parse_target("sm_90"))
dtypes = {"*i64": torch.int64, "*i32": torch.int32, "*fp32": torch.float32}
arguments = [torch.zeros(64, dtype=dtypes[t]) if t in dtypes else 0 for t in SIGNATURE.values()]
options = COMPILE_OPTIONS | {"debug": False, "instrumentation_mode": ""}
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
bound, specialization, rest = bind(*arguments, **options)
_, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, rest)
assert ASTSource(kernel, signature, constexprs, attrs).hash() == source.hash(), (signature, constexprs, attrs)
"""


def clean_environment(**variables: str) -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path} | variables


def compiled(name: str, kind: str, policy: str, ranks: int = 1) -> dict[str, Any]:
    command = [sys.executable, "-c", REPORT, name, kind, policy, str(ranks)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[tuple, Future]]:
    with ahead(request, "report", compiled) as reports:
        yield reports


@pytest.fixture(
    scope="module",
    params=[
        *([name, "plain", "static"] for name in GEOMETRIES),
        *([name, "profile", "static"] for name in ("Llama-3.2-1B", "Qwen3-8B")),
        *([name, "plain", "hybrid"] for name in ("Llama-3.2-1B", "Qwen3-8B")),
        ["Qwen3-8B", "plain", "static", 2],
        ["Qwen3-32B", "plain", "static", 2],
        ["Llama-3.1-70B", "plain", "static", 4],
    ],
    ids=lambda parameters: " ".join(map(str, parameters)),
)
def report(request: pytest.FixtureRequest, reports: dict[tuple, Future]) -> dict[str, Any]:
    return reports[tuple(request.param)].result()


def test_work_by_warps_has_a_row_per_warp_and_a_column_per_lane(report: dict[str, Any]):
    assert report["layouts"] == [BY_WARPS]


def test_real_kernels_fit_hopper(request: pytest.FixtureRequest, report: dict[str, Any]):
    assert report["bulk_copies"] > 0, "weights would come by plain loads"
    assert report["registers"] <= MAX_REGISTERS
    if "plain static" in request.node.callspec.id:
        name, _, _, *ranks = request.node.callspec.params["report"]
        assert report["spills"] <= KNOWN_SPILLS.get((name, *(ranks or [1])), 0)
    else:
        assert report["spills"] <= FEW_SPILLS
    assert report["shared_bytes"] < report["num_bytes"] <= MAX_SHARED_BYTES
    assert report["ring_slots"] * report["slot_bytes"] >= 128 << 10, "too little on its way to hide a hop"


def test_only_several_ranks_order_memory_of_the_system(report: dict[str, Any], request: pytest.FixtureRequest):
    several = request.node.callspec.params["report"][3:]
    assert (report["red.release.sys"] > 0) == (report["ld.acquire.sys"] > 0) == bool(several)
    assert report["multimem"] == 0


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-8B"])
def test_dynamic_kernels_fit_hopper(name: str):
    """There is no order in which a ring could bring the weights."""
    report = compiled(name, "plain", "dynamic")
    assert report["bulk_copies"] == report["ring_slots"] == 0
    assert report["registers"] <= MAX_REGISTERS
    assert report["spills"] <= FEW_SPILLS


def test_compile_reports_resources():
    command = [sys.executable, "-m", "tri_mpk", "compile", "--geometry", "Qwen3-0.6B", "--target", "sm_90", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=280)
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)) == KEYS


def test_the_runtime_launches_the_kernel_that_is_compiled_here():
    from tri_mpk.generator import write_source
    from tri_mpk.geometries import geometry
    from tri_mpk.inspect import plan_config

    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 1
    path = write_source(plan_config(config, torch.bfloat16, 256, num_workers=4).source)
    command = [sys.executable, "-c", SAME_KERNEL, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_gpu_without_bulk_copies_loads_tiles():
    command = [sys.executable, "-m", "tri_mpk", "compile", "--geometry", "Qwen3-0.6B", "--target", "sm_80", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=280)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bulk_copies"] == 0 and report["registers"] <= MAX_REGISTERS


def test_targets():
    assert parse_target("sm_90") == parse_target("sm_90a") == GPUTarget("cuda", 90, 32)
    assert parse_target("sm_100").arch == 100
    assert [t for t in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120") if has_bulk_copies(t)] == ["sm_90", "sm_100"]
    for bad in ("sm_75", "90", "sm90", "gfx942", ""):
        with pytest.raises(ValueError, match="sm_80 or newer"):
            parse_target(bad)


def test_the_interpreter_cannot_compile():
    command = [sys.executable, "-m", "tri_mpk", "compile", "--geometry", "Llama-3.2-1B"]
    environment = clean_environment(TRITON_INTERPRET="1")
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("tri-mpk: error: TRITON_INTERPRET is set") and result.stderr.count("\n") == 1


def test_signature_covers_the_kernel():
    assert list(SIGNATURE)[-1] == "first_worker"
    assert all(kind.startswith("*") for name, kind in SIGNATURE.items() if name.endswith("_ptr"))
