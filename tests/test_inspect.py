"""Planning without a device: what `tri-mpk inspect` finds for real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tri_mpk.errors import CheckpointError, UnsupportedModelError
from tri_mpk.geometries import geometry
from tri_mpk.gpu_profile import default_profile
from tri_mpk.inspect import (
    attention_coverage,
    critical_path,
    dot,
    inspect_program,
    load_config,
    op_facts,
    plan_config,
    print_debug,
    ranges,
)
from tri_mpk.program import Program
from tri_mpk.scheduler import STEP_EVENT

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["Llama-3.2-1B", "Qwen3-8B"])
def program(request: pytest.FixtureRequest) -> Program:
    return plan_config(geometry(request.param), torch.bfloat16, 4096, num_workers=132)


@pytest.fixture(scope="module")
def tiny() -> Program:
    return plan_config(load_config(str(ROOT / "demos/tiny")), torch.bfloat16, 512, num_workers=8)


def test_at_4096_tokens_attention_covers_the_workers(program: Program):
    attention = attention_coverage(program, 4096)
    assert attention["coverage"] >= 0.95
    assert attention["busy_workers"] == round(attention["coverage"] * 132)


def test_large_ops_are_balanced(program: Program):
    large = [facts for facts in op_facts(program, per_layer=True) if facts.bytes >= 4 << 20]
    assert len(large) >= 4 * 16 + 1
    assert max(facts.imbalance for facts in large) <= 1.04


def test_facts_add_up(program: Program):
    facts = inspect_program(program, default_profile(), 4096)
    ops = facts["ops"]
    assert sum(op["tasks"] for op in ops) == facts["tasks"] == facts["verify"]["tasks"] == len(program.graph.tasks)
    assert sum(op["bytes"] for op in ops) == facts["bytes"]
    assert sum(op["hops"] for op in ops) + 1 == facts["hops"]  # the last one is the step event
    num_layers = sum(label.endswith(" gate_up") for label in program.graph.ops)
    assert facts["hops_per_layer"] * num_layers < facts["hops"] <= facts["hops_per_layer"] * num_layers + 4
    assert Path(facts["kernel"]).read_text() == program.source


def test_fusion_makes_few_events_of_many_pairs(program: Program):
    """o_proj's 132 tasks each wait for all of attention: pairs before, one event after."""
    facts = inspect_program(program, default_profile(), 4096)["fusion"]
    assert facts["events_before"] > 100 * facts["events_after"]
    assert facts["max_waits_before"] >= 128 and facts["waits_per_task_before"] > 50
    assert facts["max_waits_after"] == 1 >= facts["waits_per_task_after"] > 0.9
    assert 1 <= facts["signals_per_task_after"] <= facts["max_signals_after"] <= 4


def test_passes_fuse_events_and_add_no_hop(program: Program):
    facts = inspect_program(program, default_profile(), 4096)
    names = ["derive", "reduce", "fuse", "fit", "linearise", "queues"]
    passes = {row["name"]: row for row in facts["passes"]}
    assert list(passes) == names
    assert passes["derive"]["events"] > passes["reduce"]["events"] == facts["fusion"]["events_before"]
    assert passes["fuse"]["events"] + 1 == passes["linearise"]["events"] == facts["events"]  # and the step event
    assert passes["reduce"]["max_waits"] > 100 and passes["fuse"]["max_waits"] == 1
    assert passes["linearise"]["signals_per_task"] == facts["fusion"]["signals_per_task_after"]
    assert {row["hops"] for row in facts["passes"]} == {facts["hops"]}  # the depth of the model, in all of them


@pytest.mark.parametrize("policy", ["hybrid", "dynamic"])
def test_kernels_with_pools_are_inspected_too(policy: str):
    static, pooled = (
        plan_config(load_config(str(ROOT / "demos/tiny")), torch.bfloat16, 512, num_workers=8, policy=policy)
        for policy in ("static", policy)
    )
    expected, facts = (inspect_program(program, default_profile(), 512) for program in (static, pooled))
    assert facts["bytes"] == expected["bytes"] and 0 < facts["pool_bytes"] <= facts["bytes"]
    assert expected["pool_bytes"] == 0
    for name in ("tasks", "events", "hops", "hops_per_layer"):
        assert facts[name] == expected[name], name
    assert [op["tasks"] for op in facts["ops"]] == [op["tasks"] for op in expected["ops"]]
    assert facts["estimate"]["ms"] > expected["estimate"]["ms"]  # tickets, and weights that are not on their way
    assert facts["attention"] == expected["attention"]


def test_the_estimate_is_above_its_bounds(program: Program):
    facts = inspect_program(program, default_profile(), 4096)["estimate"]
    assert facts["gpu"] == "NVIDIA H200" and facts["context"] == 4096
    assert 0 < max(facts["stream_ms"], facts["chain_ms"]) < facts["ms"]


def test_coverage_by_hand(tiny: Program):
    """2 KV heads, split over 8 workers: with one token only the first split of each head has something."""
    assert attention_coverage(tiny, 1)["busy_workers"] == 2
    assert attention_coverage(tiny, 2)["busy_workers"] == 2  # the first has the new token, and the older one
    assert attention_coverage(tiny, tiny.tuning.split_tokens + 1)["busy_workers"] == 2
    assert attention_coverage(tiny, tiny.tuning.split_tokens + 2)["busy_workers"] == 4
    attention = attention_coverage(tiny, 512)
    assert attention["splits"] * 2 >= 8
    assert attention["busy_workers"] == 2 * -(-511 // tiny.tuning.split_tokens)
    with pytest.raises(ValueError, match="context=0"):
        attention_coverage(tiny, 0)


def test_critical_path_is_a_chain_of_signals_and_no_other_is_longer(tiny: Program):
    """The longest chain, found once more in program order, which every queue follows."""
    graph, events = tiny.graph, tiny.events
    worker_of = {task: worker for worker, queue in enumerate(tiny.schedule.queues) for task in queue}
    depth, latest = [], [0] * tiny.num_workers
    for task in range(len(graph.tasks)):
        event = events.wait[task]
        signalled = 1 + max(depth[producer] for producer in events.events[event].producers) if event >= 0 else 0
        depth.append(max(signalled, latest[worker_of[task]]))
        latest[worker_of[task]] = depth[task]
    path = critical_path(tiny)
    assert [depth[task] for task in path] == list(range(1, max(depth) + 1))
    assert max(depth) == max(depth[task] for task in events.events[STEP_EVENT].producers)


def test_dot_names_ops_and_events(tiny: Program):
    for layer, present, absent in ((0, "L00 qkv", "L02 qkv"), (None, "L03 qkv", "dashed")):
        text = dot(tiny, layer)
        assert text.startswith("digraph megakernel {") and text.rstrip().endswith("}")
        assert present in text and absent not in text
        nodes = {line.split()[0] for line in text.splitlines() if "[label=" in line or "shape=ellipse" in line}
        edges = [line.strip(" ;").split(" -> ") for line in text.splitlines() if "->" in line]
        assert edges and {end for edge in edges for end in edge} == nodes
    with pytest.raises(ValueError, match="choose 0 to 3, or all"):
        dot(tiny, 4)


def test_debug_goes_to_standard_error(tiny: Program, capsys: pytest.CaptureFixture):
    print_debug(tiny)
    out, err = capsys.readouterr()
    assert out == "" and "megakernel_" in err and str(tiny.report) in err
    assert f"knobs {tiny.tuning}" in err
    for label in tiny.graph.ops:
        assert sum(line.startswith(f"{label}  ") for line in err.splitlines()) == 1, label


def test_ranges():
    assert ranges([]) == "-"
    assert ranges({7, 1, 2, 3}) == "1-3,7"


def test_configs_come_from_folders_and_files(tmp_path: Path):
    tiny = ROOT / "demos/tiny"
    folder, file = (load_config(str(path)).to_dict() for path in (tiny, tiny / "config.json"))
    assert folder | {"_name_or_path": None} == file | {"_name_or_path": None}
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_config(str(tmp_path))
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(CheckpointError):
        load_config(str(broken))
    broken.write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        load_config(str(broken))
