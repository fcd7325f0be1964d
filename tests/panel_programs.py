"""Programs of many tokens, planned on the meta device, whose rows are so long that weights come in panels."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.loading import empty_model
from tri_mpk.models import describe
from tri_mpk.models.batch_decoder import build_serving
from tri_mpk.program import Program
from tri_mpk.sharding import Shard

MAX_SEQ_LEN = 256


def serving_kernel(
    hidden_size: int = 1024, num_workers: int = 8, policy: str = "static", ranks: int = 1, max_tokens: int = 128
) -> BatchKernel:
    """The kernel that serves a Llama of two layers. Weights come in panels wherever ops can have them."""
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_attention_heads=8, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=1001, max_position_embeddings=MAX_SEQ_LEN,
    )  # fmt: skip
    shard = Shard(config, 0, ranks) if ranks > 1 else None
    local = config if shard is None else shard.local_config()
    step = torch.zeros(1, dtype=torch.int32, device="meta")
    text = torch.zeros(MAX_SEQ_LEN, dtype=torch.int64, device="meta")
    kernel = BatchKernel(
        ranks, meta_tensors=[step, text], max_batch_size=4, max_tokens_per_step=max_tokens, num_workers=num_workers,
        policy=policy,
    )  # fmt: skip
    model = empty_model(local, torch.bfloat16)
    build_serving(kernel, describe(local, MAX_SEQ_LEN), model, 128, 8, False, shard)
    return kernel


def serving_program(**parameters: object) -> Program:
    return serving_kernel(**parameters).plan()
