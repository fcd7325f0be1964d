"""The decoder of `decoder.py` for many tokens of many sequences in one step, from the plan of the step to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from tri_mpk.batch_kernel import BatchKernel, StepPlan
from tri_mpk.models.decoder import DecoderShape, pack_rows, rotary_tables
from tri_mpk.ops.op import TensorHandle
from tri_mpk.sharding import Shard


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What the decoder leaves for the ops that choose tokens and make the plan of the next step.

    Regions of these tensors are `columns` of them (two coordinates), those of the plan `span` or `whole`.
    """

    plan: StepPlan
    logits: TensorHandle  # [S, V] fp32, row s of output_token[s]; other rows remain what they were
    best_value: TensorHandle  # [S, tasks] fp32: the largest logit of a task's part of the vocabulary
    best_index: TensorHandle  # [S, tasks] int32: its index, the lowest one on a tie


def build_serving(
    mpk: BatchKernel,
    shape: DecoderShape,
    model: nn.Module,
    page_size: int,
    num_pages: int,
    progress: bool,
    shard: Shard | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Adds a whole step: what hosts ask for, the decoder as of `build_batch`, and the plan of the next step."""
    state = mpk.host_words_layer(page_size=page_size, num_pages=num_pages)
    output = build_batch(mpk, shape, model, page_size, progress, num_pages, shard, reduce_dtype)
    best, logits = (output.best_value, output.best_index), output.logits
    if shard is not None:
        best, logits = mpk.batch_gather_layer(
            plan=output.plan,
            state=state,
            best=best,
            logits=logits,
            first_row=shard.first_row,
            num_rows=shard.num_rows,
            vocab_size=shard.config.vocab_size,
        )
    mpk.advance_layer(plan=output.plan, state=state, input=best, logits=logits)


def build_batch(
    mpk: BatchKernel,
    shape: DecoderShape,
    model: nn.Module,
    page_size: int,
    progress: bool,
    num_pages: int | None = None,
    shard: Shard | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> BatchOutput:
    """Adds the decoder `model` (a transformers causal LM) to the graph. The caller adds the ops that end the step.

    `num_pages`: of the KV cache of a layer, for all sequences together; None: enough for all to be of full length.
    On several ranks `model` is this rank's part, the `shard`; what ranks add to the residual is in `reduce_dtype`.
    """
    dtype = model.model.embed_tokens.weight.dtype
    device, tokens = mpk.device, mpk.max_tokens_per_step
    sequence_pages = -(-mpk.max_seq_len // page_size)
    cache_dims = (num_pages or mpk.max_batch_size * sequence_pages, shape.num_kv_heads, page_size, shape.head_dim)
    q_size = shape.num_q_heads * shape.head_dim
    qkv_size = q_size + 2 * shape.num_kv_heads * shape.head_dim

    def attach(tensor: torch.Tensor | None, name: str) -> TensorHandle | None:
        return None if tensor is None else mpk.attach_input(tensor, name=name)

    plan = mpk.new_step_plan(sequence_pages)
    cos, sin = (
        attach(t.to(device), n) for t, n in zip(rotary_tables(model, mpk.max_seq_len), ("cos", "sin"), strict=True)
    )
    embedding = attach(model.model.embed_tokens.weight, "embed_tokens")
    layers = model.model.layers
    norms = [(attach(x.input_layernorm.weight, f"L{i:02d}.input_norm")) for i, x in enumerate(layers)]
    norms.append(attach(model.model.norm.weight, "norm"))
    x = mpk.new_residual(shape.hidden_size, dtype, name="x", reduce_dtype=reduce_dtype)
    work = mpk.batch_items_layer(
        plan=plan, num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads, label="items"
    )
    first_row = 0 if shard is None else shard.first_row
    mpk.batch_embed_layer(plan=plan, weight=embedding, next_norm=norms[0], output=x, label="embed", first_row=first_row)
    # One of each for all layers: rewritten every few microseconds, they stay in the L2 cache.
    qkv = mpk.new_tensor((tokens, qkv_size), dtype, name="qkv")
    q = mpk.new_tensor((tokens, shape.num_q_heads, shape.head_dim), dtype, name="q")
    parts = mpk.new_batch_attention_parts(work, shape.head_dim, dtype, name="parts")
    attention = mpk.new_tensor((tokens, q_size), dtype, name="attention")
    hidden = mpk.new_tensor((tokens, model.config.intermediate_size), dtype, name="hidden")
    for i, layer in enumerate(tqdm(layers, "packing", disable=not progress, leave=False)):
        at, name = layer.self_attn, f"L{i:02d}"
        weight, bias = pack_rows([at.q_proj, at.k_proj, at.v_proj])
        mpk.batch_linear_layer(
            plan=plan,
            input=x,
            weight=attach(weight, f"{name}.qkv_proj"),
            bias=attach(bias, f"{name}.qkv_bias"),
            output=qkv,
            eps=shape.eps,
            label=f"{name} qkv",
        )
        k_cache, v_cache = (
            attach(torch.zeros(cache_dims, dtype=dtype, device=device), f"{name}.{kind}_cache") for kind in "kv"
        )
        mpk.batch_attention_layer(
            work=work,
            input=qkv,
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cos_pos_embed=cos,
            sin_pos_embed=sin,
            parts=parts,
            output=attention,
            q_norm=attach(at.q_norm.weight, f"{name}.q_norm") if shape.qk_norm else None,
            k_norm=attach(at.k_norm.weight, f"{name}.k_norm") if shape.qk_norm else None,
            scale=at.scaling,
            eps=shape.eps,
            label=f"{name} attention",
        )
        post_norm = attach(layer.post_attention_layernorm.weight, f"{name}.post_norm")
        mpk.batch_linear_with_residual_layer(
            plan=plan,
            input=attention,
            weight=attach(at.o_proj.weight, f"{name}.o_proj"),
            bias=attach(at.o_proj.bias, f"{name}.o_bias"),
            residual=x,
            next_norm=post_norm,
            label=f"{name} o_proj",
        )
        mpk.batch_gated_linear_layer(
            plan=plan,
            input=x,
            weight_gate=attach(layer.mlp.gate_proj.weight, f"{name}.gate_proj"),
            weight_up=attach(layer.mlp.up_proj.weight, f"{name}.up_proj"),
            output=hidden,
            eps=shape.eps,
            label=f"{name} gate_up",
        )
        mpk.batch_linear_with_residual_layer(
            plan=plan,
            input=hidden,
            weight=attach(layer.mlp.down_proj.weight, f"{name}.down_proj"),
            residual=x,
            next_norm=norms[i + 1],
            label=f"{name} down_proj",
        )
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    vocab_size = shape.vocab_size if shard is None else shard.config.vocab_size
    most_rows = -(-vocab_size // mpk.world_size)  # of the vocabulary, on any rank
    logits = mpk.new_tensor((mpk.max_batch_size, most_rows), torch.float32, name="logits")
    best = mpk.new_best()
    mpk.batch_lm_head_layer(
        work=work,
        input=x,
        weight=embedding if tied else attach(model.lm_head.weight, "lm_head"),
        logits=logits,
        best=best,
        eps=shape.eps,
        label="lm_head",
    )
    return BatchOutput(plan, logits, *best)
