"""Llama 2, 3, 3.1 and 3.2."""

from transformers import LlamaConfig

from tri_mpk.errors import UnsupportedModelError
from tri_mpk.models.decoder import DecoderShape, describe_decoder


def describe(config: LlamaConfig, max_seq_len: int) -> DecoderShape:
    if config.mlp_bias:
        raise UnsupportedModelError("llama: mlp_bias=True is not supported")
    return describe_decoder(config, max_seq_len)
