"""What attention needs of the step's tokens: q normalised (Qwen3) and rotated, k likewise and with v in the cache.

num tokens [1], positions, sequences [T] int32 read | qkv [T, (H + 2 Hkv) * Dh] read | q, k gain [Dh] read
cos, sin [max_seq_len, Dh] fp32 read | page table [S, pages] int32 read
q [T, H, Dh] written, times the scale of the scores in base 2 | k, v cache [num_pages, Hkv, page_size, Dh] appended to
One task = one KV head, BLOCK_TOKENS tokens. Which rows of the cache a token has is known only at run time, but never
those of another: the caches' regions are (KV head, token of the step).
Source: arXiv:2104.09864; transformers apply_rotary_pos_emb, Qwen3Attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.ops.rotary import inverse_norms, rotate_head, rotate_torch
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def rotated_heads(
    ptr, offset, position, mask, gain_ptr, cos_ptr, sin_ptr,
    DH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_DH: tl.constexpr,
):  # fmt: skip
    """Heads [rows, BLOCK_DH] fp32 that begin at these offsets, normalised (if NORM) and rotated."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    mask = mask[:, None] & (d < DH)
    partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
    x = tl.load(ptr + offset[:, None] + d, mask=mask, other=0.0)
    x_partner = tl.load(ptr + offset[:, None] + partner, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + position[:, None] * DH + d, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position[:, None] * DH + d, mask=mask, other=0.0)
    rstd = inverse_norms(x, DH, NORM, EPS)
    return rotate_head(x, x_partner, rstd, gain_ptr, cos, sin, DH, BLOCK_DH, NORM)


@triton.jit
def append_kv_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, positions_ptr, sequences_ptr, qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,  # in
    page_table_ptr,  # in
    q_ptr, k_cache_ptr, v_cache_ptr,  # out
    kv_head, token0,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_PAGES: tl.constexpr,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    WIDTH: tl.constexpr = (H + 2 * HKV) * DH
    num_tokens = tl.load(num_tokens_ptr)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if token0 < num_tokens:
        d = tl.arange(0, BLOCK_DH)[None, :]
        row = tl.arange(0, BLOCK_TOKENS * BLOCK_H)
        token = token0 + row // BLOCK_H
        is_head = (token < num_tokens) & (row % BLOCK_H < GROUP)
        head = kv_head * GROUP + row % BLOCK_H
        position = tl.load(positions_ptr + token, mask=is_head, other=0)
        q = rotated_heads(
            qkv_ptr, token * WIDTH + head * DH, position, is_head, q_gain_ptr, cos_ptr, sin_ptr,
            DH, NORM, EPS, BLOCK_DH,
        )  # fmt: skip
        q = (q * (SCALE * 1.4426950408889634)).to(q_ptr.dtype.element_ty)  # log2(e)
        tl.store(q_ptr + (token * H + head)[:, None] * DH + d, q, mask=is_head[:, None] & (d < DH))
        token = token0 + tl.arange(0, BLOCK_TOKENS)
        is_token = token < num_tokens
        position = tl.load(positions_ptr + token, mask=is_token, other=0)
        sequence = tl.load(sequences_ptr + token, mask=is_token, other=0)
        page = tl.load(page_table_ptr + sequence * NUM_PAGES + position // PAGE_SIZE, mask=is_token, other=0)
        at = ((page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + position % PAGE_SIZE)[:, None] * DH + d
        mask = is_token[:, None] & (d < DH)
        k = rotated_heads(
            qkv_ptr, token * WIDTH + (H + kv_head) * DH, position, is_token, k_gain_ptr, cos_ptr, sin_ptr,
            DH, NORM, EPS, BLOCK_DH,
        )  # fmt: skip
        tl.store(k_cache_ptr + at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
        v = tl.load(qkv_ptr + (token * WIDTH + (H + HKV + kv_head) * DH)[:, None] + d, mask=mask, other=0.0)
        tl.store(v_cache_ptr + at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)
    signal(task, event_ptr, PORTABLE)


def token_block(max_tokens: int, num_kv_heads: int, num_workers: int) -> int:
    """Tokens of a task, so that there are about as many tasks as workers."""
    return min(16, next_power_of_2(-(-max_tokens * num_kv_heads // num_workers)))


def cut_append_kv(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_positions: TensorHandle,
    token_sequences: TensorHandle,
    input: TensorHandle,
    cos_pos_embed: TensorHandle,
    sin_pos_embed: TensorHandle,
    page_table: TensorHandle,
    q: TensorHandle,
    k_cache: TensorHandle,
    v_cache: TensorHandle,
    scale: float,
    q_norm: TensorHandle | None = None,
    k_norm: TensorHandle | None = None,
    eps: float = 1e-6,
    grid_dim: int | None = None,
) -> Cut:
    if grid_dim is not None:
        raise ValueError(f"append_kv is cut by KV heads and tokens, got grid_dim={grid_dim}; leave grid_dim out")
    _, num_kv_heads, page_size, head_dim = k_cache.dims
    max_tokens, num_q_heads, _ = q.dims
    group = num_q_heads // num_kv_heads
    block = token_block(max_tokens, num_kv_heads, machine.num_workers)
    pointers = {
        "num_tokens_ptr": num_tokens, "positions_ptr": token_positions, "sequences_ptr": token_sequences,
        "qkv_ptr": input, "q_gain_ptr": q_norm or input, "k_gain_ptr": k_norm or input,
        "cos_ptr": cos_pos_embed, "sin_ptr": sin_pos_embed, "page_table_ptr": page_table,
        "q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache,
    }  # fmt: skip
    cut = Cut(
        {
            "H": num_q_heads, "HKV": num_kv_heads, "DH": head_dim,
            "PAGE_SIZE": page_size, "NUM_PAGES": page_table.dims[1], "SCALE": scale,
            "NORM": q_norm is not None, "EPS": eps if q_norm is not None else 0.0,  # equal shapes share a kernel
            "BLOCK_TOKENS": block, "BLOCK_H": next_power_of_2(group), "BLOCK_DH": next_power_of_2(head_dim),
        },
        pointers,
    )  # fmt: skip
    plan = tuple(t.whole() for t in (num_tokens, token_positions, token_sequences, page_table))
    tables = tuple(t.whole() for t in (cos_pos_embed, sin_pos_embed, q_norm, k_norm) if t)
    addresses = cut.addresses()
    for head in range(num_kv_heads):
        heads = (head * group * head_dim, (head + 1) * group * head_dim)
        k, v = (((num_q_heads + i * num_kv_heads + head) * head_dim) for i in (0, 1))
        for i, token0 in enumerate(range(0, max_tokens, block)):
            tokens = (token0, min(token0 + block, max_tokens))
            new = tuple(input.box(tokens, cols) for cols in (heads, (k, k + head_dim), (v, v + head_dim)))
            rows = tuple(cache.box((head, head + 1), tokens) for cache in (k_cache, v_cache))
            cut.tasks.append(
                Task(
                    op=0,
                    tile=(head, i),
                    reads=plan + tables + new,
                    writes=(q.box(tokens, heads), *rows),
                    cost_bytes=2 * block * (group + 2) * head_dim * input.dtype.itemsize,
                    fields=addresses | {"kv_head": head, "token0": token0},
                )
            )
    return cut


def append_kv_torch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, H, Dh], k and v [T, Hkv, Dh] of tokens at these positions."""
    heads = qkv.float().view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm is not None:
        q = torch.nn.functional.rms_norm(q, (head_dim,), q_norm.float(), eps)
        k = torch.nn.functional.rms_norm(k, (head_dim,), k_norm.float(), eps)
    cos, sin = cos[positions.long()][:, None], sin[positions.long()][:, None]
    return rotate_torch(q, cos, sin) * scale * 1.4426950408889634, rotate_torch(k, cos, sin), v


APPEND_KV = Op("append_kv", append_kv_tile, cut_append_kv, append_kv_torch)
