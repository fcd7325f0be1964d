"""What time stamps cost: ms per token of the same weights with profile=False and with profile=True, launches in turn.

PYTHONPATH=. python bench/profile_overhead.py --geometry Llama-3.2-1B Qwen3-8B --context 64 512
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tri_mpk.benchmark import (
    SEED,
    WARMUP,
    bench_device,
    decode_at,
    environment,
    fill_cache,
    free_memory,
    quantiles,
)
from tri_mpk.geometries import geometry
from tri_mpk.loading import from_model, random_model, resolve_dtype
from tri_mpk.model import PAGE_SIZE


def overhead(name: str, contexts: list[int], num_tokens: int, launches: int) -> list[dict]:
    """A row per context: p50 of ms per token without and with stamps, and the slowdown, 0.01 for one per cent.

    Both models share the matrices that are used where they lie; each has its own packed ones and its own cache.
    """
    config, device = geometry(name), bench_device(None)
    hf_model = random_model(config, SEED, resolve_dtype(None, device, config), device)
    max_seq_len = -(-(max(contexts) + num_tokens) // PAGE_SIZE) * PAGE_SIZE
    models = [from_model(hf_model, max_seq_len=max_seq_len, profile=profile) for profile in (False, True)]
    for model in models:
        fill_cache(model)
    rows = []
    for context in contexts:
        times: list[list[float]] = [[], []]
        for _ in range(WARMUP + launches):
            for model, measured in zip(models, times, strict=True):
                measured.append(decode_at(model, context, num_tokens))
        off, on = (quantiles(measured[WARMUP:])["ms_p50"] for measured in times)
        rows.append({"geometry": name, "context": context, "ms_off": off, "ms_on": on, "slowdown": on / off - 1})
        print(f"{name} context {context:6}: {off:.4f} ms/token, profiled {on:.4f}, {on / off - 1:+.2%}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=["Llama-3.2-1B", "Qwen3-8B"])
    parser.add_argument("--context", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--num-tokens", type=int, default=32, help="tokens per launch")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.geometry:
        rows += overhead(name, options.context, options.num_tokens, options.launches)
        free_memory()
    if options.json:
        options.json.write_text(json.dumps(environment(bench_device(None)) | {"rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
