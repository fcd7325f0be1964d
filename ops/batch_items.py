"""What there is to do in this step, as lists: the items of attention, and the sequences that choose a token.

num tokens [1], token positions, token sequences [T], first token, sequence tokens, output token [S] int32 read
items [T * max splits, 4] int32, outputs [S] int32, counts [2] int32 (how many items and outputs there are) written
An item is BLOCK_TOKENS neighbours of one sequence (its last block may have fewer) and one split of the positions they
attend to: split s has positions s * SPLIT_TOKENS to (s + 1) * SPLIT_TOKENS, whatever else is in the step. Written as
first token | split << 16, last token, sequence, position of the last token. All layers work through the same items, so
that no task of attention is empty while others have more than their share: whole splits come first, and what ends with
the last token, often short, behind them. A single task, needed by the first layer's attention only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task

ITEM_WORDS = tl.constexpr(4)


@triton.jit
def batch_items_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, positions_ptr, sequences_ptr, first_token_ptr, sequence_tokens_ptr, output_token_ptr,  # in
    items_ptr, outputs_ptr, counts_ptr,  # out
    MAX_TOKENS: tl.constexpr, MAX_SEQUENCES: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    num_tokens = tl.load(num_tokens_ptr)
    token = tl.arange(0, BLOCK_T)
    is_token = (token < num_tokens) & (token < MAX_TOKENS)
    sequence = tl.load(sequences_ptr + token, mask=is_token, other=0)
    first = tl.load(first_token_ptr + sequence, mask=is_token, other=0)
    end = first + tl.load(sequence_tokens_ptr + sequence, mask=is_token, other=0)
    last = tl.minimum(token + BLOCK_TOKENS, end) - 1  # of the block that begins here
    position = tl.load(positions_ptr + token, mask=is_token, other=0) + last - token
    begins = is_token & ((token - first) % BLOCK_TOKENS == 0)
    num_splits = tl.where(begins, tl.minimum(position // SPLIT_TOKENS + 1, MAX_SPLITS), 0)
    num_whole = tl.where(begins, num_splits - 1, 0)
    place = tl.cumsum(num_whole, axis=0) - num_whole
    last_place = tl.sum(num_whole, axis=0) + tl.cumsum(begins.to(tl.int32), axis=0) - 1
    for split in tl.range(0, MAX_SPLITS, num_stages=1):
        item_ptr = items_ptr + tl.where(split < num_whole, place + split, last_place) * ITEM_WORDS
        tl.store(item_ptr, token | (split << 16), mask=split < num_splits)
        tl.store(item_ptr + 1, last, mask=split < num_splits)
        tl.store(item_ptr + 2, sequence, mask=split < num_splits)
        tl.store(item_ptr + 3, position, mask=split < num_splits)
    tl.store(counts_ptr, tl.sum(num_splits, axis=0))
    s = tl.arange(0, BLOCK_S)
    chooses = (tl.load(output_token_ptr + s, mask=s < MAX_SEQUENCES, other=-1) >= 0).to(tl.int32)
    chooses = tl.where(num_tokens > 0, chooses, 0)
    tl.store(outputs_ptr + tl.cumsum(chooses, axis=0) - 1, s, mask=chooses > 0)
    tl.store(counts_ptr + 1, tl.sum(chooses, axis=0))
    signal(task, event_ptr, PORTABLE)


def cut_batch_items(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_positions: TensorHandle,
    token_sequences: TensorHandle,
    first_token: TensorHandle,
    sequence_tokens: TensorHandle,
    output_token: TensorHandle,
    items: TensorHandle,
    outputs: TensorHandle,
    counts: TensorHandle,
    block_tokens: int,
    split_tokens: int,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("batch_items", grid_dim, 1, "one task")
    reads = {
        "num_tokens_ptr": num_tokens, "positions_ptr": token_positions, "sequences_ptr": token_sequences,
        "first_token_ptr": first_token, "sequence_tokens_ptr": sequence_tokens, "output_token_ptr": output_token,
    }  # fmt: skip
    writes = {"items_ptr": items, "outputs_ptr": outputs, "counts_ptr": counts}
    max_tokens, max_sequences = token_positions.numel, output_token.numel
    cut = Cut(
        {
            "MAX_TOKENS": max_tokens, "MAX_SEQUENCES": max_sequences, "MAX_SPLITS": items.dims[0] // max_tokens,
            "BLOCK_TOKENS": block_tokens, "SPLIT_TOKENS": split_tokens,
            "BLOCK_T": next_power_of_2(max_tokens), "BLOCK_S": next_power_of_2(max_sequences),
        },
        reads | writes,
    )  # fmt: skip
    cut.tasks.append(
        Task(
            op=0,
            tile=(0,),
            reads=tuple(tensor.whole() for tensor in reads.values()),
            writes=tuple(tensor.whole() for tensor in writes.values()),
            cost_bytes=4 * items.numel,
            fields=dict(cut.addresses()),
        )
    )
    return cut


def batch_items_torch(
    positions: torch.Tensor,
    first_token: torch.Tensor,
    sequence_tokens: torch.Tensor,
    output_token: torch.Tensor,
    block_tokens: int,
    split_tokens: int,
) -> tuple[list[tuple[int, int, int, int, int]], list[int]]:
    """Items (first token, split, last token, sequence, its position), last splits behind the others, and outputs."""
    items = []
    for sequence, (first, count) in enumerate(zip(first_token.tolist(), sequence_tokens.tolist(), strict=True)):
        for token in range(first, first + count, block_tokens):
            last = min(token + block_tokens, first + count) - 1
            position = int(positions[last])
            items += [(token, split, last, sequence, position) for split in range(position // split_tokens + 1)]
    items.sort(key=lambda item: (item[1] == item[4] // split_tokens, item))
    return items, [s for s, token in enumerate(output_token.tolist()) if token >= 0]


BATCH_ITEMS = Op("batch_items", batch_items_tile, cut_batch_items, batch_items_torch)
