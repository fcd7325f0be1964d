"""The inline PTX of ops/panels.py, thread by thread: who asks for what, when, and what is there when it is multiplied.

A thread is a lane that does something of its own: one of each warp that multiplies, and those that ask for panels. They
take turns at random, an instruction at a time, and a copy is there at once. Memory holds what was asked for where.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import triton.language as tl

from ptx_emulator import Barrier
from tri_mpk.ops import panels

MASK = (1 << 32) - 1
THREADS = (0, 32, 64, 96, *range(128, 132), *range(160, 164))
COMPARE = {"ne": operator.ne, "eq": operator.eq, "lt": operator.lt, "gt": operator.gt, "le": operator.le}
BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.floordiv, "rem": operator.mod,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "shl": operator.lshift, "shr": operator.rshift,
    "min": min,
}  # fmt: skip


def statements_of(function: str, **names: object) -> list[str]:
    """Of the assembly in a function of ops/panels.py, with its constants put in."""
    constants = {name: x.value for name, x in vars(panels).items() if isinstance(x, tl.constexpr)}
    tree = ast.parse(Path(panels.__file__).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)

    def put_in(text: ast.JoinedStr) -> str:
        return eval(compile(ast.Expression(text), function, "eval"), constants | names)

    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.JoinedStr):
            names[node.target.id] = put_in(node.value)
    texts = (node for node in ast.walk(body) if isinstance(node, ast.JoinedStr))
    asm = put_in(max(texts, key=lambda node: len(node.values)))
    asm = re.sub(r"//[^\n]*", "", asm).strip()[1:-1]
    return [" ".join(statement.split()) for statement in asm.split(";") if statement.strip()]


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


class Emulator(ABC):
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.barriers: dict[int, Barrier] = {}
        self.words: dict[int, int] = {}  # shared memory
        self.requests: dict[int, tuple[int, int, int]] = {}  # where -> map, column, row
        self.multiplied: list[tuple[int, int, int]] = []  # thread, address of weights, of activations

    def run(self, statements: list[str], inputs: list[int]) -> None:
        """All threads, until each is at the end."""
        threads = {tid: self.thread(tid, statements, inputs) for tid in THREADS}
        at_barrier: set[int] = set()
        for _ in range(3_000_000):
            ready = [tid for tid in threads if tid not in at_barrier]
            if not ready:
                if not threads:
                    return
                at_barrier.clear()
                continue
            tid = self.random.choice(ready)
            for _ in range(self.random.randint(1, 40)):
                state = next(threads[tid], "end")
                if state == "end":
                    del threads[tid]
                elif state == "barrier":
                    at_barrier.add(tid)
                if state:
                    break
        raise AssertionError("threads wait for each other for ever")

    def thread(self, tid: int, statements: list[str], inputs: list[int]) -> Iterator[str]:
        """Yields after each instruction: "barrier", "waits" or ""."""
        registers: dict[str, int] = {f"${i}": value for i, value in enumerate(inputs, 1)} | {"%tid.x": tid}
        code, labels = [], {}
        for statement in statements:
            while label := re.match(r"(\w+): ", statement):
                labels[label[1]] = len(code)
                statement = statement[label.end() :]
            if not statement.startswith(".reg"):
                code.append(statement)

        def read(name: str) -> int:
            name = name.strip()
            return registers[name] if name in registers else 0 if name.startswith("0f") else int(name, 0)

        def address(operand: str) -> int:
            return sum(map(read, operand.strip("[] ").split("+")))

        at = 0
        while at < len(code):
            statement = code[at]
            at += 1
            if statement.startswith("@"):
                predicate, statement = statement[1:].split(None, 1)
                if bool(read(predicate.lstrip("!"))) == predicate.startswith("!"):
                    continue
            opcode, _, rest = statement.partition(" ")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            kind, *suffixes = opcode.replace("::", ".").split(".")
            bits = 64 if suffixes and suffixes[-1] in ("u64", "s64", "b64") else 32
            state = ""
            if kind in ("createpolicy", "fence"):  # nothing that is seen here
                continue
            elif kind == "bra":
                at = labels[operands[0]]
            elif kind == "bar":
                state = "barrier" if suffixes == ["sync"] else ""
            elif kind in ("mov", "cvt"):
                low, *high = map(read, operands[1].strip("{}").split(","))
                value = low | high[0] << 32 if high else low
                if suffixes == ["s64", "s32"]:
                    value = signed(value, 32)
                registers[operands[0]] = value & (1 << 64) - 1 if kind == "cvt" else value
            elif kind == "setp":
                a, b = (read(name) for name in operands[1:3])
                if suffixes[-1] == "s32":
                    a, b = signed(a, 32), signed(b, 32)
                value = COMPARE[suffixes[0]](a, b)
                if len(suffixes) == 3:
                    value = (value and read(operands[3])) if suffixes[1] == "and" else (value or read(operands[3]))
                registers[operands[0]] = int(bool(value))
            elif kind == "selp":
                registers[operands[0]] = read(operands[1 if read(operands[3]) else 2])
            elif kind == "mad":
                registers[operands[0]] = read(operands[1]) * read(operands[2]) + read(operands[3]) & MASK
            elif kind in BINARY:
                registers[operands[0]] = BINARY[kind](read(operands[1]), read(operands[2])) & (1 << bits) - 1
            elif kind == "ld":
                names = operands[0].strip("{}").split(",")
                for i, name in enumerate(names):
                    registers[name.strip()] = self.words[address(operands[1]) + 4 * i]
            elif kind == "st":
                for i, name in enumerate(operands[1].strip("{}").split(",")):
                    self.words[address(operands[0]) + 4 * i] = read(name)
            elif kind == "mbarrier":
                where = address(next(operand for operand in operands if operand.startswith("[")))
                if suffixes[0] == "init":
                    self.barriers[where] = Barrier(read(operands[1]))
                elif suffixes[0] == "arrive":
                    self.barriers[where].arrive(read(operands[2]) if "expect_tx" in suffixes else 0)
                else:
                    over = self.barriers[where].phase != read(operands[2])
                    registers[operands[0]] = int(over)
                    state = "" if over else "waits"
            elif kind == "cp":
                tensor_map, column, row = (read(x) for x in re.sub(r"[\[\]{}]", "", operands[1]).split(","))
                self.requests[address(operands[0])] = tensor_map, column, row
                self.barriers[address(operands[2])].transfer(-self.request_bytes(tensor_map))
            elif kind == "wgmma":
                if suffixes[0] == "mma_async":
                    weights, x = ((read(name) & 0x3FFF) << 4 for name in operands[1:3])
                    self.multiply(tid, weights, x)
            else:
                raise AssertionError(f"{statement} is not known here")
            yield state

    @abstractmethod
    def request_bytes(self, tensor_map: int) -> int:
        """What a request of this map brings."""

    @abstractmethod
    def multiply(self, tid: int, weights: int, x: int) -> None:
        """A thread multiplies what lies at these addresses."""
