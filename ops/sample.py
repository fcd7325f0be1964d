"""The end of a decode step: which token comes next, and whether one comes. argmax, or a token drawn at random.

best value, index [num_parts] read | logits [V] fp32 read | seen [V] int8 read and written
tokens [max_seq_len] int64 written | logprobs [max_seq_len] fp32 written | step [1] int32 written | scratch
A single task, as in argmax.py. How a token is chosen is data, words of the control block: without sampling, repetition
penalty and log-probabilities the logits are not read at all. Else the worker goes over the vocabulary a few times
(sampling.py): repetition penalty, temperature, top-k, top-p, min-p, in this order. The random number is Philox of seed
and position, so a request gets the same tokens whatever runs beside it. A log-probability is that of the distribution
that the token was chosen from.
Source: transformers GenerationMixin._get_logits_processor and _sample; Philox: Salmon et al., SC 2011.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.argmax import MAILBOX_STOP, STOP_INTERVAL, best_of_parts, finish_step
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid, next_power_of_2
from tri_mpk.ops.sampling import SLOTS, best_score, over_block, sample, write_scores
from tri_mpk.scheduler.device import (
    CONTROL_CHOICE,
    CONTROL_EOS,
    CONTROL_LAST_STEP,
    CONTROL_LOGITS_STRIDE,
    CONTROL_NUM_EOS,
    CONTROL_NUM_KNOWN,
    signal,
    wait,
)
from tri_mpk.scheduler.graph import Address, Task

# How tokens are chosen: words (int64) from CONTROL_CHOICE on, or of a request's record (batch_sample.py). Numbers that
# are no integers as fp32 bits.
CHOICE = tl.constexpr(0)  # one of the three below
CHOICE_SEED = tl.constexpr(1)
CHOICE_TEMPERATURE = tl.constexpr(2)
CHOICE_TOP_K = tl.constexpr(3)  # 0: off
CHOICE_TOP_P = tl.constexpr(4)  # 1.0: off
CHOICE_MIN_P = tl.constexpr(5)  # 0.0: off
CHOICE_REPETITION_PENALTY = tl.constexpr(6)  # 1.0: off
CHOICE_WORDS = tl.constexpr(7)

CHOOSE_BEST = tl.constexpr(0)  # of what lm_head's tasks found
CHOOSE_BEST_SCORE = tl.constexpr(1)  # after the repetition penalty, and with its log-probability
CHOOSE_AT_RANDOM = tl.constexpr(2)

MAX_TURN = 4096  # 8 numbers per thread: with twice as many the kernel spills


@triton.jit
def float_word(choice_ptr, word):
    return tl.load(choice_ptr + word).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def choose(
    choice_ptr, choice, logits_ptr, seen_ptr, position, scores_ptr, scratch_ptr, indices_ptr,
    V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token for a position and its log-probability; -1 if no logit is a number. `choice_ptr`: the words CHOICE_."""
    penalty = float_word(choice_ptr, CHOICE_REPETITION_PENALTY)
    temperature = float_word(choice_ptr, CHOICE_TEMPERATURE)
    best = write_scores(logits_ptr, seen_ptr, scores_ptr, penalty, temperature, V, TURN, PORTABLE)
    top = over_block(best, scratch_ptr, "max", PORTABLE)
    if choice == CHOOSE_AT_RANDOM:
        uniform = tl.rand(tl.load(choice_ptr + CHOICE_SEED), position)
        top_k = tl.load(choice_ptr + CHOICE_TOP_K).to(tl.int32)
        top_p, min_p = float_word(choice_ptr, CHOICE_TOP_P), float_word(choice_ptr, CHOICE_MIN_P)
        token, logprob = sample(
            scores_ptr, scratch_ptr, indices_ptr, best, top, uniform, top_k, top_p, min_p, V, TURN, PORTABLE
        )
    else:
        first, weights = best_score(scores_ptr, top, V, TURN, PORTABLE)
        token = over_block(first, scratch_ptr, "min", PORTABLE).to(tl.int32)
        token = tl.where(token < V, token, -1)
        logprob = -tl.log(over_block(weights, scratch_ptr, "sum", PORTABLE))
    return token, logprob


@triton.jit
def next_token(
    control_ptr, choice, logits_ptr, position, goes_on, best_value_ptr, best_index_ptr, logprobs_ptr, seen_ptr,
    scores_ptr, scratch_ptr, indices_ptr,
    NUM_PARTS: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token for a position, as the launch wants it chosen. `goes_on`: the prompt does, so it does not matter."""
    token = best_of_parts(best_value_ptr, best_index_ptr, NUM_PARTS)
    if (choice != CHOOSE_BEST) & (goes_on == 0):
        chosen, logprob = choose(
            control_ptr + CONTROL_CHOICE, choice, logits_ptr, seen_ptr, position, scores_ptr, scratch_ptr, indices_ptr,
            V, TURN, PORTABLE,
        )  # fmt: skip
        token = tl.where(chosen >= 0, chosen.to(tl.int64), token)
        tl.store(logprobs_ptr + position, logprob)
        tl.store(seen_ptr + token, 1)
    return token


# Triton's time for a function grows with the square of its size: with this one inlined it takes twice as long.
@triton.jit(noinline=True)
def sample_tile(
    task, event_ptr, control_ptr, logits_ptr, mailbox_ptr, epoch, step, step_ptr,
    best_value_ptr, best_index_ptr, tokens_ptr, logprobs_ptr, seen_ptr,  # in, in, out, out, in and out
    scores_ptr, scratch_ptr, indices_ptr,
    NUM_PARTS: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    choice = tl.load(control_ptr + CONTROL_CHOICE).to(tl.int32)
    asks = step % STOP_INTERVAL == 0
    stop_asked = tl.load(mailbox_ptr + MAILBOX_STOP, mask=asks, other=0, volatile=True) != 0
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    token = next_token(
        control_ptr, choice, row_ptr, step + 1, step + 1 < num_known, best_value_ptr, best_index_ptr, logprobs_ptr,
        seen_ptr, scores_ptr, scratch_ptr, indices_ptr, NUM_PARTS, V, TURN, PORTABLE,
    )  # fmt: skip
    stop = (step >= last_step) | stop_asked
    finish_step(
        control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop, PORTABLE
    )
    signal(task, event_ptr, PORTABLE)


def turn(vocab_size: int) -> int:
    """Tokens of a turn: 64 KiB of scores on their way together keep a worker busy, unless the vocabulary is smaller."""
    return min(MAX_TURN, next_power_of_2(max(vocab_size, SLOTS.value)))


def score_size(vocab_size: int) -> int:
    """Elements that the scores of a vocabulary take: whole turns."""
    return -(-vocab_size // turn(vocab_size)) * turn(vocab_size)


def cut_sample(
    machine: Machine,
    *,
    best_value: TensorHandle,
    best_index: TensorHandle,
    tokens: TensorHandle,
    logprobs: TensorHandle,
    seen: TensorHandle,
    scores: TensorHandle,
    scratch: TensorHandle,
    indices: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("sample", grid_dim, 1, "one task")
    reads = {"best_value_ptr": best_value, "best_index_ptr": best_index}
    writes = {
        "tokens_ptr": tokens, "logprobs_ptr": logprobs, "seen_ptr": seen,
        "scores_ptr": scores, "scratch_ptr": scratch, "indices_ptr": indices,
    }  # fmt: skip
    task = Task(
        op=0,
        tile=(0,),
        reads=(best_value.whole(), best_index.whole(), seen.whole()),
        writes=tuple(tensor.whole() for tensor in writes.values()),
        cost_bytes=8 * best_value.numel,  # of greedy decoding
        fields={name: Address(tensor.name) for name, tensor in (reads | writes).items()},
    )
    constants = {"NUM_PARTS": best_value.numel, "V": seen.numel, "TURN": turn(seen.numel)}
    return Cut(constants, reads | writes, [task])


def sample_torch(
    logits: torch.Tensor,
    previous: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> torch.Tensor:
    """Probabilities [V] of the next token after the tokens `previous`."""
    scores = logits.float().clone()
    seen = previous.unique()
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * repetition_penalty, scores[seen] / repetition_penalty)
    scores /= temperature
    if 0 < top_k < len(scores):
        scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
    if top_p < 1:
        order = scores.sort(descending=False, stable=True).indices
        cut = scores[order].softmax(-1).cumsum(-1) <= 1 - top_p
        cut[-1] = False
        scores[order[cut]] = -torch.inf
    probabilities = scores.softmax(-1)
    scores[probabilities < min_p * probabilities.max()] = -torch.inf
    return scores.softmax(-1)


SAMPLE = Op("sample", sample_tile, cut_sample, sample_torch, ends_step=True)
