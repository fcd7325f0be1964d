"""A pre-norm decoder with gated MLP, the shape that all families here share, built through the public graph API."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from tri_mpk.errors import UnsupportedModelError
from tri_mpk.ops.op import TensorHandle
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.sharding import Shard

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What `build` needs to know beyond the weights."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    vocab_size: int
    qk_norm: bool = False


def describe_decoder(config: PreTrainedConfig, max_seq_len: int, qk_norm: bool = False) -> DecoderShape:
    """The common part of all families, with the refusals that they share."""
    name = config.model_type
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"{name}: hidden_act={config.hidden_act!r} is not supported; only 'silu' is")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{name}: rope_type={rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{name}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope_type == "dynamic" and max_seq_len > original:
        raise UnsupportedModelError(
            f"{name}: max_seq_len={max_seq_len} with rope_type='dynamic' is supported up to {original}; choose less"
        )
    if max_seq_len > config.max_position_embeddings:
        raise ValueError(
            f"max_seq_len={max_seq_len} exceeds the model's {config.max_position_embeddings} positions; choose less"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not 32 <= head_dim <= 256 or head_dim % 2:
        raise UnsupportedModelError(f"{name}: head_dim={head_dim} is not supported; even sizes from 32 to 256 are")
    return DecoderShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        config.rms_norm_eps,
        config.vocab_size,
        qk_norm,
    )


def refuse_sliding_window(config: PreTrainedConfig, max_seq_len: int, window: int | None) -> None:
    """A window that no sequence exceeds is full attention."""
    if window is not None and max_seq_len > window:
        raise UnsupportedModelError(
            f"{config.model_type}: sliding_window={window} is not supported beyond its length;"
            f" choose max_seq_len <= {window} (got {max_seq_len})"
        )


def rotary_tables(model: nn.Module, max_seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_seq_len, head_dim] fp32 from transformers' own rotary module."""
    rotary = type(model.model.rotary_emb)(config=model.config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(max_seq_len)[None])
    return cos[0].contiguous(), sin[0].contiguous()


def pack_rows(layers: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight (and bias) for several linear layers of one input; the layers become views of it, so nothing is held
    twice."""
    packed = []
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if any(p is None for p in parameters):
            packed.append(None)
            continue
        whole = torch.cat([p.data for p in parameters])
        for parameter, view in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
            parameter.data = view
        packed.append(whole)
    return packed[0], packed[1]


def build(
    mpk: PersistentKernel,
    shape: DecoderShape,
    model: nn.Module,
    page_size: int,
    progress: bool,
    shard: Shard | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Adds the whole decode step of `model` (a transformers causal LM) to the graph.

    On several ranks `model` is this rank's part, the `shard`. Vectors of the hidden size
    then are a residual, the same on all ranks, and the parts that ranks have added to it since, in `reduce_dtype`.
    """
    dtype = model.model.embed_tokens.weight.dtype
    device = mpk.device
    num_pages = -(-mpk.max_seq_len // page_size)
    cos, sin = (mpk.attach_input(t.to(device), name=n) for t, n in zip(
        rotary_tables(model, mpk.max_seq_len), ("cos", "sin"), strict=True
    ))  # fmt: skip
    page_table = mpk.attach_input(torch.arange(num_pages, dtype=torch.int32, device=device), name="page_table")
    q_size = shape.num_q_heads * shape.head_dim
    qkv_size = q_size + 2 * shape.num_kv_heads * shape.head_dim

    def attach_optional(tensor: torch.Tensor | None, name: str):
        return None if tensor is None else mpk.attach_input(tensor, name=name)

    several = shard is not None
    first_row, vocab_size = (shard.first_row, shard.config.vocab_size) if several else (0, shape.vocab_size)

    def new_parts(name: str) -> TensorHandle | None:
        """What each rank adds to the residual."""
        if several:
            return mpk.new_tensor((mpk.world_size, shape.hidden_size), reduce_dtype, name, symmetric=True)
        return None

    embedding = mpk.attach_input(model.model.embed_tokens.weight, name="embed_tokens")
    x = mpk.new_tensor((shape.hidden_size,), torch.float32, name="x")
    parts_x, parts_attention = new_parts("parts_x"), new_parts("parts_attention")
    mpk.embed_layer(
        input=mpk.tokens, weight=embedding, output=parts_x if several else x, first_row=first_row, label="embed"
    )
    residual = x
    if several:
        residual = mpk.attach_input(torch.zeros(shape.hidden_size, device=device), name="zeros")
        asked = mpk.new_tensor((mpk.world_size, 1), torch.int32, name="asked", symmetric=True)
        mpk.stop_request_layer(output=asked, label="stop_request")
    # One of each for all layers: rewritten every few microseconds, they stay in the L2 cache and on one page of memory.
    qkv = mpk.new_tensor((qkv_size,), dtype, name="qkv")
    parts = mpk.new_attention_parts(shape.num_q_heads, shape.num_kv_heads, shape.head_dim, dtype, name="attention")
    x_attention = mpk.new_tensor((shape.hidden_size,), torch.float32, name="x_attention")
    hidden = mpk.new_tensor((model.config.intermediate_size,), dtype, name="hidden")
    for i, layer in enumerate(tqdm(model.model.layers, "packing", disable=not progress, leave=False)):
        at, name = layer.self_attn, f"L{i:02d}"
        weight, bias = pack_rows([at.q_proj, at.k_proj, at.v_proj])
        mpk.rmsnorm_linear_layer(
            input=residual,
            parts=parts_x,
            total=x if several else None,
            weight_norm=mpk.attach_input(layer.input_layernorm.weight, name=f"{name}.input_norm"),
            weight_linear=mpk.attach_input(weight, name=f"{name}.qkv_proj"),
            bias=attach_optional(bias, f"{name}.qkv_bias"),
            output=qkv,
            eps=shape.eps,
            label=f"{name} qkv",
        )
        cache_dims = (num_pages, shape.num_kv_heads, page_size, shape.head_dim)
        k_cache, v_cache = (
            mpk.attach_input(torch.zeros(cache_dims, dtype=dtype, device=device), name=f"{name}.{kind}_cache")
            for kind in "kv"
        )
        mpk.attention_layer(
            input=qkv,
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=page_table,
            cos_pos_embed=cos,
            sin_pos_embed=sin,
            output=parts,
            q_norm=mpk.attach_input(at.q_norm.weight, name=f"{name}.q_norm") if shape.qk_norm else None,
            k_norm=mpk.attach_input(at.k_norm.weight, name=f"{name}.k_norm") if shape.qk_norm else None,
            scale=at.scaling,
            eps=shape.eps,
            label=f"{name} attention",
        )
        mpk.attention_output_layer(
            input=parts,
            weight=mpk.attach_input(at.o_proj.weight, name=f"{name}.o_proj"),
            bias=attach_optional(at.o_proj.bias, f"{name}.o_bias"),
            residual=None if several else x,
            output=parts_attention if several else x_attention,
            label=f"{name} o_proj",
        )
        mpk.rmsnorm_gated_linear_layer(
            input=x if several else x_attention,
            parts=parts_attention,
            total=x_attention if several else None,
            weight_norm=mpk.attach_input(layer.post_attention_layernorm.weight, name=f"{name}.post_norm"),
            weight_gate=mpk.attach_input(layer.mlp.gate_proj.weight, name=f"{name}.gate_proj"),
            weight_up=mpk.attach_input(layer.mlp.up_proj.weight, name=f"{name}.up_proj"),
            output=hidden,
            eps=shape.eps,
            label=f"{name} gate_up",
        )
        down = {
            "input": hidden,
            "weight": mpk.attach_input(layer.mlp.down_proj.weight, name=f"{name}.down_proj"),
            "label": f"{name} down_proj",
        }
        if several:
            mpk.linear_layer(output=parts_x, **down)
            residual = x_attention
        else:
            mpk.linear_with_residual_layer(residual=x_attention, output=x, **down)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    dims = (mpk.world_size, mpk.num_workers) if several else (mpk.num_workers,)
    best = (
        mpk.new_tensor(dims, torch.float32, name="best_value", symmetric=several),
        mpk.new_tensor(dims, torch.int32, name="best_index", symmetric=several),
    )
    others = {}
    if several:
        most = -(-vocab_size // mpk.world_size)
        others["all_logits"] = mpk.new_tensor((mpk.world_size, most), torch.float32, name="all_logits", symmetric=True)
    mpk.lm_head_layer(
        input=residual,
        parts=parts_x,
        first_row=first_row,
        weight_norm=mpk.attach_input(model.model.norm.weight, name="norm"),
        weight_linear=embedding if tied else mpk.attach_input(model.lm_head.weight, name="lm_head"),
        output=best,
        eps=shape.eps,
        label="lm_head",
        **others,
    )
    if several:
        others |= {"asked": asked, "vocab_size": vocab_size}
    mpk.sample_layer(input=best, label="sample", **others)
