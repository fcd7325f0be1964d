"""Steps of many tokens on a GPU: accuracy, bits that depend on no neighbour, and how long steps take."""

from __future__ import annotations

import copy

import pytest
import torch

from batches import BatchDecoder
from decoders import in_bfloat16, tiny_config, transformers_model
from tri_mpk.geometries import geometry
from tri_mpk.loading import random_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
MODELS = {
    "llama": tiny_config(
        "llama", vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    ),
    "qwen2, 7 to 1": tiny_config(
        "qwen2", vocab_size=2001, hidden_size=896, intermediate_size=2433, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
    "qwen3": tiny_config(
        "qwen3", vocab_size=1500, hidden_size=640, intermediate_size=1920, num_hidden_layers=3, num_attention_heads=10,
        num_key_value_heads=5, head_dim=128, max_position_embeddings=4096,
    ),
    "panels": tiny_config(  # blocks of 17 to 64 rows, one and several, and columns that are no whole panels
        "qwen3", vocab_size=9001, hidden_size=2072, intermediate_size=5640, num_hidden_layers=3, num_attention_heads=48,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
    ),
}  # fmt: skip
MODELS["panels in float16"] = MODELS["panels"]
MODELS["panels of short rows"] = tiny_config(  # fewer steps than activations have places for, and several blocks
    "llama", vocab_size=9001, hidden_size=1024, intermediate_size=5000, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(scope="module", params=[(name, tokens) for name in MODELS for tokens in (64, 300)], ids=str)
def decoder(request) -> BatchDecoder:
    name, tokens = request.param
    dtype = torch.float16 if name.endswith("float16") else torch.bfloat16
    model = in_bfloat16(transformers_model(copy.deepcopy(MODELS[name])).to(CUDA), dtype)
    decoder = BatchDecoder(
        model, max_batch_size=8, max_tokens_per_step=tokens, max_seq_len=1024, page_size=128, num_workers=None
    )
    decoder.compile()
    if name.startswith("panels") and torch.cuda.get_device_capability()[0] == 9:
        streams = [task.panels for task in decoder.kernel.program.graph.tasks if task.panels]
        assert {stream.panels for stream in streams} == {2, 4} and any(stream.second for stream in streams)
    return decoder


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_as_close_to_fp32_as_transformers_is(decoder):
    decoder.forget()
    theirs = in_bfloat16(copy.deepcopy(decoder.theirs), decoder.model.dtype)
    ours, their = [], []
    long = decoder.tokens(400)[0]
    decoder.step({5: long[:64]}, silent=(5,))
    for i in range(1, 5):
        steps = {5: long[64 * i : 64 * i + 40], 1: decoder.tokens(3)[0], 7: decoder.tokens(1)[0]}
        logits = decoder.step(steps)
        for sequence in steps:
            expected = decoder.expected(sequence)
            ours.append(distance(logits[sequence], expected))
            their.append(distance(decoder.expected(sequence, theirs), expected))
        assert logits[[0, 2, 3, 4, 6]].isnan().all()
    assert sum(ours) <= 1.1 * sum(their) and max(ours) < 0.05, (ours, their)


def test_bits_depend_on_no_neighbour(decoder):
    """Nor on the cut of the prompt into chunks, on the slot, on the place in the step, or on the tokens in the step."""
    text, *others = decoder.tokens(331, 40, 17, 23)
    most = decoder.kernel.max_tokens_per_step
    decoder.forget()
    for at in range(0, 330, most):
        decoder.step({0: text[at : min(at + most, 330)]})
    alone = decoder.step({0: text[330:]})[0]
    assert not alone.isnan().any()
    decoder.forget()
    decoder.step({2: others[0], 6: text[:19]})
    at = 19
    for size in (1, 7, 30, 33, 60, 64, 50, 3, 63):
        decoder.step({1: others[1][: (64 - size) // 2], 6: text[at : at + size], 2: [4] * ((64 - size) // 4)})
        at += size
    assert at == 330
    together = decoder.step({s: others[2] for s in (0, 3)} | {6: text[330:]} | {s: [s] for s in (1, 2, 4, 5, 7)})
    assert torch.equal(together[6], alone)


def test_same_bits_again(decoder):
    decoder.forget()
    first = decoder.step({s: [s, s + 1] for s in range(8)})
    for _ in range(5):
        decoder.forget()
        assert torch.equal(decoder.step({s: [s, s + 1] for s in range(8)}), first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-8B"])
def test_step_times(name: str):
    """Prints them: pytest -s. Random weights; every sequence decodes one token at the same position."""
    model = random_model(geometry(name), 0, torch.bfloat16, CUDA)
    decoder = BatchDecoder(
        model, max_batch_size=64, max_tokens_per_step=64, max_seq_len=4096, page_size=128, num_workers=None
    )
    decoder.compile()
    for handle in decoder.kernel.tensors.values():
        if handle.name.endswith("_cache"):
            handle.data.zero_()
    best = {}
    for context in (64, 1024, 4000):
        for batch in (1, 8, 16, 32, 64):
            times = []
            for _ in range(5):
                decoder.lengths = [context] * 64
                logits = decoder.step({s: [s + 1] for s in range(batch)}, repeats=20)
                times.append(decoder.kernel.runtime.last_launch_ms / 20)
            assert not logits[:batch].isnan().any() and logits[batch:].isnan().all()
            best[context, batch] = min(times)
            print(f"{name}: context {context}, batch {batch}: {min(times):.3f} ms per step")
    decoder.lengths = [64] * 64
    decoder.step({0: [1] * 64}, repeats=20)
    print(f"{name}: a chunk of 64 tokens: {decoder.kernel.runtime.last_launch_ms / 20:.3f} ms")
    assert best[64, 8] < 8 * best[64, 1], "8 sequences at once take longer than one after another"
