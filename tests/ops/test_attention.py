"""attention and its merge: GQA, odd head sizes, q/k norms, lengths around blocks and pages, splits without tokens."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.attention import ATTENTION
from tri_mpk.ops.attention_merge import ATTENTION_MERGE

EPS = 1e-5
PAGE = 128
NUM_PAGES = 3
# query heads, KV heads, head size, norm of q and k, splits (None: as the machine has workers)
SHAPES = [(4, 2, 32, False, None), (7, 1, 80, True, 3), (3, 3, 34, False, 1), (2, 2, 64, True, 4)]
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 383]  # tokens in the cache already


@pytest.fixture(scope="module")
def harness():
    torch.manual_seed(0)
    harness = OpHarness(max_seq_len=NUM_PAGES * PAGE + 1)
    page_table = torch.tensor([2, 0, 1], dtype=torch.int32)  # pages of the sequence, out of order
    harness.page_table = harness.attach(page_table)
    harness.cases = [Case(harness, *shape) for shape in SHAPES]
    harness.compile()
    return harness


class Case:
    def __init__(self, harness: OpHarness, num_q_heads: int, num_kv_heads: int, head_dim: int, norm: bool, splits):
        self.num_q_heads, self.num_kv_heads, self.head_dim, self.norm = num_q_heads, num_kv_heads, head_dim, norm
        self.page_table = harness.page_table.data.clone()
        angles = torch.rand(NUM_PAGES * PAGE, head_dim // 2).repeat(1, 2) * 6.28
        self.cos, self.sin = harness.attach(angles.cos()), harness.attach(angles.sin())
        self.qkv = harness.input((num_q_heads + 2 * num_kv_heads) * head_dim)
        self.k_cache, self.v_cache = (harness.input(NUM_PAGES, num_kv_heads, PAGE, head_dim) for _ in "kv")
        harness.changing |= {self.k_cache.name, self.v_cache.name}
        self.q_norm, self.k_norm = (harness.gain(head_dim) if norm else None for _ in "qk")
        self.scale = 0.7 * head_dim**-0.5 if norm else None
        self.output = harness.output(num_q_heads * head_dim)
        harness.mpk.attention_layer(
            input=self.qkv, k_cache=self.k_cache, v_cache=self.v_cache, page_table=harness.page_table,
            cos_pos_embed=self.cos, sin_pos_embed=self.sin, output=self.output, num_q_heads=num_q_heads,
            q_norm=self.q_norm, k_norm=self.k_norm, scale=self.scale, eps=EPS, grid_dim=splits,
        )  # fmt: skip

    def sequence(self, cache: torch.Tensor) -> torch.Tensor:
        """The cache in the order of the sequence: [positions, KV heads, head size]."""
        return cache[self.page_table.long()].transpose(1, 2).reshape(-1, self.num_kv_heads, self.head_dim)

    def fill(self, length: int) -> None:
        """`length` random rows in both caches, NaN in all others."""
        for cache in (self.k_cache, self.v_cache):
            rows = torch.randn(NUM_PAGES * PAGE, self.num_kv_heads, self.head_dim)
            rows[length:] = float("nan")
            pages = rows.view(NUM_PAGES, PAGE, self.num_kv_heads, self.head_dim).transpose(1, 2)
            cache.data[self.page_table.long()] = pages

    def expected(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, and the new row of both caches, after `length` older tokens."""
        heads = self.qkv.data.view(-1, self.head_dim)
        q, k, v = heads.split([self.num_q_heads, self.num_kv_heads, self.num_kv_heads])
        if self.norm:
            q, k = rms_norm(q, self.q_norm.data), rms_norm(k, self.k_norm.data)
        q, k = (rotate(x, self.cos.data[length], self.sin.data[length]) for x in (q, k))
        older = [self.sequence(cache.data)[:length] for cache in (self.k_cache, self.v_cache)]
        scale = self.scale or self.head_dim**-0.5
        return ATTENTION.reference(q, k, v, *older, scale).view(-1), k, v


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], gain, EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As complex numbers: pairs (i, i + half) turned by an angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:half], sin[:half])
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_reference(harness, length):
    for case in harness.cases:
        case.fill(length)
    before = [(case.k_cache.data.clone(), case.v_cache.data.clone()) for case in harness.cases]
    harness.run(step=length)
    for case, caches in zip(harness.cases, before, strict=True):
        output, k, v = case.expected(length)
        check_close(actual=case.output.data.view(-1), expected=output)
        for cache, old, new in zip((case.k_cache, case.v_cache), caches, (k, v), strict=True):
            rows = case.sequence(cache.data)
            check_close(actual=rows[length], expected=new)
            rows = rows.clone()
            rows[length] = float("nan")
            assert torch.equal(rows.nan_to_num(99.0), case.sequence(old).nan_to_num(99.0)), "another row has changed"


def test_large_scores_do_not_overflow(harness):
    case = harness.cases[0]
    before = case.qkv.data.clone()
    case.fill(200)
    case.qkv.data.mul_(1e3)
    harness.run(step=200)
    output, _, _ = case.expected(200)
    # the softmax is all but one-hot: compare what is left of it
    torch.testing.assert_close(case.output.data.view(-1), output, rtol=1e-3, atol=1e-2)
    case.qkv.data.copy_(before)


def test_merge_reference_equals_softmax():
    """The reference that the merge is defined by: partial softmaxes in base 2 give the whole one."""
    scores, values = torch.randn(5, 30), torch.randn(30, 8)  # 5 heads
    parts = [(0, 7), (7, 8), (8, 30)]
    row_max = torch.stack([scores[:, lo:hi].amax(1) for lo, hi in parts])
    weights = [torch.exp2(scores[:, lo:hi] - m[:, None]) for (lo, hi), m in zip(parts, row_max, strict=True)]
    acc = torch.stack([w @ values[lo:hi] for w, (lo, hi) in zip(weights, parts, strict=True)])
    merged = ATTENTION_MERGE.reference(acc, row_max, torch.stack([w.sum(1) for w in weights]))
    expected = torch.softmax(scores * torch.log(torch.tensor(2.0)), -1) @ values
    check_close(actual=merged, expected=expected)
