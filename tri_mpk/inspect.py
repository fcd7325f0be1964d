"""Look at a kernel before it runs: its tasks, events, balance and critical path. Needs neither weights nor a GPU."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from tri_mpk.cost_model import estimate, kv_blocks
from tri_mpk.errors import CheckpointError, UnsupportedModelError
from tri_mpk.generator import write_source
from tri_mpk.gpu_profile import GpuProfile
from tri_mpk.labels import split_label
from tri_mpk.loading import empty_model
from tri_mpk.model import PAGE_SIZE
from tri_mpk.models import describe
from tri_mpk.models.decoder import build
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT, imbalance
from tri_mpk.scheduler.passes import pass_effects
from tri_mpk.sharding import Shard
from tri_mpk.tuning import Tuning

# ---- planning without a device ----


def load_config(name_or_path: str, **hub: object) -> PreTrainedConfig:
    """The config of a checkpoint folder, of a hub name, or of a config.json file."""
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError) as error:
        if "model type" in str(error):
            raise UnsupportedModelError(f"{name_or_path}: {error}".splitlines()[0]) from error
        raise CheckpointError(f"cannot read the config of {name_or_path}: {error}".splitlines()[0]) from error


def plan_config(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    max_seq_len: int,
    num_workers: int | None = None,
    bulk_copies: bool = True,
    tuning: Tuning | None = None,
    profile: bool = False,
    policy: str = "static",
    world_size: int = 1,
    rank: int = 0,
) -> Program:
    """The program of a GPU kernel with `num_workers` workers, or with that tuning, planned on the meta device.

    `bulk_copies`: it has what the weight ring needs, as Hopper and the data-centre Blackwells do.
    """
    shard = None
    if world_size > 1:
        shard = Shard(config, rank, world_size)
        config = shard.local_config()
    shape = describe(config, max_seq_len)
    step = torch.zeros(1, dtype=torch.int32, device="meta")
    tokens = torch.zeros(max_seq_len, dtype=torch.int64, device="meta")
    kernel = PersistentKernel(
        world_size, rank, num_workers, [step, tokens], tuning=tuning, profile=profile, policy=policy
    )
    kernel.has_bulk_copies = bulk_copies
    build(kernel, shape, empty_model(config, dtype), PAGE_SIZE, progress=False, shard=shard)
    return kernel.plan()


# ---- facts ----


@dataclass(frozen=True, slots=True)
class OpFacts:
    """One op of the graph, or all ops that differ only in their layer."""

    op: str  # label
    name: str  # of its file in ops/
    variants: tuple[int, ...]
    calls: int
    tasks: int
    events: int  # that its tasks wait for
    hops: int  # of the critical path that end in it
    bytes: int  # per step, all calls
    worker_max_bytes: int  # of one call, busiest worker; the most uneven call counts. Tasks of pools belong to nobody
    worker_mean_bytes: float
    imbalance: float  # their ratio


def critical_path(program: Program) -> list[int]:
    """Tasks at the end of each hop (a signal and the wait for it) on a longest chain; the step event adds one more.

    One symbolic run of the queues: a task runs when the one before it in its queue has run and its event is complete.
    A task of a pool, as soon as its event is complete: like a queue of its own.
    """
    events, queues = program.events, program.schedule.static_queues()
    depth = [0] * len(program.graph.tasks)
    previous = [-1] * len(depth)  # on the longest chain to a task
    missing = [event.count for event in events.events]
    deepest = [-1] * len(missing)  # producer of each event
    queues = [*queues, *([task] for tasks in program.schedule.pools for task in tasks)]
    next_slot = [0] * len(queues)
    sleeping: dict[int, list[int]] = defaultdict(list)
    awake = list(range(len(queues)))
    while awake:
        worker = awake.pop()
        for task in queues[worker][next_slot[worker] :]:
            event = events.wait[task]
            if event >= 0 and missing[event]:
                sleeping[event].append(worker)
                break
            if slot := next_slot[worker]:
                previous[task] = queues[worker][slot - 1]
                depth[task] = depth[previous[task]]
            if event >= 0 and depth[deepest[event]] + 1 > depth[task]:
                previous[task] = deepest[event]
                depth[task] = depth[deepest[event]] + 1
            next_slot[worker] += 1
            for signal in events.signals[task]:
                missing[signal] -= events.weights[task] if events.weights else 1  # ranks that run in step
                if deepest[signal] < 0 or depth[task] > depth[deepest[signal]]:
                    deepest[signal] = task
                if not missing[signal]:
                    awake += sleeping.pop(signal, ())
    path, task = [], deepest[STEP_EVENT]
    while task >= 0:
        if depth[task] > (depth[previous[task]] if previous[task] >= 0 else 0):
            path.append(task)
        task = previous[task]
    return path[::-1]


def op_facts(program: Program, per_layer: bool) -> list[OpFacts]:
    """One entry per op, or per kind of op with all layers together, in program order."""
    graph = program.graph
    group_of = [label if per_layer else split_label(label)[1] for label in graph.ops]
    variants, waits, sent, num_tasks = defaultdict(set), defaultdict(set), Counter(), Counter()
    for index, task in enumerate(graph.tasks):
        group = group_of[task.op]
        variants[group].add(task.variant)
        sent[group] += task.cost_bytes
        num_tasks[group] += 1
        if program.events.wait[index] >= 0:
            waits[group].add(program.events.wait[index])
    hops = Counter(group_of[graph.tasks[task].op] for task in critical_path(program))
    balances = defaultdict(list)
    for group, balance in zip(group_of, imbalance(graph, program.schedule), strict=True):
        balances[group].append(balance)
    facts = []
    for group, calls in balances.items():
        worst = max(calls, key=lambda balance: balance.ratio)
        numbers = tuple(sorted(variants[group]))
        facts.append(
            OpFacts(
                op=group,
                name=program.variants[numbers[0]].op.name if numbers else "",
                variants=numbers,
                calls=len(calls),
                tasks=num_tasks[group],
                events=len(waits[group]),
                hops=hops[group],
                bytes=sent[group],
                worker_max_bytes=worst.max_bytes,
                worker_mean_bytes=round(worst.mean_bytes, 1),
                imbalance=round(worst.ratio, 4),
            )
        )
    return facts


def attention_coverage(program: Program, context: int) -> dict[str, float | int]:
    """How many workers have some of the KV cache to read when the new token is number `context` of its sequence.

    A split without a block of older tokens is empty, but the first one has the new token. The least over all layers.
    """
    worker_of = {task: worker for worker, queue in enumerate(program.schedule.static_queues()) for task in queue}
    busy: dict[int, set[int]] = {}  # of a pool: as many as there are tasks, at best
    num_splits = block_kv = 0
    for index, num_blocks in kv_blocks(program, context).items():
        task = program.graph.tasks[index]
        constants = dict(program.variants[task.variant].constants)
        num_splits, block_kv = constants["NUM_SPLITS"], constants["BLOCK_KV"]
        _, split = task.tile
        workers = busy.setdefault(task.op, set())
        if num_blocks or split == 0:
            workers.add(worker_of.get(index, -1 - index))
    num_busy = min(min(map(len, busy.values()), default=0), program.num_workers)
    return {
        "context": context,
        "splits": num_splits,
        "block_kv": block_kv,
        "busy_workers": num_busy,
        "coverage": round(num_busy / program.num_workers, 4),
    }


def fusion_facts(program: Program) -> dict[str, float | int]:
    """Events, waits and signals before and after equal sets of producers were fused.

    Before, each ordered pair of tasks is an event of its own: one signal, one wait. Means are over all tasks.
    """
    events = program.events
    num_tasks = len(program.graph.tasks)
    num_signals = [len(signals) for signals in events.signals]
    return {
        "events_before": events.num_pairs,
        "waits_per_task_before": round(events.num_pairs / num_tasks, 2),
        "max_waits_before": events.max_pairs,
        "events_after": len(events.events),
        "waits_per_task_after": round(sum(event >= 0 for event in events.wait) / num_tasks, 2),
        "max_waits_after": max(event >= 0 for event in events.wait) * 1,
        "signals_per_task_after": round(sum(num_signals) / num_tasks, 2),
        "max_signals_after": max(num_signals),
    }


def pass_facts(program: Program) -> list[dict[str, object]]:
    """What every pass from regions to queues did, in order; the first row is where it begins. Means are over all tasks.

    Hops are those of the longest chain, the step event included, which `queues` alone can make longer.
    """
    num_tasks = len(program.graph.tasks)
    rows = []
    for effect in pass_effects(program.graph):
        rows.append(
            {
                "name": effect.name,
                "events": effect.num_events,
                "waits_per_task": round(effect.num_waits / num_tasks, 2),
                "max_waits": effect.max_waits,
                "signals_per_task": round(effect.num_signals / num_tasks, 2),
                "max_signals": effect.max_signals,
                **_hops(program, effect.chain),
            }
        )
    return [*rows, rows[-1] | {"name": "queues"} | _hops(program, critical_path(program))]


def _hops(program: Program, chain: list[int]) -> dict[str, int]:
    layers = Counter(split_label(program.graph.ops[program.graph.tasks[task].op])[0] for task in chain)
    layers.pop(None, None)
    return {"hops": len(chain) + 1, "hops_per_layer": max(layers.values(), default=0)}


def time_facts(program: Program, gpu: GpuProfile, context: int) -> dict[str, object]:
    """The cost model's estimate of a step, in ms, for a GPU."""
    time = estimate(program, gpu, context)
    return {
        "gpu": gpu.name,
        "context": context,
        "ms": round(time.step_s * 1e3, 4),
        "stream_ms": round(time.stream_s * 1e3, 4),
        "chain_ms": round(time.chain_s * 1e3, 4),
    }


def inspect_program(program: Program, gpu: GpuProfile, context: int, per_layer: bool = False) -> dict[str, object]:
    """Everything that `tri-mpk inspect` shows, ready for JSON."""
    passes = pass_facts(program)
    costs = [task.cost_bytes for task in program.graph.tasks]
    worker_bytes = [sum(costs[t] for t in queue) for queue in program.schedule.static_queues()]
    pool_bytes = sum(costs[t] for tasks in program.schedule.pools for t in tasks)
    report = program.report
    return {
        "num_workers": program.num_workers,
        "tasks": len(program.graph.tasks),
        "events": len(program.events.events),
        "variants": len(program.variants),
        "hops": passes[-1]["hops"],
        "hops_per_layer": passes[-1]["hops_per_layer"],
        "bytes": sum(worker_bytes) + pool_bytes,
        "pool_bytes": pool_bytes,  # of tasks that go to whichever worker is free; not among those of workers
        "worker_max_bytes": max(worker_bytes),
        "worker_mean_bytes": round(sum(worker_bytes) / len(worker_bytes), 1),
        "imbalance": round(max(worker_bytes) * len(worker_bytes) / max(sum(worker_bytes), 1), 4),
        "passes": passes,
        "fusion": fusion_facts(program),
        "estimate": time_facts(program, gpu, context),
        "tuning": asdict(program.tuning),
        "attention": attention_coverage(program, context),
        "ops": [asdict(facts) for facts in op_facts(program, per_layer)],
        "verify": {
            "tasks": report.num_tasks,
            "events": report.num_events,
            "pairs": report.num_pairs,
            "reads": report.num_regions_covered,
            "seconds": round(report.seconds, 3),
            "text": str(report),
        },
        "kernel": str(write_source(program.source)),
        "planning_seconds": round(program.seconds, 3),
    }


# ---- Graphviz ----


def dot(program: Program, layer: int | None = None) -> str:
    """Ops (boxes) and the events between them (ellipses) as a Graphviz digraph; of one layer, or of the whole graph.

    Events between the same ops share an ellipse, which says how many signals each takes per step. Dashed ops belong to
    other layers.
    """
    graph, events = program.graph, program.events.events
    layers = [split_label(label)[0] for label in graph.ops]
    if layer is not None and layer not in layers:
        highest = max((n for n in layers if n is not None), default=None)
        raise ValueError(f"layer={layer} does not exist; choose 0 to {highest}, or all")
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for event in events:
        sides = (tuple(sorted({graph.tasks[t].op for t in side})) for side in (event.producers, event.consumers))
        groups[tuple(sides)].append(event.count)
    if layer is not None:
        groups = {key: counts for key, counts in groups.items() if any(layers[op] == layer for op in sum(key, ()))}
    shown = sorted({op for producers, consumers in groups for op in (*producers, *consumers)})
    return "\n".join(["digraph megakernel {", *_dot_ops(program, shown, layer), *_dot_events(groups), "}"]) + "\n"


def _dot_ops(program: Program, shown: list[int], layer: int | None) -> Iterator[str]:
    num_tasks = Counter(task.op for task in program.graph.tasks)
    name = {task.op: program.variants[task.variant].op.name for task in program.graph.tasks}
    yield "  node [shape=box, fontname=monospace];"
    for op in shown:
        label = program.graph.ops[op]
        text = _dot_text(f"{label}\n{name[op]}\n{_count(num_tasks[op], 'task')}")
        style = ", style=dashed" if layer is not None and split_label(label)[0] != layer else ""
        yield f"  op{op} [label={text}{style}];"


def _dot_events(groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]]) -> Iterator[str]:
    for number, ((producers, consumers), counts) in enumerate(groups.items()):
        name = _count(len(counts), "event") if consumers else "step event"
        text = _dot_text(f"{name}\nsignals: {ranges(set(counts))}")
        yield f"  events{number} [shape=ellipse, label={text}];"
        yield from (f"  op{op} -> events{number};" for op in producers)
        yield from (f"  events{number} -> op{op};" for op in consumers)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _dot_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


# ---- TRI_MPK_DEBUG=1 ----


def print_debug(program: Program) -> None:
    """Where the kernel's source lies, and one line per op, on standard error."""
    graph, events = program.graph, program.events
    tasks_of = defaultdict(list)
    for index, task in enumerate(graph.tasks):
        tasks_of[task.op].append(index)
    worker_of = {task: worker for worker, queue in enumerate(program.schedule.static_queues()) for task in queue}
    rows = [("op", "variant", "tasks", "waits for", "signals", "workers", "bytes")]
    for op, tasks in tasks_of.items():
        rows.append(
            (
                graph.ops[op],
                ranges({graph.tasks[t].variant for t in tasks}),
                str(len(tasks)),
                ranges({events.wait[t] for t in tasks} - {-1}),
                ranges({event for t in tasks for event in events.signals[t]}),
                ranges({worker_of[t] for t in tasks if t in worker_of}) or "any",
                str(sum(graph.tasks[t].cost_bytes for t in tasks)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"tri_mpk: kernel {write_source(program.source)}", file=sys.stderr)
    print(f"tri_mpk: {program.report}", file=sys.stderr)
    print(f"tri_mpk: knobs {program.tuning}", file=sys.stderr)
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)


def ranges(numbers: Iterable[int]) -> str:
    """`{1, 2, 3, 7}` -> `1-3,7`; the empty set -> `-`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in parts) or "-"
