"""The geometries are the published models: parameter counts, rope, and bytes per token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tri_mpk.geometries import GEOMETRIES, geometry, weight_bytes

PUBLISHED_PARAMETERS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-1.5B": 1_543_714_304,
}


def test_every_geometry_has_a_published_count():
    assert set(PUBLISHED_PARAMETERS) == set(GEOMETRIES)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_parameters_and_bytes(name: str):
    config = geometry(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters())  # shared ones appear once
    assert sum(p.numel() for p in parameters.values()) == PUBLISHED_PARAMETERS[name]
    assert model.dtype == torch.bfloat16

    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    layers = sum(p.numel() for n, p in parameters.items() if n.startswith("model.layers.") and p.ndim == 2)
    assert weight_bytes(config) == 2 * (layers + model.lm_head.weight.numel())
    assert weight_bytes(config, bytes_per_element=1) == weight_bytes(config) // 2


def test_rope_parameters():
    llama = geometry("Llama-3.2-1B").rope_parameters
    assert llama["rope_type"] == "llama3"
    assert (llama["rope_theta"], llama["factor"]) == (500000.0, 32.0)
    assert llama["original_max_position_embeddings"] == 8192
    assert geometry("Llama-3.1-8B").rope_parameters["factor"] == 8.0
    for name in ("Qwen3-8B", "Qwen2.5-1.5B"):
        assert geometry(name).rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


def test_names_ignore_case_and_configs_are_fresh():
    config = geometry("qwen3-8b")
    assert config.model_type == "qwen3"
    config.rope_parameters["rope_theta"] = 1.0
    config.num_hidden_layers = 1
    assert geometry("Qwen3-8B").rope_parameters["rope_theta"] == 1000000.0
    assert geometry("Qwen3-8B").num_hidden_layers == 36


def test_no_geometry_has_a_sliding_window():
    assert all(getattr(geometry(name), "sliding_window", None) is None for name in GEOMETRIES)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"Qwen3-9B.*choose one of.*Qwen3-8B"):
        geometry("Qwen3-9B")
