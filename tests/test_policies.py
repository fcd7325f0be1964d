"""Static, hybrid and dynamic kernels on a CPU: the same bits whoever runs what, with workers delayed at random."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from decoders import prompt, tiny_pair
from tri_mpk import CausalLM, MegakernelTimeout, PersistentKernel, WorkerDiedError
from tri_mpk.ops.op import Policy
from tri_mpk.profiler import BEGIN, DONE, FETCH, RUN, SIGNAL
from tri_mpk.scheduler.descriptor import EVENT_STRIDE
from tri_mpk.scheduler.graph import STEP_EVENT
from tri_mpk.scheduler.ready import RELEASE_TARGET

PROMPT = prompt(3)
NEW_TOKENS = 3
TWO_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_seq_len": 16}
POLICIES = ["static", "hybrid", "dynamic"]


def model(policy: str, **options: object) -> tuple[CausalLM, torch.Tensor]:
    """And the tokens of transformers."""
    ours, theirs = tiny_pair(policy=policy, **TWO_LAYERS | options)
    ours.compile()
    return ours, theirs.generate(PROMPT, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def expected_logits() -> torch.Tensor:
    ours, _ = model("static", num_workers=3)
    return ours(PROMPT).logits


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_delays_change_no_bit(policy: str, seed: int, expected_logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRI_MPK_TEST_DELAYS", str(seed))
    ours, tokens = model(policy, num_workers=3)
    pools = ours.kernel.program.schedule.pools
    assert len(pools) == {"static": 0, "hybrid": 2, "dynamic": 1}[policy]
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=NEW_TOKENS), tokens)
    assert torch.equal(ours(PROMPT).logits, expected_logits)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_counters_of_pools_wrap_around(policy: str):
    ours, tokens = model(policy)
    program, runtime = ours.kernel.program, ours.kernel.runtime
    size = max(map(len, program.schedule.pools))
    for epoch in (2**31 - 3, -2, (2**31 - 1) // size - 1):
        runtime.set_epoch(epoch)
        assert torch.equal(ours.generate(PROMPT, max_new_tokens=NEW_TOKENS), tokens)
    counters, expected = runtime.events, torch.from_numpy(program.counters.before(runtime.next_epoch))
    for pool in range(len(program.schedule.pools)):
        for place in (program.counters.tickets(pool), program.counters.released(pool)):
            assert counters[place] == expected[place]


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_planted_faults_end_in_a_timeout(policy: str):
    ours, tokens = model(policy, wait_bound_s=4.0)
    program, runtime = ours.kernel.program, ours.kernel.runtime
    releasing = sorted(program.counters.release)
    last = releasing[-1]

    def timeout() -> MegakernelTimeout:
        runtime.wait_bound_s = 0.2
        with pytest.raises(MegakernelTimeout) as caught:
            ours.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        runtime.wait_bound_s = 4.0
        assert torch.equal(ours.generate(PROMPT, max_new_tokens=NEW_TOKENS), tokens)
        return caught.value

    for event in {releasing[0], last}:  # a signal is lost
        runtime.set_epoch(1)
        runtime.events[event * EVENT_STRIDE] -= 1
        error = timeout()
        assert f"signals of event {event} never came" in error.root_cause
        assert any(program.graph.task_name(t) in error.root_cause for t in program.events.events[event].producers)
    runtime.set_epoch(1)
    runtime.events[last * EVENT_STRIDE + RELEASE_TARGET.value] += 1  # it comes, but nobody releases the tasks
    error = timeout()
    assert "not at all" in error.root_cause or "never came" in error.root_cause
    runtime.set_epoch(1)
    runtime.events[STEP_EVENT * EVENT_STRIDE] -= 1
    error = timeout()
    assert error.task == "the end of the step" and error.wanted == error.seen + 1
    runtime.set_epoch(1)
    runtime.events[program.counters.tickets(0)] += 1  # a ticket is lost
    timeout()


def test_a_dead_worker_of_a_pool():
    ours, tokens = model("dynamic")
    ours.kernel.runtime.workers[1].kill()
    with pytest.raises(WorkerDiedError):
        ours.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=NEW_TOKENS), tokens)


def test_the_policy_of_a_layer_comes_first():
    step, tokens = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    mpk = PersistentKernel(num_workers=2, meta_tensors=[step, tokens], policy="dynamic")
    x = mpk.new_tensor((8,), torch.float32, name="x")
    mpk.embed_layer(weight=mpk.attach_input(torch.zeros(4, 8), name="table"), output=x, policy="static")
    best = mpk.attach_input(torch.zeros(1), name="a"), mpk.attach_input(torch.zeros(1, dtype=torch.int32), name="b")
    mpk.argmax_layer(input=best)
    assert [call.policy for call in mpk.calls] == [Policy.STATIC, Policy.DYNAMIC]
    with pytest.raises(ValueError, match="'quick' is not a valid Policy"):
        mpk.argmax_layer(input=best, policy="quick")


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_profiles_say_who_took_which_task(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRI_MPK_TEST_DELAYS", "1")
    ours, tokens = model(policy, num_workers=3, profile=True)
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=NEW_TOKENS), tokens)
    profile = ours.profile()
    program = profile.program
    pooled = [task for tasks in program.schedule.pools for task in tasks]
    takers = profile.worker_of[:, pooled]
    assert len(profile.steps) == 5 and set(takers.ravel().tolist()) <= {0, 1, 2}
    assert len(np.unique(takers, axis=0)) > 1  # not the same in all steps
    assert (np.diff(profile.times, axis=-1) >= 0).all()
    for at, times in enumerate(profile.times):
        for worker in range(3):
            spans = times[profile.worker_of[at] == worker]
            spans = spans[np.argsort(spans[:, RUN])]
            assert (spans[1:, FETCH] >= spans[:-1, DONE]).all()  # one task at a time
            assert spans[0, FETCH] == profile.step_times[at, worker, BEGIN]
        for event in program.events.events:
            if event.consumers:
                assert times[event.producers, SIGNAL].max() < times[event.consumers, RUN].min()
        assert profile.critical_path(profile.steps[at])[-1].task in program.events.events[STEP_EVENT].producers
    assert sum(row.tasks for row in profile.table()) == len(program.graph.tasks)
    profile.to_perfetto(tmp_path / "trace.json")
    slices = [
        e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("args", {}).get("op")
    ]
    assert len(slices) == len(profile.steps) * len(program.graph.tasks)


def test_refusals():
    with pytest.raises(ValueError, match="policy='quick' is not supported; choose one of static, hybrid, dynamic"):
        tiny_pair(policy="quick")
