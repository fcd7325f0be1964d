"""Ahead-of-time compilation of a generated kernel for a GPU that need not be there, and what ptxas made of it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from tri_mpk.errors import DeviceError
from tri_mpk.generator import import_source
from tri_mpk.program import COMPILE_OPTIONS

# The kernel's parameters as the runtime passes them, so that it finds what is compiled here in Triton's cache. All are
# divisible by 16: the pointers are aligned, and `first_worker` is 0.
SIGNATURE = {
    "queue_ptr": "*i64",
    "queue_start_ptr": "*i32",
    "event_ptr": "*i32",
    "control_ptr": "*i64",
    "step_ptr": "*i32",
    "logits_ptr": "*fp32",
    "mailbox_ptr": "*i64",
    "first_worker": "i32",
}
DEFAULT_TARGET = "sm_90"


def parse_target(target: str) -> GPUTarget:
    """`sm_90` or `sm_90a` (Triton always builds the `a` form from there on); ValueError for anything else."""
    match = re.fullmatch(r"sm_(\d{2,3})a?", target)
    if match is None or int(match[1]) < 80:
        raise ValueError(f"target={target!r} is not supported; give sm_80 or newer, for example {DEFAULT_TARGET}")
    return GPUTarget("cuda", int(match[1]), 32)


def has_bulk_copies(target: str) -> bool:
    """Whether the target's GPUs can hold a weight ring: Hopper and the Blackwells with as much shared memory."""
    return parse_target(target).arch // 10 in (9, 10)


def check_compiler() -> None:
    """DeviceError where Triton cannot compile: its functions are then bound to its interpreter."""
    if triton.knobs.runtime.interpret:
        raise DeviceError(
            "TRITON_INTERPRET is set, so kernels can be neither planned nor compiled here; unset it and start again"
            " (on a CPU the worker processes set it for themselves)"
        )


def kernel_source(source_path: Path) -> ASTSource:
    kernel = import_source(source_path).megakernel
    assert kernel.arg_names == list(SIGNATURE), kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(SIGNATURE))}
    return ASTSource(fn=kernel, signature=SIGNATURE, constexprs={}, attrs=aligned)


def compile_for(source_path: Path, target: str) -> CompiledKernel:
    """The kernel in a source file, compiled for `target` as the runtime does, or taken from its cache."""
    gpu = parse_target(target)
    check_compiler()
    with contextlib.redirect_stdout(sys.stderr):  # when ptxas fails, Triton prints the whole PTX
        return triton.compile(kernel_source(source_path), target=gpu, options=COMPILE_OPTIONS)


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """What a compiled kernel takes of an SM, without the shared memory of the weight ring, which a launch adds.

    `registers` and `stack_bytes` are per thread. `spills` counts the instructions that write or read local memory (STL,
    LDL). `bulk_copies` are the places that refill the weight ring: none means that weights come by plain loads.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
        "bulk_copies": kernel.asm["ptx"].count("cp.async.bulk.shared"),
    }


def _cuobjdump(what: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path  # ships with Triton
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def compile_report(source_path: Path, target: str) -> dict[str, int | float]:
    """`resources` and the seconds that compiling took (near zero from Triton's cache)."""
    started = time.perf_counter()
    kernel = compile_for(source_path, target)
    return resources(kernel) | {"seconds": round(time.perf_counter() - started, 2)}
