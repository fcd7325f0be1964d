"""Where the time of a token goes: the same kernel on edited queues, one loss taken away at a time.

The edits make the numbers that a launch computes meaningless; they change nothing but the packed queues, so the kernel
and its schedule are the real ones. Afterwards the runtime is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tri_mpk.generator import field_names
from tri_mpk.model import CausalLM
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler.peers import TASK_PEERS

SKIPPED = -1  # the variant of a task that only signals


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the account: what was changed, and the ms per token then."""

    name: str
    ms: float


class Queues:
    """The packed queues of a model on a GPU, and the edits."""

    def __init__(self, model: CausalLM):
        self.program = model.kernel.program
        self.words = model.kernel.runtime.queue.cpu()
        self.queue_start = model.kernel.runtime.queue_start.cpu()
        self.variant = self.words[:, words.TASK_VARIANT.value].to(torch.int32)

    def of_op(self, *names: str) -> torch.Tensor:
        """Which records run one of these ops."""
        indices = [i for i, variant in enumerate(self.program.variants) if variant.op.name in names]
        return torch.isin(self.variant, torch.tensor(indices, dtype=torch.int32))

    def without_waits(self) -> None:
        """Only the end of a step is still waited for, so that all workers agree on how many steps there are."""
        self.words[~self.of_op("argmax", "sample"), words.TASK_WAIT_COUNT.value] = 0

    def without_attention(self) -> None:
        self.words[self.of_op("attention"), words.TASK_VARIANT.value] = SKIPPED

    def without_matrices(self) -> None:
        """Every matrix has no rows: its tasks wait, stage their activations and signal."""
        for i, variant in enumerate(self.program.variants):
            names = field_names(variant.op)
            if "num_rows" in names:
                self.words[self.variant == i, words.TASK_FIELDS.value + names.index("num_rows")] = 0

    def without_communication(self) -> None:
        """Every rank is its own peer: what it would push and signal to others it pushes and signals to itself, as often
        as before, so that each rank runs alone and all counts are reached.
        """
        tasks = (self.words[:, words.TASK_VARIANT.value] >> 32).tolist()
        graph = self.program.graph
        far = [i for i, task in enumerate(tasks) if self.variant[i] >= 0 and graph.tasks[task].is_far]
        self.words[far, TASK_PEERS.value : TASK_PEERS.value + self.program.num_ranks] = 0

    def cached_weights(self) -> None:
        """All matrices lie in the same few MB of lm_head, 128 KiB apart per worker at most, and so in the L2 cache."""
        stream = words.TASK_STREAM.value
        lm_head = self.words[self.of_op("lm_head")]
        start = int(lm_head[:, stream].min())
        spare = int(lm_head[:, stream + 2].sum() - self.words[:, stream + 2].max())
        apart = min(128 << 10, max(spare, 0) // (len(self.queue_start) - 1)) // 16 * 16
        queue_start = self.queue_start.tolist()
        for worker, (first, last) in enumerate(zip(queue_start, queue_start[1:], strict=False)):
            records = self.words[first:last]
            records[:, stream] = start + worker * apart
            records[records[:, stream + 1] != 0, stream + 1] = start + worker * apart

    def without_copies(self) -> None:
        """The weight ring is told that every matrix has no bytes: what lies in shared memory is multiplied."""
        stream = words.TASK_STREAM.value
        self.words[:, stream + 1 : stream + 3] = 0


EDITS: dict[str, tuple[Callable[[Queues], None], ...]] = {
    "as it is": (),
    "no weights copied": (Queues.without_copies,),
    "no weights copied, no waits": (Queues.without_copies, Queues.without_waits),
    "weights from L2": (Queues.cached_weights,),
    "weights from L2, no waits": (Queues.cached_weights, Queues.without_waits),
    "no waits": (Queues.without_waits,),
    "no waits, no attention": (Queues.without_waits, Queues.without_attention),
    "no matrices": (Queues.without_matrices,),
    "no matrices, no attention, no waits": (
        Queues.without_matrices, Queues.without_attention, Queues.without_waits,
    ),
}  # fmt: skip
RANK_EDITS: dict[str, tuple[Callable[[Queues], None], ...]] = {
    "no communication": (Queues.without_communication,),
    "no communication, no weights copied": (Queues.without_communication, Queues.without_copies),
    "no communication, no matrices": (Queues.without_communication, Queues.without_matrices),
}


@contextmanager
def edited(model: CausalLM, edits: tuple[Callable[[Queues], None], ...]) -> Iterator[None]:
    """The model's kernel on edited queues meanwhile."""
    runtime = model.kernel.runtime
    queues = Queues(model)
    for edit in edits:
        edit(queues)
    original = runtime.queue
    runtime.queue = queues.words.to(original.device)
    try:
        yield
    finally:
        runtime.queue = original


def account(model: CausalLM, measure: Callable[[], float]) -> Iterator[Entry]:
    """What `measure`, ms per token of a launch, returns as it is and with each loss taken away."""
    model.compile()
    edits_of = EDITS | (RANK_EDITS if model.kernel.world_size > 1 else {})
    for name, edits in edits_of.items():
        with edited(model, edits):
            yield Entry(name, measure())
