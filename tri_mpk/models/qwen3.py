"""Qwen3 (dense): RMSNorm on every head of q and k."""

from transformers import Qwen3Config

from tri_mpk.models.decoder import DecoderShape, describe_decoder, refuse_sliding_window


def describe(config: Qwen3Config, max_seq_len: int) -> DecoderShape:
    refuse_sliding_window(config, max_seq_len, config.sliding_window if config.use_sliding_window else None)
    return describe_decoder(config, max_seq_len, qk_norm=True)
