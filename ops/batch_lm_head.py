"""Final RMSNorm, language model head and the first half of argmax, of all sequences that choose a token in this step.

num tokens [1], token sequences [T] read | counts [2] read: the second is how many of these sequences there are
outputs [S] read: which they are | output token [S] read
xb [T, D] = x * gain read | squares [num_parts, T] fp32 read | W [V, D] read
logits [S, V'] fp32 written, V' >= V | best value, index [S, num_tasks] written
One task = consecutive rows of the vocabulary; it also leaves, for each of these sequences, its largest logit and that
logit's index (the lowest one on a tie). Rows of other sequences remain what they are.
Source: transformers LlamaForCausalLM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import MANY, begin_weights, for_all_tokens, multiply_rows, residual_reads, token_rstd
from tri_mpk.ops.batch_linear import batch_linear_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.panels import PANEL_TOKENS, panel_streams
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import wait_for_any


@triton.jit
def finish_logits(y, row, is_row, is_output, state, args, CONSTANTS: tl.constexpr):
    best, best_row = state
    logits_of_ptr, sequence, rstd = args
    V: tl.constexpr = CONSTANTS[0]
    y *= rstd[None, :]
    at = logits_of_ptr + sequence.to(tl.int64)[None, :] * V + row[:, None]
    tl.store(at, y, mask=is_row[:, None] & is_output[None, :])
    y = tl.where(is_row[:, None], y, float("-inf"))
    value = tl.max(y, axis=0)
    value_row = tl.min(tl.where(y == value[None, :], row[:, None], 0x7FFFFFFF), axis=0)
    better = value > best
    return tl.where(better, value, best), tl.where(better, value_row, best_row)


@triton.jit
def logits_of_tokens(
    first, sequence, token, is_output, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr
):
    """Of tokens [TOKENS] and their sequences, if they are outputs."""
    ring, part, row0, num_rows, inputs, outputs = args
    D: tl.constexpr = CONSTANTS[1]
    EPS: tl.constexpr = CONSTANTS[2]
    NUM_BEST: tl.constexpr = CONSTANTS[3]
    NUM_PARTS: tl.constexpr = CONSTANTS[4]
    MAX_TOKENS: tl.constexpr = CONSTANTS[5]
    xb_ptr, squares_ptr, weight_ptr = inputs[2], inputs[3], inputs[4]
    logits_of_ptr, best_value_ptr, best_index_ptr = outputs
    rstd = token_rstd(squares_ptr, token, is_output, D, EPS, NUM_PARTS, MAX_TOKENS)
    none = tl.full([TOKENS], float("-inf"), tl.float32), tl.zeros([TOKENS], tl.int32)
    best, best_row = multiply_rows(
        ring, first, row0, num_rows, weight_ptr, weight_ptr, xb_ptr, token, is_output, none,
        (logits_of_ptr, sequence, rstd), finish_logits, CONSTANTS, D, False, 1, TOKENS, PANELS,
    )  # fmt: skip
    tl.store(best_value_ptr + sequence * NUM_BEST + part, best, mask=is_output)
    tl.store(best_index_ptr + sequence * NUM_BEST + part, best_row, mask=is_output)


@triton.jit(noinline=True)  # but not beside panels
def logits_of_outputs(
    first, num_outputs, args, CONSTANTS: tl.constexpr, TOKENS: tl.constexpr, PANELS: tl.constexpr
):  # fmt: skip
    outputs_ptr, output_token_ptr = args[4][0], args[4][1]
    output = first + tl.arange(0, TOKENS)
    is_output = output < num_outputs
    sequence = tl.load(outputs_ptr + output, mask=is_output, other=0)
    token = tl.load(output_token_ptr + sequence, mask=is_output, other=0)
    logits_of_tokens(first, sequence, token, is_output, args, CONSTANTS, TOKENS, PANELS)


@triton.jit
def batch_lm_head_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, sequences_ptr, counts_ptr, outputs_ptr, output_token_ptr, xb_ptr, squares_ptr, weight_ptr,  # in
    logits_of_ptr, best_value_ptr, best_index_ptr,  # out
    part, row0, num_rows, xb_map_addr,
    V: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, NUM_BEST: tl.constexpr, MAX_OUTPUTS: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, PANELS: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    # Panels multiply all tokens of a step, if these are so few that the weights are read once: no row is gathered then
    num_tokens = tl.load(num_tokens_ptr)
    few = tl.where(num_tokens <= PANEL_TOKENS, num_tokens, 0) if PANELS else num_tokens * 0
    ring = begin_weights(
        task, control_ptr, few, xb_map_addr, weight_ptr, weight_ptr, row0, num_rows, D, False, 1, PANELS, PORTABLE
    )
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    inputs = (outputs_ptr, output_token_ptr, xb_ptr, squares_ptr, weight_ptr)
    args = (ring, part, row0, num_rows, inputs, (logits_of_ptr, best_value_ptr, best_index_ptr))
    CONSTANTS: tl.constexpr = (V, D, EPS, NUM_BEST, NUM_PARTS, MAX_TOKENS)
    if PANELS:  # noqa: SIM102  Triton evaluates both sides of `and`
        if few > 0:
            token = tl.arange(0, PANEL_TOKENS)
            is_token = token < num_tokens
            sequence = tl.load(sequences_ptr + token, mask=is_token, other=0)
            is_output = is_token & (tl.load(output_token_ptr + sequence, mask=is_token, other=-1) == token)
            logits_of_tokens(0, sequence, token, is_output, args, CONSTANTS, PANEL_TOKENS, True)
    if few == 0:
        for_all_tokens(tl.load(counts_ptr + 1), args, logits_of_outputs, CONSTANTS, MAX_OUTPUTS, MANY, False)
    signal(task, event_ptr, PORTABLE)


def cut_batch_lm_head(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_sequences: TensorHandle,
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
    residual, sizes = residual_reads(k, input, squares)
    num_best = best_value.dims[1]
    if grid_dim not in (None, num_best):
        raise ValueError(f"best_value={best_value.name} is for {num_best} tasks, got grid_dim={grid_dim}; leave it out")
    ranges = list(even_ranges(vocab_size, num_best))
    streams, x_map = panel_streams(machine, weight, ranges, input, few_only=True)
    cut = Cut(
        {"V": logits.dims[1], "D": k, "EPS": eps, "NUM_BEST": num_best, "MAX_OUTPUTS": outputs.numel,
         "PANELS": x_map is not None} | sizes,
        {
            "num_tokens_ptr": num_tokens, "sequences_ptr": token_sequences, "counts_ptr": counts,
            "outputs_ptr": outputs, "output_token_ptr": output_token,
            "xb_ptr": input, "squares_ptr": squares, "weight_ptr": weight,
            "logits_of_ptr": logits, "best_value_ptr": best_value, "best_index_ptr": best_index,
        },
    )  # fmt: skip
    whole = (
        num_tokens.whole(),
        token_sequences.whole(),
        counts.whole(),
        outputs.whole(),
        output_token.whole(),
        *residual,
    )
    addresses = cut.addresses()
    for i, (lo, hi) in enumerate(ranges):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight.span(lo * k, hi * k)),
                writes=(logits.columns(lo, hi), best_value.columns(i, i + 1), best_index.columns(i, i + 1)),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"part": i, "row0": lo, "num_rows": hi - lo, "xb_map_addr": x_map or 0},
                panels=streams[i],
            )
        )
    return cut


def batch_lm_head_torch(
    xb: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, eps: float, output_token: torch.Tensor
) -> torch.Tensor:
    """Logits [n, V] of the sequences with an output token (those of -1 are left out)."""
    token = output_token[output_token >= 0].long()
    return batch_linear_torch(xb[token], squares[:, token], weight, eps)


BATCH_LM_HEAD = Op("batch_lm_head", batch_lm_head_tile, cut_batch_lm_head, batch_lm_head_torch, waits_for_ranks=True)
