"""`generate` for batches, and serving, on real models: the tokens of transformers, in one launch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import tri_mpk
from decoders import TINY, prompt, tiny_config, tiny_pair, transformers_model
from tri_mpk.batching import Batching
from tri_mpk.generation import resolve_batch
from tri_mpk.loading import memory_bytes
from tri_mpk.models import describe


def batch_pair(page_size: int = 64, **options: object):
    theirs = transformers_model(tiny_config())
    ours = tri_mpk.from_model(
        copy.deepcopy(theirs), device="cpu", num_workers=2, wait_bound_s=60.0, progress=False, page_size=page_size,
        **options,
    )  # fmt: skip
    return ours, theirs


@pytest.fixture(scope="module")
def pair():
    return batch_pair(max_batch_size=3, max_tokens_per_step=8, max_seq_len=64, page_size=7)  # any size will do


def padded(*lengths: int, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [prompt(length, seed=i)[0] for i, length in enumerate(lengths)]
    ids = torch.full((len(rows), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return ids, mask


def test_a_batch_gets_the_tokens_of_transformers(pair):
    """More prompts than slots, a prompt in chunks beside sequences that decode, padding on both sides."""
    ours, theirs = pair
    ids, mask = padded(2, 11, 1, 4)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    launches = 0 if ours.kernel.runtime is None else ours.kernel.runtime.num_launches
    assert torch.equal(ours.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0), expected)
    assert ours.kernel.runtime.num_launches == launches + 1
    eos = int(expected[0, ids.shape[1] + 1])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=eos, pad_token_id=7
    )
    actual = ours.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=eos, pad_token_id=7)
    assert torch.equal(actual, expected) and 7 in actual[0]


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls += value.view(-1).tolist()

    def end(self) -> None:
        self.calls.append("end")


def test_one_prompt(pair):
    ours, theirs = pair
    streamer = Recorder()
    result = ours.generate(prompt(3).tolist(), max_new_tokens=3, streamer=streamer)
    assert torch.equal(result, theirs.generate(prompt(3), max_new_tokens=3, do_sample=False))
    assert streamer.calls == [*result[0].tolist(), "end"]
    with pytest.raises(ValueError, match="a streamer is for one prompt, got 2"):
        ours.generate(torch.ones(2, 2, dtype=torch.int64), streamer=streamer)


def test_prompts_of_a_batch_draw_from_seeds_of_their_own(pair):
    ours, _ = pair
    ids, mask = padded(3, 3, 2)
    ids[1] = ids[0]
    options = {"do_sample": True, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logprobs": True}
    together = ours.generate(ids, attention_mask=mask, seed=11, repetition_penalty=1.2, **options)
    assert together.sequences.shape == (3, 7) and together.logprobs.shape == (3, 4)
    assert bool((together.logprobs < 0).all()) and bool(together.logprobs.isfinite().all())
    alone = ours.generate(ids[1:2], seed=12, repetition_penalty=1.2, **options)
    assert torch.equal(alone.sequences[0], together.sequences[1])
    torch.testing.assert_close(alone.logprobs[0], together.logprobs[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(together.sequences[0], together.sequences[1])


def test_preempted_sequences_go_on_as_if_nothing_had_happened():
    """Both need a second page when there is one left."""
    ours, theirs = batch_pair(max_batch_size=2, max_tokens_per_step=32, max_seq_len=128, num_pages=3)
    with ours.serve() as engine:
        streams = [engine.submit(prompt(62, seed=i), max_new_tokens=8) for i in range(2)]
        with pytest.raises(RuntimeError, match="the model is serving"):
            ours.generate(prompt(2))
    for i, stream in enumerate(streams):
        expected = theirs.generate(prompt(62, seed=i), max_new_tokens=8, do_sample=False)
        assert stream.tokens == expected[0, 62:].tolist()
    assert engine.statistics.preemptions == 1
    assert torch.equal(ours.generate(prompt(2), max_new_tokens=1), theirs.generate(prompt(2), max_new_tokens=1))


# ---- without running the kernel ----


def resolve(ids, mask=None, **parameters):
    return resolve_batch(
        ids, GenerationConfig(), 32, TINY["vocab_size"], attention_mask=mask, generation_config=None,
        parameters=parameters,
    )  # fmt: skip


def test_batches_are_resolved():
    ids, mask = padded(2, 5, pad=-1)  # what lies under a mask is not looked at
    requests, pad = resolve(ids, mask, max_length=9, eos_token_id=[-1, 3], do_sample=True, seed=(1 << 64) - 1)
    assert [(len(r.prompt), r.max_length) for r in requests] == [(2, 6), (5, 9)]
    assert [r.sampling.seed for r in requests] == [(1 << 64) - 1, 0]
    assert requests[0].prompt.tolist() == ids[0, 3:].tolist() and pad == 3
    assert resolve(ids, mask, pad_token_id=8)[1] == 8 and resolve(ids, mask)[1] == 0
    with pytest.raises(NotImplementedError, match="prompt 1 is not padding on the left"):
        resolve(ids.abs(), torch.tensor([[1] * 5, [1, 1, 1, 0, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 5\)"):
        resolve(ids, mask[:1])
    with pytest.raises(ValueError, match="input_ids is empty"):
        resolve(ids, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="input_ids is empty"):
        resolve(torch.zeros(0, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        resolve([1, 2])
    with pytest.raises(ValueError, match="holds token -1"):
        resolve(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0 must be a positive integer"),
        ({"max_batch_size": 4, "max_tokens_per_step": 3}, "must be at least max_batch_size=4"),
        ({"max_batch_size": 4, "max_tokens_per_step": 1 << 20}, "max_tokens_per_step=1048576 must be at most"),
        ({"max_batch_size": 4, "page_size": 0}, "page_size=0 must be a positive integer"),
        ({"max_batch_size": 4, "num_pages": 1.5}, "num_pages=1.5 must be a positive integer"),
        ({"num_pages": 5}, "for max_batch_size > 1"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tri_mpk.from_config(tiny_config(), device="cpu", max_seq_len=64, **options)


def test_what_only_one_of_the_kernels_does(pair):
    with pytest.raises(NotImplementedError, match="max_batch_size=1"):
        pair[0](prompt(2))
    with pytest.raises(ValueError, match="load it with max_batch_size=8"):
        tiny_pair()[0].serve()


def test_memory_of_pages():
    config = tiny_config()
    shape, page = describe(config, 64), 2 * 1 * 1 * 32 * 128 * 4
    one = memory_bytes(config, shape, torch.float32, 300)
    assert memory_bytes(config, shape, torch.float32, 300, Batching(4)) == one + 9 * page
    assert memory_bytes(config, shape, torch.float32, 300, Batching(4, num_pages=5)) == one + 2 * page
