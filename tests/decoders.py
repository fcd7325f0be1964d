"""Tiny decoders of every family, with all weights random, and what transformers makes of them."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import tri_mpk
from tri_mpk import CausalLM
from tri_mpk.tuning import Tuning

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def tiny_config(family: str = "llama", **changes: object) -> PreTrainedConfig:
    defaults = {"sliding_window": None} if family == "mistral" else {}
    return CONFIGS[family](**copy.deepcopy(TINY | defaults | changes))


def transformers_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random fp32 weights, norms and biases too, so that none can be forgotten; attention in its plainest form."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.3)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.add_(1.0)
    return model


def in_bfloat16(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model's weights converted, as `from_pretrained` loads them: `.to` alone rounds the rotary frequencies too."""
    rotary = type(model.model.rotary_emb)(config=model.config).to(model.device)
    model = model.to(dtype)
    model.model.rotary_emb = rotary
    return model


def tiny_pair(
    family: str = "llama",
    *,
    max_seq_len: int = 64,
    num_workers: int = 2,
    wait_bound_s: float = 30.0,
    profile: bool = False,
    tuning: Tuning | None = None,
    policy: str = "static",
    **changes: object,
) -> tuple[CausalLM, PreTrainedModel]:
    """The same model twice: ours, on two worker processes, and transformers'."""
    theirs = transformers_model(tiny_config(family, **changes))
    ours = tri_mpk.from_model(
        copy.deepcopy(theirs), device="cpu", max_seq_len=max_seq_len, num_workers=num_workers,
        wait_bound_s=wait_bound_s, progress=False, profile=profile, tuning=tuning, policy=policy,
    )  # fmt: skip
    return ours, theirs


def prompt(length: int, vocab_size: int = TINY["vocab_size"], seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
