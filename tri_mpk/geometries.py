"""Named geometries of the bench: the values of the published config.json files, without weights.

Decode latency depends on shapes and bytes, not on what the weights say, so the bench fills these
with random weights.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
_LLAMA_3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "dtype": "bfloat16",
}
_QWEN_3: dict[str, Any] = {
    **_QWEN,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "eos_token_id": 151645,
}

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Llama-3.2-1B": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA_3_ROPE, "factor": 32.0},
        },
    ),
    "Llama-3.2-3B": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA_3_ROPE, "factor": 32.0},
        },
    ),
    "Llama-3.1-8B": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_parameters": {**_LLAMA_3_ROPE, "factor": 8.0},
        },
    ),
    "Qwen3-0.6B": (
        Qwen3Config,
        {
            **_QWEN_3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-1.7B": (
        Qwen3Config,
        {
            **_QWEN_3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-4B": (
        Qwen3Config,
        {
            **_QWEN_3,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": (
        Qwen3Config,
        {
            **_QWEN_3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-32B": (
        Qwen3Config,
        {
            **_QWEN_3,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "max_window_layers": 64,
            "num_attention_heads": 64,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.1-70B": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_parameters": {**_LLAMA_3_ROPE, "factor": 8.0},
        },
    ),
    "Qwen2.5-1.5B": (
        Qwen2Config,
        {
            **_QWEN,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "max_window_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "sliding_window": 131072,
            "eos_token_id": 151643,
            "tie_word_embeddings": True,
        },
    ),
}

GEOMETRIES: tuple[str, ...] = tuple(_CONFIGS)


def geometry(name: str) -> PreTrainedConfig:
    """A fresh config of the geometry `name` (case-insensitive), free for the caller to change."""
    for known, (config_class, values) in _CONFIGS.items():
        if known.lower() == name.lower():
            # transformers 5 writes into the rope_parameters it is given: never hand it our table
            return config_class(**copy.deepcopy(values))
    raise ValueError(f"geometry {name!r} is not known; choose one of {', '.join(GEOMETRIES)}")


def weight_bytes(config: PreTrainedConfig, bytes_per_element: int = 2) -> int:
    """Bytes of weights read per decoded token: every linear layer and lm_head, at batch size 1.

    Tied embeddings count once, as lm_head. The one embedding row, biases and norms are left out:
    together they are under 0.1 %.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q_rows = config.num_attention_heads * head_dim
    kv_rows = config.num_key_value_heads * head_dim
    attention = (2 * q_rows + 2 * kv_rows) * config.hidden_size  # q, o, k, v
    mlp = 3 * config.intermediate_size * config.hidden_size  # gate, up, down
    lm_head = config.vocab_size * config.hidden_size
    return (config.num_hidden_layers * (attention + mlp) + lm_head) * bytes_per_element
