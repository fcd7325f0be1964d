"""bench/serving.py: random traffic, what clients see, and the whole command on CPU workers."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench_scripts import load_script
from decoders import tiny_config
from tri_mpk import serving_benchmark
from tri_mpk.runtime import InterpreterRuntime
from tri_mpk.serving_benchmark import Served, Traffic, arrivals, run_serving_bench, summary


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("serving")


def test_arrivals_are_a_poisson_process():
    traffic = Traffic(50.0, 2000, prompt=(3, 9), output=(1, 4))
    requests = arrivals(traffic, 96)
    due = torch.tensor([request.due for request in requests], dtype=torch.float64)
    gaps = due.diff()
    assert bool((gaps >= 0).all()) and gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(float(gaps.mean()), rel=0.1)  # of an exponential distribution
    assert {len(request.prompt) for request in requests} == set(range(3, 10))
    assert {request.num_new for request in requests} == {1, 2, 3, 4}
    assert all(int(request.prompt.min()) >= 0 and int(request.prompt.max()) < 96 for request in requests)
    at_once = arrivals(Traffic(math.inf, 2000, prompt=(3, 9), output=(1, 4)), 96)
    assert all(request.due == 0 for request in at_once)
    assert all(torch.equal(a.prompt, b.prompt) for a, b in zip(requests, at_once, strict=True))


@pytest.mark.parametrize(
    ("what", "message"),
    [({"rate": 0}, "rate=0"), ({"rate": 1, "num_requests": 0}, "num_requests=0"),
     ({"rate": 1, "prompt": (0, 4)}, "prompt="), ({"rate": 1, "output": (5, 4)}, "output=")],
)  # fmt: skip
def test_traffic_checks_its_numbers(what: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Traffic(**what)


def test_summary():
    served = [Served(1.0, 10, [1.5, 1.6, 2.0]), Served(2.0, 20, [4.0]), Served(3.0, 30, [3.2, 5.0])]
    result = summary(served)
    assert result["seconds"] == 4.0 and result["requests_per_s"] == 0.75
    assert result["tokens_per_s"] == 6 / 4 and result["all_tokens_per_s"] == 66 / 4
    assert result["first_token_ms_p50"] == pytest.approx(500) and result["first_token_ms_p99"] == pytest.approx(1970)
    assert result["between_tokens_ms_p50"] == pytest.approx(400) and result["request_ms_p50"] == pytest.approx(2000)


def test_the_command(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 500.0, raising=False)
    monkeypatch.setattr(serving_benchmark, "bench_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(serving_benchmark, "geometry", lambda _: tiny_config())
    quick = functools.partial(run_serving_bench, num_workers=2, progress=False)
    monkeypatch.setattr(script, "run_serving_bench", quick)
    arguments = ["--geometry", "Tiny", "--rate", "20", "--requests", "3", "--prompt", "1", "6"]
    arguments += ["--output", "1", "3", "--max-batch-size", "2", "--tokens-per-step", "4", "--commit", "abc"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "Tiny_cpu.json").read_text())
    assert (report["commit"], report["launches"], report["settings"]["max_seq_len"]) == ("abc", 2, 128)
    assert [row["rate"] for row in report["rows"]] == [20]
    requests = arrivals(Traffic(1.0, 3, (1, 6), (1, 3)), 96)
    for row in report["rows"]:
        assert row["requests"] == 3 and row["tokens"] == sum(len(r.prompt) + r.num_new - 1 for r in requests)
        assert row["steps_per_s"] == 2 * row["steps"] >= 2 * row["busy_steps"] > 0
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p99"] <= row["request_ms_p99"]
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(sum(r.num_new for r in requests))
    assert "new tokens/s" in capsys.readouterr().out
