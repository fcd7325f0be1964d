"""Many sequences on several ranks, on a CPU: processes with gloo and shared memory, two workers each."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import tri_mpk
from decoders import prompt, tiny_config, transformers_model
from ranks import REQUESTS, RankProcesses, run_ranks

TWO_LAYERS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "llama": (2, {"family": "llama", **TWO_LAYERS}),
    "qwen3, tied, an odd vocabulary": (
        2, {"family": "qwen3", **TWO_LAYERS, "vocab_size": 97, "tie_word_embeddings": True}
    ),
    "llama, bias of o, odd sizes": (
        2, {"family": "llama", "attention_bias": True, "hidden_size": 70, "intermediate_size": 106, "head_dim": 34}
    ),
    "llama on four, KV heads twice": (4, {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ops_equal_their_references(num_ranks):
    """More tokens than are added up at once, columns and rows of the vocabulary that no block divides, a bias."""
    assert run_ranks(num_ranks, "batch_ops") == ["equal"] * num_ranks


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gets_the_tokens_of_transformers(name):
    """More prompts than slots, chunks beside sequences that decode; the same bits on all ranks."""
    num_ranks, parameters = MODELS[name]
    work = {"lengths": [2, 11, 1, 4]} if num_ranks == 2 else {"lengths": [2, 9], "num_new": 2, "repeats": 1}
    check(run_ranks(num_ranks, "batch", **work, **parameters))


def check(results: list[dict]) -> None:
    for result in results:
        assert all(tokens == result["expected"] for tokens in result["tokens"])
        assert result["launches"] == len(result["tokens"])
    assert len({result["bits"] for result in results}) == 1


def test_a_rank_that_lags_behind_changes_no_bit():
    delays = {1: {"TRI_MPK_TEST_DELAYS": "2/1"}}
    with RankProcesses(2, "batch", delays, lengths=[2, 5], num_new=3, repeats=1, family="llama") as ranks:
        check([ranks.last(rank, 300) for rank in range(2)])


def test_requests_are_served_as_one_rank_serves_them():
    """Sampled tokens, seeds that nobody gave, and a cancelled request that ends on all ranks with the same token."""
    _, parameters = MODELS["qwen3, tied, an odd vocabulary"]
    model = transformers_model(tiny_config(**parameters))
    one = tri_mpk.from_model(
        model, device="cpu", max_seq_len=64, num_workers=2, progress=False, max_batch_size=3, max_tokens_per_step=8
    )
    common = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logprobs": True}
    expected = [one.generate(prompt(3), **common, **request) for request in REQUESTS]
    results = run_ranks(2, "serve_batch", requests=REQUESTS, cancelling=1, **parameters)
    for result in results:
        assert result["tokens"] == [each.sequences[0, 3:].tolist() for each in expected]
        for logprobs, each in zip(result["logprobs"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), each.logprobs[0], rtol=0, atol=1e-5)
        assert result["reason"] == "cancelled"
    for what in ("drawn", "long", "bits"):
        assert results[0][what] == results[1][what], what


@pytest.mark.parametrize("what", ["a prompt", "one more"])
def test_ranks_that_do_not_submit_the_same(what):
    """The launch ends on all ranks, whoever has requests left gets the error, and the next launch is in order."""
    results = run_ranks(2, "different_requests", what=what)
    for result in results if what == "a prompt" else results[:1]:
        assert "number 1, from 0, is not the same on all ranks" in result["text"], result
    assert all(result["equal"] for result in results)


def test_a_killed_rank_ends_the_other():
    """Also while there is nothing to do."""
    with RankProcesses(2, "serve_and_hang") as ranks:
        pids = [ranks.next(rank)["pids"] for rank in range(2)]
        assert [ranks.next(rank) for rank in range(2)] == ["idle"] * 2
        for pid in pids[0]:
            os.kill(pid, signal.SIGKILL)
        result = ranks.last(1, 120)
    assert result["error"] == "MegakernelTimeout" and result["silent_ranks"] == [0], result
