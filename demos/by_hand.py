"""A two-layer Llama built by hand with the graph API: what `tri_mpk.from_pretrained` does for you, op by op.

    python demos/by_hand.py

It ends by comparing itself with `tri_mpk.from_model` on equal weights: same tokens, and logits equal to the last bit.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import tri_mpk
from tri_mpk.loading import random_model

PAGE_SIZE = 128  # tokens per page of the KV cache
MAX_SEQ_LEN = 64  # prompt and new tokens together
CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=300,
    max_position_embeddings=MAX_SEQ_LEN,
    tie_word_embeddings=False,
)


def build(llama: nn.Module, step: Tensor, tokens: Tensor) -> tri_mpk.PersistentKernel:
    """One decode step, from tokens[step] to tokens[step + 1], as a graph of fused ops on named tensors.

    Nothing is computed here. An op call says what is read and what is written; tasks, events and queues follow from
    that. The kernel repeats the step by itself, and argmax_layer advances `step`.
    """
    config, dtype, device = llama.config, llama.dtype, llama.device
    num_q_heads, num_kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps = config.rms_norm_eps
    mpk = tri_mpk.PersistentKernel(world_size=1, rank=0, meta_tensors=[step, tokens])

    # attach_input: a tensor that exists and is used where it lies. new_tensor: memory for values between ops.
    # Positions become angles once, on the host: row p of cos and sin rotates the token at position p.
    positions = torch.arange(MAX_SEQ_LEN, device=device)[None]
    cos, sin = llama.model.rotary_emb(torch.zeros(1, device=device), positions)
    cos = mpk.attach_input(cos[0].float().contiguous(), name="cos")
    sin = mpk.attach_input(sin[0].float().contiguous(), name="sin")
    # Page i of the sequence lies at page page_table[i] of every cache. Here: one after the other.
    num_pages = -(-MAX_SEQ_LEN // PAGE_SIZE)
    page_table = torch.arange(num_pages, dtype=torch.int32, device=device)
    page_table = mpk.attach_input(page_table, name="page_table")

    # x is the residual stream, in fp32 whatever the weights are.
    x = mpk.new_tensor((config.hidden_size,), torch.float32, name="x")
    table = mpk.attach_input(llama.model.embed_tokens.weight, name="embed_tokens")
    mpk.embed_layer(input=mpk.tokens, weight=table, output=x)

    for i, layer in enumerate(llama.model.layers):
        attention, mlp = layer.self_attn, layer.mlp

        # RMSNorm and the q, k, v projections are one op on one packed matrix: one wait instead of four.
        qkv_weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        qkv = mpk.new_tensor((qkv_weight.shape[0],), dtype, name=f"{i}.qkv")
        mpk.rmsnorm_linear_layer(
            input=x,
            weight_norm=mpk.attach_input(layer.input_layernorm.weight, name=f"{i}.input_norm"),
            weight_linear=mpk.attach_input(qkv_weight, name=f"{i}.qkv_proj"),
            output=qkv,
            eps=eps,
        )

        # Rotates q and k, appends k and v to the paged cache, attends to all older positions. The KV length is split
        # over the workers; each leaves a part, which the output projection merges.
        cache_dims = (num_pages, num_kv_heads, PAGE_SIZE, head_dim)
        parts = mpk.new_attention_parts(num_q_heads, num_kv_heads, head_dim, dtype, name=f"{i}.attention")
        mpk.attention_layer(
            input=qkv,
            k_cache=mpk.attach_input(torch.zeros(cache_dims, dtype=dtype, device=device), name=f"{i}.k_cache"),
            v_cache=mpk.attach_input(torch.zeros(cache_dims, dtype=dtype, device=device), name=f"{i}.v_cache"),
            page_table=page_table,
            cos_pos_embed=cos,
            sin_pos_embed=sin,
            output=parts,
        )

        # A new tensor for every version of the residual stream: nobody overwrites what a slower worker still reads.
        x_attention = mpk.new_tensor((config.hidden_size,), torch.float32, name=f"{i}.x_attention")
        mpk.attention_output_layer(
            input=parts,
            weight=mpk.attach_input(attention.o_proj.weight, name=f"{i}.o_proj"),
            residual=x,
            output=x_attention,
        )

        # RMSNorm, gate, up and silu(gate) * up in one op. Then down, and the residual stream goes to the next layer.
        hidden = mpk.new_tensor((config.intermediate_size,), dtype, name=f"{i}.hidden")
        mpk.rmsnorm_gated_linear_layer(
            input=x_attention,
            weight_norm=mpk.attach_input(layer.post_attention_layernorm.weight, name=f"{i}.post_norm"),
            weight_gate=mpk.attach_input(mlp.gate_proj.weight, name=f"{i}.gate_proj"),
            weight_up=mpk.attach_input(mlp.up_proj.weight, name=f"{i}.up_proj"),
            output=hidden,
            eps=eps,
        )
        x = mpk.new_tensor((config.hidden_size,), torch.float32, name=f"{i}.x")
        mpk.linear_with_residual_layer(
            input=hidden,
            weight=mpk.attach_input(mlp.down_proj.weight, name=f"{i}.down_proj"),
            residual=x_attention,
            output=x,
        )

    # Each worker scores its share of the vocabulary and leaves its best; argmax_layer picks one and ends the step.
    best = (
        mpk.new_tensor((mpk.num_workers,), torch.float32, name="best_value"),
        mpk.new_tensor((mpk.num_workers,), torch.int32, name="best_index"),
    )
    mpk.lm_head_layer(
        input=x,
        weight_norm=mpk.attach_input(llama.model.norm.weight, name="norm"),
        weight_linear=mpk.attach_input(llama.lm_head.weight, name="lm_head"),
        output=best,
        eps=eps,
    )
    mpk.argmax_layer(input=best)
    return mpk


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--max-new-tokens", type=int, default=6, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter is right in fp32 only
    prompt = torch.tensor([17, 4, 256], device=device)

    # The two tensors that the host and the kernel share: the position of the next token to process, and all tokens.
    step = torch.zeros(1, dtype=torch.int32, device=device)
    tokens = torch.zeros(MAX_SEQ_LEN, dtype=torch.int64, device=device)
    mpk = build(random_model(CONFIG, args.seed, dtype, device), step, tokens)
    mpk.compile()
    program = mpk.program
    print(f"{len(program.graph.ops)} ops on {mpk.num_workers} workers: {program.report}")
    print(f"kernel: {mpk.runtime.source_path}")

    tokens[: len(prompt)] = prompt
    length = mpk(num_tokens=len(prompt), max_new_tokens=args.max_new_tokens)  # one launch
    logits = mpk.runtime.default_logits.clone()  # of the last step
    print(f"by hand:    {tokens[:length].tolist()}, step = {int(step)}, launches = {mpk.runtime.num_launches}")

    model = tri_mpk.from_model(random_model(CONFIG, args.seed, dtype, device), max_seq_len=MAX_SEQ_LEN, progress=False)
    expected = model.generate(prompt[None], max_new_tokens=args.max_new_tokens, eos_token_id=None)[0]
    expected_logits = model.kernel.runtime.default_logits
    print(f"from_model: {expected.tolist()}")
    same_tokens = torch.equal(tokens[:length], expected)
    same_logits = torch.equal(logits, expected_logits) and bool(logits.isfinite().all()) and bool(logits.any())
    print(f"tokens {'equal' if same_tokens else 'DIFFER'}, logits {'equal bit for bit' if same_logits else 'DIFFER'}")
    return 0 if same_tokens and same_logits else 1


if __name__ == "__main__":
    sys.exit(main())
