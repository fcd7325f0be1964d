"""Inline PTX in Triton's interpreter: as much of it as the work by warps in ops/ uses, on numpy arrays.

A tensor [WARPS, LANES] is a block's threads, one element each, so that shuffles and matrix instructions find the other
lanes of a warp. Branches and barriers are not emulated: all threads go through an instruction before the next one.
"""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SHARED_BYTES = 64 << 10
shared = np.zeros(SHARED_BYTES, np.uint8)


def _gather(memory: np.ndarray, index: np.ndarray, num_bytes: int) -> np.ndarray:
    return memory[index[:, None] + np.arange(num_bytes)]


def _memory(addresses: np.ndarray, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The stretch of this process's memory that the addresses lie in, as bytes, and where they lie in it."""
    low, high = int(addresses.min()), int(addresses.max()) + num_bytes
    assert high - low < 1 << 30, "addresses of different tensors in one instruction"
    return np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8), (addresses - low).astype(int)


class Block:
    """One run of an inline assembly: registers by name, as uint64 [threads]."""

    def __init__(self, inputs: list[np.ndarray], num_outputs: int):
        self.size = max((x.size for x in inputs), default=1)
        self.registers = {f"${num_outputs + i}": np.broadcast_to(x.ravel(), self.size) for i, x in enumerate(inputs)}

    def read(self, name: str) -> np.ndarray:
        name = name.strip()
        if name in self.registers:
            return self.registers[name]
        value = np.float32(0).view(np.uint32) if name.startswith("0f") else int(name, 0) & 0xFFFFFFFF
        return np.full(self.size, value, np.uint64)

    def floats(self, name: str) -> np.ndarray:
        return self.read(name).astype(np.uint32).view(np.float32)

    def write(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        old = self.registers.get(name, np.zeros(self.size, np.uint64))
        self.registers[name] = np.where(active, value.astype(np.uint64), old)

    def lanes(self, x: np.ndarray) -> np.ndarray:
        assert self.size % 32 == 0, "a warp instruction needs whole warps"
        return x.reshape(-1, 32)

    # ---- instructions ----

    def run(self, statement: str) -> None:
        active = np.ones(self.size, bool)
        if statement.startswith("@"):
            predicate, statement = statement[1:].split(None, 1)
            active = self.read(predicate.lstrip("!")) != 0
            if predicate.startswith("!"):
                active = ~active
        opcode, _, rest = statement.partition(" ")
        operands = [part.strip("{} ") for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        kind, *suffixes = opcode.split(".")
        getattr(self, f"_{kind}")(suffixes, operands, active)

    def _mov(self, suffixes, operands, active):
        self.write(operands[0], self.read(operands[1]), active)

    def _setp(self, suffixes, operands, active):
        compare = {"ne": np.not_equal, "eq": np.equal}[suffixes[0]]
        self.write(operands[0], compare(self.read(operands[1]), self.read(operands[2])), active)

    def _cvt(self, suffixes, operands, active):
        if suffixes == ["u16", "u32"]:
            value = self.read(operands[1]) & 0xFFFF
        else:
            assert suffixes == ["rn", "f16x2", "f32"], suffixes  # numpy has no bf16
            high, low = (self.floats(name).astype(np.float16).view(np.uint16) for name in operands[1:])
            value = high.astype(np.uint64) << 16 | low
        self.write(operands[0], value, active)

    def _prmt(self, suffixes, operands, active):
        both = np.stack([self.read(name).astype(np.uint32) for name in operands[1:3]], -1).view(np.uint8)
        selector = int(operands[3], 16)
        chosen = [both[:, selector >> 4 * i & 7] for i in range(4)]
        self.write(operands[0], np.stack(chosen, -1).copy().view(np.uint32)[:, 0], active)

    def _max(self, suffixes, operands, active):
        self.write(operands[0], np.maximum(self.floats(operands[1]), self.floats(operands[2])), active)

    def _add(self, suffixes, operands, active):
        self.write(operands[0], self.floats(operands[1]) + self.floats(operands[2]), active)

    def _shfl(self, suffixes, operands, active):
        assert suffixes[:2] == ["sync", "bfly"] and active.all()
        other = np.arange(32) ^ int(operands[2])
        self.write(operands[0], self.lanes(self.read(operands[1]))[:, other].ravel(), active)

    def _ld(self, suffixes, operands, active):
        names = [name.strip() for name in operands[0].split(",")]
        if not active.any():
            return
        size = 4 * len(names)
        address = self.read(operands[1].strip("[]"))
        if suffixes[0] == "shared":
            memory, index = shared, np.where(active, address, 0).astype(int)
        else:
            memory, where = _memory(address[active], size)
            index = np.zeros(self.size, int)
            index[active] = where
        assert not (address[active] % size).any(), "a misaligned load"
        words = _gather(memory, index, size).copy().view(np.uint32)
        for i, name in enumerate(names):
            self.write(name, words[:, i], active)

    def _st(self, suffixes, operands, active):
        assert suffixes[0] == "shared"
        width = 2 if suffixes[-1] == "b16" else 4
        names = [name.strip() for name in operands[1].split(",")]
        address = self.read(operands[0].strip("[]"))[active].astype(int)
        assert not (address % (width * len(names))).any(), "a misaligned store"
        for i, name in enumerate(names):
            value = self.read(name)[active].astype(np.uint16 if width == 2 else np.uint32).view(np.uint8)
            shared[address[:, None] + width * i + np.arange(width)] = value.reshape(-1, width)

    def _movmatrix(self, suffixes, operands, active):
        assert active.all()
        halves = self.lanes(self.read(operands[1]).astype(np.uint32)).copy().view(np.uint16).reshape(-1, 8, 8)
        self.write(operands[0], halves.transpose(0, 2, 1).copy().view(np.uint32).ravel(), active)

    def _mma(self, suffixes, operands, active):
        """m16n8k16: see "Matrix Fragments" in NVIDIA's description of PTX for which lane has what."""
        assert suffixes[-4:] == ["f32", "f16", "f16", "f32"] and active.all()
        d, a, b, c = ([name.strip() for name in group.split(",")] for group in operands)
        warps = self.size // 32
        g, j = np.divmod(np.arange(32), 4)

        def halves(name: str) -> np.ndarray:
            return self.lanes(self.read(name).astype(np.uint32)).copy().view(np.float16).reshape(warps, 32, 2)

        left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        for i, name in enumerate(a):
            for half in range(2):
                left[:, g + 8 * (i % 2), 2 * j + half + 8 * (i // 2)] = halves(name)[..., half]
        for i, name in enumerate(b):
            for half in range(2):
                right[:, 2 * j + half + 8 * i, g] = halves(name)[..., half]
        product = left @ right
        for i, name in enumerate(d):
            value = product[:, g + 8 * (i // 2), 2 * j + i % 2].ravel() + self.floats(c[i])
            self.write(name, value.astype(np.float32), active)


def _inline_asm(self, asm: str, constraints: str, values: list, types: list, is_pure: bool, pack: int):
    num_outputs = len(types)
    inputs = []
    for value in values:
        data = value.data
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[data.dtype.itemsize]
        inputs.append(np.ascontiguousarray(data).view(bits).astype(np.uint64))
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    block = Block([np.broadcast_to(x, shape) for x in inputs], num_outputs)
    for statement in re.sub(r"^\s*\{|\}\s*$", "", asm.strip()).split(";"):
        statement = " ".join(statement.split())
        if statement and not statement.startswith(".reg"):
            block.run(statement)
    results = []
    for i, kind in enumerate(types):
        scalar = kind.scalar if hasattr(kind, "scalar") else kind
        words = block.read(f"${i}").astype(np.uint32)
        data = words.view(np.float32) if scalar.is_floating() else words.view(np.int32)
        results.append(TensorHandle(data.reshape(shape).copy(), scalar))
    return SimpleNamespace(get_result=results.__getitem__)


def install() -> None:
    """From here on, Triton's interpreter in this process runs inline PTX."""
    InterpreterBuilder.create_inline_asm = _inline_asm
    tl.core.tuple.__radd__ = lambda self, other: tl.core.tuple([*other, *self.values])  # what the compiler can do, too
