"""Qwen2 and Qwen2.5: a bias on q, k and v."""

from transformers import Qwen2Config

from tri_mpk.models.decoder import DecoderShape, describe_decoder, refuse_sliding_window


def describe(config: Qwen2Config, max_seq_len: int) -> DecoderShape:
    refuse_sliding_window(config, max_seq_len, config.sliding_window if config.use_sliding_window else None)
    return describe_decoder(config, max_seq_len)
