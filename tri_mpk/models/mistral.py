"""Mistral 7B and its dense relatives."""

from transformers import MistralConfig

from tri_mpk.models.decoder import DecoderShape, describe_decoder, refuse_sliding_window


def describe(config: MistralConfig, max_seq_len: int) -> DecoderShape:
    refuse_sliding_window(config, max_seq_len, config.sliding_window)
    return describe_decoder(config, max_seq_len)
