"""The tensors by which many sequences share a kernel: the plan of a step, what is known of each, and the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tri_mpk.ops.advance import LOOKS, NUM_COUNTERS, NUM_FREE_PAGES, SLOT_FIELDS, RingSizes
from tri_mpk.ops.op import TensorHandle, next_power_of_2
from tri_mpk.ops.rings import RECORD

if TYPE_CHECKING:
    from tri_mpk.persistent_kernel import PersistentKernel


@dataclass(slots=True)
class BatchPlan:
    """What one step computes: tensors that `advance` writes and all other ops of the next step read.

    A step has up to T = max_tokens_per_step tokens of S = max_batch_size sequences. Tokens of a sequence are
    neighbours, in the order of their positions.
    """

    num_tokens: TensorHandle  # int32 [1]; 0: there is nothing to do in this step
    token_ids: TensorHandle  # int32 [T]
    token_positions: TensorHandle  # int32 [T], in their sequences
    token_sequences: TensorHandle  # int32 [T]
    first_token: TensorHandle  # int32 [S], index of the first token of a sequence
    sequence_tokens: TensorHandle  # int32 [S], how many it has in this step
    output_token: TensorHandle  # int32 [S], index of the token whose logits choose the next one, or -1
    page_table: TensorHandle  # int32 [S, ceil(max_seq_len / page_size)]
    page_size: int
    num_pages: int

    @property
    def max_batch_size(self) -> int:
        return self.first_token.numel

    @property
    def max_tokens_per_step(self) -> int:
        return self.token_ids.numel

    def tensors(self) -> dict[str, TensorHandle]:
        names = (
            "num_tokens", "token_ids", "token_positions", "token_sequences", "first_token", "sequence_tokens",
            "output_token", "page_table",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class BatchState:
    """What `advance` keeps between steps: see ops/advance.py."""

    slots: TensorHandle
    counters: TensorHandle
    records: TensorHandle
    tokens: TensorHandle
    free_pages: TensorHandle
    rings: RingSizes

    def tensors(self) -> dict[str, TensorHandle]:
        return {name: getattr(self, name) for name in ("slots", "counters", "records", "tokens", "free_pages")}


def new_plan(
    mpk: PersistentKernel, max_batch_size: int, max_tokens_per_step: int, page_size: int, num_pages: int
) -> BatchPlan:
    """Plan of no tokens: the first step of a launch only takes requests in."""
    row = -(-mpk.max_seq_len // page_size)
    dims = {
        "num_tokens": (1,), "token_ids": (max_tokens_per_step,), "token_positions": (max_tokens_per_step,),
        "token_sequences": (max_tokens_per_step,), "first_token": (max_batch_size,),
        "sequence_tokens": (max_batch_size,), "output_token": (max_batch_size,), "page_table": (max_batch_size, row),
    }  # fmt: skip
    handles = {name: mpk.attach_input(_zeros(mpk, *size), name=name) for name, size in dims.items()}
    return BatchPlan(**handles, page_size=page_size, num_pages=num_pages)


def new_state(mpk: PersistentKernel, plan: BatchPlan, rings: RingSizes | None) -> BatchState:
    num_slots = plan.max_batch_size
    return BatchState(
        slots=mpk.attach_input(_zeros(mpk, SLOT_FIELDS.value, num_slots), name="slots"),
        counters=mpk.attach_input(_zeros(mpk, NUM_COUNTERS.value, dtype=torch.int64), name="counters"),
        records=mpk.attach_input(_zeros(mpk, num_slots, RECORD.value, dtype=torch.int64), name="records"),
        tokens=mpk.attach_input(_zeros(mpk, num_slots, mpk.max_seq_len), name="sequence_ids"),
        free_pages=mpk.attach_input(_zeros(mpk, plan.num_pages), name="free_pages"),
        rings=rings or default_rings(num_slots, mpk.max_seq_len),
    )


def default_rings(max_batch_size: int, max_seq_len: int) -> RingSizes:
    """Some requests may queue, and results of many steps wait for the host. A prompt of any length has its place."""
    return RingSizes(
        tickets=next_power_of_2(max(4 * max_batch_size, 64)),
        results=next_power_of_2(max(16 * max_batch_size, 256)),
        prompts=next_power_of_2(max(2 * max_seq_len, 1 << 14)),
    )


def reset(plan: BatchPlan, state: BatchState) -> None:
    """Before a launch: all slots and all pages are free, and nothing is planned."""
    for handle in (plan.num_tokens, plan.sequence_tokens, state.slots, state.counters):
        handle.data.zero_()
    plan.output_token.data.fill_(-1)
    state.free_pages.data.copy_(torch.arange(plan.num_pages, dtype=torch.int32))
    state.counters.data[NUM_FREE_PAGES.value] = plan.num_pages
    state.counters.data[LOOKS.value] = 1


def _zeros(mpk: PersistentKernel, *dims: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(dims, dtype=dtype, device=mpk.device)
