"""Graphs for the scheduler's tests: by hand, and at random."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from tri_mpk.scheduler.explore import Cell, Machine, cells
from tri_mpk.scheduler.graph import Events, Region, Schedule, Task, TaskGraph, TensorInfo

Instance = tuple[int, int]  # (epoch, task): sorts in program order


class GraphBuilder:
    """`b.op("a")`, then `b.task(reads=["x[0:4]"], writes=["y[0:2]"])`: boxes as text, as the errors
    print them."""

    def __init__(self, **tensors: tuple[tuple[int, ...], bool]) -> None:
        infos = {name: TensorInfo(dims, initialised) for name, (dims, initialised) in tensors.items()}
        self.graph = TaskGraph(tensors=infos)

    def op(self, name: str) -> None:
        self.graph.ops.append(name)

    def task(self, reads: list[str] = (), writes: list[str] = (), cost: int = 1) -> int:
        graph = self.graph
        op = len(graph.ops) - 1
        tile = (sum(task.op == op for task in graph.tasks),)
        graph.tasks.append(Task(op, tile, _regions(reads), _regions(writes), cost))
        return len(graph.tasks) - 1


def _regions(texts: list[str]) -> tuple[Region, ...]:
    return tuple(region(text) for text in texts)


def region(text: str) -> Region:
    """`x[0:4, 2:3]` as a Region."""
    tensor, _, box = text.rstrip("]").partition("[")
    return Region(tensor, tuple(tuple(map(int, part.split(":"))) for part in box.split(",")))


def chain(num_tiles: int = 1) -> TaskGraph:
    """a writes x, b reads x and writes y, c reads y: `num_tiles` tasks each, every task reading all
    tiles."""
    builder = GraphBuilder(x=((num_tiles,), False), y=((num_tiles,), False), z=((num_tiles,), False))
    for name, source, target in (("a", None, "x"), ("b", "x", "y"), ("c", "y", "z")):
        builder.op(name)
        for tile in range(num_tiles):
            reads = [f"{source}[0:{num_tiles}]"] if source else []
            builder.task(reads, [f"{target}[{tile}:{tile + 1}]"])
    return builder.graph


@st.composite
def graphs(draw: st.DrawFn, max_tasks: int = 12, max_regions: int = 2) -> TaskGraph:
    """Random tasks on random boxes of few small tensors, reused in place, with many readers and
    writers.

    A first task writes the tensors that have no initial data.
    """
    shapes = draw(st.lists(st.sampled_from([(4,), (3,), (2, 3)]), min_size=1, max_size=3))
    tensors = {f"x{i}": TensorInfo(dims, draw(st.booleans())) for i, dims in enumerate(shapes)}
    graph = TaskGraph(["op0"], [], tensors)
    empty = [name for name, info in tensors.items() if not info.initialised]
    if empty:
        whole = {name: tuple((0, size) for size in tensors[name].dims) for name in empty}
        graph.tasks.append(Task(0, (0,), (), tuple(Region(n, b) for n, b in whole.items()), 1))
    while len(graph.tasks) < max_tasks and (draw(st.integers(0, 9)) or not graph.tasks):
        if draw(st.booleans()):
            graph.ops.append(f"op{len(graph.ops)}")
        reads, writes = draw(regions(tensors, max_regions)), draw(regions(tensors, max_regions))
        tile = (len(graph.tasks),)
        graph.tasks.append(Task(len(graph.ops) - 1, tile, reads, writes, draw(st.integers(0, 3))))
    return graph


@st.composite
def regions(draw: st.DrawFn, tensors: dict[str, TensorInfo], max_regions: int) -> tuple[Region, ...]:
    def interval(size: int) -> tuple[int, int]:
        lo = draw(st.integers(0, size - 1))
        return lo, draw(st.integers(lo + 1, size))

    names = draw(st.lists(st.sampled_from(sorted(tensors)), max_size=max_regions))
    return tuple(Region(name, tuple(map(interval, tensors[name].dims))) for name in names)


def run_at_random(graph: TaskGraph, events: Events, schedule: Schedule, num_epochs: int, seed: int) -> None:
    """Run one interleaving on symbolic memory; every read must see the version that program order says."""
    chooser = random.Random(seed)
    machine = Machine(events, schedule)
    state, order = machine.start(), []
    while ready := [(w, epoch, task) for w, epoch, task in machine.enabled(state) if epoch <= num_epochs]:
        worker, epoch, task = chooser.choice(ready)
        state = machine.after(state, worker)
        if task is not None:
            order.append((epoch, task))
    assert len(order) == num_epochs * len(graph.tasks), f"stuck after {order}"
    assert _versions_read(graph, order) == _versions_read(graph, sorted(order))


def _versions_read(graph: TaskGraph, order: list[Instance]) -> dict[Instance, list]:
    """What each task instance reads, cell by cell, as the name of the instance that wrote it; and the final memory."""
    memory: dict[Cell, Instance] = {}
    seen = {}
    for instance in order:
        task = graph.tasks[instance[1]]
        seen[instance] = [memory.get(cell) for region in task.reads for cell in sorted(cells(region))]
        memory.update((cell, instance) for region in task.writes for cell in cells(region))
    seen[(0, -1)] = sorted(memory.items())
    return seen
