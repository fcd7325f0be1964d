"""Final RMSNorm, language model head and the first half of argmax, of all sequences that choose a token in this step.

counts [2] read: the second is how many those are | outputs [S] read: which | output token [S] read
xb [T, D] = x * gain read | squares [num_parts, T] fp32 read | W [V, D] read
logits [S, V] fp32 written | best value, index [S, num_tasks] written
One task = consecutive rows of the vocabulary; it also leaves, for each of these sequences, its largest logit and that
logit's index (the lowest one on a tie). Rows of other sequences remain what they are.
Source: transformers LlamaForCausalLM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import (
    ROWS,
    TOKENS,
    all_tokens,
    even_block,
    multiply_rows,
    of_block,
    segment,
    token_blocks,
    token_rstd,
    with_block,
)
from tri_mpk.ops.batch_linear import batch_linear_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def batch_lm_head_tile(
    task, event_ptr, control_ptr, epoch,
    counts_ptr, outputs_ptr, output_token_ptr, xb_ptr, squares_ptr, weight_ptr,  # in
    logits_of_ptr, best_value_ptr, best_index_ptr,  # out
    part, row0, num_rows,
    V: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, NUM_BEST: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, BLOCKS: tl.constexpr, SEGMENT: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    block_rows = even_block(num_rows, ROWS)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    num_outputs = tl.load(counts_ptr + 1)
    outputs = all_tokens(BLOCKS)
    sequences = tl.load(outputs_ptr + outputs, mask=outputs < num_outputs, other=0)
    tokens = tl.load(output_token_ptr + sequences, mask=outputs < num_outputs, other=0)
    rstd = token_rstd(squares_ptr, tokens, outputs < num_outputs, D, EPS, NUM_PARTS, MAX_TOKENS, BLOCKS)
    best = tl.full([BLOCKS, TOKENS], float("-inf"), tl.float32)
    best_row = tl.zeros([BLOCKS, TOKENS], tl.int32)
    for done in tl.range(0, num_rows, block_rows, num_stages=1, disable_licm=True):
        left = tl.minimum(block_rows, num_rows - done)
        row = row0 + done + tl.arange(0, ROWS)
        is_row = tl.arange(0, ROWS) < left
        for first in tl.range(0, num_outputs, TOKENS, num_stages=1, disable_licm=True):
            output = first + tl.arange(0, TOKENS)
            is_output = output < num_outputs
            sequence = tl.load(outputs_ptr + output, mask=is_output, other=0)
            y = multiply_rows(
                weight_ptr, weight_ptr, row0 + done, left, xb_ptr, first, num_outputs, outputs_ptr, output_token_ptr,
                D, False, True, SEGMENT, PORTABLE,
            )  # fmt: skip
            y *= of_block(rstd, first // TOKENS, BLOCKS)[None, :]
            at = logits_of_ptr + sequence.to(tl.int64)[None, :] * V + row[:, None]
            tl.store(at, y, mask=is_row[:, None] & is_output[None, :])
            y = tl.where(is_row[:, None], y, float("-inf"))
            value = tl.max(y, axis=0)
            value_row = tl.min(tl.where(y == value[None, :], row[:, None], 0x7FFFFFFF), axis=0)
            better = value[None, :] > best
            best_row = tl.where(better, with_block(best_row, first // TOKENS, value_row, BLOCKS), best_row)
            best = tl.where(better, with_block(best, first // TOKENS, value, BLOCKS), best)
    at = sequences * NUM_BEST + part
    tl.store(best_value_ptr + at, best, mask=outputs < num_outputs)
    tl.store(best_index_ptr + at, best_row, mask=outputs < num_outputs)
    signal(task, event_ptr, PORTABLE)


def cut_batch_lm_head(
    machine: Machine,
    *,
    counts: TensorHandle,
    outputs: TensorHandle,
    output_token: TensorHandle,
    input: TensorHandle,
    squares: TensorHandle,
    weight: TensorHandle,
    logits: TensorHandle,
    best_value: TensorHandle,
    best_index: TensorHandle,
    eps: float,
    grid_dim: int | None = None,
) -> Cut:
    vocab_size, k = weight.dims
    num_parts, max_tokens = squares.dims
    num_best = best_value.dims[1]
    if grid_dim not in (None, num_best):
        raise ValueError(f"best_value={best_value.name} is for {num_best} tasks, got grid_dim={grid_dim}; leave it out")
    cut = Cut(
        {
            "V": vocab_size, "D": k, "EPS": eps, "NUM_BEST": num_best,
            "NUM_PARTS": num_parts, "MAX_TOKENS": max_tokens, "BLOCKS": token_blocks(outputs.numel),
            "SEGMENT": segment(weight),
        },
        {
            "counts_ptr": counts, "outputs_ptr": outputs, "output_token_ptr": output_token,
            "xb_ptr": input, "squares_ptr": squares, "weight_ptr": weight,
            "logits_of_ptr": logits, "best_value_ptr": best_value, "best_index_ptr": best_index,
        },
    )  # fmt: skip
    whole = (
        counts.whole(), outputs.whole(), output_token.whole(),
        input.columns(0, k), squares.box((0, num_parts), (0, max_tokens)),
    )  # fmt: skip
    addresses = cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(vocab_size, num_best)):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight.span(lo * k, hi * k)),
                writes=(logits.columns(lo, hi), best_value.columns(i, i + 1), best_index.columns(i, i + 1)),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"part": i, "row0": lo, "num_rows": hi - lo},
            )
        )
    return cut


def batch_lm_head_torch(
    xb: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, eps: float, output_token: torch.Tensor
) -> torch.Tensor:
    """Logits [n, V] of the sequences with an output token (those of -1 are left out)."""
    token = output_token[output_token >= 0].long()
    return batch_linear_torch(xb[token], squares[:, token], weight, eps)


BATCH_LM_HEAD = Op("batch_lm_head", batch_lm_head_tile, cut_batch_lm_head, batch_lm_head_torch)
