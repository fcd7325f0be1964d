"""The search for the best knobs, with made-up times instead of a GPU: what it tries, when it ends, what it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import tiny_config
from tri_mpk import tuner
from tri_mpk.cost_model import estimate
from tri_mpk.errors import DeviceError
from tri_mpk.geometries import geometry
from tri_mpk.gpu_profile import default_profile, estimated, stored
from tri_mpk.inspect import plan_config
from tri_mpk.models import describe
from tri_mpk.runtime import InterpreterRuntime
from tri_mpk.tuner import MIN_GAIN, Search, StepEstimate, Trial, knob_values, ready_gpu, search, tune
from tri_mpk.tuning import Tuning, choose_tuning
from tri_mpk.tuning_store import find_tuning, load_tuning, tuning_path

H200 = default_profile()
START = choose_tuning(H200, num_kv_heads=8, head_dim=64)
KNOBS = {"slot_bytes": [8192, 16384, 32768, 65536], "num_splits": [4, 8, 16, 32], "block_kv": [16, 32]}


class Machine:
    """A clock, and a time for every tuning: a bowl around `best`. Each measurement takes ten seconds."""

    def __init__(self, best: Tuning):
        self.best, self.now, self.measured = best, 0.0, []
        self.before: Callable[[Tuning], None] = lambda _: None

    def clock(self) -> float:
        return self.now

    def estimate(self, tuning: Tuning) -> float:
        return 1.0

    def measure(self, tuning: Tuning) -> dict[int, float]:
        self.before(tuning)
        self.measured.append(tuning)
        self.now += 10.0
        away = sum(abs(math.log2(getattr(tuning, knob) / getattr(self.best, knob))) for knob in KNOBS)
        return {512: 1.0 + 0.1 * away, 4096: 2.0 + 0.2 * away}

    def search(self, seconds: float = 1e9, **options: object) -> Search:
        return search(START, KNOBS, self.estimate, self.measure, seconds, clock=self.clock, **options)


tunings = st.builds(
    lambda slot_bytes, num_splits, block_kv: replace(
        START, slot_bytes=slot_bytes, num_splits=num_splits, block_kv=block_kv
    ),
    *(st.sampled_from(values) for values in KNOBS.values()),
)


@given(best=tunings)
def test_it_finds_the_best_of_a_bowl_and_measures_nothing_twice(best: Tuning):
    machine = Machine(best)
    found = machine.search()
    assert found.best.tuning == best and found.best.ms == {512: 1.0, 4096: 2.0}
    assert found.first.tuning == START == machine.measured[0]
    assert len(machine.measured) == len(set(machine.measured)) == len(found.trials)
    assert found.outcome == "no knob gained anything more"


@given(best=tunings, seconds=st.floats(1, 200))
def test_it_keeps_to_its_time_but_measures_the_first(best: Tuning, seconds: float):
    machine = Machine(best)
    found = machine.search(seconds)
    assert machine.now <= max(seconds, 10.0)
    assert found.best.score <= found.first.score
    if found.outcome == "the time was up":
        assert machine.now + 10.0 > seconds
    else:
        assert found.best.tuning == best


@given(best=tunings, count=st.integers(1, 12))
def test_an_interrupt_keeps_the_best_so_far(best: Tuning, count: int):
    machine = Machine(best)

    def interrupt(_: Tuning) -> None:
        if len(machine.measured) == count:
            raise KeyboardInterrupt

    machine.before = interrupt
    found = machine.search()
    if found.outcome == "interrupted":
        assert len(found.trials) == count
    assert found.best.score == min(trial.score for trial in found.trials)


def test_an_interrupt_before_anything_was_measured_is_one():
    machine = Machine(START)

    def interrupt(_: Tuning) -> None:
        raise KeyboardInterrupt

    machine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        machine.search()


def test_candidates_that_fail_are_noted_and_left_behind():
    machine = Machine(replace(START, num_splits=8))

    def fail(tuning: Tuning) -> None:
        if tuning.slot_bytes != START.slot_bytes:
            raise AssertionError("logits are\nfar away")

    def no_room(tuning: Tuning) -> float:
        if tuning.block_kv == 16:
            raise DeviceError("no room")
        return 1.0

    machine.before, machine.estimate = fail, no_room
    found = machine.search()
    assert found.best.tuning == machine.best
    failures = {trial.failure for trial in found.trials if trial.ms is None}
    assert failures == {"AssertionError: logits are", "no room"}
    assert all(trial.score == math.inf for trial in found.trials if trial.ms is None)


def test_the_choice_of_the_cost_model_has_to_run():
    def fail(_: Tuning) -> None:
        raise DeviceError("too old")

    machine = Machine(START)
    machine.before = fail
    with pytest.raises(DeviceError, match="too old"):
        machine.search()


def test_values_of_a_knob_come_in_the_order_of_their_estimates():
    machine = Machine(START)
    estimates = {4: 1.2, 8: 1.05, 16: 1.0, 32: 0.9}
    machine.estimate = lambda tuning: estimates[tuning.num_splits]
    machine.search()
    order = [t.num_splits for t in machine.measured if t.num_splits != START.num_splits]
    assert order == [32, 8], "4 is 20 % slower than the best, says the model"


def test_noise_is_no_gain():
    first = Trial(START, 1.0, {512: 1.0})
    other = Trial(replace(START, num_splits=8), 1.0, {512: 1.0 - MIN_GAIN / 2})
    better = Trial(replace(START, block_kv=16), 1.0, {512: 1.0 - 2 * MIN_GAIN})
    assert Search([first, other]).best is first
    assert Search([first, other, better]).best is better


def test_progress_is_told_after_every_trial():
    counts = []
    found = Machine(START).search(on_trial=lambda so_far: counts.append(len(so_far.trials)))
    assert counts == list(range(1, len(found.trials) + 1))


@settings(deadline=None, max_examples=50)
@given(
    num_sms=st.integers(8, 160), num_kv_heads=st.integers(1, 40), head_dim=st.sampled_from([32, 64, 80, 128, 256]),
    ring=st.booleans(),
)  # fmt: skip
def test_every_value_makes_a_tuning(num_sms: int, num_kv_heads: int, head_dim: int, ring: bool):
    properties = {"multiprocessor_count": num_sms, "max_shared_mem": 232_448}
    gpu = estimated("any", properties)
    shape = replace(
        describe(geometry("Llama-3.2-1B"), 64),
        num_q_heads=num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    start = choose_tuning(gpu, num_kv_heads, head_dim)
    for knob, values in knob_values(gpu, shape, start, ring).items():
        assert getattr(start, knob) in values and values == sorted(set(values))
        for value in values:
            replace(start, **{knob: value})
        if not ring and knob == "slot_bytes":
            assert len(values) == 1


def test_the_estimate_of_two_layers_is_near_that_of_all():
    config = geometry("Llama-3.2-1B")
    estimated_ms = StepEstimate(config, H200, torch.bfloat16, [512])
    exact = estimate(plan_config(config, torch.bfloat16, 1024, tuning=START), H200, 512).step_s * 1e3
    assert estimated_ms(START) == pytest.approx(exact, rel=0.05)
    assert config.num_hidden_layers == 16
    with pytest.raises(DeviceError, match="shared memory"):
        StepEstimate(config, replace(H200, shared_bytes=100_000), torch.bfloat16, [512])(START)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-8B"])
def test_the_choice_is_nearly_what_the_cost_model_thinks_fastest(name: str):
    """Within 2 %, one knob at a time; the number of workers is left to measurements."""
    config = geometry(name)
    shape = describe(config, 4096)
    estimated_ms = StepEstimate(config, H200, torch.bfloat16, [512, 4096])
    chosen = choose_tuning(H200, shape.num_kv_heads, shape.head_dim)
    best = estimated_ms(chosen)
    candidates = knob_values(H200, shape, chosen, ring=True)
    del candidates["num_workers"]
    refused = []
    for knob, values in candidates.items():
        for value in values:
            try:
                estimated = estimated_ms(replace(chosen, **{knob: value}))
            except DeviceError:  # no room for three such slots
                refused.append((knob, value))
            else:
                assert estimated > 0.98 * best, (knob, value)
    assert {knob for knob, _ in refused} <= {"slot_bytes"} and len(refused) < len(candidates["slot_bytes"]) / 2


# ---- the whole, with stand-ins for the GPU ----


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    config = tiny_config(num_layers=2)
    best = replace(choose_tuning(H200, config.num_key_value_heads, 32), num_splits=33)
    machine = Machine(best)
    monkeypatch.setattr(tuner, "bench_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(tuner, "StepMeasurement", lambda *_: machine.measure)
    return machine


def test_what_tune_finds_is_what_is_used_afterwards(gpu: Machine):
    config = tiny_config(num_layers=2)
    shape = describe(config, 128)
    chosen, source = find_tuning(H200, shape, torch.float32)
    assert source == "cost model"
    result = tune(config, [64], progress=False)
    assert json.loads(json.dumps(result)) == result
    assert Tuning.parse(result["chosen"]) == chosen and result["best_ms"] < result["chosen_ms"]
    assert result["file"] == str(tuning_path(H200, shape, torch.float32))
    stored_tuning = load_tuning(H200, shape, torch.float32)
    assert asdict(stored_tuning.tuning) == result["best"]
    tuning, source = find_tuning(H200, shape, torch.float32)
    assert asdict(tuning) == result["best"] and source == f"measured {stored_tuning.date}"
    # a wish for another number of workers, other shapes or another type: the cost model's choice
    assert find_tuning(H200, shape, torch.float32, num_workers=7)[0].num_workers == 7
    assert find_tuning(H200, replace(shape, vocab_size=1), torch.float32)[1] == "cost model"
    assert find_tuning(H200, shape, torch.bfloat16)[1] == "cost model"


def test_a_gpu_that_nobody_measured_is_measured_first_and_once(gpu: Machine, monkeypatch: pytest.MonkeyPatch):
    unknown = estimated("NVIDIA X", {"multiprocessor_count": 10, "max_shared_mem": 166_912})
    calls = []

    def measure_profile(device: torch.device):
        calls.append(device)
        return replace(unknown, hop_s=2e-6)

    def find_profile(_: torch.device):
        known = stored("NVIDIA X")
        return (unknown, "estimated") if known is None else (known, "measured")

    monkeypatch.setattr(tuner, "measure_profile", measure_profile)
    monkeypatch.setattr(tuner, "find_profile", find_profile)
    assert ready_gpu(None, again=False)[1:] == (replace(unknown, hop_s=2e-6), "measured now")
    assert ready_gpu(None, again=False)[2] == "measured"
    assert len(calls) == 1
    ready_gpu(None, again=True)
    assert len(calls) == 2


def test_a_measurement_checks_the_logits_and_times_each_context(monkeypatch: pytest.MonkeyPatch):
    """In the interpreter; only the GPU's clock is replaced."""
    monkeypatch.setattr(tuner, "NUM_TOKENS", 2)
    monkeypatch.setattr(tuner, "LAUNCHES", 1)
    monkeypatch.setattr(InterpreterRuntime, "last_launch_ms", 4.0, raising=False)
    measured_ms = tuner.StepMeasurement(tiny_config(num_layers=1), torch.float32, torch.device("cpu"), [4, 9])
    tuning = Tuning(num_workers=2, slot_bytes=8192, block_kv=16, num_splits=1, split_tokens=256)
    assert measured_ms(tuning) == {4: 2.0, 9: 2.0}
    assert measured_ms(replace(tuning, num_splits=2, split_tokens=32, block_kv=32)) == {4: 2.0, 9: 2.0}
    exact, rounded = measured_ms.references
    measured_ms.references = exact + 1, rounded + 1
    with pytest.raises(AssertionError, match="farther from fp32"):
        measured_ms(tuning)


def test_bad_arguments_and_no_gpu():
    config = tiny_config()
    with pytest.raises(ValueError, match=r"contexts=\[\]"):
        tune(config, [])
    with pytest.raises(ValueError, match="seconds=0"):
        tune(config, [64], seconds=0)
    with pytest.raises(DeviceError, match=r"CUDA GPU.*tri-mpk inspect"):
        tune(config, [64], device="cpu")
