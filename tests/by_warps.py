"""Run in Triton's interpreter, by tests/ops/test_by_warps.py: attention a warp at a time, against its torch reference.

Prints one line per case; exits with an AssertionError at the first that is wrong.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl

import ptx_emulator
from tri_mpk.ops.attention import ATTENTION, attention_tile
from tri_mpk.ops.attention_output import load_merged
from tri_mpk.ops.gemv import own_columns

PAGE = 128
NUM_PAGES = 3
SPLIT_TOKENS = 64
EPS = 1e-5


@triton.jit
def attention_kernel(
    task, event_ptr, control_ptr, step, qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,
    k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_DH: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    ring = (step * 0, 0)
    attention_tile(
        task, event_ptr, control_ptr, 1, step, ring, qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,
        page_table_ptr, k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, tl.program_id(0), tl.program_id(1),
        H, HKV, DH, NUM_SPLITS, SPLIT_TOKENS, PAGE_SIZE, SCALE, NORM, EPS, True, 8, BLOCK_DH, BLOCK_KV, True,
    )  # fmt: skip


@triton.jit
def merge_kernel(parts_ptr, lse_ptr, out_ptr, num_splits, K: tl.constexpr, DH: tl.constexpr, SLOT_ROWS: tl.constexpr):
    x = load_merged(parts_ptr, lse_ptr, num_splits, K, DH, SLOT_ROWS, True)
    for i in tl.static_range(len(x)):
        col, wanted = own_columns(i // 8, K, SLOT_ROWS)
        tl.store(out_ptr + col + i % 8, x[i], mask=wanted)


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], gain.float(), EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    partner = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + partner * sin


def check_attention(group: int, num_kv_heads: int, head_dim: int, norm: bool, length: int) -> None:
    num_heads, num_splits = group * num_kv_heads, 4
    half = torch.float16
    qkv = torch.randn((num_heads + 2 * num_kv_heads) * head_dim, dtype=half)
    gains = [(1 + 0.1 * torch.randn(head_dim)).to(half) for _ in "qk"]
    angles = torch.rand(NUM_PAGES * PAGE, head_dim // 2).repeat(1, 2) * 6.28
    cos, sin = angles.cos(), angles.sin()
    page_table = torch.tensor([2, 0, 1], dtype=torch.int32)
    rows = [torch.randn(NUM_PAGES * PAGE, num_kv_heads, head_dim, dtype=half) for _ in "kv"]
    caches = []
    for kind in rows:
        kind[length:] = float("nan")
        cache = torch.empty(NUM_PAGES, num_kv_heads, PAGE, head_dim, dtype=half)
        cache[page_table.long()] = kind.view(NUM_PAGES, PAGE, num_kv_heads, head_dim).transpose(1, 2)
        caches.append(cache)
    before = [cache.clone() for cache in caches]
    parts = torch.full((num_splits, num_heads, head_dim), float("nan"), dtype=half)
    lse = torch.full((num_splits, num_heads), float("nan"))
    scale = 0.9 / math.sqrt(head_dim)
    task = torch.zeros(16, dtype=torch.int64)
    task[3:5] = -1  # no signals, and nothing to wait for
    ptx_emulator.shared[:] = 0xFF  # NaN in 16 and in 32 bits
    step = torch.tensor(length, dtype=torch.int32)
    attention_kernel[(num_kv_heads, num_splits)](
        task, torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int64), int(step), qkv, *gains, cos, sin,
        page_table, *caches, parts, lse, H=num_heads, HKV=num_kv_heads, DH=head_dim, NUM_SPLITS=num_splits,
        SPLIT_TOKENS=SPLIT_TOKENS, PAGE_SIZE=PAGE, SCALE=scale, NORM=norm, EPS=EPS,
        BLOCK_DH=triton.next_power_of_2(head_dim), BLOCK_KV=32 if head_dim <= 64 else 16,
    )  # fmt: skip

    q, k, v = qkv.float().view(-1, head_dim).split([num_heads, num_kv_heads, num_kv_heads])
    if norm:
        q, k = rms_norm(q, gains[0]), rms_norm(k, gains[1])
    q, k = (rotate(x, cos[length], sin[length]) for x in (q, k))
    expected = ATTENTION.reference(q, k, v, *(kind[:length] for kind in rows), scale)
    active = min(max(-(-length // SPLIT_TOKENS), 1), num_splits)
    assert not parts[:active].isnan().any() and not lse[:active].isnan().any()
    assert parts[active:].isnan().all() and lse[active:].isnan().all(), "a split without tokens has written"
    share = torch.softmax(lse[:active] * math.log(2.0), 0)
    merged = (parts[:active].float() * share[..., None]).sum(0)
    torch.testing.assert_close(merged, expected, rtol=2e-2, atol=4e-3)

    keys = torch.cat((rows[0][:length].float(), k[None])).repeat_interleave(group, 1)
    total = torch.logsumexp(torch.einsum("hd,thd->ht", q, keys) * scale, -1)
    torch.testing.assert_close(torch.logsumexp(lse[:active] * math.log(2.0), 0), total, rtol=2e-3, atol=4e-3)
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        page, place = int(page_table[length // PAGE]), length % PAGE
        torch.testing.assert_close(cache[page, :, place].float(), new, rtol=2e-3, atol=2e-3)
        cache[page, :, place] = old[page, :, place]
        assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0)), "another row has changed"


def check_merge(k: int, head_dim: int, slot_rows: int, num_splits: int) -> None:
    parts = torch.randn(6, k // head_dim, head_dim, dtype=torch.float16)
    lse = torch.randn(6, k // head_dim) * 5
    parts[num_splits:], lse[num_splits:] = float("nan"), float("nan")
    out = torch.full((k,), float("nan"))
    merge_kernel[(1,)](parts, lse, out, num_splits, K=k, DH=head_dim, SLOT_ROWS=slot_rows)
    share = torch.softmax(lse[:num_splits] * math.log(2.0), 0)
    expected = (parts[:num_splits].float() * share[..., None]).sum(0).view(-1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def main() -> None:
    ptx_emulator.install()
    torch.manual_seed(0)
    cases = {  # query heads per KV head, KV heads, head size, norm -> tokens in the cache
        (4, 2, 64, False): [0, 1, 33, 200, 383],
        (4, 1, 128, True): [0, 17, 300],
        (8, 1, 64, False): [129],
        (7, 1, 80, False): [16, 130],
        (1, 2, 48, True): [65],
        (3, 1, 32, False): [31],
    }
    for shape, lengths in cases.items():
        for length in lengths:
            check_attention(*shape, length)
            print("attention", *shape, "after", length, flush=True)
    for vector, num_splits in itertools.product([(512, 64, 16), (2048, 128, 8), (240, 80, 16)], [1, 2, 3, 5]):
        check_merge(*vector, num_splits)
        print("merge of", num_splits, "splits,", vector[0], "columns", flush=True)


if __name__ == "__main__":
    main()
