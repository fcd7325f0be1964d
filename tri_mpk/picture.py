"""A picture of one decode step: a row per worker, time to the right, the time a task runs in the colour of its op."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from tri_mpk.labels import split_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tri_mpk.profiler import Profile

WAIT_COLOUR, OTHER_COLOUR = "#e4e4e4", "#9a9a9a"
# matplotlib's ten without its grey; the op of most bytes gets the first
OP_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


def check_matplotlib() -> None:
    """ValueError where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "the picture needs matplotlib, which is not installed; pip install 'tri_mpk[profile]'"
        ) from error


def draw_step(profile: Profile, path: str | PathLike, step: int | None) -> None:
    """Writes the picture; what format, the name says. The same profile gives the same bytes."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    from tri_mpk.profiler import BEGIN, END

    at = profile.index(step)
    workers = profile.step_times[at]
    length = (workers[:, END].max() - workers[:, BEGIN].min()) / profile.scale
    with matplotlib.rc_context({"svg.hashsalt": "tri_mpk", "font.size": 9}):
        figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        _draw_tasks(axes, profile, at)
        axes.set_xlim(0, length)
        axes.set_ylim(profile.program.num_workers, 0)
        axes.set_xlabel(f"{profile.unit} from the beginning of the step")
        axes.set_ylabel("worker")
        axes.set_title(f"One decode step, position {profile.steps[at]}: {length:.4g} {profile.unit}", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=6, frameon=False)
        metadata = {"Date": None} if str(path).endswith(".svg") else {}
        figure.savefig(path, dpi=200, metadata=metadata)


def _draw_tasks(axes: Axes, profile: Profile, at: int) -> None:
    from tri_mpk.profiler import BEGIN, DONE, END, FETCH, RUN, SIGNAL, STEP_WAIT, WAIT

    graph = profile.program.graph
    kinds = np.array([split_label(graph.ops[task.op])[1] for task in graph.tasks])
    workers, worker_of = np.arange(profile.program.num_workers), profile.worker_of[at]
    origin = profile.step_times[at, :, BEGIN].min()
    times = (profile.times[at] - origin) / profile.scale
    ends = (profile.step_times[at] - origin) / profile.scale
    num_bytes = np.array([task.cost_bytes for task in graph.tasks])
    names = list(dict.fromkeys(kinds.tolist()))
    by_size = sorted(names, key=lambda kind: -num_bytes[kinds == kind].sum())
    for kind in names:
        of_kind = kinds == kind
        colour = OP_COLOURS[by_size.index(kind) % len(OP_COLOURS)]
        _draw(axes, worker_of[of_kind], times[of_kind, RUN], times[of_kind, SIGNAL], colour, kind)
    _draw(axes, worker_of, times[:, WAIT], times[:, RUN], WAIT_COLOUR, "wait")
    _draw(axes, workers, ends[:, STEP_WAIT], ends[:, END], WAIT_COLOUR, None)
    _draw(axes, worker_of, times[:, FETCH], times[:, WAIT], OTHER_COLOUR, "fetch, signal")
    _draw(axes, worker_of, times[:, SIGNAL], times[:, DONE], OTHER_COLOUR, None)


def _draw(axes: Axes, rows: np.ndarray, begin: np.ndarray, end: np.ndarray, colour: str, label: str | None) -> None:
    """A rectangle per entry, as pixels: ten thousand shapes would make an SVG of megabytes."""
    from matplotlib.collections import PolyCollection

    corners = [(begin, rows), (end, rows), (end, rows + 1), (begin, rows + 1)]
    shapes = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
    axes.add_collection(PolyCollection(shapes, facecolor=colour, linewidth=0, label=label, rasterized=True))
