"""bench/policies.py: everything but the times, on CPU workers, and its kernels compiled ahead of time."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench_scripts import BENCH, load_script
from decoders import prompt, tiny_config, tiny_pair
from test_aot import clean_environment
from tri_mpk.loading import from_model
from tri_mpk.runtime import InterpreterRuntime


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("policies")


@pytest.fixture
def on_cpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take 4 ms, those of kernels with pools 5."""
    ms = property(lambda runtime: 5.0 if runtime.program.schedule.pools else 4.0)
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", ms, raising=False)
    monkeypatch.setattr(script, "bench_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(script, "WARMUP", 0)


def test_policies_take_turns(script, on_cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    monkeypatch.setattr(script, "geometry", lambda _: config)
    monkeypatch.setattr(script, "from_model", functools.partial(from_model, num_workers=2, progress=False))
    monkeypatch.setattr(script, "CHECKED_CONTEXTS", (8,))
    monkeypatch.setattr(script, "WithoutBound", lambda runtime: nullcontext)
    arguments = ["--geometry", "Tiny", "--context", "4", "8", "--num-tokens", "2", "--launches", "2", "--commit", "abc"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "Tiny_cpu.json").read_text())
    assert (report["commit"], report["settings"]["launches"], report["settings"]["dtype"]) == ("abc", 2, "float32")
    kernels = ["static", "hybrid", "dynamic", "static again", "static, unbounded"]
    assert [(row["context"], row["kernel"]) for row in report["rows"]] == [(c, k) for c in (4, 8) for k in kernels]
    for row in report["rows"]:
        pools = row["kernel"] in ("hybrid", "dynamic")
        assert (row["ms_p50"], row["against"]) == ((2.5, 0.25) if pools else (2.0, 0.0))
        assert ("rel_l2" in row) == (row["context"] == 8 and row["kernel"] != "static again")
        assert row.get("rel_l2", 0) < 1e-5
    out = capsys.readouterr().out
    assert out.count("+25.00%") == 4 and "rel. L2" in out and "Tiny_cpu.json" in out


def test_against_is_the_median_over_turns(script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "WARMUP", 1)
    static, other = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 1.1, 1.8, 4.4])  # a drift that hits both
    first, second = script.take_turns({"static": static.__next__, "other": other.__next__}, 3, "")
    assert (first["against"], first["ms_p50"], second["ms_p50"]) == (0, 2.0, 1.8)
    assert second["against"] == pytest.approx(0.1)


def test_waits_without_a_bound_give_the_same_tokens(script):
    ours, theirs = tiny_pair()
    program = ours.kernel.plan()
    assert "CONTROL_WAIT_BOUND)" in program.source
    program.source = script.unbounded(program.source)
    assert "CONTROL_WAIT_BOUND)" not in program.source and program.source.count("def poll_counter(") == 1
    assert torch.equal(ours.generate(prompt(3), max_new_tokens=3), theirs.generate(prompt(3), max_new_tokens=3))


def test_the_kernel_without_bounds_is_there_only_meanwhile(script):
    _, theirs = tiny_pair()
    program = from_model(theirs, device="cpu", max_seq_len=16, num_workers=2, progress=False).kernel.plan()
    runtime = SimpleNamespace(program=program, kernel="own", compiled="own, compiled", shared_memory="own plan")
    runtime._compile = lambda: (f"{runtime.kernel.__module__}, compiled", "its plan")
    without_bound = script.WithoutBound(runtime)
    own = ("own", "own, compiled", "own plan")
    assert (runtime.kernel, runtime.compiled, runtime.shared_memory) == own
    for _ in range(2):
        with without_bound():
            kernel = runtime.kernel
            assert (runtime.compiled, runtime.shared_memory) == (f"{kernel.__module__}, compiled", "its plan")
            assert "def megakernel(" in kernel.src and kernel.__module__.startswith("megakernel_")
        assert (runtime.kernel, runtime.compiled, runtime.shared_memory) == own


def test_uneven_tasks(script, on_cpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import uneven

    for name, value in {"NUM_LAYERS": 2, "MAX_BLOCKS": 12, "BLOCK": 16}.items():
        monkeypatch.setattr(uneven, name, value)
        monkeypatch.setattr(script, name, value, raising=False)
    monkeypatch.setattr(script, "TASKS_PER_WORKER", 3)
    monkeypatch.setattr(script, "compare_uneven", functools.partial(script.compare_uneven, num_workers=2))
    assert script.main(["--uneven", "--num-tokens", "2", "--launches", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "uneven_cpu.json").read_text())
    against = {row["kernel"]: row["against"] for row in report["rows"]}
    assert against == {"static": 0, "dynamic": 0.25, "static, sizes known": 0, "static again": 0}
    assert report["settings"]["tasks"] == 6 and 8 <= report["settings"]["blocks_mean"] <= 12


COMPILED = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import policies, uneven
from tri_mpk.aot import compile_for, resources
from tri_mpk.generator import write_source
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
config = geometry("Qwen3-8B")
config.num_hidden_layers = 2
sizes = uneven.draw_sizes(64, 0)
blocks = torch.empty((int(sizes.sum()), uneven.BLOCK), device="meta")
sources = {
    policy: uneven.build_uneven(torch.empty(64, device="meta"), sizes, blocks, 32, policy, False, 8).plan().source
    for policy in ("static", "dynamic")
}
sources["unbounded"] = policies.unbounded(plan_config(config, torch.bfloat16, 8192).source)
reports = {}
for name, source in sources.items():
    kernel = compile_for(write_source(source), "sm_90")
    reports[name] = resources(kernel) | {what: kernel.asm["ptx"].count(what) for what in ("globaltimer", "ld.acquire")}
print(json.dumps(reports))
"""


def test_kernels_compile_for_a_gpu():
    command = [sys.executable, "-c", COMPILED, str(BENCH)]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert [report["spills"] for report in reports.values()] == [0, 0, 0], reports
    bounded, dynamic, unbounded = reports.values()
    assert bounded["globaltimer"] > 0 and dynamic["globaltimer"] > 0
    assert unbounded["globaltimer"] == 0 < unbounded["ld.acquire"]


def test_help_teaches():
    command = [sys.executable, str(BENCH / "policies.py"), "--help"]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 0 and "static again" in result.stdout and "--uneven" in result.stdout
