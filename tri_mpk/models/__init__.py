"""Model families: from a Hugging Face config to a description that `decoder.build` turns into a graph.

A family is one file with a function `describe(config, max_seq_len) -> DecoderShape` that refuses by name what it does
not implement. To add one, write that file and name it in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from tri_mpk.errors import UnsupportedModelError
from tri_mpk.models import llama, mistral, qwen2, qwen3
from tri_mpk.models.decoder import DecoderShape

FAMILIES: dict[str, Callable[[PreTrainedConfig, int], DecoderShape]] = {
    "llama": llama.describe,
    "mistral": mistral.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
}


def describe(config: PreTrainedConfig, max_seq_len: int) -> DecoderShape:
    """The decoder of a config. Raises UnsupportedModelError for what is not implemented, by name."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("quantized checkpoints are not supported; load one in bfloat16, float16 or float32")
    return family(config, max_seq_len)
