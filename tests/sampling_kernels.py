"""What ops/sampling.py does, one function at a time in Triton's interpreter: `python tests/sampling_kernels.py GROUP`.

Run by tests/ops/test_sample.py, in a process of its own, because a Triton that interprets can do nothing else.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tri_mpk._interpreter_worker import tune_interpreter
from tri_mpk.ops.sample import SAMPLE, choose, score_size, turn
from tri_mpk.ops.sampling import (
    NUM_INDICES,
    NUM_SCRATCH,
    TOKEN,
    WEIGHT,
    collect,
    cut_key,
    cut_list,
    over_block,
    pick,
    sort_key,
    write_scores,
)
from tri_mpk.sampling import Sampling

INF = float("inf")
VOCABULARIES = (1, 2, 31, 96, 513, 1024, 1025, 2500)  # beyond 1024 a list holds only what a bound has let through
PARAMETERS: dict[str, dict[str, float]] = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_k of many": {"top_k": 400},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.4},
    "top_k, top_p": {"top_k": 20, "top_p": 0.7},
    "top_p, min_p": {"top_p": 0.95, "min_p": 0.02, "temperature": 1.2},
    "top_k, min_p": {"top_k": 12, "min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "all, many": {"temperature": 2.0, "top_k": 600, "top_p": 0.97, "min_p": 1e-3, "repetition_penalty": 0.8},
}


@triton.jit
def list_kernel(
    logits_ptr, seen_ptr, scores_ptr, scratch_ptr, indices_ptr, out_ptr, penalty, temperature, top_k, top_p, min_p,
    V: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    best = write_scores(logits_ptr, seen_ptr, scores_ptr, penalty, temperature, V, TURN, True)
    top = over_block(best, scratch_ptr, "max", True)
    number, mass = collect(scores_ptr, scratch_ptr, indices_ptr, top * 0.0 - float("inf"), top, V, TURN, True)
    cut_list(scratch_ptr, number, mass, top, top_k, top_p, min_p, True)
    tl.store(out_ptr, number)


@triton.jit
def draw_kernel(scratch_ptr, indices_ptr, tokens_ptr, seed):
    """A token per program from the list that list_kernel has left, of 32 at most."""
    left = tl.sum(tl.load(scratch_ptr + WEIGHT + tl.arange(0, 32)), axis=0)
    place, _ = pick(scratch_ptr + WEIGHT, tl.rand(seed, tl.program_id(0)) * left, 32)
    tl.store(tokens_ptr + tl.program_id(0), tl.load(indices_ptr + TOKEN + place))


@triton.jit
def search_kernel(
    logits_ptr, seen_ptr, scores_ptr, scratch_ptr, keys_ptr, out_ptr, penalty, temperature, top_k, top_p,
    V: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    best = write_scores(logits_ptr, seen_ptr, scores_ptr, penalty, temperature, V, TURN, True)
    top = over_block(best, scratch_ptr, "max", True)
    tl.store(out_ptr, cut_key(scores_ptr, scratch_ptr, top, top_k, top_p, V, TURN, True))
    for first in range(0, V, TURN):
        token = first + tl.arange(0, TURN)
        tl.store(keys_ptr + token, sort_key(tl.load(scores_ptr + token), token))


@triton.jit
def choose_kernel(
    choice_ptr, logits_ptr, seen_ptr, scores_ptr, scratch_ptr, indices_ptr, tokens_ptr, logprobs_ptr, first,
    CHOICE: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) + first
    token, logprob = choose(
        choice_ptr, CHOICE, logits_ptr, seen_ptr, position, scores_ptr, scratch_ptr, indices_ptr, V, TURN, True
    )
    tl.store(tokens_ptr + position, token)
    tl.store(logprobs_ptr + position, logprob)


class Memory:
    """Scratch full of NaN."""

    def __init__(self, vocab_size: int):
        self.scores = torch.full((score_size(vocab_size),), float("nan"))
        self.scratch = torch.full((NUM_SCRATCH.value,), float("nan"))
        self.indices = torch.full((NUM_INDICES.value,), -(1 << 30), dtype=torch.int32)
        self.sizes = {"V": vocab_size, "TURN": turn(vocab_size)}


def seen_mask(previous: torch.Tensor, vocab_size: int) -> torch.Tensor:
    mask = torch.zeros(vocab_size, dtype=torch.int8)
    mask[previous] = 1
    return mask


def run_choose(logits: torch.Tensor, sampling: Sampling, previous: torch.Tensor, number: int = 1, first: int = 0):
    words = torch.tensor(sampling.words())
    memory = Memory(len(logits))
    tokens = torch.full((first + number,), -7, dtype=torch.int32)
    logprobs = torch.full((first + number,), float("nan"))
    choose_kernel[(number,)](
        words, logits, seen_mask(previous, len(logits)), memory.scores, memory.scratch, memory.indices, tokens,
        logprobs, first, CHOICE=int(words[0]), **memory.sizes,
    )  # fmt: skip
    return tokens[first:].long(), logprobs[first:]


def processed(logits: torch.Tensor, previous: torch.Tensor, p: Sampling) -> torch.Tensor:
    """Scores as transformers' processors make them, in their order."""
    processors = LogitsProcessorList()
    if p.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(MinPLogitsWarper(p.min_p))
    return processors(previous[None], logits[None].clone())[0]


def run_list(logits: torch.Tensor, previous: torch.Tensor, p: Sampling) -> tuple[Memory, int]:
    memory, out = Memory(len(logits)), torch.zeros(1, dtype=torch.int32)
    top_k = p.top_k if p.top_k < len(logits) else 0
    list_kernel[(1,)](
        logits, seen_mask(previous, len(logits)), memory.scores, memory.scratch, memory.indices, out,
        p.repetition_penalty, p.temperature, top_k, p.top_p, p.min_p, **memory.sizes,
    )  # fmt: skip
    return memory, int(out)


def kept_by_list(logits: torch.Tensor, previous: torch.Tensor, p: Sampling) -> set[int]:
    memory, number = run_list(logits, previous, p)
    kept = memory.scratch[WEIGHT.value :][:number] > 0
    return set(memory.indices[TOKEN.value :][:number][kept].tolist())


def kept_by_search(logits: torch.Tensor, previous: torch.Tensor, p: Sampling) -> set[int]:
    memory, out = Memory(len(logits)), torch.zeros(1, dtype=torch.int64)
    keys = torch.zeros(len(memory.scores), dtype=torch.int64)
    top_k = p.top_k if p.top_k < len(logits) else 0
    search_kernel[(1,)](
        logits, seen_mask(previous, len(logits)), memory.scores, memory.scratch, keys, out, p.repetition_penalty,
        p.temperature, top_k, p.top_p, **memory.sizes,
    )  # fmt: skip
    weights = (memory.scores - memory.scores.max()).exp()
    kept = (keys >= out) & (weights >= p.min_p) & (weights > 0)
    return set(kept.nonzero().view(-1).tolist())


def expected_set(logits: torch.Tensor, previous: torch.Tensor, p: Sampling, stable: bool = False) -> set[int]:
    """What transformers keeps. Its sort is not stable, so which of equal scores top-p keeps only the reference says."""
    if stable:
        parameters = {
            name: getattr(p, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        }
        return set((SAMPLE.reference(logits, previous, **parameters) > 0).nonzero().view(-1).tolist())
    return set(processed(logits, previous, p).isfinite().nonzero().view(-1).tolist())


def check_kept(logits: torch.Tensor, previous: torch.Tensor, p: Sampling, exact: bool = True) -> None:
    """Both ways keep what transformers keeps. Not `exact`: but for tokens that rounding decides about."""
    expected = expected_set(logits, previous, p, stable=not exact)
    ways = [kept_by_search] + [kept_by_list] * (len(logits) <= 1024)
    for way in ways:
        differing = way(logits, previous, p) ^ expected
        if not exact:
            differing -= doubtful(logits, previous, p)
        assert not differing, (way.__name__, p, sorted(differing), len(expected))


def doubtful(logits: torch.Tensor, previous: torch.Tensor, p: Sampling) -> set[int]:
    """Tokens at the edge of top-p or min-p, to 1e-5."""
    loose = Sampling(True, p.temperature, p.top_k, repetition_penalty=p.repetition_penalty)
    probabilities = processed(logits, previous, loose).double().softmax(-1)
    order = processed(logits, previous, loose).sort(stable=True).indices
    below = torch.empty_like(probabilities)
    below[order] = probabilities[order].cumsum(-1)
    at_top_p = (below - (1 - p.top_p)).abs() < 1e-5
    at_min_p = (probabilities / probabilities.max() - p.min_p).abs() < 1e-5
    return set((at_top_p | at_min_p).nonzero().view(-1).tolist())


def kept() -> None:
    """Random logits, every parameter and combinations."""
    for vocab_size in VOCABULARIES:
        for parameters in PARAMETERS.values():
            logits = 2.5 * torch.randn(vocab_size)
            previous = torch.randint(vocab_size, (9,))
            check_kept(logits, previous, Sampling(True, **parameters))
        print("kept", vocab_size, flush=True)


numbers = st.floats(0.0, 1.0, width=32)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(st.integers(1, 200), st.integers(1000, 1100)),
    st.integers(0, 1 << 30), st.sampled_from([0.0, 0.01, 1.0, 3.0, 1e4]), st.booleans(),
    st.sampled_from([0.05, 0.5, 1.0, 2.5, 100.0]), st.integers(0, 1400), st.one_of(st.just(1.0), numbers),
    st.one_of(st.just(0.0), numbers), st.sampled_from([1.0, 1.3, 0.5, 10.0]),
)  # fmt: skip
def edges(vocab_size, seed, scale, ties, temperature, top_k, top_p, min_p, penalty) -> None:
    """Odd sizes, ties, logits of -inf, flat and steep distributions: the same sets, and a token of the set."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(vocab_size, generator=generator)
    if ties:
        logits = (logits * 2).round() / 2
    logits[torch.rand(vocab_size, generator=generator) < 0.2] = -INF
    logits[torch.randint(vocab_size, (1,), generator=generator)] = 0.25
    previous = torch.randint(vocab_size, (5,), generator=generator)
    p = Sampling(True, temperature, top_k, top_p, min_p, penalty, seed=seed)
    check_kept(logits, previous, p, exact=False)
    (token,), (logprob,) = run_choose(logits, p, previous)
    allowed = expected_set(logits, previous, p, stable=True)
    assert int(token) in allowed | doubtful(logits, previous, p)
    if not doubtful(logits, previous, p):
        scores = processed(logits, previous, replace(p, top_p=1.0, min_p=0.0))[sorted(allowed)].log_softmax(-1)
        torch.testing.assert_close(logprob, scores[sorted(allowed).index(int(token))], rtol=2e-4, atol=2e-4)


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The statistic in units of its standard deviation above its mean; rare tokens together count as one."""
    assert bool((probabilities[tokens] > 0).all())
    expected, counts = probabilities * len(tokens), torch.bincount(tokens, minlength=len(probabilities))
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).double()
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    used = expected > 1e-3 * len(tokens)
    freedom = max(1, int(used.sum()) - 1)
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    return (statistic - freedom) / (2 * freedom) ** 0.5


def draws(half: int, number: int = 1000) -> None:
    """How often tokens of a list are chosen, at many positions of a seed, against the op's reference."""
    for name, parameters in list(PARAMETERS.items())[half::2]:
        logits, previous = 1.5 * torch.randn(30), torch.randint(30, (4,))
        p = Sampling(True, seed=1234, **parameters)
        probabilities = SAMPLE.reference(logits, previous, **parameters)
        torch.testing.assert_close(probabilities, processed(logits, previous, p).softmax(-1))
        memory, _ = run_list(logits, previous, p)
        tokens = torch.full((number,), -1, dtype=torch.int32)
        draw_kernel[(number,)](memory.scratch, memory.indices, tokens, p.seed)
        deviation = chi_square(tokens.long(), probabilities)
        print("draws", name, f"{deviation:.2f}", flush=True)
        assert deviation < 4


def repeats(number: int = 1000) -> None:
    """The same through `choose`, with a list and without, at many positions and with many seeds."""
    for vocab_size, parameters in ((40, {"top_k": 9, "temperature": 0.9}), (1100, {})):  # a list, and no list
        logits, previous = 1.5 * torch.randn(vocab_size), torch.tensor([0])
        probabilities = SAMPLE.reference(logits, previous, **parameters)
        tokens, logprobs = run_choose(logits, Sampling(True, seed=5, **parameters), previous, number // 10, first=77)
        torch.testing.assert_close(logprobs, probabilities[tokens].log(), rtol=1e-4, atol=1e-4)
        assert chi_square(tokens, probabilities) < 4
        seeds = range(1 << 40, (1 << 40) + number // 20)
        tokens = torch.cat([run_choose(logits, Sampling(True, seed=i, **parameters), previous)[0] for i in seeds])
        assert chi_square(tokens, probabilities) < 4
        print("repeats of", vocab_size, flush=True)


def chosen() -> None:
    """From a vocabulary beyond a list: what bounds the list changes neither tokens nor their probabilities."""
    for top_k, top_p, min_p in ((30, 0.9, 0.1), (30, 1.0, 0.1), (0, 0.9, 0.1), (300, 0.8, 0.05), (30, 0.9, 0.0)):
        parameters = {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": 1.3}
        logits, previous = -0.12 * torch.randperm(2500), torch.randint(2500, (9,))
        probabilities = SAMPLE.reference(logits, previous, **parameters)
        tokens, logprobs = run_choose(logits, Sampling(True, seed=9, **parameters), previous, 2)
        torch.testing.assert_close(logprobs, probabilities[tokens].log(), rtol=2e-4, atol=2e-4)
    print("chosen", flush=True)


def odd() -> None:
    """What no distribution comes of still gives -1, or a token; greedy choices are the lowest of equal ones."""
    previous = torch.tensor([0])
    for logits in (torch.full((40,), -INF), torch.full((1500,), float("nan"))):
        for parameters in PARAMETERS.values():
            assert run_choose(logits, Sampling(True, **parameters), previous)[0].tolist() == [-1]
        assert int(run_choose(logits, Sampling(logprobs=True), previous)[0]) in (-1, 0)
    logits = torch.tensor([3.0, -0.0, 5.0, 5.0, -INF, 4.5])
    token, logprob = run_choose(logits, Sampling(logprobs=True), previous)
    assert token.tolist() == [2]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[2:3])
    penalised = Sampling(repetition_penalty=2.0)
    assert run_choose(logits, penalised, torch.tensor([2]))[0].tolist() == [3]
    assert run_choose(logits, penalised, torch.tensor([2, 3]))[0].tolist() == [5]
    assert run_choose(-logits.abs(), penalised, torch.tensor([1]))[0].tolist() == [1]  # zero stays
    flat = torch.zeros(2000)
    for parameters in ({}, {"top_p": 0.25}, {"top_k": 1}, {"top_k": 1999}, {"min_p": 1.0}, {"top_p": 0.0}):
        p = Sampling(True, seed=3, **parameters)
        tokens, logprobs = run_choose(flat, p, previous, 12)
        number = int(processed(flat, previous, p).isfinite().sum())
        assert set(tokens.tolist()) <= expected_set(flat, previous, p, stable=True) | doubtful(flat, previous, p)
        assert len(set(tokens.tolist())) > min(number, 12) // 2
        torch.testing.assert_close(logprobs, torch.full((12,), -float(np.log(number))), rtol=1e-3, atol=1e-3)
    # a token depends on seed and position, and on nothing else
    logits, p = torch.randn(300), Sampling(True, seed=(1 << 64) - 5)
    together, _ = run_choose(logits, p, previous, 8)
    alone = [run_choose(logits, p, previous, 1, position)[0] for position in range(8)]
    assert torch.equal(together, torch.cat(alone)) and len(set(together.tolist())) > 3
    assert not torch.equal(together, run_choose(logits, Sampling(True, seed=5), previous, 8)[0])
    print("odd", flush=True)


if __name__ == "__main__":
    tune_interpreter()
    torch.manual_seed(0)
    groups = {
        "kept": kept, "edges": edges, "draws": partial(draws, 0), "more_draws": partial(draws, 1), "repeats": repeats,
        "chosen": chosen, "odd": odd,
    }  # fmt: skip
    groups[sys.argv[1]]()
