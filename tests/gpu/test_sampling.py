"""Sampling on one CUDA GPU: which tokens and how often, log-probabilities, seeds; greedy decoding is as before."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import tri_mpk
from decoders import prompt, tiny_config
from tri_mpk import CausalLM
from tri_mpk.loading import random_model
from tri_mpk.ops.sample import SAMPLE
from tri_mpk.runtime import LaunchRequest
from tri_mpk.sampling import Sampling

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
VOCAB_SIZES = (997, 32000, 151936)  # in a list as a whole; some turns, the last one not full; as large as Qwen3's
NUM_DRAWS = 4000
PARAMETERS: dict[str, dict[str, float]] = {
    "nothing": {"temperature": 0.2},
    "top_k": {"top_k": 50, "temperature": 0.5},
    "top_k of many": {"top_k": 3000, "temperature": 0.3},
    "top_p": {"top_p": 0.9, "temperature": 0.2},
    "top_p of many": {"top_p": 0.5, "temperature": 1.5},
    "min_p": {"min_p": 0.05},
    "min_p of many": {"min_p": 1e-4, "temperature": 2.0},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def pair(request) -> tuple[CausalLM, PreTrainedModel]:
    config = tiny_config(
        "llama", vocab_size=request.param, hidden_size=256, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    theirs = random_model(config, 0, torch.bfloat16, CUDA)
    with torch.no_grad():
        theirs.lm_head.weight.normal_(0.0, 0.15)
    theirs.generation_config.eos_token_id = None
    return tri_mpk.from_model(theirs, max_seq_len=NUM_DRAWS + 16, progress=False), theirs


def sampled(model: CausalLM, number: int = 64, **parameters: object):
    return model.generate(
        prompt(5, 900), max_new_tokens=number, do_sample=True, return_dict_in_generate=True, output_logprobs=True,
        **{"top_k": 0, **parameters},
    )  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_are_those_that_transformers_allows(pair, name):
    """Each token's log-probability against the reference on the kernel's own logits of the same text."""
    ours, _ = pair
    output = sampled(ours, seed=3, **PARAMETERS[name])
    text, logprobs = output.sequences[0], output.logprobs[0]
    logits = ours(text[None]).logits[0].cpu()
    misses = 0
    for i, logprob in enumerate(logprobs.tolist(), 5):
        expected = float(SAMPLE.reference(logits[i - 1], text[:i], **PARAMETERS[name])[text[i]].log())
        misses += abs(logprob - expected) > 2e-3
    assert misses <= 1  # a token at the edge of top-p may be in or out


@pytest.mark.parametrize("name", PARAMETERS)
def test_how_often_tokens_are_chosen(pair, name):
    """Chi-square: the probabilities of steps differ, so counts are compared by ranges of the cumulative probability."""
    ours, _ = pair
    output = sampled(ours, 1000, seed=8, **PARAMETERS[name])
    text = output.sequences[0]
    logits = ours(text[None]).logits[0].cpu()
    generator, bins = torch.Generator().manual_seed(0), 20
    counts = torch.zeros(bins)
    for i in range(5, len(text)):
        probabilities = SAMPLE.reference(logits[i - 1], text[:i], **PARAMETERS[name]).double()
        # uniform in [0, 1) if the token is drawn from these probabilities: its interval, and a place in it
        below = float(probabilities[: text[i]].sum())
        place = below + float(probabilities[text[i]]) * float(torch.rand((), generator=generator))
        counts[min(int(place * bins), bins - 1)] += 1
    expected = (len(text) - 5) / bins
    assert float(((counts - expected) ** 2 / expected).sum()) < 50  # 19 degrees of freedom: p = 1e-4


def test_the_same_seed_gives_the_same_text(pair):
    ours, _ = pair
    for parameters in PARAMETERS.values():
        first, again, other = (sampled(ours, seed=seed, **parameters) for seed in (1, 1, 2))
        assert torch.equal(first.sequences, again.sequences) and torch.equal(first.logprobs, again.logprobs)
        assert not torch.equal(first.sequences, other.sequences)
    torch.manual_seed(5)
    drawn = sampled(ours).sequences
    torch.manual_seed(5)
    assert torch.equal(sampled(ours).sequences, drawn)


def test_greedy_decoding_before_and_after(pair):
    ours, _ = pair
    input_ids = prompt(5, 900)
    greedy = ours.generate(input_ids, max_new_tokens=40)
    sampled(ours, seed=4)
    assert torch.equal(ours.generate(input_ids, max_new_tokens=40), greedy)
    for parameters in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert torch.equal(sampled(ours, 40, **parameters).sequences, greedy)
    output = ours.generate(input_ids, max_new_tokens=40, return_dict_in_generate=True, output_logprobs=True)
    assert torch.equal(output.sequences, greedy)
    logits = ours(greedy).logits[0, 4:-1].cpu()
    expected = logits.log_softmax(-1).gather(1, greedy[0, 5:, None])[:, 0]
    torch.testing.assert_close(output.logprobs[0], expected, rtol=1e-3, atol=1e-3)


def test_greedy_with_a_penalty(pair):
    """Token by token, from the kernel's own logits of the text that it has made."""
    ours, _ = pair
    text = ours.generate(prompt(5, 900), max_new_tokens=60, repetition_penalty=1.5)[0]
    logits = ours(text[None]).logits[0].cpu()
    for i in range(5, len(text)):
        assert int(SAMPLE.reference(logits[i - 1], text[:i], repetition_penalty=1.5).argmax()) == int(text[i])


def test_what_it_costs(pair):
    """Microseconds per token more than greedy decoding: printed, not judged, but for the plainest mode."""
    ours, _ = pair

    def us_per_token(sampling: Sampling) -> float:
        times = []
        for _ in range(5):
            ours.kernel.step.data.zero_()
            list(ours.kernel.launch(LaunchRequest(1, 256, sampling=sampling)))
            times.append(ours.kernel.runtime.last_launch_ms)
        return 1e3 * sorted(times)[2] / 257

    greedy = us_per_token(Sampling())
    modes = {"greedy with log-probabilities": Sampling(logprobs=True)}
    modes |= {name: Sampling(True, **parameters) for name, parameters in PARAMETERS.items()}
    for name, sampling in modes.items():
        print(f"{ours.config.vocab_size} tokens, {name}: {us_per_token(sampling) - greedy:.1f} us")
    assert us_per_token(Sampling(True)) - greedy < 100
