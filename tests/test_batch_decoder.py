"""Steps of many tokens: prompts in chunks, decoding and both at once give each sequence what transformers gives it."""

from __future__ import annotations

import pytest
import torch

import tri_mpk.batch_kernel
from batches import BatchDecoder, tiny_batches
from tolerances import MODEL_TOLERANCES, check_close
from tri_mpk.ops.batch_attention import BATCH_ATTENTION
from tri_mpk.ops.op import Policy

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": {"family": "llama", "rope_parameters": LLAMA3_ROPE, "attention_bias": True},
    "qwen2, 7 heads to 1": {"family": "qwen2", "num_attention_heads": 7, "hidden_size": 70},
    "qwen3, 6 heads to 2": {"family": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 40},
    "mistral, two layers, tied": {"family": "mistral", "num_hidden_layers": 2, "tie_word_embeddings": True},
}


def check_step(decoder: BatchDecoder, work: dict[int, list[int]], silent: tuple[int, ...] = ()) -> None:
    logits = decoder.step(work, silent)
    output = decoder.output
    for sequence, row in enumerate(logits):
        if sequence in work and sequence not in silent:
            check_close(actual=row, expected=decoder.expected(sequence), table=MODEL_TOLERANCES)
            part = int(output.best_value.data[sequence].argmax())
            assert output.best_value.data[sequence, part] == row.max()
            assert output.best_index.data[sequence, part] == row.argmax()
        else:
            assert row.isnan().all() and output.best_value.data[sequence].isnan().all()


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def decoder(request) -> BatchDecoder:
    return tiny_batches(request.param["family"], {k: v for k, v in request.param.items() if k != "family"})


def test_mixed_steps(decoder):
    decoder.forget()
    a, b, c, d = decoder.tokens(3, 7, 1, 5)
    check_step(decoder, {0: a, 2: c})
    check_step(decoder, {2: [7], 0: b, 3: [1]})  # a chunk at position 3 among those who decode; 1 is idle
    check_step(decoder, {3: d, 1: [2], 0: [3]}, silent=(3,))  # its prompt goes on
    check_step(decoder, {0: [1], 1: [95], 2: [5], 3: [6]})


@pytest.fixture(scope="module")
def small_splits():
    """Attention has several splits and token blocks, and there are more tokens than a product takes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tri_mpk.batch_kernel, "SPLIT_TOKENS", 64)
        changes = {"num_attention_heads": 4, "max_position_embeddings": 512}
        yield tiny_batches(changes=changes, max_seq_len=256, max_tokens_per_step=48, max_batch_size=3)


def test_long_sequences(small_splits):
    small_splits.forget()
    chunks = small_splits.tokens(48, 48, 40)
    small_splits.step({1: chunks[0]}, silent=(1,))
    small_splits.step({1: chunks[1]}, silent=(1,))
    check_step(small_splits, {0: [4], 1: chunks[2], 2: [5, 6]})  # positions 96 to 135: of the splits 1 and 2
    check_step(small_splits, {2: [3], 0: [1], 1: [2]})


def test_bits_depend_on_no_neighbour(small_splits):
    """Nor on the slot. Its tokens come first in each step: numpy's products depend on the column, a GPU's do not."""
    text = small_splits.tokens(71)[0]
    small_splits.forget()
    small_splits.step({0: text[:40]})
    alone = small_splits.step({0: text[40:]})[0]
    assert not alone.isnan().any()
    small_splits.forget()
    small_splits.step({2: text[:40], 1: [1] * 8})
    together = small_splits.step({2: text[40:], 0: [5, 4, 3], 1: [6]})
    assert torch.equal(together[2], alone)


def test_a_step_without_tokens_touches_nothing(decoder):
    decoder.step({0: [1, 2, 3]})
    names = decoder.kernel.tensors.keys() - {"num_tokens", "counts"}
    names -= {name for name in names if name.startswith(("token", "first", "sequence", "output", "best", "logits"))}
    before = {name: decoder.kernel.tensors[name].data.clone() for name in names}
    logits = decoder.step({})
    assert logits.isnan().all()
    for name in names:
        same = before[name].view(torch.uint8).equal(decoder.kernel.tensors[name].data.view(torch.uint8))
        assert same, f"{name} has changed"


def test_same_bits_with_dynamic_attention():
    results = []
    for policy in ("static", "hybrid"):
        decoder = tiny_batches(policy=policy)
        results.append(decoder.step({0: [1, 2, 3], 2: [4] * 9, 1: [5]}))
        dynamic = [call.op for call in decoder.kernel.calls if call.policy is Policy.DYNAMIC]
        assert dynamic == ([BATCH_ATTENTION] if policy == "hybrid" else [])
    assert not results[0][:3].isnan().any()
    assert results[0].view(torch.int32).equal(results[1].view(torch.int32))
