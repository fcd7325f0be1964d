"""Several ranks on a CPU: processes with gloo and shared memory, two workers each."""

from __future__ import annotations

import os
import signal
import time

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
    "qwen2, one KV head on both": (2, {"family": "qwen2", **TWO_LAYERS, "num_key_value_heads": 1}),
    "llama, bias of o": (2, {"family": "llama", "attention_bias": True}),
    "odd sizes": (2, {"family": "mistral", "hidden_size": 70, "intermediate_size": 106, "head_dim": 34}),
    "llama on four, KV heads twice": (4, {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_ranks_equal_transformers_and_each_other(name):
    """Tokens; logits up to rounding; the residual stream and all that ranks share bit by bit, on every run."""
    num_ranks, parameters = MODELS[name]
    check(run_ranks(num_ranks, "decode", **parameters))


@pytest.mark.parametrize(
    ("name", "requests"),
    [("qwen3, tied, an odd vocabulary", REQUESTS), ("llama on four, KV heads twice", REQUESTS[1:2])],
)
def test_ranks_sample_as_one_does(name, requests):
    """The seed decides, also where each rank would draw another one; and greedy decoding goes on as before."""
    num_ranks, parameters = MODELS[name]
    model = transformers_model(tiny_config(**parameters))
    one = tri_mpk.from_model(model, device="cpu", max_seq_len=64, num_workers=2, progress=False)
    common = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logprobs": True}
    expected = [one.generate(prompt(3), **common, **request) for request in requests]
    results = run_ranks(num_ranks, "sample", requests=requests, **parameters)
    for result in results:
        assert result["tokens"] == [each.sequences[0].tolist() for each in expected]
        for logprobs, each in zip(result["logprobs"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), each.logprobs[0], rtol=0, atol=1e-5)
        assert result["greedy"] and result["drawn"] == results[0]["drawn"]
    assert len(set(map(tuple, results[0]["tokens"]))) == len(requests)


def check(results: list[dict]) -> None:
    for result in results:
        assert all(tokens == result["expected"] for tokens in result["tokens"])
        assert 0 < result["error"] < 2e-6
    for kind in ("residual", "logits"):
        assert len({value for result in results for value in result[kind]}) == 1, f"{kind} differ"


@pytest.mark.parametrize(("num_ranks", "slow"), [(2, 0), (2, 1), (4, 2)])
def test_a_rank_that_lags_behind_changes_no_bit(num_ranks, slow):
    parameters = {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    delays = {slow: {"TRI_MPK_TEST_DELAYS": f"{num_ranks}/{slow}"}}
    with RankProcesses(num_ranks, "decode", delays, num_new=3, **parameters) as ranks:
        late = [ranks.last(rank, 300) for rank in range(num_ranks)]
    check(late)


def test_epochs_wrap_around():
    for result in run_ranks(2, "epochs", start=2**31 - 3):
        assert result == {"equal": [True, True], "next": -(2**31) + 5}


@pytest.mark.parametrize("stopping", [0, 1])
def test_a_stop_on_one_rank_ends_all_after_the_same_step(stopping):
    results = run_ranks(2, "stop_on_one_rank", stopping=stopping)
    assert [result["failed"] for result in results] == [rank == stopping for rank in range(2)]
    assert results[0]["step"] == results[1]["step"] < 40
    assert all(result["equal"] for result in results)


def test_a_checkpoint_is_read_in_parts(tmp_path):
    config = tiny_config("qwen3", **TWO_LAYERS)
    transformers_model(config).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for result in run_ranks(2, "checkpoint", folder=str(tmp_path)):
        assert result["equal"] and result["held"] < 0.55 * result["whole"]


def test_a_profile_of_a_rank_is_sound():
    assert run_ranks(2, "profile") == [{"equal": True, "steps": 4}] * 2


def test_the_graph_api_reduces_and_gathers():
    for result in run_ranks(2, "graph"):
        assert result["equal"] and result["tokens"] == [0, result["best"], result["best"]] and result["step"] == 2


def test_ranks_serve_the_same_requests():
    first, second = run_ranks(2, "serve")
    assert first["greedy"] and second["greedy"]
    assert first["drawn"] == second["drawn"] and first["drawn"][0] != first["drawn"][1]
    for result in (first, second):
        assert result["cancelled"] and result["reason"] == "cancelled"
        assert set(result["ended"]) == {"cancelled"}
        assert len(result["differs"]) == 2 and all("number 1, from 0," in text for text in result["differs"])
    assert "number 2, from 0," in first["more"] and first["reasons"] == ["length"] * 2
    assert second["more"] is None and second["reasons"] == ["length", "length", "error"]
    for what in ("statistics", "again"):
        assert first[what] == second[what]


def test_the_baseline_chooses_the_same_tokens():
    for result in run_ranks(2, "baseline"):
        assert result["tokens"] == result["expected"]


def test_random_shards_are_parts_of_one_model():
    errors = run_ranks(2, "bench")[0]["errors"]
    assert errors["rel_l2"] < 1e-5


@pytest.mark.parametrize(
    "parameters",
    [
        {"family": "llama", "hidden_size": 64, "intermediate_size": 208, "num_hidden_layers": 2, "vocab_size": 200},
        {"hidden_size": 264, "intermediate_size": 1056, "head_dim": 64, "vocab_size": 73, "slots": 6, "half": True},
    ],
)
def test_weight_rings_add_up_parts(parameters):
    """The form of GPUs, its PTX emulated, with parts of 32 and of 16 bits."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    results = run_ranks(2, "emulated", timeout=600, **heads, **({"family": "qwen3"} | parameters))
    assert results[0] == results[1]
    assert 0 < results[0]["error"] < 5e-3 and results[0]["chosen"][-1] == results[0]["best"]


# ---- faults ----


@pytest.mark.parametrize(("victim", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_rank_that_dies_or_stalls_ends_the_others(victim, how):
    with RankProcesses(2, "hang") as ranks:
        pids = [ranks.next(rank)["pids"] for rank in range(2)]
        assert [ranks.next(rank) for rank in range(2)] == ["decoding"] * 2
        started = time.monotonic()
        for pid in pids[victim]:
            os.kill(pid, how)
        result = ranks.last(1 - victim, 60)  # its process ends too: nothing waits for the lost rank
        assert time.monotonic() - started < 45
        for pid in pids[victim]:
            if how == signal.SIGSTOP:
                os.kill(pid, signal.SIGKILL)
    assert result["error"] == "MegakernelTimeout"
    assert result["rank"] == 1 - victim and result["silent_ranks"] == [victim]
    assert f"rank {victim} stopped or ended" in result["text"]
    assert f"event {result['event']} stood at {result['seen']}, wanted {result['wanted']}" in result["text"]


def test_a_lost_signal_ends_all_ranks_and_leaves_them_usable():
    results = run_ranks(2, "lost_signal", on=1)
    assert "1 of 2 signals of event 1 never came" in results[1]["error"]["text"]
    assert "rank 1 gave up" in results[0]["error"]["text"]
    for rank, result in enumerate(results):
        assert result["error"]["rank"] == rank and result["error"]["silent"] == [] and result["equal"]


def test_ranks_that_are_out_of_step_start_afresh():
    for result in run_ranks(2, "out_of_step", on=1):
        assert result["equal"] == [True] * 3


def test_a_dead_worker_ends_all_ranks_and_leaves_them_usable():
    results = run_ranks(2, "dead_worker", on=1)
    assert [result["error"] for result in results] == ["MegakernelTimeout", "WorkerDiedError"]
    assert all(result["equal"] for result in results)


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("prompt", "ValueError", "the prompt differs between ranks"),
        ("sampling", "ValueError", "a launch: sampling differs between ranks"),
        ("length", "ValueError", "max_seq_len differs between ranks, 64 on rank 0 and 65 on rank 1"),
        ("pages", "ValueError", "num_pages differs between ranks, 9 on rank 0 and 10 on rank 1"),
        ("config", "ValueError", "config differs between ranks"),
        ("world", "ValueError", "tensor_parallel=3, but there are 2 ranks"),
        ('{"hidden_size": 96, "num_attention_heads": 3}', "UnsupportedModelError", "num_attention_heads=3"),
        ('{"intermediate_size": 99}', "UnsupportedModelError", "intermediate_size=99"),
    ],
)
def test_refused_before_anything_is_launched(what, error, text):
    for result in run_ranks(2, "refuse", what=what):
        assert result["error"] == error and text in result["text"], result


def test_a_rank_that_does_not_come_to_a_launch_is_named():
    first, second = run_ranks(2, "refuse", what="absent")
    assert first["error"] == "RankError" and "rank 1 did not come to a launch within 2 s" in first["text"]
    assert second["error"] is None


def test_one_rank_of_one_needs_no_distributed(monkeypatch):
    from tri_mpk.distributed import resolve_world

    monkeypatch.delenv("RANK", raising=False)
    assert resolve_world("auto") == resolve_world(1) == (0, 1)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        resolve_world(2)
    for bad in (0, "two", 1.5, True):
        with pytest.raises(ValueError, match="tensor_parallel"):
            resolve_world(bad)
    assert not torch.distributed.is_initialized()
