"""The next token of one sequence: the best one, or one drawn at random, as its request asks.

the plan of the step, records [S, RECORD] int64, tokens [S, L] int32 read
best value, index [S, num_parts] | logits [S, V] fp32 read
chosen [S] int32, logprobs [S] fp32 written | seen [S, V'] int8, scores [S, V'] fp32, scratch: a row of its own
One task = one sequence, so sequences choose at the same time. How it chooses is sample.py's `choose`: words of the
request's record. V' is V rounded up to whole turns. With a repetition penalty the tokens seen so far are marked: a task
whose slot has just been given to a new request clears the marks and sets those of the prompt while the step computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.advance import SLOT_NEW
from tri_mpk.ops.argmax import best_of_parts
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.ops.rings import RECORD, RECORD_CHOICE, RECORD_PROMPT_LENGTH
from tri_mpk.ops.sample import (
    CHOICE,
    CHOICE_REPETITION_PENALTY,
    CHOOSE_BEST,
    choose,
    float_word,
    sample_torch,
    turn,
)
from tri_mpk.ops.sampling import NUM_INDICES, NUM_SCRATCH
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.graph import Region, Task
from tri_mpk.scheduler.peers import wait_for_any


@triton.jit
def mark_prompt(seen_ptr, tokens_ptr, length, V: tl.constexpr, TURN: tl.constexpr):
    """The marks of a new request: of the tokens of its prompt, and of no others."""
    for first in tl.range(0, V, TURN, num_stages=1):
        tl.store(seen_ptr + first + tl.arange(0, TURN), tl.zeros([TURN], tl.int8))
    tl.debug_barrier()
    for first in tl.range(0, length, 512, num_stages=1):
        place = first + tl.arange(0, 512)
        token = tl.load(tokens_ptr + place, mask=place < length, other=0)
        tl.store(seen_ptr + token, tl.full([512], 1, tl.int8), mask=place < length)
    tl.debug_barrier()


# Triton's time for a function grows with the square of its size, so this one is not inlined.
@triton.jit(noinline=True)
def batch_sample_tile(
    task, event_ptr, control_ptr, epoch,
    output_token_ptr, token_positions_ptr, slots_ptr, records_ptr, tokens_ptr,  # in
    best_value_ptr, best_index_ptr, logit_rows_ptr,  # in
    chosen_ptr, logprobs_ptr, seen_ptr,  # out, out, in and out
    scores_ptr, scratch_ptr, indices_ptr,
    sequence,
    S: tl.constexpr, L: tl.constexpr, NUM_PARTS: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, TURN: tl.constexpr,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    record_ptr = records_ptr + sequence * RECORD
    choice_ptr = record_ptr + RECORD_CHOICE
    row = sequence.to(tl.int64)
    seen_row_ptr = seen_ptr + row * VP
    penalised = float_word(choice_ptr, CHOICE_REPETITION_PENALTY) != 1.0
    if penalised & (tl.load(slots_ptr + SLOT_NEW * S + sequence) != 0):
        mark_prompt(
            seen_row_ptr, tokens_ptr + row * L, tl.load(record_ptr + RECORD_PROMPT_LENGTH).to(tl.int32), V, TURN
        )
    output = tl.load(output_token_ptr + sequence)
    choice = tl.load(choice_ptr + CHOICE).to(tl.int32)
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    if output >= 0:
        token = best_of_parts(best_value_ptr + sequence * NUM_PARTS, best_index_ptr + sequence * NUM_PARTS, NUM_PARTS)
        if choice != CHOOSE_BEST:
            position = tl.load(token_positions_ptr + output) + 1
            token_chosen, logprob = choose(
                choice_ptr, choice, logit_rows_ptr + row * V, seen_row_ptr, position, scores_ptr + row * VP,
                scratch_ptr + sequence * NUM_SCRATCH, indices_ptr + sequence * NUM_INDICES, V, TURN, PORTABLE,
            )  # fmt: skip
            token = tl.where(token_chosen >= 0, token_chosen.to(tl.int64), token)
            tl.store(logprobs_ptr + sequence, logprob)
            tl.store(seen_row_ptr + token, 1)
        tl.store(chosen_ptr + sequence, token.to(tl.int32))
    signal(task, event_ptr, PORTABLE)


def cut_batch_sample(
    machine: Machine,
    *,
    output_token: TensorHandle,
    token_positions: TensorHandle,
    slots: TensorHandle,
    records: TensorHandle,
    tokens: TensorHandle,
    best_value: TensorHandle,
    best_index: TensorHandle,
    logits: TensorHandle,
    chosen: TensorHandle,
    logprobs: TensorHandle,
    seen: TensorHandle,
    scores: TensorHandle,
    scratch: TensorHandle,
    indices: TensorHandle,
    vocab_size: int,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("batch_sample", grid_dim, chosen.numel, "a task per sequence")
    num_sequences = chosen.numel
    num_parts = best_value.numel // num_sequences
    common = {"output_token_ptr": output_token, "token_positions_ptr": token_positions, "slots_ptr": slots}
    rows_read = {
        "records_ptr": records, "tokens_ptr": tokens, "best_value_ptr": best_value, "best_index_ptr": best_index,
        "logit_rows_ptr": logits,
    }  # fmt: skip
    rows_written = {
        "chosen_ptr": chosen, "logprobs_ptr": logprobs, "seen_ptr": seen, "scores_ptr": scores, "scratch_ptr": scratch,
        "indices_ptr": indices,
    }  # fmt: skip
    constants = {
        "S": num_sequences, "L": tokens.dims[1], "NUM_PARTS": num_parts, "V": vocab_size, "VP": seen.dims[1],
        "TURN": turn(vocab_size),
    }  # fmt: skip
    cut = Cut(constants, common | rows_read | rows_written)

    def row(tensor: TensorHandle, sequence: int):
        size = tensor.numel // num_sequences
        return tensor.span(sequence * size, (sequence + 1) * size)

    for sequence in range(num_sequences):
        # what the language model head leaves has two coordinates: its tasks write columns
        found = [_row_of(tensor, sequence) for tensor in (best_value, best_index, logits)]
        cut.tasks.append(
            Task(
                op=0,
                tile=(sequence,),
                reads=(
                    *(tensor.whole() for tensor in common.values()),
                    *(row(tensor, sequence) for tensor in (records, tokens, seen)),
                    *found,
                ),
                writes=tuple(row(tensor, sequence) for tensor in rows_written.values()),
                cost_bytes=8 * num_parts,  # of greedy decoding
                fields=cut.addresses() | {"sequence": sequence},
            )
        )
    return cut


def _row_of(tensor: TensorHandle, sequence: int) -> Region:
    """Of a matrix [S, N], or of what all ranks pushed: see rank_batch_gather.py."""
    num_rows, size = tensor.dims
    if tensor.symmetric:
        return tensor.box((0, num_rows), (sequence, sequence + 1))
    return tensor.box((sequence, sequence + 1), (0, size))


BATCH_SAMPLE = Op("batch_sample", batch_sample_tile, cut_batch_sample, sample_torch, waits_for_ranks=True)
