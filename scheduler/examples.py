"""Large graphs of known shapes, on which the time of `verify` is measured: a decoder's step, and a butterfly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .events import derive_events, event_tensors
from .graph import STEP_EVENT, Box, Event, Events, Guard, Region, Task, TaskGraph, TensorInfo, Value

HEADS = 8
NUM_WORKERS = 132


def decoder_graph(num_layers: int, num_workers: int, reuse_buffers: bool) -> TaskGraph:
    """The shape of a decoder's step: every op reads all of the op before; attention goes by head and split.

    With `reuse_buffers` all layers share their activation buffers, which adds every write-after-read there is.
    """
    graph = TaskGraph(tensors={"x": TensorInfo((num_workers,), True)})
    splits = max(1, num_workers // HEADS)

    def op(name: str, boxes: list[Box], target: str, reads: Callable[[int, Box], list[tuple[str, Box]]]) -> None:
        graph.ops.append(name)
        graph.tensors.setdefault(target, TensorInfo(tuple(hi for _, hi in boxes[-1]), False))
        for tile, box in enumerate(boxes):
            regions = tuple(Region(tensor, read) for tensor, read in reads(tile, box))
            graph.tasks.append(Task(len(graph.ops) - 1, (tile,), regions, (Region(target, box),), cost_bytes=1 << 20))

    tiles: list[Box] = [((i, i + 1),) for i in range(num_workers)]
    whole: Box = ((0, num_workers),)
    parts: list[Box] = [((h, h + 1), (s, s + 1)) for h in range(HEADS) for s in range(splits)]
    all_parts: Box = ((0, HEADS), (0, splits))
    head_tiles = [((h * num_workers // HEADS, (h + 1) * num_workers // HEADS),) for h in range(HEADS)]
    for layer in range(num_layers):
        prefix, label = "" if reuse_buffers else f"{layer}.", f"L{layer:02}"
        qkv, attn, out, act, norm = (prefix + part for part in ("qkv", "attn", "out", "act", "norm"))
        weights = f"{layer}.w"
        graph.tensors[weights] = TensorInfo((num_workers,), True)
        op(f"{label} qkv", tiles, qkv, lambda i, box, w=weights: [("x", whole), (w, box)])
        op(f"{label} attn", parts, attn, lambda i, box, q=qkv: [(q, head_tiles[box[0][0]])])
        op(f"{label} o", tiles, out, lambda i, box, a=attn: [(a, all_parts)])
        op(f"{label} norm", tiles, norm, lambda i, box, o=out: [(o, whole), ("x", box)])
        op(f"{label} gate_up", tiles, act, lambda i, box, n=norm: [(n, whole)])
        op(f"{label} down", tiles, "x", lambda i, box, a=act: [(a, whole), ("x", box)])
    return graph


def butterfly_graph(num_stages: int, log2_width: int) -> TaskGraph:
    """The data flow of a fast Fourier transform: task i of stage s reads tiles i and i xor 2^s of the stage before.

    All tiles lie in one tensor, and every pair of them has an event of its own, about half as many events as tasks.
    """
    width = 1 << log2_width
    graph = TaskGraph(tensors={"x": TensorInfo((1, width), True), "y": TensorInfo((num_stages, width), False)})
    for stage in range(num_stages):
        source, row = ("y", stage - 1) if stage else ("x", 0)
        graph.ops.append(f"stage{stage}")
        for i in range(width):
            pair = (i, i ^ (1 << stage % log2_width))
            reads = tuple(Region(source, ((row, row + 1), (j, j + 1))) for j in pair)
            writes = (Region("y", ((stage, stage + 1), (i, i + 1))),)
            graph.tasks.append(Task(stage, (i,), reads, writes, cost_bytes=1 << 20))
    return graph


def butterfly_events(graph: TaskGraph, log2_width: int) -> Events:
    """What `derive_events` makes of a butterfly, whose sets of ancestors would fill gigabytes."""
    width, num_tasks = 1 << log2_width, len(graph.tasks)
    last = list(range(num_tasks - width, num_tasks))
    events = [Event(last, [], len(last))]
    wait, signals = [-1] * num_tasks, [[STEP_EVENT] for _ in range(num_tasks)]
    for first in range(0, num_tasks - width, width):
        distance = 1 << (first // width + 1) % log2_width
        for i in (i for i in range(width) if not i & distance):
            producers = [first + i, first + i + distance]
            consumers = [task + width for task in producers]
            for task in producers:
                signals[task] = [len(events)]
            for task in consumers:
                wait[task] = len(events)
            events.append(Event(producers, consumers, 2))
    num_fused = len(events) - 1
    tensors = event_tensors(graph, events)
    return Events(events, wait, signals, tensors=tensors, num_pairs=4 * num_fused, max_pairs=2 if num_fused else 0)


def experts_graph(num_layers: int, num_tokens: int, num_experts: int, num_tiles: int) -> TaskGraph:
    """Mixtures of experts: a router gives each token the id of an expert, of which each has `num_tiles` tasks.

    dispatch -> expert is signalled by id, expert -> combine is waited for by id. All layers share their buffers.
    """
    row: Box = ((0, num_tokens),)
    graph = TaskGraph(
        tensors={"x": TensorInfo((num_tokens,), True), "ids": TensorInfo((num_layers, num_tokens), False)}
    )
    graph.tensors |= {"xin": TensorInfo((num_tokens,), False), "y": TensorInfo((num_tokens, num_tiles), False)}

    def add(name: str, tile: tuple[int, ...], reads: list[Region], writes: list[Region], **more: tuple) -> None:
        if graph.ops[-1:] != [name]:
            graph.ops.append(name)
        graph.tasks.append(Task(len(graph.ops) - 1, tile, tuple(reads), tuple(writes), 1 << 20, **more))

    for layer in range(num_layers):
        label, names = f"L{layer:02}", [f"id{layer}.{token}" for token in range(num_tokens)]
        ids = [Region("ids", ((layer, layer + 1), (t, t + 1))) for t in range(num_tokens)]
        graph.values |= {name: Value(cell, 0, num_experts) for name, cell in zip(names, ids, strict=True)}
        add(f"{label} router", (0,), [Region("x", row)], ids, announces=tuple(names))
        for t in range(num_tokens):
            one = (t, t + 1)
            taken = [Region("xin", (one,)), Region("y", (one, (0, num_tiles)))]
            add(f"{label} dispatch", (t,), [Region("x", (one,)), ids[t]], taken)
        for e, j in itertools.product(range(num_experts), range(num_tiles)):
            reads, writes = list(ids), []
            for t, name in enumerate(names):
                chosen = Guard(name, e, e + 1)
                reads.append(Region("xin", ((t, t + 1),), chosen))
                writes.append(Region("y", ((t, t + 1), (j, j + 1)), chosen))
            add(f"{label} expert", (e, j), reads, writes)
        for t in range(num_tokens):
            one = (t, t + 1)
            add(f"{label} combine", (t,), [ids[t], Region("y", (one, (0, num_tiles)))], [Region("x", (one,))])
    return graph


def large_graphs(num_tasks: int) -> Iterator[tuple[str, TaskGraph, Events]]:
    """(what it is, the graph, its events), of `num_tasks` tasks or a few more."""
    num_layers = -(-num_tasks // len(decoder_graph(1, NUM_WORKERS, True).tasks))
    graph = decoder_graph(num_layers, NUM_WORKERS, reuse_buffers=True)
    yield f"decoder of {num_layers} layers", graph, derive_events(graph)
    log2_width = 10 if num_tasks >= 1 << 14 else 4
    num_stages = -(-num_tasks // (1 << log2_width))
    graph = butterfly_graph(num_stages, log2_width)
    yield f"butterfly of {num_stages} stages", graph, butterfly_events(graph, log2_width)
    num_layers = -(-num_tasks // (1 + 4 + 16 * 8 + 4))
    graph = experts_graph(num_layers, num_tokens=4, num_experts=16, num_tiles=8)
    yield f"experts of {num_layers} layers", graph, derive_events(graph)
