"""The strong kernel-per-operator baseline that the megakernel is measured against.

Static KV cache, plain torch functions that `torch.compile(fullgraph=True)` fuses, some layers at a time, and one CUDA
graph replays, for one sequence or for a batch; transformers' own prefill; and the bandwidth of a device
copy, the yardstick of bytes per token.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tri_mpk.reference import (
    LayerWeights,
    check_supported,
    decode_layer,
    layer_weights,
    linear_of,
    model_shape,
    reference_logits,
    rms_norm,
    rotary_tables,
)

__all__ = [
    "ATTENTIONS",
    "BATCH_ATTENTIONS",
    "StaticCacheDecoder",
    "bucket",
    "copy_bandwidth_gbps",
    "measure_baseline",
    "measure_batches",
    "prefill_ms",
    "reference_logits",
]

ATTENTIONS = ("sdpa", "split")
BATCH_ATTENTIONS = ("split", "rows")  # "sdpa" may expand k and v to all heads, which a batch makes dearer
MAX_LAYERS_PER_GRAPH = 16
SPLIT_TOKENS = 256  # KV entries per part of the "split" attention


class StaticCacheDecoder:
    """Decodes a token of each sequence at a time with the weights of a Hugging Face causal LM, where they lie.

    With `pack`, q, k, v and gate, up become one tensor each, and the model's own parameters become
    views of it: no weight exists twice, and the model stays usable.
    k_cache, v_cache: [L, B, num_kv_heads, max_seq_len, head_dim], the dtype of the model.
    """

    reduce: Callable[[Tensor], Tensor] | None = None  # see `decode_layer`

    def __init__(
        self,
        hf_model: PreTrainedModel,
        max_seq_len: int,
        pack: bool = True,
        attention: str = "sdpa",
        batch_size: int = 1,
    ) -> None:
        check_supported(hf_model, max_seq_len)
        if attention not in _ATTEND:
            raise ValueError(f"attention={attention!r} is not known; choose one of {tuple(_ATTEND)}")
        self.hf_model = hf_model
        self.attention = attention
        self.shape = model_shape(hf_model)
        self.embedding = hf_model.model.embed_tokens.weight.detach()
        self.norm = hf_model.model.norm.weight.detach()
        self.lm_head = linear_of(hf_model.lm_head)
        self.layers = [layer_weights(layer, pack) for layer in hf_model.model.layers]
        self.allocate_cache(max_seq_len, batch_size)

    def allocate_cache(self, max_seq_len: int, batch_size: int = 1) -> None:
        """A cache of zeros, and rotary tables [max_seq_len, head_dim] of the model's own module."""
        check_supported(self.hf_model, max_seq_len)
        device = self.embedding.device
        size = (len(self.layers), batch_size, self.shape.num_kv_heads, max_seq_len, self.shape.head_dim)
        self.k_cache = torch.zeros(size, dtype=self.embedding.dtype, device=device)
        self.v_cache = torch.zeros_like(self.k_cache)
        self._k_layers, self._v_layers = _unaliased(self.k_cache), _unaliased(self.v_cache)
        self.positions = torch.arange(max_seq_len, device=device)
        self.cos, self.sin = rotary_tables(self.hf_model, self.positions, self.embedding.dtype)

    def begin(self, token: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """What all layers need: x [B, D], cos, sin [B, 1, 1, head_dim], mask [B, max_seq_len]."""
        mask = self.positions <= position[:, None]
        return self.embed(token), self.cos[position][:, None, None], self.sin[position][:, None, None], mask

    def embed(self, token: Tensor) -> Tensor:
        return F.embedding(token, self.embedding)

    def run_layers(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        position: Tensor,
        layers: Sequence[LayerWeights],
        k_layers: Sequence[Tensor],
        v_layers: Sequence[Tensor],
    ) -> Tensor:
        """x behind these layers, whose caches get its k and v. All are arguments, so that one graph does for many."""

        def attend(idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store(k_layers[idx], position, k)
            store(v_layers[idx], position, v)
            return _ATTEND[self.attention](q, k_layers[idx], v_layers[idx], mask)

        for idx, layer in enumerate(layers):
            x = decode_layer(x, idx, layer, self.shape, cos, sin, attend, self.reduce)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(rms_norm(x, self.norm, self.shape.eps), *self.lm_head)

    def choose(self, x: Tensor) -> Tensor:
        return self.logits(x).argmax(-1)

    def _run(self, begin: Callable, run_layers: Callable, end: Callable, token: Tensor, position: Tensor) -> Tensor:
        x, cos, sin, mask = begin(token, position)
        many = layers_per_graph(len(self.layers))
        for first in range(0, len(self.layers), many):
            some = slice(first, first + many)
            of_layers = self.layers[some], self._k_layers[some], self._v_layers[some]
            x = run_layers(x, cos, sin, mask, position, *of_layers)
        return end(x)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """token [B] int64 at position [B] int64 -> logits [B, vocab] fp32; stores its k and v."""
        return self._run(self.begin, self.run_layers, self.logits, token, position).float()

    def next_token(self, token: Tensor, position: Tensor) -> Tensor:
        """The greedy next token, [B] int64."""
        return self._run(self.begin, self.run_layers, self.choose, token, position)

    def compiled(self, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """`next_token` by torch.compile with these options, some layers at a time."""
        compile_part = partial(torch.compile, fullgraph=True, dynamic=False, **options)
        return partial(self._run, *map(compile_part, (self.begin, self.run_layers, self.choose)))


def layers_per_graph(num_layers: int) -> int:
    """How many layers are compiled together: one graph of all would save a launch for each of these, in minutes."""
    return max(many for many in range(1, MAX_LAYERS_PER_GRAPH + 1) if num_layers % many == 0)


def store(cache: Tensor, position: Tensor, new: Tensor) -> None:
    """cache [B, KV, S, dh] at position [B] = new [B, KV, 1, dh]."""
    if len(position) == 1:
        cache.index_copy_(2, position, new)
    else:
        cache[torch.arange(len(position), device=cache.device), :, position] = new[:, :, 0]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, 1, dh], k and v [B, KV, S, dh], mask [B, S] bool -> [B, H, 1, dh]."""
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)


def attention_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with the heads of a group as rows of one query, so that k and v are used as they are."""
    batch, heads, _, dh = q.shape
    kv_heads = k.shape[1]
    rows = q.view(batch, kv_heads, heads // kv_heads, dh)
    return F.scaled_dot_product_attention(rows, k, v, mask[:, None, None]).reshape(batch, heads, 1, dh)


def attention_split(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with the KV length cut into parts, so that few KV heads still fill a GPU."""
    batch, heads, _, dh = q.shape
    _, kv_heads, seq_len, _ = k.shape
    parts = seq_len // SPLIT_TOKENS if seq_len % SPLIT_TOKENS == 0 else 1
    group, pairs = heads // kv_heads, batch * kv_heads
    q = q.view(pairs, 1, group, dh).expand(pairs, parts, group, dh)
    k, v = k.view(pairs, parts, -1, dh), v.view(pairs, parts, -1, dh)
    mask = mask.view(batch, 1, parts, 1, -1).expand(batch, kv_heads, parts, 1, -1).reshape(pairs, parts, 1, -1)

    scores = (q @ k.transpose(2, 3)).float() * dh**-0.5  # [B * KV, parts, group, S / parts]
    scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores - scores.amax((1, 3), keepdim=True)
    probs = scores.exp()
    probs = probs / probs.sum((1, 3), keepdim=True)
    out = (probs.to(v.dtype) @ v).float().sum(1)  # [B * KV, group, dh]
    return out.to(v.dtype).view(batch, heads, 1, dh)


_ATTEND = {"sdpa": attention_sdpa, "split": attention_split, "rows": attention_rows}


def _unaliased(cache: Tensor) -> list[Tensor]:
    """The layers of a cache, each a storage of its own over the same memory.

    torch.compile makes writes functional. Into views of one tensor it then copies the whole cache,
    once per layer and again at the end; tensors that look independent are updated in place.
    """
    return [torch.from_dlpack(layer) for layer in cache]


def measure_baseline(
    hf_model: PreTrainedModel,
    contexts: Sequence[int],
    max_seq_len: int | None = None,
    mode: str = "compile",
    autotune: bool = False,
    attentions: Sequence[str] = ATTENTIONS,
    pack: bool = True,
    samples: int = 50,
    replays: int = 10,
) -> list[dict[str, Any]]:
    """Milliseconds per decoded token at each context, the fastest of several baselines.

    A context of n decodes the token at position n - 1: it attends to n entries, itself included, of
    a cache filled with random normal values. A masked static cache costs its whole length at every
    context, so each context gets a cache of the next power of two (at most `max_seq_len`) and a
    graph of its own: the strongest form of this baseline. `mode` "compile" runs torch.compile,
    "eager" the plain operators, both inside one CUDA graph that feeds each token to the next step.
    Every attention of `attentions` is tried, with `autotune` also inductor's max-autotune (takes
    minutes). The row of the fastest is returned; its `tried` has the medians in ms of all. Weights
    larger than the L2 cache need no flush between replays. On a CPU the calls themselves are timed.
    """
    if mode not in ("compile", "eager"):
        raise ValueError(f"mode={mode!r} is not known; choose 'compile' or 'eager'")
    decoder = StaticCacheDecoder(hf_model, max_seq_len=1, pack=pack)
    return measure_decoder(decoder, contexts, max_seq_len, mode, autotune, attentions, samples, replays)


def measure_decoder(
    decoder: StaticCacheDecoder,
    contexts: Sequence[int],
    max_seq_len: int | None = None,
    mode: str = "compile",
    autotune: bool = False,
    attentions: Sequence[str] = ATTENTIONS,
    samples: int = 50,
    replays: int = 10,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """`measure_baseline` of a decoder that is there. All sequences of a batch have the same context."""
    inductor_modes: tuple[str | None, ...] = (None,)
    if mode == "compile":
        inductor_modes = ("default", "max-autotune-no-cudagraphs") if autotune else ("default",)
    rows = []
    for context in contexts:
        cache_len = bucket(context, max_seq_len)
        decoder.allocate_cache(cache_len, batch_size)
        decoder.k_cache.normal_()
        decoder.v_cache.normal_()
        tried = []
        for inductor_mode, attention in itertools.product(inductor_modes, attentions):
            decoder.attention = attention
            times_ms, compile_s = _time_decoder(decoder, context, inductor_mode, samples, replays)
            p20, p50, p80 = (statistics.quantiles(times_ms, n=10)[i] for i in (1, 4, 7))
            tried.append(
                {
                    "context": context,
                    "cache_len": cache_len,
                    "mode": mode,
                    "inductor_mode": inductor_mode,
                    "attention": attention,
                    "ms_p20": p20,
                    "ms_p50": p50,
                    "ms_p80": p80,
                    "compile_s": compile_s,
                }
            )
        best = min(tried, key=lambda row: row["ms_p50"])
        medians = {f"{r['inductor_mode'] or mode}/{r['attention']}": r["ms_p50"] for r in tried}
        rows.append({**best, "tried": medians})
    return rows


def measure_batches(
    hf_model: PreTrainedModel,
    batch_sizes: Sequence[int],
    context: int,
    mode: str = "compile",
    attentions: Sequence[str] = BATCH_ATTENTIONS,
    samples: int = 30,
    replays: int = 5,
) -> Iterator[dict[str, Any]]:
    """Milliseconds per step of each batch size, a row as `measure_baseline` returns it, with `batch`.

    For one sequence `ATTENTIONS` are tried instead, unless only one is wanted.
    """
    decoder = StaticCacheDecoder(hf_model, max_seq_len=1)
    try:
        for batch_size in batch_sizes:
            tried = ATTENTIONS if batch_size == 1 and len(attentions) > 1 else attentions
            (row,) = measure_decoder(
                decoder, (context,), mode=mode, attentions=tried, samples=samples, replays=replays,
                batch_size=batch_size,
            )  # fmt: skip
            yield {"batch": batch_size, **row}
    finally:
        torch.compiler.reset()  # what was compiled holds on to the cache


@torch.no_grad()
def prefill_ms(hf_model: PreTrainedModel, length: int, repeats: int = 10) -> list[float]:
    """Samples of the time to first token of a prompt: transformers' forward with a new KV cache, and the best token.

    Attention is "sdpa", which runs FlashAttention on a GPU. By the host's clock: the token has arrived there.
    """
    before = hf_model.config._attn_implementation
    hf_model.set_attn_implementation("sdpa")
    device = hf_model.device
    prompt = torch.randint(hf_model.config.vocab_size, (1, length), device=device)
    times_ms = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        cache = DynamicCache(config=hf_model.config)
        logits = hf_model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        times_ms.append((time.perf_counter() - start) * 1e3)
    hf_model.set_attn_implementation(before)
    return times_ms[3:]


def bucket(context: int, max_seq_len: int | None = None) -> int:
    """The cache length for a context: the next power of two, at most `max_seq_len`. 512 -> 512."""
    if context < 1 or (max_seq_len is not None and context > max_seq_len):
        raise ValueError(f"context={context} is not in 1 .. max_seq_len={max_seq_len}")
    power = 1 << (context - 1).bit_length()
    return power if max_seq_len is None else min(power, max_seq_len)


def copy_bandwidth_gbps(device: torch.device | str, buffer_bytes: int = 4 << 30, repeats: int = 9) -> float:
    """Device-to-device copy bandwidth in GB/s: bytes read plus bytes written, median."""
    source = torch.ones(buffer_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_ms = _sample_ms(lambda: target.copy_(source), source.device, repeats, replays=1)
    return 2 * buffer_bytes / statistics.median(times_ms) / 1e6


@torch.no_grad()
def _time_decoder(
    decoder: StaticCacheDecoder,
    context: int,
    inductor_mode: str | None,
    samples: int,
    replays: int,
) -> tuple[list[float], float]:
    """Samples in ms per token, and the seconds that compiling took."""
    device = decoder.embedding.device
    token = torch.zeros(decoder.k_cache.shape[1], dtype=torch.int64, device=device)
    position = torch.full_like(token, context - 1)
    next_token: Callable[[Tensor, Tensor], Tensor] = decoder.next_token
    start = time.perf_counter()
    if inductor_mode is not None:
        torch.compiler.reset()  # each bucket is compiled for its own static shapes
        next_token = decoder.compiled(mode=inductor_mode)
        next_token(token, position)
    compile_s = time.perf_counter() - start

    def decode() -> None:
        token.copy_(next_token(token, position))

    run = _capture(decode) if device.type == "cuda" else decode
    return _sample_ms(run, device, samples, replays), compile_s


def _capture(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as a CUDA graph, warmed up on a side stream as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _sample_ms(call: Callable[[], object], device: torch.device, samples: int, replays: int) -> list[float]:
    """`samples` times in ms per call, each the mean of `replays` calls in a row."""
    for _ in range(replays):
        call()
    if device.type != "cuda":
        times_ms = []
        for _ in range(samples):
            start = time.perf_counter()
            for _ in range(replays):
                call()
            times_ms.append((time.perf_counter() - start) * 1e3 / replays)
        return times_ms
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(replays):
                call()
            event.record()
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / replays for a, b in itertools.pairwise(events)]
