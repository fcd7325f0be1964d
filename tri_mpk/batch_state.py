"""What steps of many sequences leave for the next one: slots, pages, and how requests and results come and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tri_mpk.ops.advance import LOOKS, NUM_COUNTERS, NUM_FREE_PAGES, NUM_PAGES, SLOT_FIELDS, RingSizes
from tri_mpk.ops.op import TensorHandle, next_power_of_2
from tri_mpk.ops.rings import ASKED_SLOTS, RECORD

if TYPE_CHECKING:
    from tri_mpk.batch_kernel import BatchKernel, StepPlan


@dataclass(frozen=True, slots=True)
class BatchState:
    """Tensors of the device, described in ops/advance.py and ops/host_words.py, and the sizes of the rings."""

    slots: TensorHandle
    counters: TensorHandle
    records: TensorHandle
    tokens: TensorHandle
    free_pages: TensorHandle  # [2, num_pages], of which the second row counts users
    asked: TensorHandle  # [world_size, words], symmetric if there are several ranks
    page_size: int
    rings: RingSizes

    @property
    def num_pages(self) -> int:
        return self.free_pages.dims[1]

    def tensors(self) -> dict[str, TensorHandle]:
        names = ("slots", "counters", "records", "tokens", "free_pages", "asked")
        return {name: getattr(self, name) for name in names}

    def reset(self, plan: StepPlan) -> None:
        """Before a launch: all slots and pages are free, and nothing is planned. The first step takes requests in."""
        for handle in (plan.num_tokens, plan.sequence_tokens, self.slots, self.counters):
            handle.data.zero_()
        plan.output_token.data.fill_(-1)
        self.free_pages.data[0] = torch.arange(self.num_pages, dtype=torch.int32)
        self.free_pages.data[1] = 0
        self.counters.data[NUM_FREE_PAGES.value] = self.counters.data[NUM_PAGES.value] = self.num_pages
        self.counters.data[LOOKS.value] = 1


def new_state(mpk: BatchKernel, page_size: int, num_pages: int, rings: RingSizes | None) -> BatchState:
    def attach(name: str, *dims: int, dtype: torch.dtype = torch.int32) -> TensorHandle:
        return mpk.attach_input(torch.zeros(dims, dtype=dtype, device=mpk.device), name=name)

    num_slots = mpk.max_batch_size
    asked_dims = (mpk.world_size, ASKED_SLOTS.value + 2 * num_slots)
    return BatchState(
        slots=attach("slots", SLOT_FIELDS.value, num_slots),
        counters=attach("counters", NUM_COUNTERS.value, dtype=torch.int64),
        records=attach("records", num_slots, RECORD.value, dtype=torch.int64),
        tokens=attach("sequence_ids", num_slots, mpk.max_seq_len),
        free_pages=attach("free_pages", 2, num_pages),
        asked=mpk.new_tensor(asked_dims, torch.int64, "asked", symmetric=mpk.world_size > 1),
        page_size=page_size,
        rings=rings or default_rings(num_slots, mpk.max_seq_len),
    )


def default_rings(max_batch_size: int, max_seq_len: int) -> RingSizes:
    """Some requests may queue, and results of many steps wait for the host. A prompt of any length has its place."""
    return RingSizes(
        tickets=next_power_of_2(max(4 * max_batch_size, 64)),
        results=next_power_of_2(max(16 * max_batch_size, 256)),
        prompts=next_power_of_2(max(2 * max_seq_len, 1 << 14)),
    )
