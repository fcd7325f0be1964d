"""On one CUDA GPU: every value of every knob gives the same tokens, and what `tune` stores is used afterwards."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import tri_mpk
from decoders import prompt, tiny_config
from tri_mpk.gpu_profile import find_profile
from tri_mpk.loading import random_model
from tri_mpk.models import describe
from tri_mpk.tuner import knob_values, tune
from tri_mpk.tuning import Tuning, choose_tuning

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
CONFIG = tiny_config(
    "llama", vocab_size=1000, hidden_size=2048, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))


def test_knobs_do_not_change_the_result():
    theirs = random_model(CONFIG, 0, torch.bfloat16, CUDA)
    shape = describe(CONFIG, 1024)
    gpu, _ = find_profile(CUDA)
    chosen = choose_tuning(gpu, shape.num_kv_heads, shape.head_dim)
    input_ids = prompt(300, 1000).to(CUDA)

    def logits(tuning: Tuning) -> torch.Tensor:
        model = tri_mpk.from_model(theirs, max_seq_len=1024, tuning=tuning, progress=False)
        assert model.tuning_source == "given" and model.kernel.num_workers == tuning.num_workers
        return model(input_ids).logits[0, -1].double()

    expected = logits(chosen)
    for knob, values in knob_values(gpu, shape, chosen, ring=True).items():
        for value in values:
            if (knob, value) == ("slot_bytes", 64 << 10):
                continue  # on some GPUs too few of them fit
            found = logits(replace(chosen, **{knob: value}))
            assert float((found - expected).norm() / expected.norm()) < 1e-2, (knob, value)


def test_what_tune_stores_is_used():
    theirs = random_model(CONFIG, 0, torch.bfloat16, CUDA)
    before = tri_mpk.from_model(theirs, max_seq_len=256, progress=False)
    assert before.tuning_source == "cost model"
    result = tune(CONFIG, [128], seconds=30.0, dtype="bfloat16", progress=False)
    assert len(result["trials"]) > 1 and result["best_ms"] <= result["chosen_ms"]
    after = tri_mpk.from_model(theirs, max_seq_len=256, progress=False)
    assert after.tuning_source.startswith("measured ") and asdict(after.kernel.tuning) == result["best"]
