"""The generated kernel: the same bytes every time, one readable file, shared by equal shapes; its PTX orders memory."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from decoders import tiny_config
from golden.regenerate import GOLDEN, small_source
from panel_programs import serving_kernel, serving_program
from tri_mpk import generator
from tri_mpk.aot import compile_for, parse_target, resources
from tri_mpk.loading import empty_model
from tri_mpk.model import CausalLM
from tri_mpk.program import Program
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.store import cache_dir

META = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]


def program(
    family: str = "llama", max_seq_len: int = 256, num_workers: int = 8, profile: bool = False, **changes: object
) -> Program:
    model = empty_model(tiny_config(family, **changes), torch.bfloat16).to(META)
    return CausalLM(model, META, max_seq_len, num_workers, progress=False, profile=profile).kernel.plan()


@pytest.fixture(scope="module")
def source() -> str:
    return program(num_hidden_layers=3).source


def test_equal_input_gives_equal_bytes(source):
    assert program(num_hidden_layers=3).source == source


def test_another_process_gives_the_same_bytes(source):
    """No date, no path, no order of a hash table."""
    code = "from test_generator import program; print(program(num_hidden_layers=3).source, end='')"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "golden")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert result.stdout == source, result.stderr
    assert str(ROOT) not in source and "/home" not in source


def test_self_contained(source):
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in imports for alias in node.names} == {"triton", "triton.language"}
    assert all(isinstance(node, ast.Import) for node in imports)


def test_every_name_is_defined_before_its_use(source):
    """Top to bottom: constants, callees, callers, megakernel last."""
    tree = ast.parse(source)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == "megakernel" and len(functions) == len(set(functions))
    seen: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            called = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert called & set(functions) <= seen, node.name
            seen.add(node.name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_clean_for_ruff(family, tmp_path):
    path = tmp_path / "megakernel.py"
    path.write_text(program(family).source)
    command = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "120", str(path)]
    for task in (["check", "--select", "E4,E7,E9,F,I", "--ignore", "E741"], ["format", "--check"]):
        result = subprocess.run([*command, *task, *options], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_functions_are_verbatim(source):
    """Comments included: the file on disk is what a reader of ops/ knows."""
    for path in ("ops/embedding.py", "ops/attention_output.py", "scheduler/device.py"):
        text = (ROOT / path).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name in source:
                first = node.decorator_list[0].lineno - 1
                assert "\n".join(text.split("\n")[first : node.end_lineno]) in source, node.name


def test_no_model_name_and_no_layer_count(source):
    assert not re.search(r"llama|qwen|mistral|checkpoint", source.replace("transformers Llama", ""), re.IGNORECASE)
    assert program(num_hidden_layers=1).source == source


def test_equal_shapes_share_a_kernel(source):
    assert program("mistral", num_hidden_layers=2).source == source
    assert (
        program(num_hidden_layers=3, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}).source
        == source
    )
    assert program(num_hidden_layers=3, max_seq_len=128).source == source


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 128}, {"intermediate_size": 96}, {"rms_norm_eps": 1e-5}, {"num_attention_heads": 4}]
)
def test_other_shapes_do_not(source, changes):
    assert program(num_hidden_layers=3, **changes).source != source


def test_a_branch_per_variant_not_per_layer(source):
    branches = re.findall(r"(?:if|elif) variant == (\d+):", source)
    assert [int(i) for i in branches] == list(range(len(branches)))
    assert len(branches) == 8  # embedding, qkv, attention, o, gate and up, down, lm_head, sample


def test_written_once_under_its_hash(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    path = generator.write_source(source)
    assert path.parent == tmp_path and path.read_text() == source
    before = path.stat().st_mtime_ns
    assert generator.write_source(source) == path and path.stat().st_mtime_ns == before
    other = generator.write_source(source + "# another\n")
    assert other != path and sorted(tmp_path.iterdir()) == sorted([path, other])
    path.write_text("damaged")
    assert generator.write_source(source).read_text() == source


def test_imports_as_a_module(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    path = generator.write_source(source)
    module = generator.import_source(path)
    assert generator.import_source(path) is module is sys.modules[path.stem]
    assert module.__file__ == str(path) and isinstance(module.megakernel, triton.runtime.jit.JITFunction)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TRI_MPK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "tri_mpk"
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"


def test_golden_file():
    """If you meant to change the generated code: `python tests/golden/regenerate.py`, and read the diff."""
    assert GOLDEN.read_text() == small_source()


# ---- panels ----


def noinline(source: str) -> set[str]:
    """Functions that are called, not inlined."""
    return set(re.findall(r"^@triton\.jit\(noinline=True\).*\ndef (\w+)", source, re.MULTILINE))


@pytest.mark.parametrize(("policy", "ranks"), [("static", 1), ("dynamic", 1), ("static", 2)])
def test_a_kernel_with_panels_starts_them_once_before_its_first_task(policy, ranks):
    program = serving_program(policy=policy, ranks=ranks)
    assert any(variant.reads_panels for variant in program.variants)
    loop = program.source.split("# ---- megakernel ----")[1]
    assert loop.count("start_panels(smem)") == 1
    assert loop.index("    ring = start_ring") < loop.index("    start_panels(smem)") < loop.index("    fetch_task")
    assert loop.count("PANELS=True") == sum(variant.reads_panels for variant in program.variants)
    assert "def start_panels(" in program.source and "def multiply_block(" in program.source
    assert noinline(program.source) == {"batch_sample_tile", "advance_tile"}, "products are inlined"


def test_a_kernel_without_panels_knows_nothing_of_them():
    without_wgmma = serving_kernel()
    without_wgmma.panels = False
    for program in (serving_program(hidden_size=256), without_wgmma.plan()):
        assert not any(variant.reads_panels for variant in program.variants)
        assert "start_panels" not in program.source and "PANELS=True" not in program.source
        assert "PANELS=False" in program.source
        assert "# panels" not in program.source.split("# ---- megakernel ----")[1]
        assert {"linear_of_tokens", "gated_linear_of_tokens", "logits_of_outputs"} < noinline(program.source)


def test_a_kernel_with_panels_is_clean_for_ruff(tmp_path):
    path = tmp_path / "megakernel.py"
    path.write_text(serving_program().source)
    command = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "120", str(path)]
    for task in (["check", "--select", "E4,E7,E9,F,I", "--ignore", "E741"], ["format", "--check"]):
        result = subprocess.run([*command, *task, *options], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


# ---- time stamps ----


def test_without_profile_nothing_knows_of_stamps(source):
    for word in ("profile", "timing", "timed", "clock", "record", "CONTROL_RECORDS", "globaltimer;"):
        assert word not in re.sub(r"mov\.u64 \w+, %globaltimer;", "", source), word


def test_with_profile_every_wait_and_signal_is_timed():
    timed = ast.parse(program(profile=True).source)
    plain = ast.parse(program().source)

    def calls(tree: ast.Module) -> dict[str, list[str]]:
        """What the functions of ops/ call, in order."""
        found = {}
        for f in tree.body:
            if isinstance(f, ast.FunctionDef) and f.name in ours:
                found[f.name] = [
                    n.func.id for n in ast.walk(f) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                ]
        return found

    def reached(tile: str, called: dict[str, list[str]]) -> set[str]:
        """What a tile function calls, also by way of others of ops/."""
        return {tile}.union(*(reached(name, called) if name in called else {name} for name in called[tile]))

    ours = {
        node.name
        for path in (ROOT / "ops").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    names = {"wait": "timed_wait", "signal": "timed_signal"}
    called = calls(timed)
    assert called == {caller: [names.get(name, name) for name in found] for caller, found in calls(plain).items()}
    tiles = [name for name in called if name.endswith("_tile")]
    assert len(tiles) == 8 and all({"timed_wait", "timed_signal"} <= reached(tile, called) for tile in tiles)
    assert not any({"wait", "signal"} & set(found) for found in called.values())


def test_with_profile_the_file_is_as_readable(tmp_path):
    path = tmp_path / "megakernel.py"
    path.write_text(program(profile=True).source)
    command = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "120", str(path)]
    for task in (["check", "--select", "E4,E7,E9,F,I", "--ignore", "E741"], ["format", "--check"]):
        result = subprocess.run([*command, *task, *options], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_with_profile_layers_share_a_kernel_too():
    assert program(profile=True, num_hidden_layers=3).source == program(profile=True).source


# ---- PTX, compiled ahead of time for sm_90 ----


@triton.jit
def wait_then_signal(task, event_ptr, control_ptr, data_ptr, epoch, PORTABLE: tl.constexpr):
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    cells = data_ptr + tl.arange(0, 1024)
    tl.store(cells, tl.load(cells) + 1)
    signal(task, event_ptr, PORTABLE)


@pytest.mark.parametrize("portable", [False, True])
def test_waits_acquire_and_signals_release(portable):
    """acquire, CTA barrier, the task's loads and stores, CTA barrier, release; all at gpu scope."""
    signature = {
        "task": "*i64" if portable else "i32", "event_ptr": "*i32", "control_ptr": "*i64", "data_ptr": "*fp32",
        "epoch": "i32", "PORTABLE": "constexpr",
    }  # fmt: skip
    index = list(signature).index("PORTABLE")
    source = ASTSource(fn=wait_then_signal, signature=signature, constexprs={(index,): portable})
    ptx = triton.compile(source, target=parse_target("sm_90"), options={"num_warps": 16}).asm["ptx"]
    acquire = r"ld\.global\.gpu\.acquire" if portable else r"ld\.acquire\.gpu\.global\.s32"
    release = r"atom\.global\.gpu\.release\.add" if portable else r"red\.release\.gpu\.global\.add"
    places = {
        name: [match.start() for match in re.finditer(pattern, ptx)]
        for name, pattern in {
            "acquire": acquire, "barrier": r"bar\.sync", "load": r"ld\.global(?:\.v\d)?\.b32",
            "store": r"st\.global(?:\.v\d)?\.b32", "release": release,
        }.items()
    }  # fmt: skip
    assert all(places.values()), {name: len(found) for name, found in places.items()}

    def barrier_between(first: int, last: int) -> bool:
        return any(first < place < last for place in places["barrier"])

    assert barrier_between(max(places["acquire"]), places["load"][-1])
    assert barrier_between(max(places["store"]), min(places["release"]))
    assert max(places["acquire"]) < max(places["store"]) < min(places["release"])
    # the words of the descriptor: behind a pointer, or in shared memory only
    assert bool(re.search(r"ld\.global(?:\.v\d)?\.b64", ptx)) == portable
    assert portable or "ld.shared.b64" in ptx


def test_a_whole_kernel_fits_the_register_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    kernel = compile_for(generator.write_source(small_source()), "sm_90")
    found = resources(kernel)
    assert found["registers"] <= 128 and found["stack_bytes"] <= 128, found  # 16 warps of 128 registers fill an SM
    assert found["bulk_copies"] > 0, found
    for order in ("ld.acquire.gpu", "red.release.gpu", "st.release.sys"):
        assert order in kernel.asm["ptx"]


@pytest.mark.parametrize("target", ["sm_70", "sm90", "gfx942", ""])
def test_targets(target):
    with pytest.raises(ValueError, match="sm_80 or newer"):
        parse_target(target)
