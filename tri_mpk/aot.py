"""Ahead-of-time compilation of a generated kernel for a GPU that need not be there, and what ptxas made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tri_mpk.generator import import_source
from tri_mpk.program import NUM_WARPS

POINTERS = {
    "queue_ptr": "*i64",
    "queue_start_ptr": "*i32",
    "event_ptr": "*i32",
    "control_ptr": "*i64",
    "logits_ptr": "*fp32",
    "mailbox_ptr": "*i64",
}


def parse_target(target: str) -> GPUTarget:
    """`sm_90` or `sm_90a` -> GPUTarget; ValueError for anything else."""
    match = re.fullmatch(r"sm_(\d{2,3})a?", target)
    if match is None or int(match[1]) < 80:
        raise ValueError(f"target={target!r} is not supported; give sm_80 or newer, for example sm_90")
    return GPUTarget("cuda", int(match[1]), 32)


def compile_for(source_path: Path, target: str) -> triton.compiler.CompiledKernel:
    kernel = import_source(source_path).megakernel
    signature = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    constants = {(kernel.arg_names.index("first_worker"),): 0}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=pointers)
    options = {"num_warps": NUM_WARPS, "launch_cooperative_grid": True}
    return triton.compile(source, target=parse_target(target), options=options)


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers per thread, spilled and stack bytes, shared bytes, and how wide the streamed weight loads are.

    Weight loads are those marked evict_first; wide means 16 bytes per lane.
    """
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [cuobjdump, "-sass", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loads = re.findall(r"ld\.global\S*evict_first\S*", kernel.asm["ptx"])
    wide = sum("v4.b32" in load for load in loads)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
        "wide_weight_loads": wide,
        "narrow_weight_loads": len(loads) - wide,
    }


def compile_report(source_path: Path, target: str) -> dict[str, int | float]:
    """`resources` and the seconds that compiling took (near zero from Triton's cache)."""
    started = time.perf_counter()
    kernel = compile_for(source_path, target)
    return resources(kernel) | {"seconds": round(time.perf_counter() - started, 2)}
