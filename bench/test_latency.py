"""Decode latency, geometries x contexts: `pytest bench --geometry Llama-3.2-1B --context 512`.

What pytest-benchmark times is a whole launch on the host's clock; ms per token in `extra_info` is GPU time of the same
launches, which is what the reports hold.
"""

from __future__ import annotations

import pytest
import torch

from tri_mpk.benchmark import CHECKED_CONTEXTS, WARMUP, Subject, check_logits, decode_at, quantiles

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="decode latency is measured on a CUDA GPU")


def test_decode_latency(benchmark, subject: Subject, context: int, rows: list[dict]):
    errors = None
    if context in CHECKED_CONTEXTS:
        errors = check_logits(subject.model, subject.hf_model, context - 1)
    times_ms: list[float] = []

    def launch() -> None:
        times_ms.append(decode_at(subject.model, context, subject.num_tokens))

    benchmark.group = subject.name
    benchmark.pedantic(launch, rounds=subject.launches, warmup_rounds=WARMUP)
    row = subject.row(context, quantiles(times_ms[-subject.launches :]), errors)
    benchmark.extra_info.update(row)
    rows.append(row)
