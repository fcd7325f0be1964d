"""Errors that users can act on. Each message says what was got, what is allowed and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class TriMpkError(Exception):
    """Base of the errors below."""


class CheckpointError(TriMpkError, OSError):
    """A checkpoint is missing, truncated or holds values that no model can run on (NaN)."""


class UnsupportedModelError(TriMpkError, NotImplementedError):
    """An architecture or a feature of one that is not implemented here."""


class DeviceError(TriMpkError, RuntimeError):
    """The device cannot run the kernel: none there, too old, too small, or too few free SMs."""


class MegakernelTimeout(TriMpkError, TimeoutError):
    """A wait inside the kernel exceeded its bound. The model stays usable; the launch's result is lost.

    Attributes: of the wait that gave up first `task` (its name), `op`, `layer`, `tile` (None at the end of a step),
    `worker`, `event`, and the counts `seen` and `wanted`; then `chain`, the unfinished tasks that each waited for the
    next, that one first, and `root_cause` in words. On several ranks `rank` is this one, and `silent_ranks` are those
    that had not left the launch either when this rank stopped waiting for them.
    """

    def __init__(
        self,
        task: str,
        worker: int,
        event: int,
        seen: int,
        wanted: int,
        *,
        op: str | None = None,
        layer: int | None = None,
        tile: tuple[int, ...] | None = None,
        chain: tuple[str, ...] = (),
        root_cause: str = "unknown",
        rank: int | None = None,
        silent_ranks: Sequence[int] = (),
    ):
        self.rank, self.silent_ranks = rank, tuple(silent_ranks)
        self.task, self.worker, self.event, self.seen, self.wanted = task, worker, event, seen, wanted
        self.op, self.layer, self.tile, self.chain, self.root_cause = op, layer, tile, chain, root_cause
        shown = chain if len(chain) <= 6 else (*chain[:3], f"{len(chain) - 5} more", *chain[-2:])
        who = f"worker {worker}" if rank is None else f"rank {rank}, worker {worker}"
        super().__init__(
            f"{who} waited too long before {task}{f' ({op})' if op else ''}: event {event} stood at {seen},"
            f" wanted {wanted}. Root cause: {root_cause}."
            f"{' Unfinished: ' + ' <- '.join(shown) + '.' if len(chain) > 1 else ''}"
            " All workers have left the kernel and the next launch starts afresh; if this machine is just slow, raise"
            " wait_bound_s."
        )


class RankError(TriMpkError, RuntimeError):
    """Other ranks are missing: they ended, hang, or do something else. `ranks` are their numbers, if that is known."""

    def __init__(self, ranks: list[int], what: str):
        self.ranks = tuple(ranks)
        super().__init__(f"{_rank_names(ranks)} {what}; look at what they print, then start all ranks again")


def _rank_names(ranks: Sequence[int]) -> str:
    if not ranks:
        return "the other ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class WorkerDiedError(TriMpkError, RuntimeError):
    """A worker process of the CPU path ended in the middle of a launch."""


class EngineClosedError(TriMpkError, RuntimeError):
    """An engine that was closed, or whose kernel has ended with an error, takes no requests."""


class EngineFullError(TriMpkError, RuntimeError):
    """As many requests as an engine may hold are waiting already. Try again later, or with a longer timeout."""
