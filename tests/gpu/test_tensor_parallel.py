"""On two CUDA GPUs: accuracy, equal bits on all ranks and every run, stops, planted faults, killed ranks.

Every case is a pair of processes, as torchrun starts them (tests/ranks.py, tests/rank_program.py).
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

import tri_mpk
from decoders import prompt, tiny_config, transformers_model
from ranks import REQUESTS, RankProcesses, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SMALL = {
    "llama": {
        "family": "llama", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    },
    "llama, odd sizes": {
        "family": "llama", "vocab_size": 1001, "hidden_size": 510, "intermediate_size": 702, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 34, "max_position_embeddings": 4096,
    },
    "qwen2, one KV head": {
        "family": "qwen2", "vocab_size": 2000, "hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 3,
        "num_attention_heads": 14, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*SMALL, "Qwen3-0.6B", "Llama-3.2-1B"])
def test_as_close_to_fp32_as_bf16_and_the_same_on_all_ranks(name, reduce_dtype):
    config = json.dumps(SMALL[name]) if name in SMALL else name
    results = run_ranks(2, "accuracy", timeout=280, name=config, reduce_dtype=reduce_dtype)
    for kind in ("tokens", "residual", "logits"):
        values = [value for result in results for value in result[kind]]
        assert all(value == values[0] for value in values), f"{kind} differ between ranks or runs"
    (l2, kl), (l2_bf16, kl_bf16) = results[0]["ours"], results[0]["bf16"]
    assert l2 <= l2_bf16 and kl <= kl_bf16, results[0]
    assert results[0]["wrong"] == 0


def test_ranks_sample_as_one_gpu_does():
    parameters = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = transformers_model(tiny_config(**parameters))
    one = tri_mpk.from_model(model.cuda(), dtype=torch.float32, max_seq_len=64, progress=False)
    common = {"max_new_tokens": 4, "return_dict_in_generate": True}
    expected = [one.generate(prompt(3), **common, **request).sequences[0].tolist() for request in REQUESTS]
    for result in run_ranks(2, "sample", requests=REQUESTS, on_gpu=True, **parameters):
        assert result["tokens"] == expected and result["greedy"]


def test_fp32_without_rings_equals_transformers():
    results = run_ranks(2, "decode", on_gpu=True, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    for result in results:
        assert all(tokens == result["expected"] for tokens in result["tokens"])
        assert result["error"] < 1e-5
    assert results[0]["residual"] == results[1]["residual"]


@pytest.mark.parametrize("name", ["llama", "Qwen3-0.6B"])
def test_batches_are_as_close_to_fp32_as_bf16(name):
    results = run_ranks(2, "batch_accuracy", timeout=200, name=json.dumps(SMALL[name]) if name in SMALL else name)
    for kind in ("tokens", "bits"):
        values = [value for result in results for value in result[kind]]
        assert all(value == values[0] for value in values), f"{kind} differ between ranks or runs"
    for (l2, kl), (l2_bf16, kl_bf16) in zip(results[0]["ours"], results[0]["bf16"], strict=True):
        assert l2 <= l2_bf16 and kl <= kl_bf16, results[0]


def test_batches_in_fp32_equal_transformers():
    """More prompts than slots, chunks beside sequences that decode."""
    parameters = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 97}
    results = run_ranks(2, "batch", lengths=[2, 11, 1, 4], on_gpu=True, **parameters)
    for result in results:
        assert all(tokens == result["expected"] for tokens in result["tokens"])
    assert results[0]["bits"] == results[1]["bits"]


@pytest.mark.parametrize("cancelling", [0, 1])
def test_requests_are_served_by_two_gpus(cancelling):
    long = {"max_seq_len": 32768, "max_position_embeddings": 32768}  # so that a cancel comes in time
    results = run_ranks(2, "serve_batch", requests=REQUESTS, cancelling=cancelling, on_gpu=True, **long)
    assert results[0]["reason"] == results[1]["reason"] == "cancelled"
    for what in ("tokens", "logprobs", "drawn", "long", "bits"):
        assert results[0][what] == results[1][what], what


def test_different_requests_are_an_error():
    for result in run_ranks(2, "different_requests", what="a prompt", on_gpu=True):
        assert "number 1, from 0" in result["text"] and result["equal"], result


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_while_it_serves(victim):
    with RankProcesses(2, "serve_and_hang", bound_s=1.0, on_gpu=True) as ranks:
        pids = [ranks.next(rank)["pids"] for rank in range(2)]
        assert [ranks.next(rank) for rank in range(2)] == ["idle"] * 2
        for pid in pids[victim]:
            os.kill(pid, signal.SIGKILL)
        result = ranks.last(1 - victim, 60)
    assert result["error"] == "MegakernelTimeout" and result["silent_ranks"] == [victim], result


@pytest.mark.parametrize("stopping", [0, 1])
def test_a_stop_on_one_rank_ends_all_after_the_same_step(stopping):
    results = run_ranks(2, "stop_on_one_rank", stopping=stopping, on_gpu=True, max_seq_len=512)
    assert [result["failed"] for result in results] == [rank == stopping for rank in range(2)]
    assert results[0]["step"] == results[1]["step"] and all(result["equal"] for result in results)


def test_a_lost_signal_ends_all_ranks():
    results = run_ranks(2, "lost_signal", on=1, on_gpu=True, bound_s=0.5)
    assert all(result["error"] and result["equal"] for result in results)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(victim):
    """A launch long enough to be interrupted: tens of thousands of steps."""
    with RankProcesses(2, "hang", bound_s=1.0, max_seq_len=65536, on_gpu=True) as ranks:
        pids = [ranks.next(rank)["pids"] for rank in range(2)]
        assert [ranks.next(rank) for rank in range(2)] == ["decoding"] * 2
        for pid in pids[victim]:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        result = ranks.last(1 - victim, 60)
    assert result["error"] == "MegakernelTimeout" and result["silent_ranks"] == [victim], result
    assert time.monotonic() - started < 30
