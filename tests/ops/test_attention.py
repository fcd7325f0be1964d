"""attention: each split's part and its weight; GQA, odd head sizes, q/k norms, lengths around blocks, pages, splits."""

from __future__ import annotations

import math

import pytest
import torch

from op_harness import OpHarness, region_mask
from tolerances import check_close
from tri_mpk.ops.attention import ATTENTION
from tri_mpk.ops.op import TensorHandle, even_ranges
from tri_mpk.tuning import Tuning

EPS = 1e-5
PAGE = 128
NUM_PAGES = 3
SPLIT_TOKENS = 48
TUNING = Tuning(num_workers=2, slot_bytes=4096, block_kv=32, num_splits=3, split_tokens=SPLIT_TOKENS)
# query heads, KV heads, head size, norm of q and k, splits (None: as the tuning says); blocks of 32, 16, 32, 32 tokens
SHAPES = [(4, 2, 32, False, None), (7, 1, 80, True, 5), (3, 3, 34, False, 1), (2, 2, 64, True, 8)]
# tokens in the cache already, and as how many splits they are taken if there are so many
ACTIVE = {
    0: 1, 1: 1, 15: 1, 16: 1, 17: 1, 31: 1, 32: 1, 33: 1, 47: 1, 48: 1, 49: 2, 64: 2, 65: 2, 96: 2, 97: 3, 127: 3,
    128: 3, 129: 3, 145: 4, 240: 5, 241: 6, 383: 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def harness():
    torch.manual_seed(0)
    harness = new_harness()
    harness.cases = [Case(harness, *shape) for shape in SHAPES]
    harness.compile()
    return harness


def new_harness() -> OpHarness:
    harness = OpHarness(max_seq_len=NUM_PAGES * PAGE + 1, tuning=TUNING)
    harness.page_table = harness.attach(torch.tensor([2, 0, 1], dtype=torch.int32))  # of the sequence, out of order
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
        self.parts, self.lse = harness.mpk.new_attention_parts(
            num_q_heads, num_kv_heads, head_dim, torch.float32, f"{self.qkv.name} parts", num_splits=splits
        )
        self.num_splits = splits or TUNING.num_splits
        harness.mpk.attention_layer(
            input=self.qkv, k_cache=self.k_cache, v_cache=self.v_cache, page_table=harness.page_table,
            cos_pos_embed=self.cos, sin_pos_embed=self.sin, output=(self.parts, self.lse),
            q_norm=self.q_norm, k_norm=self.k_norm, scale=self.scale, eps=EPS,
        )  # fmt: skip
        self.block_kv = harness.mpk.calls[-1].options["block_kv"]

    def sequence(self, cache: TensorHandle) -> torch.Tensor:
        """The cache in the order of the sequence: [positions, KV heads, head size]."""
        return cache.data[self.page_table.long()].transpose(1, 2).reshape(-1, self.num_kv_heads, self.head_dim)

    def fill(self, length: int) -> None:
        """`length` random rows in both caches, NaN in all others."""
        for cache in (self.k_cache, self.v_cache):
            rows = torch.randn(NUM_PAGES * PAGE, self.num_kv_heads, self.head_dim)
            rows[length:] = float("nan")
            pages = rows.view(NUM_PAGES, PAGE, self.num_kv_heads, self.head_dim).transpose(1, 2)
            cache.data[self.page_table.long()] = pages

    def new_token(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Its q, k and v, normalised and rotated, after `length` older tokens."""
        heads = self.qkv.data.view(-1, self.head_dim)
        q, k, v = heads.split([self.num_q_heads, self.num_kv_heads, self.num_kv_heads])
        if self.norm:
            q, k = rms_norm(q, self.q_norm.data), rms_norm(k, self.k_norm.data)
        q, k = (rotate(x, self.cos.data[length], self.sin.data[length]) for x in (q, k))
        return q, k, v

    def num_active(self, length: int) -> int:
        return min(ACTIVE[length], self.num_splits)

    def expected(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """parts [n, H, Dh] and lse [n, H] of the n active splits: whole blocks of older tokens, the new one first."""
        q, new_k, new_v = self.new_token(length)
        older = [self.sequence(cache)[:length] for cache in (self.k_cache, self.v_cache)]
        parts, lse = [], []
        for split, blocks in enumerate(even_ranges(-(-length // self.block_kv), self.num_active(length))):
            tokens = slice(*(min(block * self.block_kv, length) for block in blocks))
            keys, values = (x[tokens] for x in older)
            if split == 0:
                keys, values = torch.cat((keys, new_k[None])), torch.cat((values, new_v[None]))
            part, sum = self.attention(q, keys, values)
            parts.append(part)
            lse.append(sum)
        return torch.stack(parts), torch.stack(lse)

    def attention(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of these tokens: the result, and the logarithm in base 2 of the sum of exponentials."""
        scale = self.scale or self.head_dim**-0.5
        part = ATTENTION.reference(q, keys[-1], values[-1], keys[:-1], values[:-1], scale)
        scores = torch.einsum("hd,thd->ht", q, keys.repeat_interleave(self.num_q_heads // self.num_kv_heads, 1))
        return part, torch.logsumexp(scores * scale, -1) / math.log(2.0)


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], gain, EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As complex numbers: pairs (i, i + half) turned by an angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:half], sin[:half])
    return torch.cat((turned.real, turned.imag), -1)


def check_only_row_changed(case: Case, caches: tuple[torch.Tensor, torch.Tensor], length: int) -> None:
    """Both caches have the new token's row, and are otherwise, NaN included, as they were."""
    _, new_k, new_v = case.new_token(length)
    for cache, old, new in zip((case.k_cache, case.v_cache), caches, (new_k, new_v), strict=True):
        rows = case.sequence(cache)
        check_close(actual=rows[length], expected=new)
        rows[length] = float("nan")
        before = old[case.page_table.long()].transpose(1, 2).reshape(rows.shape)
        assert torch.equal(rows.nan_to_num(99.0), before.nan_to_num(99.0)), "another row has changed"


def copies(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.k_cache.data.clone(), case.v_cache.data.clone()


@pytest.mark.parametrize("length", ACTIVE)
def test_each_split_equals_the_reference(harness, length):
    for case in harness.cases:
        case.fill(length)
    before = [copies(case) for case in harness.cases]
    harness.run(step=length)
    for case, caches in zip(harness.cases, before, strict=True):
        parts, lse = case.expected(length)
        active = case.num_active(length)
        check_close(actual=case.parts.data[:active], expected=parts)
        check_close(actual=case.lse.data[:active], expected=lse)
        for handle in (case.parts, case.lse):
            assert bool(handle.data[active:].isnan().all()), "a split without tokens has written"
        check_only_row_changed(case, caches, length)


@pytest.mark.parametrize("length", [0, 49, 383])
def test_splits_together_are_attention_to_all_tokens(harness, length):
    for case in harness.cases:
        case.fill(length)
    older = [(case.sequence(case.k_cache)[:length], case.sequence(case.v_cache)[:length]) for case in harness.cases]
    harness.run(step=length)
    for case, (keys, values) in zip(harness.cases, older, strict=True):
        active = case.num_active(length)
        weights = torch.exp2(case.lse.data[:active] - case.lse.data[:active].amax(0))
        merged = (case.parts.data[:active] * (weights / weights.sum(0))[..., None]).sum(0)
        q, new_k, new_v = case.new_token(length)
        expected, _ = case.attention(q, torch.cat((keys, new_k[None])), torch.cat((values, new_v[None])))
        check_close(actual=merged, expected=expected)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_a_task_alone(split):
    """One of two active splits, or one without tokens, of the second head, with NaN in all that is another's: it needs
    nothing else, writes its own part only, and only the first split appends the new token."""
    length, heads = 96, slice(2, 4)
    harness = new_harness()
    case = Case(harness, 4, 2, 32, True, 3)
    op = harness.keep_only(3 + split)
    harness.compile()
    (task,) = harness.tasks(op)
    assert task.tile == (1, split)
    case.fill(length)
    for cache in (case.k_cache, case.v_cache):
        cache.data[:, 0] = float("nan")
    before = copies(case)
    parts, lse = case.expected(length)
    _, new_k, new_v = case.new_token(length)
    case.qkv.data[~region_mask(case.qkv, task.reads)] = float("nan")
    harness.run(step=length)
    for handle, expected in ((case.parts, parts), (case.lse, lse)):
        if split < 2:
            check_close(actual=handle.data[split, heads], expected=expected[split, heads])
            handle.data[split, heads] = float("nan")
        assert bool(handle.data.isnan().all()), "the part of another task was written"
    for cache, old, new in zip((case.k_cache, case.v_cache), before, (new_k, new_v), strict=True):
        if split == 0:
            row = cache.data[case.page_table[length // PAGE], 1, length % PAGE]
            check_close(actual=row, expected=new[1])
            row.fill_(float("nan"))
        assert torch.equal(cache.data.nan_to_num(99.0), old.nan_to_num(99.0)), "another row has changed"


def test_only_the_first_split_reads_the_new_k_and_v(harness):
    for op, case in enumerate(harness.cases):
        q_size, head_dim = case.num_q_heads * case.head_dim, case.head_dim
        tasks = harness.tasks(op)
        assert len(tasks) == case.num_kv_heads * case.num_splits
        for task in tasks:
            head, split = task.tile
            k = case.qkv.span(q_size + head * head_dim, q_size + (head + 1) * head_dim)
            v_at = q_size + case.num_kv_heads * head_dim
            v = case.qkv.span(v_at + head * head_dim, v_at + (head + 1) * head_dim)
            assert [region in task.reads for region in (k, v)] == [split == 0] * 2


def test_large_scores_do_not_overflow(harness):
    case = harness.cases[0]
    before = case.qkv.data.clone()
    case.fill(241)
    case.qkv.data.mul_(1e3)
    harness.run(step=241)
    parts, lse = case.expected(241)
    # the softmax is all but one-hot: compare what is left of it
    torch.testing.assert_close(case.parts.data, parts, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(case.lse.data, lse, rtol=1e-5, atol=1e-2)
    case.qkv.data.copy_(before)
