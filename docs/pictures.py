"""Draws the pictures of docs/scheduler.md from real graphs: `python docs/pictures.py`, then look at the diff.

A layer of demos/tiny on four workers, its queues under each policy, and the mixture of experts of demos/experts.py.
Nothing runs: all of it is planned.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch

from tri_mpk.inspect import load_config, plan_config
from tri_mpk.labels import split_label
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT, derive_events
from tri_mpk.scheduler.examples import experts_graph
from tri_mpk.scheduler.graph import Events, TaskGraph, pool_entry
from tri_mpk.scheduler.values import Numbers

ROOT = Path(__file__).resolve().parents[1]
NUM_WORKERS = 4
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
LINE, FAINT, INK = "#555555", "#c4c4c4", "#222222"


class Svg:
    """Shapes, in the order in which they are drawn."""

    def __init__(self) -> None:
        self.shapes: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = LINE, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"{dash}/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{colour}"/>')
        self.text(x + width / 2, y + height / 2 + 4, text, "#ffffff", "middle")

    def circle(self, x: float, y: float, text: str) -> None:
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#ffffff" stroke="{INK}"/>')
        self.text(x, y + 4, text, INK, "middle")

    def text(self, x: float, y: float, text: str, colour: str = INK, anchor: str = "start") -> None:
        if text:
            self.shapes.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{text}</text>')

    def write(self, path: Path, width: float, height: float) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
            ' font-family="sans-serif" font-size="11">'
        )
        background = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
        path.write_text("\n".join([head, background, *self.shapes, "</svg>"]) + "\n")


# ---- tasks in columns, one per op, and the events between them ----


def draw_graph(path: Path, graph: TaskGraph, events: Events, ops: list[int], numbers: Numbers | None = None) -> None:
    """Waits and signals by a value are dashed; those that happen when values have these numbers are dark.

    Events over more than one op are left out: they guard memory that is used again.
    """
    column, row_height, box_width, top = 210, 34, 66, 46
    tasks = {op: [i for i, task in enumerate(graph.tasks) if task.op == op] for op in ops}
    height = row_height * max(map(len, tasks.values()))
    at = {}
    for place, members in enumerate(tasks.values()):
        for row, task in enumerate(members):
            at[task] = 20 + place * column, top + (row + 0.5) * height / len(members)
    svg, circles = Svg(), _place_events(graph, events, at, column, top, height)
    for event, (x, y) in circles.items():
        for task, (task_x, task_y) in at.items():
            for touches, guards, side in (
                (event in events.signals[task], events.signal_if, box_width),
                (event == events.wait[task], events.wait_if, 0),
            ):
                held = [use.guard for use in guards.get(task, ()) if use.event == event]
                if touches or held:
                    dark = touches or numbers is None or any(guard.holds(numbers[guard.value]) for guard in held)
                    svg.line(task_x + side, task_y, x, y, LINE if dark else FAINT, dashed=not touches)
    for event, (x, y) in circles.items():
        svg.circle(x, y, str(events.events[event].count))
    for place, op in enumerate(ops):
        svg.text(20 + place * column + box_width / 2, 24, split_label(graph.ops[op])[1], INK, "middle")
        for task in tasks[op]:
            x, y = at[task]
            tile = ".".join(map(str, graph.tasks[task].tile))
            svg.box(x, y - 11, box_width, 22, COLOURS[place % len(COLOURS)], f"t{tile}")
    svg.write(path, (len(ops) - 1) * column + box_width + 40, top + height + 16)


def _place_events(
    graph: TaskGraph, events: Events, at: dict[int, tuple[float, float]], column: float, top: float, height: float
) -> dict[int, tuple[float, float]]:
    """Each left of its first consumer, those of an event tensor below each other."""
    found = {}
    columns: dict[float, list[int]] = defaultdict(list)
    for number, event in enumerate(events.events):
        consumers = [task for task in event.consumers if task in at]
        if number == STEP_EVENT or not consumers or event.producers[-1] not in at:
            continue
        if graph.tasks[event.producers[-1]].op == graph.tasks[consumers[0]].op - 1:
            columns[at[consumers[0]][0] - (column - 66) * 0.42].append(number)
    for x, numbers in columns.items():
        for row, number in enumerate(numbers):
            found[number] = x, top + (row + 0.5) * height / len(numbers)
    return found


# ---- queues ----


def draw_queues(path: Path, programs: dict[str, Program]) -> None:
    """A row per worker and one per pool, a box per task. Slots, not time."""
    svg, y, width = Svg(), 16.0, 0.0
    graph = next(iter(programs.values())).graph
    kinds = list(dict.fromkeys(split_label(op)[1] for op in graph.ops))
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}

    def draw_task(task: int, x: float) -> float:
        label = graph.ops[graph.tasks[task].op]
        svg.box(x, y, 18, 18, colour[split_label(label)[1]])
        return x + 21

    for policy, program in programs.items():
        svg.text(12, y + 8, f'policy="{policy}"')
        y += 16
        for worker, queue in enumerate(program.schedule.queues):
            svg.text(12, y + 13, f"worker {worker}")
            x = 76.0
            for entry in queue:
                if entry >= 0:
                    x = draw_task(entry, x)
                else:
                    svg.box(x, y, 46, 18, INK, f"pool {pool_entry(entry)}")
                    x += 49
            width, y = max(width, x), y + 21
        for pool, tasks in enumerate(program.schedule.pools):
            svg.text(12, y + 13, f"pool {pool}")
            x = 76.0
            for task in tasks:
                x = draw_task(task, x)
            width, y = max(width, x), y + 21
        y += 12
    x = 12.0
    for kind in kinds:
        svg.box(x, y, 14, 14, colour[kind])
        svg.text(x + 19, y + 11, kind)
        x += 34 + 7 * len(kind)
    svg.write(path, max(width, x) + 12, y + 26)


def tiny(policy: str) -> Program:
    config = load_config(str(ROOT / "demos/tiny"))
    config.num_hidden_layers = 2
    return plan_config(config, torch.bfloat16, 512, NUM_WORKERS, policy=policy)


def main(folder: Path) -> None:
    programs = {policy: tiny(policy) for policy in ("static", "hybrid", "dynamic")}
    static = programs["static"]
    layer = [op for op, label in enumerate(static.graph.ops) if split_label(label)[0] == 0]
    draw_graph(folder / "layer.svg", static.graph, static.events, [*layer, layer[-1] + 1])
    draw_queues(folder / "queues.svg", programs)
    graph = experts_graph(1, num_tokens=4, num_experts=3, num_tiles=2)
    numbers = dict(zip(graph.values, (0, 2, 0, 1), strict=True))
    draw_graph(folder / "experts.svg", graph, derive_events(graph), list(range(len(graph.ops))), numbers)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
