"""Inline PTX in Triton's interpreter: as much of it as the work by warps in ops/ uses, on numpy arrays.

A tensor [WARPS, LANES] is a block's threads, one element each, so that shuffles and matrix instructions find the other
lanes of a warp. All threads go through an instruction before the next one, except behind branches, so barriers of the
block mean nothing here; those in shared memory (mbarrier) are counted, and bulk copies are done at once.
"""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

THREADS = (16, 32)  # what has no inputs is the same in all threads, or says which thread it is
NUM_THREADS = 512
ALONE = 480  # the thread that prefetches
SHARED_BYTES = 232448
STREAMS_BYTES = 16 << 10  # of those, in front of address 0
shared = np.zeros(SHARED_BYTES, np.uint8)


def _gather(memory: np.ndarray, index: np.ndarray, num_bytes: int) -> np.ndarray:
    return memory[index[:, None] + np.arange(num_bytes)]


def _shared_index(addresses: np.ndarray) -> np.ndarray:
    index = addresses.astype(np.uint32).view(np.int32).astype(int) + STREAMS_BYTES
    assert ((index >= 0) & (index < SHARED_BYTES)).all(), "an address beyond shared memory"
    return index


def _memory(addresses: np.ndarray, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The stretch of this process's memory that the addresses lie in, as bytes, and where they lie in it."""
    low, high = int(addresses.min()), int(addresses.max()) + num_bytes
    assert high - low < 1 << 30, "addresses of different tensors in one instruction"
    return np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8), (addresses - low).astype(int)


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all bytes of it are in."""

    def __init__(self, count: int):
        self.count = self.arrivals = count
        self.bytes = self.phase = 0

    def arrive(self, num_bytes: int = 0) -> None:
        self.arrivals -= 1
        assert self.arrivals >= 0, "more arrivals than the barrier counts"
        self.transfer(num_bytes)

    def transfer(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals, self.phase = self.count, self.phase ^ 1


barriers: dict[int, Barrier] = {}


class Block:
    """One run of an inline assembly: registers by name, as uint64 [threads]."""

    def __init__(self, inputs: list[np.ndarray], num_outputs: int):
        self.size = max((x.size for x in inputs), default=NUM_THREADS)
        self.registers = {f"${num_outputs + i}": np.broadcast_to(x.ravel(), self.size) for i, x in enumerate(inputs)}
        self.registers["%tid.x"] = np.arange(self.size, dtype=np.uint64)
        if self.size == 1:  # what is done with scalars is the same in all threads, or done by one that acts alone
            self.registers["%tid.x"] = np.full(1, ALONE, np.uint64)

    def read(self, name: str) -> np.ndarray:
        name = name.strip()
        if name in self.registers:
            return self.registers[name]
        value = np.float32(float(name)).view(np.uint32) if "." in name else int(name, 0) & 0xFFFFFFFF
        return np.full(self.size, value, np.uint64)

    def floats(self, name: str) -> np.ndarray:
        return self.read(name).astype(np.uint32).view(np.float32)

    def integers(self, name: str) -> np.ndarray:
        return self.read(name).astype(np.uint32).view(np.int32).astype(np.int64)

    def write(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        old = self.registers.get(name, np.zeros(self.size, np.uint64))
        self.registers[name] = np.where(active, value.astype(np.uint64), old)

    def addresses(self, operand: str) -> np.ndarray:
        """Of `[register + offset]`."""
        register, _, offset = operand.strip("[] ").partition("+")
        return self.read(register) + np.uint64(int(offset or 0))

    def lanes(self, x: np.ndarray) -> np.ndarray:
        assert self.size % 32 == 0, "a warp instruction needs whole warps"
        return x.reshape(-1, 32)

    def execute(self, asm: str) -> None:
        """All threads, each as far as its branches lead it; those that are behind go first."""
        statements, labels = [], {}
        for statement in re.sub(r"^\s*\{|\}\s*$", "", asm.strip()).split(";"):
            statement = " ".join(statement.split())
            label = re.match(r"(\w+): ", statement)
            if label:
                labels[label[1]] = len(statements)
                statement = statement[label.end() :]
            if statement and not statement.startswith(".reg"):
                statements.append(statement)
        at = np.zeros(self.size, int)
        for _ in range(10_000):
            line = at.min()
            if line == len(statements):
                return
            active = at == line
            statement = statements[line]
            if statement.startswith("@"):
                predicate, statement = statement[1:].split(None, 1)
                wanted = self.read(predicate.lstrip("!")) != 0
                condition = active & (~wanted if predicate.startswith("!") else wanted)
            else:
                condition = active
            at[active] += 1
            if statement.startswith("bra "):
                at[condition] = labels[statement.split()[1]]
            elif condition.any():
                self.run(statement, condition)
        raise AssertionError("a loop that does not end: nothing else runs that could end it")

    # ---- instructions ----

    def run(self, statement: str, active: np.ndarray) -> None:
        opcode, _, rest = statement.partition(" ")
        operands = [part.strip("{} ") for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        kind, *suffixes = opcode.replace("::", ".").split(".")
        getattr(self, f"_{kind}")(suffixes, operands, active)

    def _mov(self, suffixes, operands, active):
        self.write(operands[0], self.read(operands[1]), active)

    def _setp(self, suffixes, operands, active):
        compare = {"ne": np.not_equal, "eq": np.equal, "lt": np.less, "gt": np.greater, "ge": np.greater_equal}
        read = self.integers if suffixes[1] == "s32" else self.read
        self.write(operands[0], compare[suffixes[0]](read(operands[1]), read(operands[2])), active)

    def _selp(self, suffixes, operands, active):
        value = np.where(self.read(operands[3]) != 0, self.read(operands[1]), self.read(operands[2]))
        self.write(operands[0], value, active)

    def _mad(self, suffixes, operands, active):
        assert suffixes[0] == "lo"
        a, b, c = (self.integers(name) for name in operands[1:])
        self.write(operands[0], (a * b + c).astype(np.int32).view(np.uint32), active)

    def _shl(self, suffixes, operands, active):
        self.write(operands[0], self.read(operands[1]) << self.read(operands[2]) & np.uint64(0xFFFFFFFF), active)

    def _and(self, suffixes, operands, active):
        self.write(operands[0], self.read(operands[1]) & self.read(operands[2]), active)

    def _xor(self, suffixes, operands, active):
        self.write(operands[0], self.read(operands[1]) ^ self.read(operands[2]), active)

    def _bfe(self, suffixes, operands, active):
        x, begin, length = (self.read(name) for name in operands[1:])
        self.write(operands[0], x >> begin & (np.uint64(1) << length) - np.uint64(1), active)

    def _min(self, suffixes, operands, active):
        assert suffixes == ["s32"]
        value = np.minimum(self.integers(operands[1]), self.integers(operands[2]))
        self.write(operands[0], value.astype(np.int32).view(np.uint32), active)

    def _sub(self, suffixes, operands, active):
        value = self.integers(operands[1]) - self.integers(operands[2])
        self.write(operands[0], value.astype(np.int32).view(np.uint32), active)

    def _cvt(self, suffixes, operands, active):
        if suffixes == ["u16", "u32"]:
            value = self.read(operands[1]) & 0xFFFF
        elif suffixes in (["u32", "u64"], ["u64", "u32"]):
            value = self.read(operands[1]) & 0xFFFFFFFF
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
        if suffixes == ["f32"]:
            self.write(operands[0], self.floats(operands[1]) + self.floats(operands[2]), active)
        elif suffixes == ["u64"]:
            self.write(operands[0], self.read(operands[1]) + self.read(operands[2]), active)
        else:
            value = self.integers(operands[1]) + self.integers(operands[2])
            self.write(operands[0], value.astype(np.int32).view(np.uint32), active)

    def _shfl(self, suffixes, operands, active):
        assert suffixes[:2] == ["sync", "bfly"] and active.all()
        other = np.arange(32) ^ int(operands[2])
        self.write(operands[0], self.lanes(self.read(operands[1]))[:, other].ravel(), active)

    def _ld(self, suffixes, operands, active):
        names = [name.strip() for name in operands[0].split(",")]
        width = 8 if suffixes[-1] == "b64" else 4
        size = width * len(names)
        address = self.addresses(operands[1])
        if suffixes[0] == "shared":
            memory, where = shared, _shared_index(address[active])
        else:
            memory, where = _memory(address[active], size)
        assert not (where % size if suffixes[0] == "shared" else address[active] % size).any(), "a misaligned load"
        index = np.zeros(self.size, int)
        index[active] = where
        words = _gather(memory, index, size).copy().view(np.uint64 if width == 8 else np.uint32)
        for i, name in enumerate(names):
            self.write(name, words[:, i], active)

    def _st(self, suffixes, operands, active):
        assert suffixes[0] == "shared"
        width = {"b16": 2, "b64": 8}.get(suffixes[-1], 4)
        names = [name.strip() for name in operands[1].split(",")]
        address = _shared_index(self.addresses(operands[0])[active])
        assert not (address % (width * len(names))).any(), "a misaligned store"
        for i, name in enumerate(names):
            value = self.read(name)[active].astype({2: np.uint16, 4: np.uint32, 8: np.uint64}[width]).view(np.uint8)
            shared[address[:, None] + width * i + np.arange(width)] = value.reshape(-1, width)

    # ---- the ring: copies are there at once, so whoever waits for one that was not asked for waits for ever ----

    def _mbarrier(self, suffixes, operands, active):
        address = self.addresses(next(operand for operand in operands if operand.startswith("[")))
        for thread in np.flatnonzero(active):
            at = int(address[thread])
            if suffixes[0] == "init":
                barriers[at] = Barrier(int(self.read(operands[1])[thread]))
            elif suffixes[0] == "arrive":
                expected = int(self.read(operands[2])[thread]) if "expect_tx" in suffixes else 0
                barriers[at].arrive(expected)
            else:
                over = barriers[at].phase != int(self.read(operands[2])[thread])
                one = np.zeros(self.size, bool)
                one[thread] = True
                self.write(operands[0], np.full(self.size, over), one)

    def _cp(self, suffixes, operands, active):
        assert suffixes[:2] == ["async", "bulk"]
        for thread in np.flatnonzero(active):
            to, source, barrier = (int(self.addresses(operands[i])[thread]) for i in (0, 1, 3))
            num_bytes = int(self.read(operands[2])[thread])
            assert not (to % 16 or source % 16 or num_bytes % 16), "a misaligned bulk copy"
            begin = int(_shared_index(np.array([to], np.uint64))[0])
            shared[begin : begin + num_bytes] = np.frombuffer(ctypes.string_at(source, num_bytes), np.uint8)
            barriers[barrier].transfer(-num_bytes)

    def _createpolicy(self, suffixes, operands, active): ...
    def _fence(self, suffixes, operands, active): ...
    def _bar(self, suffixes, operands, active): ...

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
    shape = np.broadcast_shapes(*(value.data.shape for value in values)) if values else THREADS
    block = Block([np.broadcast_to(x, shape) for x in inputs], num_outputs)
    block.execute(asm)
    results = []
    for i, kind in enumerate(types):
        scalar = kind.scalar if hasattr(kind, "scalar") else kind
        words = block.read(f"${i}")
        if scalar.primitive_bitwidth == 64:
            data = words.astype(np.uint64).view(np.int64)
        else:
            data = words.astype(np.uint32).view(np.float32 if scalar.is_floating() else np.int32)
        results.append(TensorHandle(data.reshape(shape).copy(), scalar))
    return SimpleNamespace(get_result=results.__getitem__)


def install() -> None:
    """From here on, Triton's interpreter in this process runs inline PTX."""
    InterpreterBuilder.create_inline_asm = _inline_asm
    tl.core.tuple.__radd__ = lambda self, other: tl.core.tuple([*other, *self.values])  # what the compiler can do, too
