"""A decoder layer in plain torch, and the logits that everything else is compared with.

Run eagerly, every operation rounds where transformers' own rounds: on the same cache,
`reference_logits` in bf16 has the noise of transformers' bf16 run with its "sdpa" attention.
In fp32 it is the definition of correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Linear = tuple[Tensor, Tensor | None]  # weight [N, K], bias [N]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> output


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


@torch.no_grad()
def reference_logits(
    hf_model: PreTrainedModel,
    k_cache: Tensor,
    v_cache: Tensor,
    token: Tensor,
    position: Tensor | int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [B, vocab] fp32 of tokens [B], all at `position`, computed eagerly in `dtype`.

    Reads k_cache, v_cache [L, B, num_kv_heads, S, head_dim] below `position` and leaves them
    unchanged. Weights are cast layer by layer, so an 8B model needs no second copy of itself.
    """
    seq_len = int(position)
    check_supported(hf_model, seq_len + 1)
    shape = model_shape(hf_model)
    at = torch.tensor([seq_len], device=token.device)
    cos, sin = rotary_tables(hf_model, at, dtype)

    def attend(idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat((k_cache[idx, :, :, :seq_len].to(dtype), k), 2)
        v = torch.cat((v_cache[idx, :, :, :seq_len].to(dtype), v), 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with _exact_fp32():
        x = F.embedding(token, hf_model.model.embed_tokens.weight).to(dtype)
        for idx, module in enumerate(hf_model.model.layers):
            layer = _cast(layer_weights(module, pack=False), dtype)
            x = decode_layer(x, idx, layer, shape, cos, sin, attend)
        x = rms_norm(x, hf_model.model.norm.weight.to(dtype), shape.eps)
        return F.linear(x, *_cast(linear_of(hf_model.lm_head), dtype)).float()


def decode_layer(
    x: Tensor,
    idx: int,
    layer: LayerWeights,
    shape: Shape,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One layer for one token of each sequence: x [B, D] -> [B, D]. `attend` returns [B, H, 1, head_dim].

    cos, sin: [1, head_dim] for all of them, or [B, 1, 1, head_dim].
    `reduce`: adds up what several ranks have, each for its part of the heads and of the intermediate size.
    """
    reduce = reduce or (lambda part: part)
    heads, kv_heads, dh, ff, eps = shape
    batch = len(x)
    y = rms_norm(x, layer.attention_norm, eps)
    q, k, v = project(y, layer.qkv, (heads * dh, kv_heads * dh, kv_heads * dh))
    q, k, v = q.view(batch, heads, 1, dh), k.view(batch, kv_heads, 1, dh), v.view(batch, kv_heads, 1, dh)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
    out = attend(idx, rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + reduce(F.linear(out.reshape(batch, heads * dh), *layer.o))

    gate, up = project(rms_norm(x, layer.mlp_norm, eps), layer.gate_up, (ff, ff))
    return x + reduce(F.linear(F.silu(gate) * up, *layer.down))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_hat = x.float()
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., head_dim] by cos, sin, which broadcast."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def project(x: Tensor, linears: tuple[Linear, ...], sizes: tuple[int, ...]) -> Sequence[Tensor]:
    """x [B, K] through packed or separate linears: one [B, N] per entry of `sizes`."""
    if len(linears) == 1:
        return F.linear(x, *linears[0]).split(sizes, -1)
    return [F.linear(x, weight, bias) for weight, bias in linears]


def check_supported(hf_model: PreTrainedModel, max_seq_len: int) -> None:
    """Refuse by name what `decode_layer` does not compute."""
    config = hf_model.config
    if config.model_type not in FAMILIES:
        raise NotImplementedError(f"model_type={config.model_type!r} is not one of {FAMILIES}")
    if config.hidden_act != "silu":
        raise NotImplementedError(f"hidden_act={config.hidden_act!r} is not 'silu'")
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        raise NotImplementedError(f"rope_parameters={config.rope_parameters}: position-dependent")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_seq_len:
        raise NotImplementedError(f"sliding_window={window} is shorter than {max_seq_len} tokens")


def model_shape(hf_model: PreTrainedModel) -> Shape:
    config = hf_model.config
    return Shape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=hf_model.model.layers[0].self_attn.head_dim,
        intermediate_size=config.intermediate_size,
        eps=config.rms_norm_eps,
    )


def linear_of(module: nn.Linear) -> Linear:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def linears_of(modules: Sequence[nn.Linear], pack: bool) -> tuple[Linear, ...]:
    if not pack:
        return tuple(linear_of(module) for module in modules)
    return ((_pack([m.weight for m in modules]), _pack([m.bias for m in modules])),)


def layer_weights(layer: nn.Module, pack: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=linears_of((attention.q_proj, attention.k_proj, attention.v_proj), pack),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        o=linear_of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=linears_of((mlp.gate_proj, mlp.up_proj), pack),
        down=linear_of(mlp.down_proj),
    )


def _pack(parameters: Sequence[nn.Parameter | None]) -> Tensor | None:
    """One tensor of all rows; the parameters become views of it. None if there are none."""
    if parameters[0] is None:
        return None
    packed = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, packed.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return packed


def _cast(weights: Any, dtype: torch.dtype) -> Any:
    """A tuple of tensors, however nested, in another dtype."""
    if weights is None or isinstance(weights, Tensor):
        return None if weights is None else weights.to(dtype)
    cast = [_cast(part, dtype) for part in weights]
    return type(weights)(*cast) if isinstance(weights, LayerWeights) else tuple(cast)


def rotary_tables(hf_model: PreTrainedModel, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
