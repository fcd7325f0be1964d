"""Graphs for the scheduler's tests: by hand, of a transformer's shape, and at random."""

from __future__ import annotations

from hypothesis import strategies as st

from tri_mpk.scheduler.graph import Box, Region, Task, TaskGraph, TensorInfo


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


def transformer(num_layers: int, num_workers: int, reuse_buffers: bool) -> TaskGraph:
    """The shape of a decoder's step: every op reads all of the op before; attention goes by head
    and split.

    With `reuse_buffers` all layers share their activation buffers, which adds every
    write-after-read there is.
    """
    graph = TaskGraph(ops=[], tensors={"x": TensorInfo((num_workers,), True)})
    heads, splits = 8, max(1, num_workers // 8)

    def op(name: str, boxes: list[Box], target: str, reads) -> None:
        graph.ops.append(name)
        graph.tensors.setdefault(target, TensorInfo(tuple(hi for _, hi in boxes[-1]), False))
        for tile, box in enumerate(boxes):
            regions = tuple(Region(tensor, read) for tensor, read in reads(tile, box))
            graph.tasks.append(Task(len(graph.ops) - 1, (tile,), regions, (Region(target, box),), cost_bytes=1 << 20))

    tiles: list[Box] = [((i, i + 1),) for i in range(num_workers)]
    whole: Box = ((0, num_workers),)
    parts: list[Box] = [((h, h + 1), (s, s + 1)) for h in range(heads) for s in range(splits)]
    for layer in range(num_layers):
        name = "" if reuse_buffers else f"{layer}."
        names = [name + part for part in ("qkv", "attn", "out", "act", "norm")]
        qkv, attn, out, act, norm = names
        weights = f"{layer}.w"
        graph.tensors[weights] = TensorInfo((num_workers,), True)
        head_tiles = [((h * num_workers // heads, (h + 1) * num_workers // heads),) for h in range(heads)]
        op(f"L{layer:02} qkv", tiles, qkv, lambda i, box, w=weights: [("x", whole), (w, box)])
        op(
            f"L{layer:02} attn",
            parts,
            attn,
            lambda i, box, q=qkv, t=head_tiles: [(q, t[box[0][0]])],
        )
        all_parts = ((0, heads), (0, splits))
        op(f"L{layer:02} o", tiles, out, lambda i, box, a=attn, p=all_parts: [(a, p)])
        op(f"L{layer:02} norm", tiles, norm, lambda i, box, o=out: [(o, whole), ("x", box)])
        op(f"L{layer:02} gate_up", tiles, act, lambda i, box, n=norm: [(n, whole)])
        op(f"L{layer:02} down", tiles, "x", lambda i, box, a=act: [(a, whole), ("x", box)])
    return graph


@st.composite
def graphs(draw: st.DrawFn, max_tasks: int = 12, max_regions: int = 2, reads_are_written: bool = True) -> TaskGraph:
    """Random tasks on random boxes of few small tensors, reused in place, with many readers and
    writers.

    With `reads_are_written` a first task writes the tensors that have no initial data.
    """
    shapes = draw(st.lists(st.sampled_from([(4,), (3,), (2, 3)]), min_size=1, max_size=3))
    tensors = {f"x{i}": TensorInfo(dims, draw(st.booleans())) for i, dims in enumerate(shapes)}
    graph = TaskGraph(["op0"], [], tensors)
    empty = [name for name, info in tensors.items() if not info.initialised]
    if empty and reads_are_written:
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
