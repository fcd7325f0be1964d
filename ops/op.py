"""What an op is: a tile function, the cut of its work into tasks, and its torch reference.

The signature of the tile function is the declaration of the op's task descriptor: packing on the host and unpacking in
the kernel both come from it. A parameter named

* `*_ptr` is a typed pointer field (16-byte aligned), `*_addr` a byte address (int64), any other name an int32 field;
* in KERNEL_PARAMETERS comes from the kernel itself (its task, events, epoch, position, weight ring, ...);
* annotated `tl.constexpr` is fixed at generation, by the op's cut or, if in MACHINE_CONSTANTS, for the whole kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from triton.runtime.jit import JITFunction

from tri_mpk.scheduler.graph import Address, Region, Task, Value

KERNEL_PARAMETERS = (
    "task", "event_ptr", "control_ptr", "logits_ptr", "mailbox_ptr", "epoch", "step", "step_ptr", "ring",
)  # fmt: skip
MACHINE_CONSTANTS = ("PORTABLE", "RING", "PREFETCH", "WEIGHT", "BLOCK_K", "RANKS")


@dataclass(slots=True, eq=False)
class TensorHandle:
    """A tensor of the model graph."""

    name: str
    dims: tuple[int, ...]
    dtype: torch.dtype
    data: torch.Tensor | None = None  # attached by the user; None: allocated when the kernel is compiled
    symmetric: bool = False

    @property
    def numel(self) -> int:
        return int(torch.Size(self.dims).numel())

    def span(self, lo: int, hi: int) -> Region:
        """Elements lo to hi, in row-major order. Regions have two coordinates; most ops need only the second."""
        return Region(self.name, ((0, 1), (lo, hi)))

    def whole(self) -> Region:
        return self.span(0, self.numel)

    def columns(self, lo: int, hi: int) -> Region:
        """Columns lo to hi of a matrix, as a box in two coordinates. Not to be mixed with `span` of the same tensor."""
        return Region(self.name, ((0, self.dims[0]), (lo, hi)))

    def box(self, *box: tuple[int, int]) -> Region:
        """A region in coordinates of the op's own; see Region."""
        return Region(self.name, box)


TENSOR_MAPS = "tensor_maps"  # the tensor that holds them
TENSOR_MAP_WORDS = 16  # int64


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Tells the copy engine how a matrix of 16-bit numbers lies in memory, and what one request brings: 64 columns of
    `box_rows` rows, swizzled by 128 bytes, zeros where there is nothing.
    """

    tensor: str
    num_rows: int
    num_columns: int
    box_rows: int


class TensorMaps:
    """Those that a kernel needs. The runtime makes them, since they hold addresses."""

    def __init__(self) -> None:
        self.places: dict[TensorMap, int] = {}

    def of(self, tensor: TensorHandle, num_rows: int, num_columns: int, box_rows: int) -> Address:
        place = self.places.setdefault(TensorMap(tensor.name, num_rows, num_columns, box_rows), len(self.places))
        return Address(TENSOR_MAPS, place * TENSOR_MAP_WORDS)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a cut may know about where it will run."""

    num_workers: int
    block_n: int  # rows of a weight tile, where there is no ring
    slot_bytes: int  # of the weight rings in shared memory; 0: there are none
    maps: TensorMaps | None = None  # of weights that come in panels (ops/panels.py); None: there is no `wgmma`

    @property
    def ring(self) -> bool:
        return self.slot_bytes > 0


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    name: str
    tile: JITFunction
    cut: Callable[..., Cut]
    reference: Callable[..., object]
    waits_for_ranks: bool = False  # other ranks may signal the event that its tasks wait for
    ends_step: bool = False  # it says whether there is another step; a graph needs one that does


@dataclass(slots=True)
class Cut:
    """The tasks of one call of an op, and the constants of the variant that runs them."""

    constants: dict[str, object]
    pointers: dict[str, TensorHandle]  # pointer field -> the tensor whose element type it has
    tasks: list[Task] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)  # that its tasks write, or read as others left them

    def addresses(self) -> dict[str, Address]:
        """Fields that all tasks have in common: each pointer at the beginning of its tensor."""
        return {name: Address(tensor.name) for name, tensor in self.pointers.items()}


class Policy(Enum):
    """Who decides which worker runs a task."""

    STATIC = "static"  # the host: each worker has a queue
    DYNAMIC = "dynamic"  # the kernel: whichever worker is free takes the next task that has become ready


@dataclass(slots=True, eq=False)
class OpCall:
    """One op of the model graph. `tensors` and `options` are the keyword arguments of the op's cut."""

    op: Op
    label: str  # for people: "L03 gate_up"
    tensors: dict[str, TensorHandle | None]
    options: dict[str, object]
    grid_dim: int | None = None  # number of tasks along the rows; None: cut for the machine
    policy: Policy = Policy.STATIC


def check_grid(op: str, grid_dim: int | None, num_tasks: int, what: str) -> None:
    """ValueError where another number of tasks is asked for than the op can have; `what`: which that is, in words."""
    if grid_dim not in (None, num_tasks):
        raise ValueError(f"{op} has {what}, got grid_dim={grid_dim}; leave grid_dim out")


def even_ranges(total: int, num_ranges: int) -> Iterator[tuple[int, int]]:
    """`total` items in `num_ranges` consecutive ranges whose lengths differ by at most one.

    >>> list(even_ranges(7, 3))
    [(0, 2), (2, 4), (4, 7)]
    """
    for i in range(num_ranges):
        yield i * total // num_ranges, (i + 1) * total // num_ranges


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
