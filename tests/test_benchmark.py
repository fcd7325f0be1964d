"""The benchmark's own arithmetic, its checks and its reports. Tiny fp32 model in the interpreter, no GPU."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig

from tri_mpk import benchmark
from tri_mpk.baseline import StaticCacheDecoder, measure_baseline
from tri_mpk.benchmark import (
    Subject,
    check_logits,
    compile_seconds,
    decode_at,
    dense_cache,
    empty_caches,
    fill_cache,
    kl_divergence,
    kv_bytes,
    logits_at,
    quantiles,
    run_bench,
    save_report,
)
from tri_mpk.errors import DeviceError
from tri_mpk.loading import from_model, random_model
from tri_mpk.reference import reference_logits
from tri_mpk.runtime import InterpreterRuntime
from tri_mpk.store import cache_dir

REPOSITORY = Path(__file__).parent.parent
FIXTURE = Path(__file__).parent / "fixtures" / "bench"


def load_report_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", REPOSITORY / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report_py = load_report_module()


def tiny_config(num_layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def twins():
    """Our model, two pages long with a random cache, and the transformers model over the same weights."""
    hf_model = random_model(tiny_config(), 0, torch.float32, torch.device("cpu"))
    StaticCacheDecoder(hf_model, max_seq_len=1)  # packs in place, as the baseline does before us
    model = from_model(hf_model, device="cpu", max_seq_len=256, num_workers=2, progress=False)
    fill_cache(model)
    return model, hf_model


@pytest.mark.parametrize("position", [37, 200, 255])  # first page, second page, last position of the model
def test_logits_equal_the_reference_on_the_same_cache(twins, position: int):
    model, hf_model = twins
    k_cache, v_cache = dense_cache(model, position)
    assert k_cache.shape == v_cache.shape == (2, 1, 2, position, 32)
    assert not torch.equal(k_cache, v_cache) and k_cache.std() > 0.9
    before = model.kernel.tokens.data.clone()
    actual = logits_at(model, position, token=5)
    expected = reference_logits(hf_model, k_cache, v_cache, torch.tensor([5]), position)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    other = reference_logits(hf_model, k_cache.flip(0), v_cache, torch.tensor([5]), position)[0]
    assert (other - expected).norm() > 0.01 * expected.norm()  # the cache matters
    before[position] = 5
    assert torch.equal(model.kernel.tokens.data, before)  # no token was chosen


def test_positions_beyond_the_model_are_refused(twins):
    model, _ = twins
    with pytest.raises(ValueError, match=r"position=256 is not in 0 .. 255"):
        logits_at(model, 256, token=5)
    with pytest.raises(ValueError, match=r"32 tokens around context=250 exceed max_seq_len=256"):
        decode_at(model, 250, 32)


def test_dense_cache_follows_the_page_table(twins):
    model, _ = twins
    k_cache, _ = dense_cache(model, 200)
    pages = model.kernel.tensors["L01.k_cache"].data  # [num_pages, num_kv_heads, page_size, head_dim]
    for position in (0, 127, 128, 199):
        assert torch.equal(k_cache[1, 0, :, position], pages[position // 128, :, position % 128])


def test_check_logits(twins):
    model, hf_model = twins
    errors = check_logits(model, hf_model, 37)
    assert errors["rel_l2"] < 1e-5 < 1e-3 < errors["rel_l2_bf16"]
    assert errors["kl"] < errors["kl_bf16"]

    broken = copy.deepcopy(hf_model)
    broken.model.layers[1].mlp.down_proj.weight.data *= 1.5
    with pytest.raises(AssertionError, match=r"position 37.*rel_l2 \d.*rel_l2_bf16.*kl \d.*kl_bf16"):
        check_logits(model, broken, 37)


def test_run_bench_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DeviceError, match=r"measures a CUDA GPU, but got device='cpu'"):
        run_bench("Qwen3-0.6B", [64], device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"PyTorch sees no CUDA GPU here"):
        run_bench("Qwen3-0.6B", [64])


def test_run_bench_with_stand_ins_for_the_gpu(monkeypatch: pytest.MonkeyPatch):
    """The whole run on a CPU; only what asks a GPU is replaced."""
    eager = functools.partial(measure_baseline, mode="eager", samples=2, replays=1)
    monkeypatch.setattr(benchmark, "geometry", lambda _: tiny_config(num_layers=1))
    monkeypatch.setattr(benchmark, "bench_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(benchmark, "copy_bandwidth_gbps", lambda _: 10.0)
    monkeypatch.setattr(benchmark, "measure_baseline", eager)
    monkeypatch.setattr(benchmark, "from_model", functools.partial(from_model, num_workers=2))
    monkeypatch.setattr(benchmark, "WARMUP", 0)
    monkeypatch.setattr(benchmark, "CHECKED_CONTEXTS", (8,))
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 4.0, raising=False)
    report = run_bench("qwen3-0.6b", [4, 8], num_tokens=2, launches=1, attentions=["split"], progress=False)
    assert report["geometry"] == "Qwen3-0.6B"
    assert report["settings"]["max_seq_len"] == 128
    assert [row["context"] for row in report["rows"]] == [4, 8]
    assert all(row["ms_p50"] == 2.0 and row["baseline_ms_p50"] > 0 for row in report["rows"])
    assert all(list(row["baseline_tried"]) == ["eager/split"] for row in report["rows"])
    assert [row["rel_l2"] is None for row in report["rows"]] == [True, False]
    assert report["rows"][1]["rel_l2"] < 1e-5
    assert report["compile_cold_s"] > 0 and report["compile_cached_s"] > 0
    assert json.loads(json.dumps(report)) == report


def test_run_bench_checks_its_arguments():
    with pytest.raises(ValueError, match=r"'Qwen9' is not known; choose one of"):
        run_bench("Qwen9", [64])
    with pytest.raises(ValueError, match=r"contexts=\[\]"):
        run_bench("Qwen3-0.6B", [])
    with pytest.raises(ValueError, match=r"launches=0"):
        run_bench("Qwen3-0.6B", [64], launches=0)


def test_quantiles():
    assert quantiles(list(range(11))) == {"ms_p20": 2, "ms_p50": 5, "ms_p80": 8}
    assert quantiles([3.0]) == {"ms_p20": 3.0, "ms_p50": 3.0, "ms_p80": 3.0}


def test_kl_divergence():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert kl_divergence(actual=q.log(), expected=p.log()) == pytest.approx(float(expected), rel=1e-6)


def test_empty_caches_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with empty_caches():
        inside = cache_dir()
        assert inside != tmp_path and not inside.exists()
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == inside.parent
    assert cache_dir() == tmp_path and "TRITON_CACHE_DIR" not in os.environ and not inside.parent.exists()


def test_a_subject_makes_a_report_that_the_table_reads(twins, tmp_path: Path):
    model, hf_model = twins
    seconds = compile_seconds(model)
    tried = {"default/sdpa": 1.0}
    baseline = {37: {"ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.1, "tried": tried}}
    subject = Subject("Tiny", hf_model, model, 32, 20, 4000.0, seconds, seconds, baseline)
    times = {"ms_p20": 0.4, "ms_p50": 0.5, "ms_p80": 0.6}
    row = subject.row(37, times, {"rel_l2": 1e-3, "rel_l2_bf16": 2e-3, "kl": 1e-6, "kl_bf16": 2e-6})
    weights = 4 * (2 * (64 * (128 + 64 + 64 + 128) + 3 * 64 * 96) + 96 * 64)
    assert row["weight_bytes"] == weights
    assert row["kv_bytes"] == kv_bytes(model, 37) == 2 * 2 * 2 * 32 * 37 * 4
    assert row["gbps"] == pytest.approx((weights + row["kv_bytes"]) / 0.5e-3 / 1e9)
    assert row["fraction_of_copy"] == row["gbps"] / 4000.0
    assert (row["tokens_per_s"], row["speedup"], row["baseline_ms_p50"]) == (2000.0, 2.0, 1.0)

    bare = subject.row(64, times)
    assert bare["speedup"] is None and bare["baseline_ms_p50"] is None and bare["rel_l2"] is None
    path = save_report(subject.report([row, bare]), tmp_path)
    assert path.name == "Tiny_cpu.json"
    (report,) = report_py.load_results(tmp_path)
    assert report["settings"]["max_seq_len"] == 256
    assert "| Tiny | 37 | 0.500 | 0.400 – 0.600 | 2000 |" in report_py.to_markdown([report])
    assert len(report_py.to_csv([report]).splitlines()) == 3


# ---- bench/report.py ----


@pytest.fixture
def bench(tmp_path: Path):
    """Arguments for report.py on a copy of the fixture's results and a README with markers."""
    shutil.copytree(FIXTURE, tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- bench:start -->\nold\n<!-- bench:end -->\nbelow\n")
    return ["--results", str(tmp_path / "results"), "--readme", str(readme)]


def test_report_writes_table_and_csv(bench: list[str], tmp_path: Path):
    assert report_py.main(bench) == 0
    assert (tmp_path / "results" / "results.csv").read_text() == (FIXTURE / "expected.csv").read_text()
    table = (FIXTURE / "expected.md").read_text()
    assert (tmp_path / "README.md").read_text() == f"above\n<!-- bench:start -->\n{table}<!-- bench:end -->\nbelow\n"


def test_report_check_detects_staleness(bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report_py.main([*bench, "--check"]) == 1
    message = capsys.readouterr().err
    assert "results.csv is out of date" in message and "README.md is out of date" in message
    assert not (tmp_path / "results" / "results.csv").exists()  # a check writes nothing

    report_py.main(bench)
    assert report_py.main([*bench, "--check"]) == 0

    path = tmp_path / "results" / "Llama-3.2-1B_new.json"
    report = json.loads(path.read_text())
    report["rows"][0]["ms_p50"] = 0.6
    path.write_text(json.dumps(report))
    capsys.readouterr()
    assert report_py.main([*bench, "--check"]) == 1
    assert "run python bench/report.py" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --> <!-- bench:start -->", "<!-- bench:start -->"])
def test_report_needs_markers(bench: list[str], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "README.md").write_text(text)
    assert report_py.main(bench) == 1
    assert "needs one line <!-- bench:start -->" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_parts_in_another_type_are_another_result(twins, tmp_path: Path):
    model, hf_model = twins
    subject = Subject("Tiny", hf_model, model, 32, 20, 4000.0, 1.0, 1.0, {})
    names = []
    for parts in ("bfloat16", "float32"):
        report = subject.report([subject.row(37, {"ms_p20": 0.4, "ms_p50": 0.5, "ms_p80": 0.6})])
        report["settings"]["reduce_dtype"] = parts
        names.append(save_report(report, tmp_path).name)
    assert names == ["Tiny_cpu_bfloat16-parts.json", "Tiny_cpu.json"]
    reports = report_py.load_results(tmp_path)
    assert [report_py.row_name(report) for report in reports] == ["Tiny", "Tiny (parts in bfloat16)"]
    assert "| Tiny (parts in bfloat16) | 37 |" in report_py.to_markdown(reports)
    assert report_py.to_csv(reports).splitlines()[2].startswith("Tiny (parts in bfloat16),37,")


def test_report_without_results(tmp_path: Path):
    assert report_py.load_results(tmp_path / "none") == []
    assert report_py.to_markdown([]).startswith("No results yet")


def test_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert report_py.main(["--check"]) == 0, capsys.readouterr().err
