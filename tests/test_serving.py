"""Many requests in one launch, on a "model" whose right answers are known: every request equals its own single run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hash_model import (
    VOCAB_SIZE,
    expected_tokens,
    greedy_tokens,
    hash_kernel,
    next_logits,
    penalised_tokens,
)
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.errors import EngineClosedError, EngineFullError, MegakernelTimeout, WorkerDiedError
from tri_mpk.generation import GenerationRequest
from tri_mpk.ops.advance import RingSizes
from tri_mpk.ops.rings import RECORD_FINGERPRINT
from tri_mpk.ops.sample import SAMPLE
from tri_mpk.rings import HostRings
from tri_mpk.runtime import InterpreterRuntime
from tri_mpk.sampling import Sampling
from tri_mpk.serving import Engine, Stream

MAX_SEQ_LEN, PAGE_SIZE, NUM_PAGES = 32, 4, 9
META = [torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)]
RINGS = RingSizes(tickets=8, results=16, prompts=64)


@pytest.fixture(scope="module")
def kernel():
    """Four slots, pages for one sequence of full length and little more, small rings."""
    kernel = hash_kernel(4, 8, PAGE_SIZE, NUM_PAGES, MAX_SEQ_LEN, RINGS)
    kernel.compile()
    return kernel


@pytest.fixture
def engine(kernel):
    engine = new_engine(kernel)
    yield engine
    engine.close(cancel=True)


def new_engine(kernel, **options) -> Engine:
    return Engine(kernel, GenerationConfig(), VOCAB_SIZE, **options)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(100 * length + seed))


def random_requests(number: int, longest: int, most: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    return [
        {
            "input_ids": torch.randint(VOCAB_SIZE, (1 + below(longest),), generator=generator),
            "max_new_tokens": 1 + below(most),
            "eos_token_id": [below(VOCAB_SIZE) for _ in range(below(3))] or None,
        }
        for _ in range(number)
    ]


def submit_all(engine: Engine, requests: list[dict]) -> list[Stream]:
    return [engine.submit(**request) for request in requests]


def check_all(streams: list[Stream]) -> None:
    for stream in streams:
        expected = greedy_tokens(stream.request)
        assert stream.result() == expected
        ends = expected[-1] in stream.request.eos_token_ids
        assert stream.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("number", [24, pytest.param(600, marks=pytest.mark.slow)])
def test_each_of_many_requests_equals_its_own_single_run(kernel, number):
    """More than there are slots, tickets and pages: none is lost, none comes twice, and preemption changes nothing."""
    launches = kernel.runtime.num_launches
    with new_engine(kernel) as engine:
        streams = submit_all(engine, random_requests(number, longest=12, most=9))
    check_all(streams)
    assert engine.statistics.preemptions > 3
    tokens = sum(len(s.request.prompt) + len(s.tokens) - 1 for s in streams)
    assert engine.statistics.tokens > tokens, "what was preempted is computed again"
    assert kernel.runtime.num_launches == launches + 1


def test_enough_pages_preempt_nobody(kernel):
    with new_engine(kernel) as engine:
        streams = submit_all(engine, random_requests(6, longest=5, most=3, seed=1))
    check_all(streams)
    assert engine.statistics.preemptions == 0
    assert engine.statistics.tokens == sum(len(s.request.prompt) + len(s.tokens) - 1 for s in streams)


def test_equal_beginnings_are_computed_once(kernel):
    """Full pages of the one that runs already; tokens are as if each had its own."""
    same = prompt(11)
    with new_engine(kernel) as engine:
        streams = [engine.submit(same, max_new_tokens=9)]
        next(streams[0])
        streams += [engine.submit(torch.cat((same[:n], prompt(5 - n // 3))), max_new_tokens=3) for n in (9, 4, 2)]
        streams.append(engine.submit(same, max_new_tokens=2))
    check_all(streams)
    assert engine.statistics.shared_pages >= 2


def test_a_sequence_of_all_pages(engine):
    stream = engine.submit(prompt(MAX_SEQ_LEN - 1), max_new_tokens=1)
    other = engine.submit(prompt(3), max_new_tokens=MAX_SEQ_LEN - 3)
    engine.close()
    check_all([stream, other])


def test_reasons(engine):
    full = engine.submit(prompt(4), max_new_tokens=6)
    tokens = full.result()
    assert full.finish_reason == "length" and len(tokens) == 6
    first = tokens.index(tokens[2])
    eos = engine.submit(prompt(4), max_new_tokens=6, eos_token_id=[tokens[2], 7])
    stop = engine.submit(prompt(4), max_new_tokens=6, eos_token_id=VOCAB_SIZE - 1, stop_token_ids=[tokens[2]])
    last = engine.submit(prompt(4), max_new_tokens=6, stop_token_ids=tokens[-1])
    assert eos.result() == stop.result() == tokens[: first + 1]
    assert eos.finish_reason == stop.finish_reason == "stop"
    assert last.result() == tokens[: tokens.index(tokens[-1]) + 1] and last.finish_reason == "stop"


def test_tokens_come_while_the_request_runs(engine):
    stream = engine.submit([prompt(3).tolist()], max_new_tokens=12)
    first = next(stream)
    assert stream.finish_reason is None
    assert [first, *stream] == greedy_tokens(stream.request) == stream.tokens
    assert list(stream) == [] and stream.result() == stream.tokens  # read already


def test_asynchronous_streams(engine):
    async def read(seed: int) -> bool:
        stream = engine.submit(prompt(3, seed), max_new_tokens=4)
        return [token async for token in stream] == greedy_tokens(stream.request)

    async def read_all() -> list[bool]:
        return await asyncio.gather(*map(read, range(5)))

    assert asyncio.run(read_all()) == [True] * 5


def test_idle_for_longer_than_a_wait_may_last(kernel, monkeypatch):
    monkeypatch.setattr(kernel.runtime, "wait_bound_s", 1.0)
    with new_engine(kernel) as engine:
        check_all([engine.submit(prompt(2), max_new_tokens=2)])
        time.sleep(2.5)
        check_all([engine.submit(prompt(5), max_new_tokens=2)])
    assert engine.statistics.steps > engine.statistics.busy_steps + 3


# ---- sampling ----

SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 12, "top_p": 0.9, "output_logprobs": True}


def test_a_request_draws_the_same_tokens_whatever_runs_beside_it(kernel):
    with new_engine(kernel) as engine:
        alone = engine.submit(prompt(3), max_new_tokens=5, seed=5, **SAMPLED)
        alone.result()
        streams = [
            engine.submit(prompt(3), max_new_tokens=5, seed=5, **SAMPLED),
            engine.submit(prompt(9, 2), max_new_tokens=5, repetition_penalty=3.0),
            engine.submit(prompt(3), max_new_tokens=5, seed=6, **SAMPLED),
            engine.submit(prompt(3), max_new_tokens=5),
            engine.submit(prompt(7), max_new_tokens=4, output_logprobs=True),
        ]
    assert streams[0].tokens == alone.tokens != streams[2].tokens
    assert streams[1].tokens == penalised_tokens(streams[1].request) != greedy_tokens(streams[1].request)
    check_all(streams[3:])
    for stream in (streams[0], streams[2]):
        tokens = stream.request.prompt.tolist()
        for token, logprob in zip(stream.tokens, stream.logprobs, strict=True):
            p = SAMPLE.reference(next_logits(tokens), torch.tensor([0]), temperature=1.5, top_k=12, top_p=0.9)
            assert p[token] > 0 and abs(float(p[token].log()) - logprob) < 1e-4
            tokens.append(token)
    first = next_logits(streams[4].request.prompt.tolist()).log_softmax(-1).max()
    assert abs(float(first) - streams[4].logprobs[0]) < 1e-4 and streams[3].logprobs is None


def test_marks_of_a_slot_are_forgotten_with_its_request(kernel):
    """Slots are used again and again; a penalty counts its own prompt and tokens only."""
    with new_engine(kernel) as engine:
        streams = [
            engine.submit(prompt(1 + i % 4, i), max_new_tokens=3, repetition_penalty=1.0 if i % 3 == 0 else 3.0)
            for i in range(14)
        ]
    for stream in streams:
        assert stream.tokens == penalised_tokens(stream.request)


# ---- cancelling, back-pressure, closing ----


def test_cancel(engine):
    streams = [engine.submit(prompt(2, i), max_new_tokens=30) for i in range(14)]  # the last ones wait on the host
    next(streams[0])
    for stream in (streams[0], streams[13], streams[7], streams[0]):
        stream.cancel()
    short = engine.submit(prompt(3), max_new_tokens=2)
    for stream in streams[1:7] + streams[8:13]:
        stream.cancel()
    for stream in streams:
        tokens = stream.result()
        assert stream.finish_reason == "cancelled" and len(tokens) < 30
        assert tokens == greedy_tokens(stream.request)[: len(tokens)]
    check_all([short])
    streams[0].cancel()  # after its end: nothing happens
    assert len(streams[0].tokens) >= 1 and streams[13].tokens == []


def test_results_that_nobody_takes_stop_the_steps_and_are_not_lost(kernel, monkeypatch):
    """The thread of the host sleeps: the ring holds what fits, steps are empty, and all goes on afterwards."""
    take, awake, most = HostRings.take, threading.Event(), []

    def sleepy_take(self):
        most.append(int(self.mailbox[9]) - self.num_taken)
        return take(self) if awake.is_set() else []

    monkeypatch.setattr(HostRings, "take", sleepy_take)
    with new_engine(kernel) as engine:
        streams = [engine.submit(prompt(2, i), max_new_tokens=7) for i in range(5)]
        until = time.monotonic() + 60
        while max(most, default=0) <= RINGS.results - 4 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.5)
        assert RINGS.results - 4 < max(most) <= RINGS.results
        assert all(stream.tokens == [] for stream in streams)
        awake.set()
    check_all(streams)


def test_a_stream_that_nobody_reads_holds_up_nobody(engine):
    unread = [engine.submit(prompt(2, i), max_new_tokens=9) for i in range(6)]
    check_all([engine.submit(prompt(5), max_new_tokens=3)])
    engine.close()
    assert [len(stream.tokens) for stream in unread] == [9] * 6


def test_close(kernel):
    engine = new_engine(kernel)
    stream = engine.submit(prompt(2), max_new_tokens=5)
    engine.close()
    check_all([stream])
    engine.close()
    with pytest.raises(EngineClosedError, match=r"closed; make a new one with model.serve"):
        engine.submit(prompt(2), max_new_tokens=5)
    assert not engine.is_open


def test_close_and_cancel(kernel):
    with pytest.raises(KeyboardInterrupt), new_engine(kernel) as engine:
        streams = [engine.submit(prompt(2, i), max_new_tokens=30) for i in range(11)]
        next(streams[0])
        raise KeyboardInterrupt
    for stream in streams:
        tokens = list(stream)
        assert stream.finish_reason == "cancelled" and len(tokens) < 30
    with new_engine(kernel) as engine:  # nothing is left of it
        streams = submit_all(engine, random_requests(5, longest=9, most=3, seed=2))
    check_all(streams)


# ---- errors ----


BAD = [
    ({"max_new_tokens": MAX_SEQ_LEN}, ValueError, "exceed max_seq_len"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer"),
    ({"input_ids": []}, ValueError, "empty"),
    ({"input_ids": [VOCAB_SIZE]}, ValueError, "tokens must be in"),
    ({"input_ids": [[1], [2]]}, NotImplementedError, "one prompt at a time"),
    ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature=-1.0 must be"),
    ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p=1.5 must be"),
    ({"do_sample": True, "top_k": -3}, ValueError, "top_k=-3 must be"),
    ({"do_sample": True, "seed": -1}, ValueError, "seed=-1 must be"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty=0.0 must be"),
    ({"stop_token_ids": [VOCAB_SIZE]}, ValueError, f"stop_token_ids={VOCAB_SIZE} must be"),
    ({"stop_token_ids": list(range(40))}, NotImplementedError, "at most 32"),
    ({"num_beams": 4}, NotImplementedError, "num_beams=4"),
]


def test_bad_requests_are_named(engine):
    for parameters, error, message in BAD:
        with pytest.raises(error, match=message):
            engine.submit(**{"input_ids": [1, 2]} | parameters)


def test_a_request_that_the_pages_could_never_hold():
    kernel = hash_kernel(2, 4, PAGE_SIZE, 3, MAX_SEQ_LEN)
    with new_engine(kernel) as engine:
        with pytest.raises(
            ValueError, match=r"5 prompt tokens and 8 new ones need 4 pages of 4 tokens, but there are 3"
        ):
            engine.submit(prompt(5), max_new_tokens=8)
        check_all([engine.submit(prompt(5), max_new_tokens=7), engine.submit(prompt(6), max_new_tokens=6)])


def test_more_requests_than_may_wait(kernel):
    with new_engine(kernel, max_waiting=2) as engine:
        streams = [engine.submit(prompt(2, i), max_new_tokens=25) for i in range(8)]
        with pytest.raises(EngineFullError, match="2 requests wait already"):  # noqa: PT012
            for i in range(8, 30):
                streams.append(engine.submit(prompt(2, i), max_new_tokens=25, timeout=0))
        for stream in streams[2:]:
            stream.cancel()
        check_all([engine.submit(prompt(3), max_new_tokens=2)])  # waits until there is room
    check_all(streams[:2])


def test_graphs_of_batches_are_checked():
    kernel = hash_kernel(2, 4)
    with pytest.raises(ValueError, match="from rings; use serve"):
        kernel()
    with pytest.raises(ValueError, match="max_waiting=0"):
        new_engine(kernel, max_waiting=0)
    with pytest.raises(ValueError, match="at least max_batch_size=4"):
        hash_kernel(4, 2)
    with pytest.raises(ValueError, match="num_pages=-1 must be"):
        hash_kernel(2, 2, num_pages=-1)
    with pytest.raises(ValueError, match="no advance_layer"):
        BatchKernel(meta_tensors=META, max_batch_size=2, max_tokens_per_step=2).serve()


def test_a_worker_that_dies_ends_all_streams(kernel):
    engine = new_engine(kernel)
    streams = [engine.submit(prompt(2, i), max_new_tokens=30) for i in range(11)]
    next(streams[0])
    kernel.runtime.workers[1].kill()
    for stream in streams:
        with pytest.raises(WorkerDiedError):
            stream.result(timeout=60)
        assert stream.finish_reason == "error"
        with pytest.raises(WorkerDiedError):
            list(stream)
    with pytest.raises(EngineClosedError, match="ended with WorkerDiedError"):
        engine.submit(prompt(2))
    engine.close()  # everybody has heard of it
    with new_engine(kernel) as engine:
        check_all([engine.submit(prompt(4), max_new_tokens=3)])


def test_an_error_that_no_stream_has_seen_comes_from_close(kernel):
    engine = new_engine(kernel)
    kernel.runtime.workers[0].kill()
    with pytest.raises(WorkerDiedError):
        engine.close()
    engine.close()


@pytest.mark.slow
def test_a_worker_that_hangs_ends_all_streams(kernel, monkeypatch):
    monkeypatch.setattr(InterpreterRuntime, "LEAVE_BOUND_S", 1.0)
    monkeypatch.setattr(kernel.runtime, "wait_bound_s", 0.5)
    engine = new_engine(kernel)
    streams = [engine.submit(prompt(2, i), max_new_tokens=30) for i in range(3)]
    next(streams[0])
    os.kill(kernel.runtime.workers[0].pid, signal.SIGSTOP)
    for stream in streams:
        with pytest.raises(MegakernelTimeout, match="worker 1 waited too long"):
            stream.result(timeout=100)
    engine.close()
    monkeypatch.setattr(kernel.runtime, "wait_bound_s", 20.0)
    with new_engine(kernel) as engine:
        check_all([engine.submit(prompt(4), max_new_tokens=3)])


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from hash_model import VOCAB_SIZE, hash_kernel
from transformers import GenerationConfig
from tri_mpk.serving import Engine
engine = Engine(hash_kernel(2, 4), GenerationConfig(), VOCAB_SIZE)
stream = engine.submit([1, 2], max_new_tokens=30)
print(*(process.pid for process in engine.kernel.runtime.workers), next(stream), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", [pytest.param("ends", marks=pytest.mark.slow), "killed"])
def test_a_process_that_ends_in_mid_flight_leaves_nothing_behind(end):
    """Without a word to the engine."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent), end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == (0 if end == "ends" else -signal.SIGKILL), result.stderr
    *workers, token = map(int, result.stdout.split())
    assert token == int(next_logits([1, 2]).argmax())
    until = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


# ---- the rings alone ----


def test_rings_hold_no_more_than_fits():
    rings = HostRings(torch.zeros(RINGS.num_words, dtype=torch.int64).numpy(), RINGS)
    tickets = [rings.put(GenerationRequest(prompt(20, i), 30, ())) for i in range(5)]
    assert tickets == [0, 1, 2, None, None]  # 64 tokens of prompts
    rings.mailbox[8] = 1  # the kernel has taken the first one in
    assert rings.put(GenerationRequest(prompt(20, 3), 30, (), Sampling(True, seed=(1 << 64) - 1))) == 3
    assert rings.put(GenerationRequest(prompt(20, 4), 30, ())) is None
    assert rings.prompts[60:].tolist() + rings.prompts[:16].tolist() == prompt(20, 3).tolist()  # around the end
    rings.mailbox[8] = 4
    short = [rings.put(GenerationRequest(prompt(1), 30, ())) for _ in range(9)]
    assert short == [4, 5, 6, 7, *[None] * 5]  # 8 tickets
    assert expected_tokens(GenerationRequest(prompt(2), 3, ()), lambda logits, tokens: 1) == [1]


def test_fingerprints_tell_requests_apart():
    """All that matters of a request counts, and not where it lies."""

    def fingerprints(*requests: GenerationRequest) -> list[int]:
        rings = HostRings(torch.zeros(RINGS.num_words, dtype=torch.int64).numpy(), RINGS)
        return [int(rings.records[rings.put(request), RECORD_FINGERPRINT.value]) for request in requests]

    request = GenerationRequest(prompt(5), 9, (1,), Sampling(True, seed=3))
    others = [
        GenerationRequest(prompt(5, 1), 9, (1,), Sampling(True, seed=3)),
        GenerationRequest(prompt(5), 8, (1,), Sampling(True, seed=3)),
        GenerationRequest(prompt(5), 9, (2,), Sampling(True, seed=3)),
        GenerationRequest(prompt(5), 9, (1,), Sampling(True, seed=4)),
        GenerationRequest(prompt(5), 9, (1,), Sampling(True, seed=3, top_k=1)),
    ]
    found = fingerprints(request, *others, request)
    assert found[0] == found[-1] == fingerprints(others[0], request)[1]
    assert len(set(found)) == 6 and min(found) > 0
