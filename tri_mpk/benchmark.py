"""Measuring decode: ms per token at a given KV length, with the cache filled directly.

`run_bench` measures one geometry: our kernel, the torch.compile baseline on the same weights and the device's copy
bandwidth, all in one run, and holds our logits against the fp32 reference on the same cache.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor, nn
from tqdm.auto import tqdm

import tri_mpk
from tri_mpk.account import account as account_entries
from tri_mpk.baseline import ATTENTIONS, copy_bandwidth_gbps, measure_baseline
from tri_mpk.errors import DeviceError
from tri_mpk.generator import write_source
from tri_mpk.geometries import GEOMETRIES, geometry, weight_bytes
from tri_mpk.gpu_profile import find_profile
from tri_mpk.loading import check_memory, from_model, random_model, resolve_device, resolve_dtype
from tri_mpk.model import PAGE_SIZE, CausalLM
from tri_mpk.models import describe
from tri_mpk.profiler import Profile
from tri_mpk.reference import reference_logits
from tri_mpk.runtime import RECORDED_STEPS, LaunchRequest
from tri_mpk.tuning_store import load_tuning

DEFAULT_CONTEXTS = (64, 512, 4096)
CHECKED_CONTEXTS = (512, 4096)  # where a row's logits are compared with the reference
WARMUP = 3  # launches before the first that counts
SEED = 0


# ---- one model ----


def fill_cache(model: CausalLM, seed: int = SEED) -> None:
    """Random keys and values of unit variance at every position. Ranks have parts of the same cache."""
    for name, whole in random_caches(model, seed):
        tensor = model.kernel.tensors[name].data
        tensor.copy_(whole if model.shard is None else whole[:, list(model.shard.kv_heads)])


def random_caches(model: CausalLM, seed: int = SEED) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each cache that `fill_cache` makes, with the KV heads of all ranks."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, tensor in model.kernel.tensors.items():
        if name.endswith(("k_cache", "v_cache")):
            num_pages, num_heads, *rest = tensor.dims
            if model.shard is not None:
                num_heads = model.config.num_key_value_heads
            whole = torch.empty((num_pages, num_heads, *rest), dtype=tensor.dtype, device=model.device)
            yield name, whole.normal_(0.0, 1.0, generator=generator)


def launch_at(model: CausalLM, context: int, num_tokens: int, progress: bool = False) -> None:
    """One launch that chooses `num_tokens` tokens while the KV length passes `context` half-way."""
    first = max(1, context - num_tokens // 2)
    if first + num_tokens > model.max_seq_len:
        raise ValueError(
            f"{num_tokens} tokens around context={context} exceed max_seq_len={model.max_seq_len}; load with more"
        )
    model.compile()
    model.kernel.step.data.fill_(first - 1)
    request = LaunchRequest(num_known=first, last_step=first + num_tokens - 2, logits_from=0)
    tokens = tqdm(model.kernel.launch(request), "decoding", num_tokens, leave=False, disable=not progress)
    chosen = sum(1 for _ in tokens)
    assert chosen == num_tokens, (chosen, num_tokens)


def decode_at(model: CausalLM, context: int, num_tokens: int) -> float:
    """ms per token of one such launch."""
    launch_at(model, context, num_tokens)
    return model.kernel.runtime.last_launch_ms / num_tokens


def measure(
    model: CausalLM, context: int, num_tokens: int = 32, launches: int = 20, warmup: int = WARMUP
) -> dict[str, float]:
    """p20, p50 and p80 of ms per token over many launches."""
    for _ in range(warmup):
        decode_at(model, context, num_tokens)
    return quantiles([decode_at(model, context, num_tokens) for _ in range(launches)])


def profile_at(model: CausalLM, context: int, num_steps: int, progress: bool = False) -> Profile:
    """The profile of one launch of so many steps, with random keys and values, after others that do not count.

    Raises ValueError for a model without profile=True, or for more steps than are recorded.
    """
    if not 1 <= num_steps <= RECORDED_STEPS:
        raise ValueError(f"num_steps={num_steps}: a profile holds 1 to {RECORDED_STEPS} steps")
    fill_cache(model)
    if model.device.type == "cuda":
        for _ in range(WARMUP):
            launch_at(model, context, num_steps)
    launch_at(model, context, num_steps, progress)
    return model.profile()


def median_ms(model: CausalLM, context: int, num_tokens: int, launches: int) -> float:
    return measure(model, context, num_tokens, launches)["ms_p50"]


def quantiles(times_ms: Sequence[float]) -> dict[str, float]:
    if len(times_ms) == 1:
        times_ms = [*times_ms, *times_ms]
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return {"ms_p20": deciles[1], "ms_p50": deciles[4], "ms_p80": deciles[7]}


def logits_at(model: CausalLM, position: int, token: int) -> Tensor:
    """Logits [V] fp32 of `token` at `position`, in one launch of one step.

    Attends to the cache below `position` as it is, and writes the token's own k and v there.
    """
    if not 0 <= position < model.max_seq_len:
        raise ValueError(
            f"position={position} is not in 0 .. {model.max_seq_len - 1} (max_seq_len={model.max_seq_len})"
        )
    model.compile()
    model.kernel.step.data.fill_(position)
    model.kernel.tokens.data.view(-1)[position] = token
    # the next token counts as known, so that none is chosen and the last position of the model is allowed too
    for _ in model.kernel.launch(LaunchRequest(num_known=position + 2, last_step=position, logits_from=position)):
        raise AssertionError("a launch for logits chose a token")
    logits = model.kernel.runtime.default_logits.clone()
    return logits if model.ranks is None else model.ranks.gather(logits)


def dense_cache(
    model: CausalLM, length: int, caches: dict[str, Tensor] | None = None, sequences: Sequence[int] = (0,)
) -> tuple[Tensor, Tensor]:
    """Copies of the first `length` keys and values: [L, sequences, num_kv_heads, length, head_dim] each.

    `caches`: by name, in place of the model's own. `sequences`: rows of the page table, where there are several.
    """
    tensors = model.kernel.tensors
    table = tensors["page_table"].data
    table = table[None] if table.dim() == 1 else table
    pages = table[list(sequences), : -(-length // model.batching.page_size)].long()
    caches = caches or {name: tensor.data for name, tensor in tensors.items() if name.endswith("_cache")}

    def dense(kind: str) -> Tensor:
        paged = (caches[f"L{i:02d}.{kind}_cache"][pages] for i in range(model.shape.num_layers))
        return torch.stack([p.transpose(1, 2).flatten(2, 3)[:, :, :length] for p in paged])

    return dense("k"), dense("v")


def check_logits(model: CausalLM, hf_model: nn.Module, position: int, token: int = 1) -> dict[str, float]:
    """Our distance to the fp32 reference on the same cache, and that of the bf16 reference.

    Returns: rel_l2, rel_l2_bf16, kl, kl_bf16.
    Raises: AssertionError when ours is farther away than bf16.
    """
    exact, rounded = references(model, hf_model, position, token)
    return compare_logits(logits_at(model, position, token), exact, rounded, position)


def references(
    model: CausalLM, hf_model: nn.Module, position: int, token: int, caches: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [V] of the fp32 and of the bf16 reference on the model's cache, or on `caches`."""
    cache = dense_cache(model, position, caches)
    at = (torch.tensor([token], device=model.device), position)
    return reference_logits(hf_model, *cache, *at)[0], reference_logits(hf_model, *cache, *at, dtype=torch.bfloat16)[0]


def compare_logits(ours: Tensor, exact: Tensor, rounded: Tensor, position: int) -> dict[str, float]:
    """Distances to the fp32 reference: ours and the bf16 reference's. AssertionError if ours is the larger."""
    result = {
        "rel_l2": relative_l2(ours, exact),
        "rel_l2_bf16": relative_l2(rounded, exact),
        "kl": kl_divergence(ours, exact),
        "kl_bf16": kl_divergence(rounded, exact),
    }
    # `not <=`, so that NaN fails too
    if not (result["rel_l2"] <= result["rel_l2_bf16"] and result["kl"] <= result["kl_bf16"]):
        numbers = ", ".join(f"{name} {value:.3e}" for name, value in result.items())
        raise AssertionError(f"logits at position {position} are farther from fp32 than bf16: {numbers}")
    return result


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def kl_divergence(actual: Tensor, expected: Tensor) -> float:
    """KL(expected || actual) of the two softmax distributions, in nats."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


# ---- one geometry ----


@dataclass(slots=True)
class Subject:
    """A geometry with random weights, compiled on a GPU, and the yardsticks of the same run."""

    name: str
    hf_model: nn.Module | None  # the same weights, for the reference
    model: CausalLM
    num_tokens: int
    launches: int
    copy_gbps: float
    compile_cold_s: float
    compile_cached_s: float
    baseline: dict[int, dict[str, Any]]  # by context; empty if not asked for

    def row(self, context: int, times: dict[str, float], errors: dict[str, float] | None = None) -> dict[str, Any]:
        """All about one context: times as `measure` returns them, errors as `check_logits` does. Bytes are per GPU."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        weights = weight_bytes(config, itemsize) // self.model.kernel.world_size
        kv = kv_bytes(self.model, context)
        gbps = (weights + kv) / times["ms_p50"] / 1e6
        baseline = self.baseline.get(context)
        return {
            "context": context,
            **times,
            "tokens_per_s": 1e3 / times["ms_p50"],
            "weight_bytes": weights,
            "kv_bytes": kv,
            "gbps": gbps,
            "copy_gbps": self.copy_gbps,
            "fraction_of_copy": gbps / self.copy_gbps,
            **{f"baseline_{name}": baseline and baseline[name] for name in ("ms_p20", "ms_p50", "ms_p80")},
            "baseline_tried": baseline and baseline["tried"],
            "speedup": baseline and baseline["ms_p50"] / times["ms_p50"],
            **(errors or dict.fromkeys(("rel_l2", "rel_l2_bf16", "kl", "kl_bf16"))),
        }

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The rows with everything that is needed to read or repeat them."""
        return {
            "geometry": self.name,
            **environment(self.model.device, self.model.kernel.world_size),
            "settings": {
                "num_tokens": self.num_tokens,
                "launches": self.launches,
                "warmup": WARMUP,
                "seed": SEED,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "max_seq_len": self.model.max_seq_len,
                "page_size": PAGE_SIZE,
                "num_workers": self.model.kernel.num_workers,
                "tuning": asdict(self.model.kernel.tuning),
            },
            "baseline_version": f"torch.compile {torch.__version__}" if self.baseline else None,
            "copy_gbps": self.copy_gbps,
            "plan_s": self.model.kernel.program.seconds,
            "compile_cold_s": self.compile_cold_s,
            "compile_cached_s": self.compile_cached_s,
            "rows": sorted(rows, key=lambda row: row["context"]),
        }


def kv_bytes(model: CausalLM, context: int) -> int:
    """Bytes of keys and values that a GPU reads for a token that attends to `context` entries."""
    shape = model.shape
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * context * model.dtype.itemsize


def bench_device(device: torch.device | str | None, what: str = "the benchmark measures") -> torch.device:
    """The GPU to measure. Raises DeviceError when there is none."""
    wanted = torch.device("cuda" if device is None else device)
    if wanted.type != "cuda" or not torch.cuda.is_available():
        found = "PyTorch sees no CUDA GPU here" if wanted.type == "cuda" else f"got device={str(wanted)!r}"
        raise DeviceError(f"{what} a CUDA GPU, but {found}; run it on a machine with device='cuda'")
    return resolve_device(wanted)


def prepare(
    geometry_name: str,
    contexts: Sequence[int],
    *,
    num_tokens: int = 32,
    launches: int = 20,
    baseline: bool = True,
    attentions: Sequence[str] = ATTENTIONS,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Subject:
    """Weights, copy bandwidth, the baseline's times, and our kernel, compiled and with a full cache.

    The weights exist once: the baseline packs them in place and goes before our kernel packs them anew.
    """
    config = geometry(geometry_name)
    name = next(known for known in GEOMETRIES if known.lower() == geometry_name.lower())
    check_numbers(contexts, num_tokens, launches)
    device = bench_device(device)
    free_memory()
    dtype = resolve_dtype(None, device, config)
    max_seq_len = -(-(max(contexts) + num_tokens) // PAGE_SIZE) * PAGE_SIZE
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len)

    def say(stage: str) -> None:
        if progress:
            tqdm.write(f"{name}: {stage}", file=sys.stderr)

    copy_gbps = copy_bandwidth_gbps(device)
    say(f"a copy moves {copy_gbps:.0f} GB/s; making random weights")
    hf_model = random_model(config, SEED, dtype, device).requires_grad_(False)
    measured = {}
    if baseline:
        say("the baseline: torch.compile in a CUDA graph")
        measured = {row["context"]: row for row in measure_baseline(hf_model, contexts, attentions=attentions)}
    free_memory()

    # looked up now: below, the caches are empty
    stored = load_tuning(find_profile(device)[0], describe(config, max_seq_len), dtype)
    tuning = None if stored is None else stored.tuning

    def build() -> CausalLM:
        return from_model(hf_model, max_seq_len=max_seq_len, tuning=tuning, progress=progress)

    say("our kernel, with empty caches")
    with empty_caches():
        model = build()
        cold_s = compile_seconds(model)
        del model
        free_memory()
        model = build()
        cached_s = compile_seconds(model)
    free_memory()  # the first kernel's packed weights
    say(f"compiled in {cold_s:.1f} s, again in {cached_s:.1f} s")
    fill_cache(model)
    return Subject(name, hf_model, model, num_tokens, launches, copy_gbps, cold_s, cached_s, measured)


def check_numbers(contexts: Sequence[int], num_tokens: int, launches: int) -> None:
    if not contexts or min(contexts) < 1:
        raise ValueError(f"contexts={list(contexts)} must be one or more KV lengths of at least 1")
    if num_tokens < 1 or launches < 1:
        raise ValueError(f"num_tokens={num_tokens} and launches={launches} must be at least 1")


def run_bench(
    geometry_name: str,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    *,
    num_tokens: int = 32,
    launches: int = 20,
    baseline: bool = True,
    attentions: Sequence[str] = ATTENTIONS,
    check: bool = True,
    account: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decode latency of one geometry at each context, as a report of plain values.

    Args:
        contexts: KV lengths. At 512 and 4096 `check` compares our logits with the fp32 reference.
        num_tokens: tokens per launch; the KV length passes the context half-way.
        baseline: time the torch.compile baseline on the same weights too (takes most of the run).
        attentions: that the baseline tries at each context, a compilation each.
        account: also time each context with one loss after the other taken away (tri_mpk/account.py).

    Raises: DeviceError without a CUDA GPU, ValueError for an unknown geometry, AssertionError when a check fails.
    """
    subject = prepare(
        geometry_name, contexts, num_tokens=num_tokens, launches=launches, baseline=baseline,
        attentions=attentions, device=device, progress=progress,
    )  # fmt: skip
    rows = []
    for context in contexts:
        errors = None
        if check and context in CHECKED_CONTEXTS:
            errors = check_logits(subject.model, subject.hf_model, context - 1)
        rows.append(subject.row(context, measure(subject.model, context, num_tokens, launches), errors))
        if progress:
            tqdm.write(f"{subject.name}: context {context}, {rows[-1]['ms_p50']:.3f} ms per token", file=sys.stderr)
    report = subject.report(rows)
    if account:
        report["account"] = [
            {"context": context, "change": entry.name, "ms_p50": entry.ms}
            for context in contexts
            for entry in account_entries(
                subject.model, partial(median_ms, subject.model, context, num_tokens, launches)
            )
        ]
    del subject
    free_memory()
    return report


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def empty_caches() -> Iterator[None]:
    """Triton's cache and ours in a folder of their own meanwhile."""
    names = ("TRITON_CACHE_DIR", "TRI_MPK_CACHE")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.environ.update({name: f"{folder}/{name.lower()}" for name in names})
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def compile_seconds(model: CausalLM) -> float:
    """Seconds from the graph to the end of the first step: plan, verify, generate, compile, load, run.

    The source is imported anew, so that nothing compiled before in this process is reused; what lies in the caches is.
    """
    start = time.perf_counter()
    source = write_source(model.kernel.plan().source)
    sys.modules.pop(source.stem, None)
    logits_at(model, 0, 0)
    return time.perf_counter() - start


# ---- reports ----


def save_report(report: dict[str, Any], folder: Path) -> Path:
    """One file per geometry, GPU and type that is not float32 of what ranks send each other: a new run replaces the old
    one, git keeps the history.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = report["settings"].get("reduce_dtype", "float32")
    name = f"{report['geometry']}_{report['gpu'].replace(' ', '-')}" + (f"_{parts}-parts" if parts != "float32" else "")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def environment(device: torch.device, num_gpus: int = 1) -> dict[str, Any]:
    """GPU, driver, versions, commit, date and command line."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "gpu": gpu if num_gpus == 1 else f"{num_gpus} x {gpu}",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "tri_mpk": tri_mpk.__version__,
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def git_commit() -> str | None:
    """The commit of this package's checkout, with "-dirty" if files differ; None when it is installed elsewhere."""
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if output_of(*git, "ls-files", here.name) is None:
        return None
    return output_of(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
