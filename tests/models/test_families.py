"""Every family equals transformers, logits and greedy tokens; what is not implemented is refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GPT2Config

from decoders import prompt, tiny_config, tiny_pair
from tolerances import MODEL_TOLERANCES, check_close
from tri_mpk import UnsupportedModelError
from tri_mpk.models import FAMILIES, describe
from tri_mpk.tuning import Tuning

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ODD_SIZES = {"vocab_size": 97, "hidden_size": 70, "intermediate_size": 51, "num_attention_heads": 7, "head_dim": 34}

CASES = {
    "llama": ("llama", {"num_hidden_layers": 2, "eos_token_id": [3, 5, 7]}),
    "llama, tied, rope llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA_3}),
    "llama, biases, rope dynamic": ("llama", {"rope_parameters": DYNAMIC, "attention_bias": True}),
    "llama, odd sizes, rope linear": ("llama", {**ODD_SIZES, "rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}),
    "qwen2, tied, 7 to 1, rope yarn": (
        "qwen2", {"tie_word_embeddings": True, "num_attention_heads": 7, "rope_parameters": YARN}
    ),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3, tied, head size 80": ("qwen3", {"tie_word_embeddings": True, "head_dim": 80, "rms_norm_eps": 1e-3}),
    "mistral, K split": ("mistral", {"sliding_window": 64, "intermediate_size": 1024, "rms_norm_eps": 1e-2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    family, changes = CASES[case]
    ours, theirs = tiny_pair(family, **changes)
    input_ids = prompt(4)
    with torch.no_grad():
        expected = theirs(input_ids).logits
    actual = ours(input_ids).logits
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    check_close(actual=actual, expected=expected, table=MODEL_TOLERANCES)
    short = input_ids[:, :2]
    assert torch.equal(ours.generate(short, max_new_tokens=3), theirs.generate(short, max_new_tokens=3))


def test_a_sequence_in_several_splits_equals_transformers():
    """From 17 tokens on attention is split in two, from 33 on in three, which is the most."""
    tuning = Tuning(num_workers=2, slot_bytes=4096, block_kv=16, num_splits=3, split_tokens=16)
    ours, theirs = tiny_pair("qwen3", tuning=tuning, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    input_ids = prompt(55)
    with torch.no_grad():
        expected = theirs(input_ids).logits
    check_close(actual=ours(input_ids).logits, expected=expected, table=MODEL_TOLERANCES)


def test_every_family_is_tested():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


REFUSED = {
    "sliding_window=40": ("mistral", {"sliding_window": 40}),
    "sliding_window=41": ("qwen2", {"sliding_window": 41, "use_sliding_window": True, "max_window_layers": 0}),
    "sliding_window=42": ("qwen3", {"sliding_window": 42, "use_sliding_window": True, "max_window_layers": 0}),
    "rope_type='longrope'": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "rope_type='dynamic'": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32
            }
        },
    ),
    "hidden_act='gelu'": ("llama", {"hidden_act": "gelu"}),
    "mlp_bias=True": ("llama", {"mlp_bias": True}),
    "head_dim=16": ("llama", {"head_dim": 16}),
    "head_dim=512": ("qwen3", {"head_dim": 512}),
    "partial_rotary_factor=0.5": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("feature", REFUSED)
def test_refused_by_name(feature):
    family, changes = REFUSED[feature]
    with pytest.raises(UnsupportedModelError, match=feature.replace("(", r"\(")) as caught:
        describe(tiny_config(family, **changes), 64)
    assert family in str(caught.value)


@pytest.mark.parametrize(("config", "name"), [(GPT2Config(), "gpt2"), (Gemma2Config(), "gemma2")])
def test_unknown_model_type_lists_the_known(config, name):
    with pytest.raises(UnsupportedModelError, match=f"'{name}'.*llama, mistral, qwen2, qwen3"):
        describe(config, 64)


def test_quantized_checkpoint_is_refused():
    config = tiny_config()
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match="quantized"):
        describe(config, 64)


def test_more_positions_than_the_model_has():
    with pytest.raises(ValueError, match="max_seq_len=513 exceeds the model's 512"):
        describe(tiny_config(), 513)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_window_that_no_sequence_exceeds_is_full_attention(family):
    changes = {"sliding_window": 64} | ({"use_sliding_window": True} if family != "mistral" else {})
    assert describe(tiny_config(family, **changes), 64).num_layers == 1


def test_an_unused_window_is_ignored():
    assert describe(tiny_config("qwen2", sliding_window=8, use_sliding_window=False), 64).num_layers == 1
