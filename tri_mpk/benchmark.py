"""Measuring decode: ms per token at a given KV length, with the cache filled directly."""

from __future__ import annotations

import statistics

import torch

from tri_mpk.model import CausalLM
from tri_mpk.runtime import LaunchRequest


def fill_cache(model: CausalLM, seed: int = 0) -> None:
    """Random keys and values of unit variance at every position."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, tensor in model.kernel.tensors.items():
        if name.endswith(("k_cache", "v_cache")):
            tensor.data.normal_(0.0, 1.0, generator=generator)


def decode_at(model: CausalLM, context: int, num_tokens: int) -> float:
    """ms per token of one launch that chooses `num_tokens` tokens while the KV length passes `context` half-way."""
    first = max(1, context - num_tokens // 2)
    model.compile()
    model.kernel.step.data.fill_(first - 1)
    request = LaunchRequest(num_known=first, last_step=first + num_tokens - 2, logits_from=0)
    tokens = sum(1 for _ in model.kernel.launch(request))
    assert tokens == num_tokens, (tokens, num_tokens)
    return model.kernel.runtime.last_launch_ms / num_tokens


def measure(model: CausalLM, context: int, num_tokens: int = 32, launches: int = 20, warmup: int = 3) -> dict[str, float]:
    """p20, p50 and p80 of ms per token over many launches."""
    for _ in range(warmup):
        decode_at(model, context, num_tokens)
    times = sorted(decode_at(model, context, num_tokens) for _ in range(launches))
    quantiles = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms_p20": quantiles[1], "ms_p50": quantiles[4], "ms_p80": quantiles[7]}
