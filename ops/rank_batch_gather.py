"""What sequences need of all ranks' language model heads to choose their tokens, told to all ranks.

output token [S] read | records [S, RECORD] int64 read | best value, index [S, parts], logits [S, V'] of this rank read
best of ranks: value, index [S, ranks] pushed | all logits [S, V] fp32 pushed
One task = one sequence. Of the parts of the vocabulary only the best goes to other ranks, with its index in the whole
of it; logits go there for sequences that do not simply take the best token. Both lie as one rank would have them, so
that ops that choose see no difference; regions of symmetric tensors are (rank, sequence).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.argmax import best_of_parts
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.ops.rings import RECORD, RECORD_CHOICE
from tri_mpk.ops.sample import CHOICE, CHOOSE_BEST
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Address, Region, Task
from tri_mpk.scheduler.peers import push, signal_ranks

LOGITS_AT_ONCE = tl.constexpr(4096)


@triton.jit
def rank_batch_gather_tile(
    task, event_ptr, control_ptr, epoch,
    output_token_addr, choice_addr, value_addr, index_addr, logits_addr,  # in
    best_value_addr, best_index_addr, all_logits_addr,  # out
    first_row, num_rows,
    NUM_PARTS: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    output = tl.load(output_token_addr.to(tl.pointer_type(tl.int32)))
    choice = tl.load(choice_addr.to(tl.pointer_type(tl.int64)))
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if output >= 0:
        value_ptr = value_addr.to(tl.pointer_type(tl.float32))
        logits_ptr = logits_addr.to(tl.pointer_type(tl.float32))
        index = best_of_parts(value_ptr, index_addr.to(tl.pointer_type(tl.int32)), NUM_PARTS)
        index = tl.minimum(index.to(tl.int32), num_rows - 1)  # after an abort anything may stand there
        value = tl.load(logits_ptr + index)
        push(task, best_value_addr.to(tl.pointer_type(tl.float32)), value, None, 4, RANKS, PORTABLE)
        push(task, best_index_addr.to(tl.pointer_type(tl.int32)), first_row + index, None, 4, RANKS, PORTABLE)
        if choice != CHOOSE_BEST:
            for first in tl.range(0, num_rows, LOGITS_AT_ONCE, num_stages=1):
                row = first + tl.arange(0, LOGITS_AT_ONCE)
                logit = tl.load(logits_ptr + row, mask=row < num_rows, other=0.0)
                there_ptr = all_logits_addr.to(tl.pointer_type(tl.float32)) + row
                push(task, there_ptr, logit, row < num_rows, 4, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_rank_batch_gather(
    machine: Machine,
    *,
    output_token: TensorHandle,
    records: TensorHandle,
    best_value: TensorHandle,
    best_index: TensorHandle,
    logits: TensorHandle,
    all_value: TensorHandle,
    all_index: TensorHandle,
    all_logits: TensorHandle,
    rank: int,
    first_row: int,
    num_rows: int,
    vocab_size: int,
    grid_dim: int | None = None,
) -> Cut:
    (num_sequences, num_parts), num_ranks = best_value.dims, all_value.dims[0]
    check_grid("batch_gather", grid_dim, num_sequences, "a task per sequence")
    cut = Cut({"NUM_PARTS": num_parts}, {})
    for sequence in range(num_sequences):
        own = [
            tensor.box((sequence, sequence + 1), (0, size))
            for tensor, size in ((best_value, num_parts), (best_index, num_parts), (logits, num_rows))
        ]
        pushed = [Region(tensor.name, ((sequence, sequence + 1),)) for tensor in (all_value, all_index, all_logits)]
        place = sequence * num_ranks + rank
        cut.tasks.append(
            Task(
                op=0,
                tile=(sequence,),
                reads=(
                    output_token.whole(), records.span(sequence * RECORD.value, (sequence + 1) * RECORD.value), *own
                ),
                writes=(),
                cost_bytes=8 * num_parts,  # of greedy decoding
                fields={
                    "output_token_addr": Address(output_token.name, sequence),
                    "choice_addr": Address(records.name, sequence * RECORD.value + RECORD_CHOICE.value + CHOICE.value),
                    "value_addr": Address(best_value.name, sequence * num_parts),
                    "index_addr": Address(best_index.name, sequence * num_parts),
                    "logits_addr": Address(logits.name, sequence * logits.dims[1]),
                    "best_value_addr": Address(all_value.name, place),
                    "best_index_addr": Address(all_index.name, place),
                    "all_logits_addr": Address(all_logits.name, sequence * vocab_size + first_row),
                    "first_row": first_row,
                    "num_rows": num_rows,
                },
                pushes=tuple(pushed),
                to_all_ranks=True,
            )
        )  # fmt: skip
    return cut


def rank_batch_gather_torch(logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every rank's logits [S, V of the rank]: values and indices [S, ranks] of its best, and all logits [S, V]."""
    whole = torch.cat(logits, dim=1)
    first = [sum(part.shape[1] for part in logits[:rank]) for rank in range(len(logits))]
    best = [part.max(dim=1) for part in logits]
    return (
        torch.stack([each.values for each in best], dim=1),
        torch.stack([each.indices + begin for each, begin in zip(best, first, strict=True)], dim=1),
        whole,
    )


RANK_BATCH_GATHER = Op("batch_gather", rank_batch_gather_tile, cut_rank_batch_gather, rank_batch_gather_torch)
