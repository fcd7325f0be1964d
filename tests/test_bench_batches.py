"""bench/batches.py and `run_batch_bench`: everything but the times, on CPU workers."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench_scripts import load_script
from decoders import tiny_config, transformers_model
from tri_mpk import batch_benchmark
from tri_mpk.baseline import measure_batches
from tri_mpk.batch_benchmark import (
    SAMPLED,
    Distances,
    batch_logits,
    check_batch,
    compile_count,
    decode_batch,
    empty_step_ms,
    launch_placed,
    pages_of,
    place_sequences,
    run_batch_bench,
)
from tri_mpk.benchmark import fill_cache
from tri_mpk.errors import DeviceError
from tri_mpk.loading import from_model
from tri_mpk.ops import advance
from tri_mpk.runtime import InterpreterRuntime

TINY = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("batches")


@pytest.fixture
def on_cpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take 4 ms, those of kernels with pools 5."""
    ms = property(lambda runtime: 5.0 if runtime.program.schedule.pools else 4.0)
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", ms, raising=False)
    for module in (script, batch_benchmark):
        monkeypatch.setattr(module, "bench_device", lambda _: torch.device("cpu"))
        monkeypatch.setattr(module, "geometry", lambda _: tiny_config(**TINY))
    monkeypatch.setattr(batch_benchmark, "copy_bandwidth_gbps", lambda _: 10.0)
    eager = functools.partial(measure_batches, mode="eager", samples=2, replays=1)
    monkeypatch.setattr(batch_benchmark, "measure_batches", eager)
    for module in (sys.modules[script.take_turns.__module__], batch_benchmark):
        monkeypatch.setattr(module, "WARMUP", 0)
    monkeypatch.setattr(batch_benchmark, "WINDOW", 2)


@pytest.fixture(scope="module")
def pair():
    """Three slots and six pages with random values; transformers' model of the same weights."""
    theirs = transformers_model(tiny_config(**TINY))
    ours = from_model(
        theirs, device="cpu", num_workers=2, max_seq_len=256, max_batch_size=3, max_tokens_per_step=8, num_pages=6,
        progress=False, wait_bound_s=60.0,
    )  # fmt: skip
    fill_cache(ours)
    return ours, theirs


def test_sequences_go_on_by_themselves(pair, monkeypatch: pytest.MonkeyPatch):
    """From one step to the next over the end of a page; each ends after its steps, and the launch with the last."""
    ours, _ = pair
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 6.0, raising=False)
    ours.compile()
    place_sequences(ours.kernel, [128, 5], 2)
    results = launch_placed(ours.kernel)
    assert [result.ticket for result in results] == [0, 1] * 2
    assert [result.reason for result in results] == [None] * 2 + ["length"] * 2
    state = ours.kernel.state
    tokens = state.tokens.data
    best = [result.token for result in results]
    assert tokens[0, 128:130].tolist() == best[::2] and tokens[1, 5:7].tolist() == best[1::2]
    counters = state.counters.data.tolist()
    assert (counters[advance.NUM_STEPS.value], counters[advance.NUM_FREE_PAGES.value]) == (2, 6)
    free, users = state.free_pages.data
    assert sorted(free.tolist()) == list(range(6)) and not users.any()

    assert decode_batch(ours, [128, 5], 2, SAMPLED) == 3.0
    assert [*tokens[0, 128:130].tolist(), *tokens[1, 5:7].tolist()] != [*best[::2], *best[1::2]]
    assert compile_count(ours) is None


def test_logits_are_those_of_the_reference_for_every_sequence(pair):
    ours, theirs = pair
    distances = check_batch(ours, theirs, [5, 130, 5])
    assert len(distances.rel_l2) == 3 and max(distances.rel_l2) < 1e-5 < 1e-3 < min(distances.rel_l2_bf16)
    summary = distances.summary()
    assert (summary["checked"], summary["farther"]) == (3, 0) and summary["rel_l2"] == max(distances.rel_l2)
    logits = batch_logits(ours, [5, 130, 5])
    assert logits.shape == (3, 96) and not torch.equal(logits[0], logits[2])
    name = "L00.k_cache"
    cache = ours.kernel.tensors[name].data
    before = cache.clone()
    page = int(ours.kernel.step_plan.page_table.data[1, 1])  # the second page of the long one
    cache[page] = 3.0
    others = batch_logits(ours, [5, 130, 5])
    cache.copy_(before)
    assert torch.equal(others[[0, 2]], logits[[0, 2]]) and not torch.equal(others[1], logits[1])


def test_distances_tell_who_is_farther_than_bf16():
    nan = float("nan")
    distances = Distances([1.0, 3.0, 1.0, nan], [2.0] * 4, [1.0, 1.0, 3.0, 1.0], [2.0] * 4)
    assert distances.farther == [1, 2, 3]
    assert distances.summary()["farther"] == 3 and distances.summary()["kl"] == 3.0


def test_what_does_not_fit_is_refused(pair):
    ours, _ = pair
    assert pages_of([127, 128, 129], 1, 128) == 5
    with pytest.raises(ValueError, match=r"4 sequences of up to 6 tokens do not fit max_batch_size=3"):
        place_sequences(ours.kernel, [5] * 4, 1)
    with pytest.raises(ValueError, match=r"1 sequences of up to 257 tokens"):
        place_sequences(ours.kernel, [255], 2)
    with pytest.raises(ValueError, match=r"batches=\[0\]"):
        run_batch_bench("Qwen3-8B", [0])
    with pytest.raises(ValueError, match=r"launches=0"):
        run_batch_bench("Qwen3-8B", [1], launches=0)
    with pytest.raises(DeviceError, match="measures a CUDA GPU"):
        run_batch_bench("Qwen3-8B", [1], device="cpu")


def test_a_late_host_does_not_count(pair, monkeypatch: pytest.MonkeyPatch):
    ours, _ = pair
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 6.0, raising=False)
    real, calls = launch_placed, []

    def late(kernel):
        calls.append(real(kernel))
        kernel.state.counters.data[advance.NUM_STEPS.value] += len(calls) < 2
        return calls[-1]

    monkeypatch.setattr(batch_benchmark, "launch_placed", late)
    assert decode_batch(ours, [5], 1) == 6.0 and len(calls) == 2
    monkeypatch.setattr(batch_benchmark, "ATTEMPTS", 1)
    calls.clear()
    with pytest.raises(AssertionError, match="1 launches of 1 steps had empty ones too, the last one 2 in all"):
        decode_batch(ours, [5], 1)


def test_empty_steps(pair, monkeypatch: pytest.MonkeyPatch):
    ours, _ = pair
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 6.0, raising=False)
    ms = empty_step_ms(ours, seconds=0.3)
    steps = int(ours.kernel.state.counters.data[advance.NUM_STEPS.value])
    assert steps >= 1 and ms == 6.0 / steps
    assert int(ours.kernel.state.counters.data[advance.NUM_BUSY_STEPS.value]) == 0


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_geometry(script, on_cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, is_whole: bool):
    """The command; only what asks a GPU is replaced. The whole of it has three kernels, with workers of their own."""
    monkeypatch.setattr(script, "run_batch_bench", functools.partial(run_batch_bench, num_workers=2, progress=False))
    arguments = ["--geometry", "Tiny", "--batch", "1", "2", "--context", "6", "--num-steps", "1", "--launches", "1"]
    arguments += ["--tokens-per-step", "8", "--prompt", "5", "--commit", "abc", "--out", str(tmp_path)]
    arguments += ["--profile"] if is_whole else ["--no-one", "--baseline-s", "0"]
    assert script.main(arguments) == 0
    report = json.loads((tmp_path / "Tiny_cpu.json").read_text())
    assert (report["commit"], report["settings"]["max_batch_size"], report["compiles"]) == ("abc", 2, None)
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert (row["ms_p50"], row["sampled_ms_p50"]) == (4.0, 4.0)
        assert row["against_one"] == (1.0 if is_whole else None)
        assert row["tokens_per_s"] == row["batch"] * 250 and row["kv_bytes"] == row["batch"] * 2 * 6 * 32 * 4
        assert row["checked"] == row["batch"] and row["farther"] == 0 and row["rel_l2"] < 1e-5
        if is_whole or row["batch"] == 1:  # the bound was over with the first one
            assert row["speedup"] == row["baseline_ms_p50"] / 4.0 > 0
        else:
            assert row["speedup"] is None
    prompt = report["prompt"]
    assert (prompt["prompt"], prompt["beside"]) == (5, 1)
    assert prompt["against_reference"] == prompt["alone"]["ms_p50"] / prompt["reference"]["ms_p50"]
    assert [row["batch"] for row in report.get("overhead", [])] == ([1, 2] if is_whole else [])
    assert all(0 < row["share"] < 1 and row["advance"] > 0 for row in report.get("overhead", []))
    assert report["failures"] == [] and report["empty_step_ms"] > 0
    out = capsys.readouterr().out
    assert "time to first token, 5 tokens" in out and "Tiny_cpu.json" in out
    assert ("critical path" in out) == is_whole


def test_a_failed_check_fails_the_command_and_keeps_the_report(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    report = {"geometry": "Tiny", "gpu": "cpu", "commit": "abc", "compiles": 1, "launches": 9, "rows": []}
    report |= {"settings": {"context": 6, "num_workers": 2}, "one_sequence": None, "empty_step_ms": 0.1}
    monkeypatch.setattr(script, "run_batch_bench", lambda *_, **__: report | {"failures": ["batch 2: too far"]})
    assert script.main(["--geometry", "Tiny", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "Tiny_cpu.json").read_text())["failures"] == ["batch 2: too far"]
    output = capsys.readouterr()
    assert "FAILED: batch 2: too far" in output.err and "compiled 1 time(s) for 9 launches" in output.out


def test_policies_take_turns_on_uneven_lengths(script, on_cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    lengths = {"one long": [4, 130]}
    monkeypatch.setattr(
        script, "compare_policies", functools.partial(script.compare_policies, lengths=lengths, num_workers=2)
    )
    arguments = ["--geometry", "Tiny", "--policy", "static", "hybrid", "--num-steps", "1", "--launches", "1"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "Tiny_uneven_cpu.json").read_text())
    kernels = ["static", "hybrid", "static again"]
    assert [(row["what"], row["kernel"]) for row in report["rows"]] == [(w, k) for w in lengths for k in kernels]
    for row in report["rows"]:
        assert (row["ms_p50"], row["against"]) == ((5.0, 0.25) if row["kernel"] == "hybrid" else (4.0, 0.0))
        assert row["lengths"] == lengths[row["what"]]
        assert ("rel_l2" in row) == (row["kernel"] != "static again") and row.get("rel_l2", 0) < 1e-5
    assert capsys.readouterr().out.count("+25.00%") == 1


def test_uneven_lengths(script):
    lengths = script.uneven_lengths()
    assert lengths["one long"] == [128] * 7 + [16384] and lengths == script.uneven_lengths()
    assert len(lengths["pareto"]) == 16 and min(lengths["pareto"]) >= 128 and max(lengths["pareto"]) <= 16384
    assert max(lengths["pareto"]) > 4 * sorted(lengths["pareto"])[8]
    assert abs(sum(lengths["equal"]) - sum(lengths["one long"])) < 8


def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    out = capsys.readouterr().out
    assert "--policy static hybrid" in out and "time to first token" in out
