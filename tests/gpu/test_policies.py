"""On one CUDA GPU: pools and events chosen by values give the same results, and lost signals end in a timeout."""

from __future__ import annotations

import dataclasses
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tri_mpk
from decoders import prompt, tiny_config
from tri_mpk import CausalLM, MegakernelTimeout
from tri_mpk.loading import random_model
from tri_mpk.profiler import RUN, SIGNAL
from tri_mpk.program import kernel_constants
from tri_mpk.scheduler.descriptor import EVENT_STRIDE
from tri_mpk.scheduler.graph import STEP_EVENT
from tri_mpk.scheduler.ready import RELEASE_TARGET

pytestmark = pytest.mark.gpu

DEMOS = Path(__file__).resolve().parents[2] / "demos"
CUDA = torch.device("cuda", 0)
SMALL = {
    "llama": tiny_config(
        "llama", vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    ),
    "llama, odd sizes": tiny_config(
        "llama", vocab_size=1001, hidden_size=510, intermediate_size=701, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=34, max_position_embeddings=4096,
    ),
    "qwen3": tiny_config(
        "qwen3", vocab_size=1500, hidden_size=640, intermediate_size=1920, num_hidden_layers=3, num_attention_heads=10,
        num_key_value_heads=5, head_dim=128, max_position_embeddings=4096,
    ),
}  # fmt: skip
POOLED = ["hybrid", "dynamic"]
PROMPT = prompt(40, 1000)


@pytest.fixture(scope="module", params=SMALL)
def weights(request: pytest.FixtureRequest) -> PreTrainedModel:
    theirs = random_model(SMALL[request.param], 0, torch.bfloat16, CUDA)
    theirs.generation_config.eos_token_id = None
    return theirs


def ours(weights: PreTrainedModel, policy: str, **options: object) -> CausalLM:
    model = tri_mpk.from_model(weights, max_seq_len=1024, progress=False, policy=policy, **options)
    model.compile()
    return model


def static_twin(weights: PreTrainedModel, policy: str) -> CausalLM:
    """The static kernel that does the same arithmetic: where all is dynamic, weights do not come through rings."""
    if policy == "hybrid":
        return ours(weights, "static")

    def without_ring(*arguments):
        return dataclasses.replace(kernel_constants(*arguments), ring=False)

    with mock.patch("tri_mpk.persistent_kernel.kernel_constants", without_ring):
        return ours(weights, "static")


# ---- pools ----


@pytest.mark.parametrize("policy", POOLED)
def test_whoever_takes_a_task_the_bits_are_the_same(weights, policy):
    static, pooled = static_twin(weights, policy), ours(weights, policy)
    assert len(pooled.kernel.program.schedule.pools) > 0 == len(static.kernel.program.schedule.pools)
    logits, text = static(PROMPT).logits, static.generate(PROMPT, max_new_tokens=300)
    for _ in range(10):
        assert torch.equal(pooled(PROMPT).logits, logits)
        assert torch.equal(pooled.generate(PROMPT, max_new_tokens=300), text)


@pytest.mark.parametrize("policy", POOLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_demo_recites_with_every_policy(policy, dtype):
    input_ids = AutoTokenizer.from_pretrained(DEMOS / "tiny")("Humpty Dumpty sat", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(DEMOS / "tiny", dtype=torch.float32)
    model = tri_mpk.from_pretrained(DEMOS / "tiny", dtype=dtype, progress=False, policy=policy)
    assert torch.equal(model.generate(input_ids), theirs.generate(input_ids))


@pytest.mark.parametrize("policy", POOLED)
def test_counters_of_pools_wrap_around(policy):
    model = ours(random_model(SMALL["llama"], 0, torch.bfloat16, CUDA), policy)
    expected = model.generate(PROMPT, max_new_tokens=50)
    size = max(map(len, model.kernel.program.schedule.pools))
    for epoch in (2**31 - 20, -20, (2**31 - 1) // size - 20):
        model.kernel.runtime.set_epoch(epoch)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=50), expected)


@pytest.mark.parametrize("policy", POOLED)
def test_a_profile_of_pools(policy):
    weights = random_model(SMALL["llama"], 0, torch.bfloat16, CUDA)
    expected = ours(weights, policy).generate(PROMPT, max_new_tokens=60)
    model = ours(weights, policy, profile=True)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=60), expected)
    profile = model.profile()
    program = profile.program
    pooled = [task for tasks in program.schedule.pools for task in tasks]
    takers = profile.worker_of[:, pooled]
    assert 0 <= takers.min() <= takers.max() < program.num_workers
    assert len(np.unique(takers, axis=0)) > 1  # not the same in all steps
    assert (np.diff(profile.times, axis=-1) >= 0).all()
    for times in profile.times:
        for event in program.events.events:
            if event.consumers:
                assert times[event.producers, SIGNAL].max() <= times[event.consumers, RUN].min()


FAULTS = ["first release", "last release", "nobody releases", "step event", "ticket"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", POOLED)
def test_faults_in_pools_end_in_a_timeout(policy, fault):
    model = ours(random_model(SMALL["llama"], 0, torch.bfloat16, CUDA), policy)
    expected = model.generate(PROMPT, max_new_tokens=20)
    program, runtime = model.kernel.program, model.kernel.runtime
    releasing = sorted(program.counters.release)
    runtime.wait_bound_s = 1.0
    if fault == "step event":
        runtime.events[STEP_EVENT * EVENT_STRIDE] -= 1
    elif fault == "ticket":
        runtime.events[program.counters.tickets(0)] += 1
    elif fault == "nobody releases":  # the signal comes, but nobody takes it for the last one
        runtime.events[releasing[-1] * EVENT_STRIDE + RELEASE_TARGET.value] += 1
    else:
        event = releasing[0 if fault == "first release" else -1]
        runtime.events[event * EVENT_STRIDE] -= 1
    started = time.monotonic()
    with pytest.raises(MegakernelTimeout) as caught:
        model.generate(PROMPT, max_new_tokens=20)
    assert time.monotonic() - started < 10
    if "last release" in fault or "first release" in fault:
        assert f"signals of event {event} never came" in caught.value.root_cause
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20), expected)


# ---- events chosen by values: demos/experts.py ----


@pytest.fixture(scope="module")
def experts() -> ModuleType:
    spec = spec_from_file_location("experts", DEMOS / "experts.py")
    module = sys.modules["experts"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Mixture:
    """The layer on the GPU, and the same on the CPU."""

    def __init__(self, experts: ModuleType, seed: int, num_workers: int | None):
        generator = torch.Generator().manual_seed(seed)
        dims = [(5, 32), (4, 32), (4, 32, 32)]
        self.x, self.router, self.experts = (torch.randn(d, generator=generator) for d in dims)
        self.experts *= 32**-0.5
        self.module, self.on_gpu = experts, self.x.to(CUDA)
        self.mpk, self.ids = experts.build(self.on_gpu, self.router.to(CUDA), self.experts.to(CUDA), num_workers)
        self.mpk.compile()

    def check_steps(self, num_steps: int) -> set[int]:
        """One launch. Returns the ids that occurred."""
        self.on_gpu.copy_(self.x)
        self.mpk.step.data.zero_()
        self.mpk(num_tokens=1, max_new_tokens=num_steps)
        expected, seen = self.x, set()
        for _ in range(num_steps):
            expected, ids = self.module.mixture_torch(expected, self.router, self.experts)
            seen |= set(ids.tolist())
        assert self.ids.tolist() == ids.tolist()
        torch.testing.assert_close(self.on_gpu.cpu(), expected, rtol=1e-4, atol=1e-4)
        return seen


@pytest.mark.parametrize("num_workers", [None, 3, 1])
@pytest.mark.parametrize("seed", range(4))
def test_one_kernel_serves_all_ids(experts, seed, num_workers):
    made = Mixture(experts, seed, num_workers)
    seen = set()
    for num_steps in (1, 2, 3, 6):
        seen |= made.check_steps(num_steps)
    assert len(seen) >= 3  # of 5, nobody included
    made.mpk.runtime.set_epoch(2**31 - 3)
    made.check_steps(6)
    counters = made.mpk.program.counters.before(made.mpk.runtime.next_epoch)
    assert torch.equal(made.mpk.runtime.events.cpu(), torch.from_numpy(counters))  # each got its count


def test_a_lost_signal_by_value_ends_in_a_timeout(experts):
    made = Mixture(experts, 0, None)
    runtime, program = made.mpk.runtime, made.mpk.program
    runtime.wait_bound_s = 1.0
    done = next(t for t in program.events.tensors if t.producer.startswith("expert"))
    chosen = int(experts.mixture_torch(made.x, made.router, made.experts)[1].min())
    assert chosen < len(made.experts)
    runtime.events[(done.first + chosen) * EVENT_STRIDE] -= 1
    with pytest.raises(MegakernelTimeout) as caught:
        made.mpk(num_tokens=1, max_new_tokens=1)
    assert caught.value.op in ("combine", None)  # None: workers at the end of the step wait as long as it does
    assert f"signals of event {done.first + chosen} never came" in caught.value.root_cause
    assert f"expert_2 t{chosen}" in caught.value.root_cause
    made.check_steps(3)
