"""What the megakernel is measured against, and what its logits are compared with.

`StaticCacheDecoder` is the strong kernel-per-operator decoder: batch 1, static KV cache, plain
torch functions that `torch.compile(fullgraph=True)` fuses and one CUDA graph replays.
`reference_logits` runs the same layers eagerly, in fp32 (the definition of correct) or in bf16 (the
noise of transformers). Run eagerly, every operation rounds where transformers' own rounds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTIONS = ("sdpa", "split")
SPLIT_TOKENS = 256  # KV entries per part of the "split" attention

Linear = tuple[Tensor, Tensor | None]  # weight [N, K], bias [N]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class LayerWeights(NamedTuple):
    """One layer. `qkv` and `gate_up` hold one packed linear, or three and two separate ones."""

    attention_norm: Tensor
    qkv: tuple[Linear, ...]
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: tuple[Linear, ...]
    down: Linear


class Shape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_hat = x.float()
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., head_dim] by cos, sin [1, head_dim]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def project(x: Tensor, linears: tuple[Linear, ...], sizes: tuple[int, ...]) -> Sequence[Tensor]:
    """x [1, K] through packed or separate linears: one [1, N] per entry of `sizes`."""
    if len(linears) == 1:
        return F.linear(x, *linears[0]).split(sizes, -1)
    return [F.linear(x, weight, bias) for weight, bias in linears]


def decode_layer(
    x: Tensor, idx: int, layer: LayerWeights, shape: Shape, cos: Tensor, sin: Tensor, attend: Attend
) -> Tensor:
    """One layer for one token: x [1, D] -> [1, D]. `attend` returns [1, H, 1, head_dim]."""
    heads, kv_heads, dh, ff, eps = shape
    y = rms_norm(x, layer.attention_norm, eps)
    q, k, v = project(y, layer.qkv, (heads * dh, kv_heads * dh, kv_heads * dh))
    q, k, v = q.view(1, heads, 1, dh), k.view(1, kv_heads, 1, dh), v.view(1, kv_heads, 1, dh)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
    out = attend(idx, rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + F.linear(out.reshape(1, heads * dh), *layer.o)

    gate, up = project(rms_norm(x, layer.mlp_norm, eps), layer.gate_up, (ff, ff))
    return x + F.linear(F.silu(gate) * up, *layer.down)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [1, H, 1, dh], k and v [1, KV, S, dh], mask [S] bool -> [1, H, 1, dh]."""
    return F.scaled_dot_product_attention(q, k, v, mask[None, None, None], enable_gqa=True)


def attention_split(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with the KV length cut into parts, so that few KV heads still fill a GPU."""
    _, heads, _, dh = q.shape
    _, kv_heads, seq_len, _ = k.shape
    parts = seq_len // SPLIT_TOKENS if seq_len % SPLIT_TOKENS == 0 else 1
    group = heads // kv_heads
    q = q.view(kv_heads, 1, group, dh).expand(kv_heads, parts, group, dh)
    k, v = k.view(kv_heads, parts, -1, dh), v.view(kv_heads, parts, -1, dh)

    scores = (q @ k.transpose(2, 3)).float() * dh**-0.5  # [KV, parts, group, S / parts]
    scores = scores.masked_fill(~mask.view(1, parts, 1, -1), float("-inf"))
    scores = scores - scores.amax((1, 3), keepdim=True)
    weights = scores.exp()
    weights = weights / weights.sum((1, 3), keepdim=True)
    out = (weights.to(v.dtype) @ v).float().sum(1)  # [KV, group, dh]
    return out.to(v.dtype).view(1, heads, 1, dh)


class StaticCacheDecoder:
    """Decodes one token at a time with the weights of a Hugging Face causal LM, where they lie.

    With `pack`, q, k, v and gate, up become one tensor each, and the model's own parameters become
    views of it: no weight exists twice, and the model stays usable.
    k_cache, v_cache: [L, 1, num_kv_heads, max_seq_len, head_dim], the dtype of the model.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        max_seq_len: int,
        pack: bool = True,
        attention: str = "sdpa",
    ) -> None:
        _check_supported(hf_model, max_seq_len)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is not known; choose one of {ATTENTIONS}")
        self.hf_model = hf_model
        self.attention = attention
        self.shape = _shape(hf_model)
        self.embedding = hf_model.model.embed_tokens.weight.detach()
        self.norm = hf_model.model.norm.weight.detach()
        self.lm_head = _linear(hf_model.lm_head)
        self.layers = [_layer_weights(layer, pack) for layer in hf_model.model.layers]
        self.allocate_cache(max_seq_len)

    def allocate_cache(self, max_seq_len: int) -> None:
        """A cache of zeros, and rotary tables [max_seq_len, head_dim] of the model's own module."""
        _check_supported(self.hf_model, max_seq_len)
        device = self.embedding.device
        size = (len(self.layers), 1, self.shape.num_kv_heads, max_seq_len, self.shape.head_dim)
        self.k_cache = torch.zeros(size, dtype=self.embedding.dtype, device=device)
        self.v_cache = torch.zeros_like(self.k_cache)
        self._k_layers, self._v_layers = _unaliased(self.k_cache), _unaliased(self.v_cache)
        self.positions = torch.arange(max_seq_len, device=device)
        self.cos, self.sin = _rotary(self.hf_model, self.positions, self.embedding.dtype)

    def _logits(self, token: Tensor, position: Tensor) -> Tensor:
        attention = attention_sdpa if self.attention == "sdpa" else attention_split
        mask = self.positions <= position

        def attend(idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._k_layers[idx].index_copy_(2, position, k)
            self._v_layers[idx].index_copy_(2, position, v)
            return attention(q, self._k_layers[idx], self._v_layers[idx], mask)

        x = F.embedding(token, self.embedding)
        cos, sin = self.cos[position], self.sin[position]
        for idx, layer in enumerate(self.layers):
            x = decode_layer(x, idx, layer, self.shape, cos, sin, attend)
        return F.linear(rms_norm(x, self.norm, self.shape.eps), *self.lm_head)

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """token [1] int64 at position [1] int64 -> logits [1, vocab] fp32; stores its k and v."""
        return self._logits(token, position).float()

    def next_token(self, token: Tensor, position: Tensor) -> Tensor:
        """The greedy next token, [1] int64."""
        return self._logits(token, position).argmax(-1)


@torch.no_grad()
def reference_logits(
    hf_model: PreTrainedModel,
    k_cache: Tensor,
    v_cache: Tensor,
    token: Tensor,
    position: Tensor | int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [1, vocab] fp32 of token [1] at `position`, computed eagerly in `dtype`.

    Reads k_cache, v_cache [L, 1, num_kv_heads, S, head_dim] below `position` and leaves them
    unchanged. Weights are cast layer by layer, so an 8B model needs no second copy of itself.
    """
    seq_len = int(position)
    _check_supported(hf_model, seq_len + 1)
    shape = _shape(hf_model)
    at = torch.tensor([seq_len], device=token.device)
    cos, sin = _rotary(hf_model, at, dtype)

    def attend(idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat((k_cache[idx, :, :, :seq_len].to(dtype), k), 2)
        v = torch.cat((v_cache[idx, :, :, :seq_len].to(dtype), v), 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with _exact_fp32():
        x = F.embedding(token, hf_model.model.embed_tokens.weight).to(dtype)
        for idx, module in enumerate(hf_model.model.layers):
            layer = _cast(_layer_weights(module, pack=False), dtype)
            x = decode_layer(x, idx, layer, shape, cos, sin, attend)
        x = rms_norm(x, hf_model.model.norm.weight.to(dtype), shape.eps)
        return F.linear(x, *_cast(_linear(hf_model.lm_head), dtype)).float()


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
    inductor_modes: tuple[str | None, ...] = (None,)
    if mode == "compile":
        inductor_modes = ("default", "max-autotune-no-cudagraphs") if autotune else ("default",)
    rows = []
    for context in contexts:
        cache_len = bucket(context, max_seq_len)
        decoder.allocate_cache(cache_len)
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


def bucket(context: int, max_seq_len: int | None = None) -> int:
    """The cache length for a context: the next power of two, at most `max_seq_len`. 512 -> 512."""
    if context < 1 or (max_seq_len is not None and context > max_seq_len):
        raise ValueError(f"context={context} is not in 1 .. max_seq_len={max_seq_len}")
    power = 1 << (context - 1).bit_length()
    return power if max_seq_len is None else min(power, max_seq_len)


def copy_bandwidth_gbps(
    device: torch.device | str, buffer_bytes: int = 4 << 30, repeats: int = 9
) -> float:
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
    token = torch.zeros(1, dtype=torch.int64, device=device)
    position = torch.full_like(token, context - 1)
    next_token: Callable[[Tensor, Tensor], Tensor] = decoder.next_token
    start = time.perf_counter()
    if inductor_mode is not None:
        torch.compiler.reset()  # each bucket is compiled for its own static shapes
        next_token = torch.compile(
            decoder.next_token, mode=inductor_mode, fullgraph=True, dynamic=False
        )
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


def _sample_ms(
    call: Callable[[], object], device: torch.device, samples: int, replays: int
) -> list[float]:
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


def _check_supported(hf_model: PreTrainedModel, max_seq_len: int) -> None:
    """Refuse by name what `decode_layer` does not compute."""
    config = hf_model.config
    if config.model_type not in FAMILIES:
        raise NotImplementedError(f"model_type={config.model_type!r}; the baseline has {FAMILIES}")
    if config.hidden_act != "silu":
        raise NotImplementedError(f"hidden_act={config.hidden_act!r}; the baseline has 'silu'")
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        raise NotImplementedError(f"rope_parameters={config.rope_parameters}: tables are static")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_seq_len:
        raise NotImplementedError(f"sliding_window={window} is shorter than {max_seq_len} tokens")


def _shape(hf_model: PreTrainedModel) -> Shape:
    config = hf_model.config
    return Shape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=hf_model.model.layers[0].self_attn.head_dim,
        intermediate_size=config.intermediate_size,
        eps=config.rms_norm_eps,
    )


def _linear(module: nn.Linear) -> Linear:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _linears(modules: Sequence[nn.Linear], pack: bool) -> tuple[Linear, ...]:
    if not pack:
        return tuple(_linear(module) for module in modules)
    return ((_pack([m.weight for m in modules]), _pack([m.bias for m in modules])),)


def _layer_weights(layer: nn.Module, pack: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_linears((attention.q_proj, attention.k_proj, attention.v_proj), pack),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        o=_linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_linears((mlp.gate_proj, mlp.up_proj), pack),
        down=_linear(mlp.down_proj),
    )


def _pack(parameters: Sequence[nn.Parameter | None]) -> Tensor | None:
    """One tensor of all rows; the parameters become views of it. None if there are none."""
    if parameters[0] is None:
        return None
    packed = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, packed.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return packed


def _unaliased(cache: Tensor) -> list[Tensor]:
    """The layers of a cache, each a storage of its own over the same memory.

    torch.compile makes writes functional. Into views of one tensor it then copies the whole cache,
    once per layer and again at the end; tensors that look independent are updated in place.
    """
    return [torch.from_dlpack(layer) for layer in cache]


def _cast(weights: Any, dtype: torch.dtype) -> Any:
    """A tuple of tensors, however nested, in another dtype."""
    if weights is None or isinstance(weights, Tensor):
        return None if weights is None else weights.to(dtype)
    cast = [_cast(part, dtype) for part in weights]
    return type(weights)(*cast) if isinstance(weights, LayerWeights) else tuple(cast)


def _rotary(
    hf_model: PreTrainedModel, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos, sin [len(positions), head_dim], rounded to `dtype` as in the model's forward."""
    like = torch.empty(0, dtype=dtype, device=positions.device)
    cos, sin = hf_model.model.rotary_emb(like, positions[None])
    return cos[0], sin[0]


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """fp32 products in fp32, also where the caller has allowed TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
