"""Writes the golden files of tests/test_generator.py anew: `python tests/golden/regenerate.py`, then read the diff."""

from __future__ import annotations

import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "megakernel_small.py"


def small_source() -> str:
    """The kernel of a small Qwen3 in bf16 on 132 workers."""
    import torch
    from transformers import Qwen3Config

    from tri_mpk.loading import empty_model
    from tri_mpk.model import CausalLM

    config = Qwen3Config(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    meta = torch.device("meta")
    model = empty_model(config, torch.bfloat16).to(meta)
    return CausalLM(model, meta, max_seq_len=256, num_workers=132, progress=False).kernel.plan().source


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    GOLDEN.write_text(small_source())
    print(f"wrote {GOLDEN}")
