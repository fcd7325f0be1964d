"""The command line: help, one-line errors and exit codes, JSON for scripts."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from tri_mpk import __version__
from tri_mpk.cli import app

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "demos/tiny")
COMMANDS = ["generate", "chat", "inspect", "verify", "compile", "tune", "bench", "profile"]


def invoke(*arguments: str, **options: object):
    return CliRunner().invoke(app, list(arguments), **options)


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tri_mpk", *arguments]
    environment = os.environ | {"PYTHONPATH": path} | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def assert_error(result, *words: str, exit_code: int = 2) -> None:
    """One line on standard error, nothing on standard output."""
    assert getattr(result, "exit_code", getattr(result, "returncode", None)) == exit_code, result
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("tri-mpk: no GPU here")]
    assert len(lines) == 1 and lines[0].startswith("tri-mpk: error: "), result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"tri-mpk {command} " in result.stdout  # an example


def test_help_imports_neither_torch_nor_transformers():
    code = "import sys, tri_mpk.cli; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == "[]\n"


def test_version_and_no_command():
    assert invoke("--version").stdout == f"tri-mpk {__version__}\n"
    assert all(command in invoke("--help").stdout for command in COMMANDS)
    assert invoke("nonsense").exit_code == 2


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_parameter_of_from_pretrained_has_a_flag(command: str):
    from tri_mpk import from_pretrained

    flags = {name for p in typer.main.get_command(app).commands[command].params for name in p.opts}
    for name, parameter in inspect.signature(from_pretrained).parameters.items():
        of_batches = ("max_batch_size", "max_tokens_per_step", "num_pages", "page_size")
        if name in ("tensor_parallel", "reduce_dtype", *of_batches) and command == "chat":
            continue  # one conversation, on one rank: it asks for input
        if parameter.kind is parameter.KEYWORD_ONLY and name != "profile":  # a command of its own
            assert f"--{name.replace('_', '-')}" in flags


def test_inspect_json():
    result = invoke("inspect", "--geometry", "Llama-3.2-1B", "--num-workers", "132", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["model"], facts["dtype"], facts["max_seq_len"]) == ("Llama-3.2-1B", "bfloat16", 4096)
    assert facts["num_workers"] == 132
    assert facts["tasks"] == facts["verify"]["tasks"] > 10_000
    assert facts["attention"]["context"] == 4096 and facts["attention"]["coverage"] >= 0.95
    assert facts["hops_per_layer"] <= 6
    assert facts["estimate"]["gpu"] == "NVIDIA H200" and 0.5 < facts["estimate"]["ms"] < 1.0
    assert facts["tuning"]["num_workers"] == 132 and facts["tuning_source"] == "cost model"
    assert facts["fusion"]["events_after"] == facts["events"]
    assert Path(facts["kernel"]).is_file()
    for op in facts["ops"]:
        if op["bytes"] >= op["calls"] * (4 << 20):
            assert op["imbalance"] <= 1.04, op
    assert {"qkv", "attention", "gate_up", "lm_head", "sample"} <= {op["op"] for op in facts["ops"]}


def test_inspect_reads_a_config_file_and_says_so_without_a_gpu():
    result = invoke("inspect", f"{TINY}/config.json", "--num-workers", "16", "--all")
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("L03 gate_up", "16 workers", "verified", "hops", "attention", "megakernel_", "ms per token", "knobs"):
        assert text in result.stdout


def test_dot(tmp_path: Path):
    result = invoke("inspect", TINY, "--num-workers", "8", "--dot", "-", "--layer", "all")
    assert result.exit_code == 0 and result.stdout.startswith("digraph ") and "L03 gate_up" in result.stdout
    file = tmp_path / "graph.dot"
    result = invoke("inspect", TINY, "--num-workers", "8", "--dot", str(file), "--json")
    assert json.loads(result.stdout)["num_workers"] == 8
    assert file.read_text().startswith("digraph ") and "L03 gate_up" not in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--geometry", "GPT-5"], ["'GPT-5' is not known", "Qwen3-8B"]),
        (["inspect"], ["either MODEL or --geometry"]),
        (["inspect", "--geometry", "Qwen3-8B", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["inspect", "--geometry", "Qwen3-8B", "--max-seq-len", "1000000"], ["40960"]),
        (["inspect", TINY, "--context", "4096"], ["max_seq_len=512"]),
        (["inspect", TINY, "--layer", "first"], ["first"]),
        (["inspect", TINY, "--num-workers", "8", "--dot", "-", "--layer", "9"], ["0 to 3"]),
        (["inspect", str(ROOT)], ["no config.json"]),
        (["verify", TINY, "--self-check"], ["leave out MODEL"]),
        (["verify"], ["either MODEL or --geometry"]),
        (["compile", "--geometry", "Qwen3-8B", "--target", "gfx942"], ["gfx942", "sm_90"]),
        (["tune", "--geometry", "Qwen3-8B", "--device", "cpu"], ["CUDA GPU", "'cpu'", "tri-mpk inspect"]),
        (["tune", TINY, "--geometry", "Qwen3-8B"], ["either MODEL or --geometry"]),
        (["generate", TINY, "text", "--tuning", f"{TINY}/config.json"], ["config.json holds no tuning", "slot_bytes"]),
        (["generate", "./missing", "text"], ["./missing"]),
        (["generate", str(ROOT), "text"], ["no config.json"]),
        (["chat", TINY], ["no chat template", "tri-mpk generate"]),
        (["profile"], ["either MODEL or --geometry"]),
        (["profile", "--geometry", "Qwen3-0.6B", "--device", "cpu"], ["too large for a CPU", "tri-mpk profile MODEL"]),
        (["profile", TINY, "--context", "510"], ["514 tokens", "512 positions"]),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: list[str]):
    assert_error(invoke(*arguments, env={"HF_HUB_OFFLINE": "1", "TRI_MPK_DEBUG": "0"}), *words)


def test_failures_while_running_exit_with_1(monkeypatch: pytest.MonkeyPatch):
    from tri_mpk.errors import MegakernelTimeout

    def fail(*_: object, **__: object):
        raise failure

    monkeypatch.setattr("tri_mpk.inspect.inspect_program", fail)
    for failure in (MegakernelTimeout("L00 qkv t3", 1, 2, 3, 4), RuntimeError("out of\nmemory")):
        assert_error(invoke("inspect", TINY, "--num-workers", "8"), str(failure).split()[0], exit_code=1)
    failure = KeyboardInterrupt()
    assert invoke("inspect", TINY, "--num-workers", "8").exit_code == 130


def test_verify_a_model():
    result = invoke("verify", TINY, "--num-workers", "8")
    assert result.exit_code == 0 and "8 workers: verified " in result.stdout
    facts = json.loads(invoke("verify", TINY, "--num-workers", "8", "--json").stdout)
    assert facts["num_workers"] == 8 and facts["num_pairs"] > 0 and facts["num_unused_signals"] == 0


def test_verify_on_trial(monkeypatch: pytest.MonkeyPatch):
    arguments = ["verify", "--self-check", "--cases", "96", "--tasks", "2000", "--no-progress"]
    result = invoke(*arguments, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0 and facts["disagreements"] == []
    kinds = {row["what"]: row for row in facts["kinds"]}
    total = kinds["all"]
    assert list(kinds)[0] == "none" and total["cases"] == 96
    assert [row["cases"] for row in facts["kinds"][-3:]] == [6, 24, 24]  # pools, values, values one at a time
    assert sum(total.get(error, 0) for error in facts["errors"]) == total["rejected"] == total["unsafe"] > 0
    assert all(row["tasks"] >= 2000 and row["seconds"] < 30 for row in facts["large"])

    monkeypatch.setattr("tri_mpk.scheduler.regions.RegionCheck.check", lambda *_: None)
    result = invoke(*arguments)
    assert result.exit_code == 1 and "disagree" in result.stdout
    assert "disagreement: seed 0, case " in result.stderr and "verify accepts it" in result.stderr


def test_bench_takes_several_contexts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []

    def run_bench(geometry_name: str, contexts: list[int], **options: object) -> dict:
        calls.append((geometry_name, contexts, options))
        return {"rows": [{"context": context, "ms_p50": 0.5, "errors": None} for context in contexts]}

    monkeypatch.setattr("tri_mpk.benchmark.run_bench", run_bench, raising=False)
    file = tmp_path / "report.json"
    result = invoke("bench", "--geometry", "Qwen3-8B", "--context", "64", "512", "4096", "--json", str(file))
    assert result.exit_code == 0, result.stderr
    assert json.loads(file.read_text())["rows"][2]["context"] == 4096
    assert "ms_p50" in result.stdout and "4096" in result.stdout
    assert invoke("bench", "--context", "64,512", "--geometry", "a", "--no-baseline").exit_code == 0
    assert invoke("bench", "--geometry", "a", "--context=64", "--context", "512", "8").exit_code == 0
    assert invoke("bench", "--geometry", "a", "--launches", "3").exit_code == 0
    assert [contexts for _, contexts, _ in calls] == [[64, 512, 4096], [64, 512], [64, 512, 8], [64, 512, 4096]]
    assert calls[1][2]["baseline"] is False and calls[3][2]["launches"] == 3
    assert invoke("bench", "--geometry", "a", "--context").exit_code == 2
    assert invoke("bench", "--geometry", "a", "--context", "0").exit_code == 2


def test_bench_takes_several_batch_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []

    def run_batch_bench(geometry_name: str, batches: list[int], context: int, **options: object) -> dict:
        calls.append((geometry_name, batches, context, options))
        rows = [{"batch": batch, "ms_p50": 4.5} for batch in batches]
        facts = {"compiles": 1, "launches": 7, "empty_step_ms": 0.25, "one_sequence": None, "prompt": {"prompt": 2048}}
        return {"rows": rows, "failures": ["too far"] if context == 9 else [], **facts}

    monkeypatch.setattr("tri_mpk.batch_benchmark.run_batch_bench", run_batch_bench)
    file = tmp_path / "report.json"
    result = invoke("bench", "--geometry", "Qwen3-8B", "--batch", "1", "8", "64", "--json", str(file))
    assert result.exit_code == 0, result.stderr
    assert json.loads(file.read_text())["rows"][2]["batch"] == 64
    assert "ms_p50" in result.stdout and "compiles" in result.stdout and "0.25" in result.stdout
    result = invoke("bench", "--geometry", "a", "--batch", "2,4", "--context", "64", "--no-baseline", "--json", "-")
    assert json.loads(result.stdout)["compiles"] == 1
    assert [call[:3] for call in calls] == [("Qwen3-8B", [1, 8, 64], 512), ("a", [2, 4], 64)]
    assert calls[0][3]["num_steps"] == 32 and calls[1][3]["baseline"] is False
    assert invoke("bench", "--geometry", "a", "--batch", "2", "--context", "9").exit_code == 1
    assert invoke("bench", "--geometry", "a", "--batch", "2", "--context", "8", "9").exit_code == 2
    assert invoke("bench", "--geometry", "a", "--batch", "0").exit_code == 2


def test_tune_shows_what_was_tried(monkeypatch: pytest.MonkeyPatch):
    knobs = {"num_workers": 4, "slot_bytes": 8192, "block_kv": 32, "num_splits": 2}
    trial = knobs | {"estimated_ms": 0.9, "ms": 1.0, "failure": None}
    failed = knobs | {"estimated_ms": None, "ms": None, "failure": "DeviceError: no room"}
    calls = []

    def tune(config, contexts, **options: object) -> dict:
        calls.append((config.model_type, list(contexts), options["seconds"], options["measure_gpu"]))
        return {
            "best": knobs, "best_ms": 1.0, "chosen_ms": 1.1, "trials": [trial, failed], "outcome": "interrupted",
            "file": "tuned.json",
        }  # fmt: skip

    monkeypatch.setattr("tri_mpk.tuner.tune", tune)
    result = invoke("tune", TINY, "--context", "64", "128", "--seconds", "5", "--measure")
    assert result.exit_code == 0, result.stderr
    for text in ("-9.1%", "interrupted", "tuned.json", "no room", "slot_bytes 8192"):
        assert text in result.stdout
    assert json.loads(invoke("tune", TINY, "--json").stdout)["best"] == knobs
    assert calls == [("llama", [64, 128], 5.0, True), ("llama", [512, 4096], 60.0, False)]


def test_tune_without_a_model_measures_the_gpu(monkeypatch: pytest.MonkeyPatch):
    from tri_mpk.gpu_profile import default_profile

    monkeypatch.setattr("tri_mpk.tuner.ready_gpu", lambda device, again: (device, default_profile(), "measured now"))
    assert json.loads(invoke("tune", "--json").stdout)["num_sms"] == 132
    assert "bandwidth_bytes_per_s" in invoke("tune").stdout


def test_generate_on_a_cpu():
    """The prompt from standard input, JSON out; nothing but the result on standard output."""
    options = ["--device", "cpu", "--num-workers", "2", "--max-new-tokens", "3"]
    result = run("generate", TINY, *options, "--json", input="Once\n")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert list(answer) == ["tokens", "text", "seconds", "tokens_per_second", "launches"]
    assert len(answer["tokens"]) == 3 and answer["launches"] == 1 and answer["seconds"] > 0

    streamed = run("generate", TINY, "Once", *options, "--no-progress")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.rstrip("\n") == answer["text"]
    assert "per second" not in streamed.stderr


def test_profile_on_a_cpu(tmp_path: Path):
    """A table or JSON on standard output; the trace and, with matplotlib, the picture where they were asked for."""
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "trace.json", tmp_path / "step.svg"
    options = ["--device", "cpu", "--num-workers", "2", "--context", "5", "--steps", "2", "--no-progress"]
    result = run("profile", TINY, *options, "--out", str(trace), "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    for text in ("context 5, 2 workers, 2 steps", "gate_up", "critical", "readings per step", "hops that take"):
        assert text in result.stdout
    assert result.stderr.splitlines() == [
        f"tri-mpk: wrote {trace}; open it at https://ui.perfetto.dev", f"tri-mpk: wrote {picture}"
    ]  # fmt: skip
    assert json.loads(trace.read_text())["traceEvents"] and picture.read_text().startswith("<?xml")

    result = run("profile", TINY, *options, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["steps"], facts["first_step"], facts["num_workers"], facts["unit"]) == (2, 3, 2, "readings")
    assert {"qkv", "attention", "gate_up", "lm_head", "sample"} <= {op["op"] for op in facts["ops"]}


def test_each_rank_has_files_of_its_own(monkeypatch: pytest.MonkeyPatch):
    from tri_mpk.cli.measurements import rank_file

    assert rank_file("out/trace.json.gz") == "out/trace.json.gz"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert rank_file("out/trace.json.gz") == f"out/trace.rank{rank}.json.gz"
        assert rank_file("step.svg") == f"step.rank{rank}.svg"


def test_profile_takes_as_many_steps_as_are_recorded():
    from tri_mpk.runtime import RECORDED_STEPS

    for steps, limit in ((0, "equal to 1\n"), (RECORDED_STEPS + 1, f"equal to {RECORDED_STEPS}\n")):
        result = invoke("profile", TINY, "--steps", str(steps))
        assert result.exit_code == 2 and result.stderr.endswith(limit)


class FakeModel:
    """Answers with one known token per call; "stop" is interrupted after it, "fail" is refused."""

    max_seq_len = 512

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def generate(self, input_ids, *, max_new_tokens: int, streamer, **parameters: object) -> None:
        import torch

        assert parameters == {"do_sample": False} and max_new_tokens == 256
        self.prompts.append(self.tokenizer.decode(input_ids[0]))
        if self.prompts[-1].endswith("fail;"):
            raise ValueError("too long")
        streamer.put(input_ids)
        streamer.put(torch.tensor(self.tokenizer("A")["input_ids"][:1]))
        if self.prompts[-1].endswith("stop;"):
            raise KeyboardInterrupt
        streamer.end()


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from transformers import AutoTokenizer

    from tri_mpk import chat

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    lines = iter(["", "one", "/help", "stop", "fail", "two", "/reset", "three", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    model = FakeModel(tokenizer)
    chat.converse(model, tokenizer, "S", None, {"do_sample": False})
    before = "s:S;u:one;a:A;"
    assert model.prompts == [
        "s:S;u:one;",
        f"{before}u:stop;",
        f"{before}u:stop;a:A;u:fail;",
        f"{before}u:stop;a:A;u:two;",
        "s:S;u:three;",
    ]
    out, err = capsys.readouterr()
    assert out.count("A") == 4 and "tri-mpk: error: too long" in err and err.count(chat.HELP) == 2


def test_decoding_is_greedy_unless_a_flag_says_how(capsys: pytest.CaptureFixture):
    from transformers import GenerationConfig

    from tri_mpk.cli.text import decoding_parameters

    plain, asked = GenerationConfig(), GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=1.1)
    assert decoding_parameters(plain, False) == {}
    assert decoding_parameters(plain, False, seed=3, top_k=None) == {"do_sample": True, "seed": 3}
    assert decoding_parameters(asked, False, do_sample=True) == {"do_sample": True}
    assert decoding_parameters(asked, False, do_sample=False, top_k=3) == {"do_sample": False, "top_k": 3}
    assert capsys.readouterr().err == ""
    assert decoding_parameters(asked, False, repetition_penalty=1.2) == {"do_sample": False, "repetition_penalty": 1.2}
    assert decoding_parameters(asked, True) == {"do_sample": False, "repetition_penalty": 1.0}
    assert "do_sample=True, repetition_penalty=1.1 is left out" in capsys.readouterr().err


def test_a_seed_on_the_command_line():
    flags = ["--device", "cpu", "--max-new-tokens", "4", "--max-seq-len", "32", "--no-progress", "--json"]
    sampled = ["--temperature", "3.0", "--top-k", "0", "--seed", "7"]
    first, again = (invoke("generate", TINY, "Call me", *flags, *sampled) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["tokens"] == json.loads(again.stdout)["tokens"]
    assert (
        json.loads(invoke("generate", TINY, "Call me", *flags).stdout)["tokens"] != json.loads(first.stdout)["tokens"]
    )
    assert_error(invoke("generate", TINY, "Call me", *flags, "--top-p", "2"), "top_p=2.0 must be")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m tri_mpk inspect {TINY} --num-workers 8 --all | head -n 1"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120
    )
    assert result.stdout.count("\n") == 1 and result.stderr == ""
