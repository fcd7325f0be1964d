"""Errors that users can act on. Each message says what was got, what is allowed and what to do next."""

from __future__ import annotations


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

    Attributes: task (name), worker, event, seen and wanted counts.
    """

    def __init__(self, task: str, worker: int, event: int, seen: int, wanted: int, detail: str = ""):
        self.task, self.worker, self.event, self.seen, self.wanted = task, worker, event, seen, wanted
        super().__init__(
            f"worker {worker} waited too long before {task}: event {event} stood at {seen}, wanted {wanted}"
            f"{'; ' + detail if detail else ''}. All workers have left the kernel and the next launch starts afresh;"
            " if this machine is just slow, raise wait_bound_s."
        )


class WorkerDiedError(TriMpkError, RuntimeError):
    """A worker process of the CPU path ended in the middle of a launch."""
