"""Many requests in one launch on one CUDA GPU: none lost, none twice, each equal to its own single run."""

from __future__ import annotations

import time

import pytest
import torch

import tri_mpk
from decoders import tiny_config
from tri_mpk import CausalLM
from tri_mpk.loading import random_model
from tri_mpk.serving import Stream

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
VOCAB_SIZE = 997


def load(**options: object) -> CausalLM:
    config = tiny_config(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    model = random_model(config, 0, torch.bfloat16, CUDA)
    model.generation_config.eos_token_id = None
    return tri_mpk.from_model(model, max_seq_len=512, progress=False, page_size=64, **options)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """Pages for two sequences of full length and a half."""
    return load(max_batch_size=8, max_tokens_per_step=64, num_pages=20)


def requests(number: int, longest: int, most: int) -> list[dict]:
    generator = torch.Generator().manual_seed(number)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    return [
        {
            "input_ids": torch.randint(VOCAB_SIZE, (1 + below(longest),), generator=generator),
            "max_new_tokens": 1 + below(most),
            "stop_token_ids": [below(VOCAB_SIZE) for _ in range(below(3))],
            "seed": below(1 << 30),
            "do_sample": below(2) == 1,
            "temperature": 0.5 + below(10) / 10,
            "top_k": below(60),
            "top_p": 1 - below(5) / 10,
            "repetition_penalty": 1.0 if below(3) else 1.3,
        }
        for _ in range(number)
    ]


def same(model: CausalLM, given: list[dict], streams: list[Stream]) -> None:
    """Each alone in the kernel, one after another."""
    with model.serve() as engine:
        for i, (request, stream) in enumerate(zip(given, streams, strict=True)):
            alone = engine.submit(**request)
            assert alone.result() == stream.tokens, i
            assert alone.finish_reason == stream.finish_reason


@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_each_request_equals_its_own_single_run(model, number):
    given = requests(number, longest=200, most=60)
    with model.serve() as engine:
        streams = [engine.submit(**request) for request in given]
    assert all(stream.finish_reason in ("stop", "length") for stream in streams)
    assert engine.statistics.preemptions > 0
    print(engine.statistics)
    step = max(1, number // 200)  # not all of ten thousand
    same(model, given[::step], streams[::step])


@pytest.mark.parametrize("max_batch_size", [2, 32, 64])
def test_other_numbers_of_slots(max_batch_size):
    model = load(max_batch_size=max_batch_size, max_tokens_per_step=4 * max_batch_size)
    given = requests(150, longest=300, most=40)
    with model.serve() as engine:
        streams = [engine.submit(**request) for request in given]
    same(model, given[:40], streams[:40])


def test_idle_requests_and_cancels(model):
    with model.serve() as engine:
        time.sleep(1.0)
        for _ in range(20):
            begin = time.perf_counter()
            stream = engine.submit([1, 2, 3], max_new_tokens=3)
            next(stream)
            first = time.perf_counter() - begin
            assert len(stream.result()) == 3 and first < 0.5, first
            time.sleep(0.05)
        long = [engine.submit([i], max_new_tokens=500) for i in range(30)]
        next(long[0])
        for stream in long:
            stream.cancel()
        for stream in long:
            assert len(stream.result(timeout=20)) < 500 and stream.finish_reason == "cancelled"
    engine = model.serve()
    stream = engine.submit([5], max_new_tokens=500)
    next(stream)
    engine.close(cancel=True)
    assert stream.finish_reason == "cancelled"


def test_a_batch_equals_its_prompts_alone(model):
    ids = torch.randint(VOCAB_SIZE, (12, 40), device=CUDA)
    mask = (torch.arange(40)[None] >= torch.arange(12)[:, None] * 3).to(CUDA, torch.int64)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=30)
    assert together.shape == (12, 70) and together.device == CUDA
    for i in range(12):
        alone = model.generate(ids[i : i + 1, 3 * i :], max_new_tokens=30)
        assert torch.equal(alone[0], together[i, 3 * i :]), i
