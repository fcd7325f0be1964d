"""Each batch op against its reference: odd sizes, more tokens than a product takes at once, and rows that stay NaN."""

from __future__ import annotations

import pytest
import torch

from batch_harness import BatchHarness
from tolerances import check_close
from tri_mpk.ops import batch_attention
from tri_mpk.ops.append_kv import APPEND_KV
from tri_mpk.ops.batch_attention import BATCH_ATTENTION, block_positions, block_tokens
from tri_mpk.ops.batch_embedding import BATCH_EMBEDDING
from tri_mpk.ops.batch_gated_linear import BATCH_GATED_LINEAR
from tri_mpk.ops.batch_items import BATCH_ITEMS
from tri_mpk.ops.batch_linear import BATCH_LINEAR
from tri_mpk.ops.batch_linear_residual import BATCH_LINEAR_RESIDUAL
from tri_mpk.ops.batch_lm_head import BATCH_LM_HEAD
from tri_mpk.ops.batch_merge import BATCH_MERGE

EPS = 1e-5
NUM_TOKENS = 37  # of 40
WORK = {3: (0, 4), 0: (129, 1), 4: (60, 31), 1: (7, 1)}  # sequence: first position, tokens


@pytest.fixture(scope="module")
def harness():
    torch.manual_seed(0)
    harness = BatchHarness(max_batch_size=5, max_tokens_per_step=40, num_pages=4, max_seq_len=256)
    harness.set_plan(WORK, silent=(3,), vocab_size=50)
    return harness


@pytest.fixture(scope="module")
def results(harness):
    """All ops as one kernel, run for one step: label -> (layer's tensors)."""
    mpk, plan, cases = harness.mpk, harness.plan, {}
    mpk.tensors["page_table"].data.copy_(torch.randperm(20).view(5, 4))
    cases["embed"] = {"weight": harness.input(50, 70), "next_norm": harness.gain(70), "output": harness.residual(70)}
    mpk.batch_embed_layer(plan=plan, **cases["embed"])
    for label, num_rows, k, has_bias in (
        ("linear", 45, 70, True),
        ("long rows", 33, 1100, False),
        ("few", 1, 64, True),
    ):
        bias = harness.input(num_rows) if has_bias else None
        cases[label] = {"input": harness.normed(k), "weight": harness.input(num_rows, k, scale=k**-0.5), "bias": bias}
        cases[label]["output"] = harness.output(40, num_rows)
        mpk.batch_linear_layer(plan=plan, eps=EPS, **cases[label])
    for label, num_rows, k, has_bias in (("residual", 70, 100, True), ("long residual", 130, 600, False)):
        cases[label] = {
            "input": harness.input(40, k),
            "weight": harness.input(num_rows, k, scale=k**-0.5),
            "bias": harness.input(num_rows) if has_bias else None,
            "residual": harness.residual(num_rows),
            "next_norm": harness.gain(num_rows),
        }
        cases[label]["before"] = cases[label]["residual"].x.data.clone()
        mpk.batch_linear_with_residual_layer(plan=plan, **{k: v for k, v in cases[label].items() if k != "before"})
    cases["gated"] = {
        "input": harness.normed(70, parts=33),
        "weight_gate": harness.input(75, 70, scale=0.2),
        "weight_up": harness.input(75, 70, scale=0.2),
        "output": harness.output(40, 75),
    }
    mpk.batch_gated_linear_layer(plan=plan, eps=EPS, **cases["gated"])
    work = cases["work"] = mpk.batch_items_layer(plan=plan, num_q_heads=6, num_kv_heads=2)
    best = harness.output(5, 2), mpk.new_tensor((5, 2), torch.int32, "index")
    head = {"input": harness.normed(70), "weight": harness.input(77, 70, scale=0.2), "logits": harness.output(5, 77)}
    cases["lm_head"] = head | {"best": best}
    mpk.batch_lm_head_layer(work=work, eps=EPS, **cases["lm_head"])
    caches = harness.input(20, 2, 64, 40), harness.input(20, 2, 64, 40)
    harness.changing |= {cache.name for cache in caches}
    cases["caches before"] = [cache.data.clone() for cache in caches]
    angles = torch.randn(256, 20).repeat(1, 2)
    cases["attention"] = {
        "input": harness.input(40, 10 * 40),
        "q": harness.output(40, 6, 40),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cos_pos_embed": harness.attach(angles.cos()),
        "sin_pos_embed": harness.attach(angles.sin()),
        "parts": mpk.new_batch_attention_parts(work, 40, torch.float32, "parts"),
        "output": harness.output(40, 240),
        "q_norm": harness.gain(40),
        "k_norm": harness.gain(40),
    }
    mpk.batch_attention_layer(work=work, scale=0.3, eps=EPS, **cases["attention"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_attention, "BLOCK_BYTES", 16 << 10)  # 64 positions at once: up to three blocks of an item
        harness.run()
    return cases


def is_untouched(tensor: torch.Tensor) -> bool:
    return bool(tensor.isnan().all())


def check_residual(case, x, normed, square):
    output = case["output"] if "output" in case else case["residual"]
    check_close(actual=output.normed.data[:NUM_TOKENS], expected=normed)
    check_close(actual=output.squares.data[:, :NUM_TOKENS].sum(0), expected=square)
    check_close(actual=output.x.data[:NUM_TOKENS], expected=x)
    assert is_untouched(output.normed.data[NUM_TOKENS:]) and is_untouched(output.squares.data[:, NUM_TOKENS:])


def test_embedding(harness, results):
    case, ids = results["embed"], harness.plan.token_ids.data[:NUM_TOKENS]
    check_residual(case, *BATCH_EMBEDDING.reference(ids, case["weight"].data, case["next_norm"].data))


@pytest.mark.parametrize("label", ["linear", "long rows", "few"])
def test_linear(results, label):
    case = results[label]
    x, bias = case["input"], case["bias"]
    expected = BATCH_LINEAR.reference(x.normed.data, x.squares.data, case["weight"].data, EPS, bias and bias.data)
    check_close(actual=case["output"].data[:NUM_TOKENS], expected=expected[:NUM_TOKENS])
    assert is_untouched(case["output"].data[NUM_TOKENS:])


@pytest.mark.parametrize("label", ["residual", "long residual"])
def test_linear_residual(results, label):
    case = results[label]
    bias, h, before = case["bias"], case["input"].data[:NUM_TOKENS], case["before"]
    expected = BATCH_LINEAR_RESIDUAL.reference(
        h, case["weight"].data, before[:NUM_TOKENS], case["next_norm"].data, bias and bias.data
    )
    check_residual(case, *expected)
    assert case["residual"].x.data[NUM_TOKENS:].equal(before[NUM_TOKENS:])


def test_gated_linear(results):
    case = results["gated"]
    x = case["input"]
    weights = case["weight_gate"].data, case["weight_up"].data
    expected = BATCH_GATED_LINEAR.reference(x.normed.data, x.squares.data, *weights, EPS)
    check_close(actual=case["output"].data[:NUM_TOKENS], expected=expected[:NUM_TOKENS])
    assert is_untouched(case["output"].data[NUM_TOKENS:])


def test_items(harness, results):
    work, plan = results["work"], harness.plan
    items, outputs = BATCH_ITEMS.reference(
        plan.token_positions.data, plan.first_token.data, plan.sequence_tokens.data, plan.output_token.data,
        block_tokens(6, 2), work.split_tokens,
    )  # fmt: skip
    num_items, num_outputs = work.counts.data.tolist()
    found = [(item & 0xFFFF, item >> 16, *rest) for item, *rest in work.items.data[:num_items].tolist()]
    assert found == items and len(items) == 10 and (work.items.data[num_items:] == -1).all()
    assert work.outputs.data[:num_outputs].tolist() == outputs == [0, 1, 4]


def test_lm_head(harness, results):
    case, token = results["lm_head"], harness.plan.output_token.data
    x, rows = case["input"], [0, 1, 4]
    expected = BATCH_LM_HEAD.reference(x.normed.data, x.squares.data, case["weight"].data, EPS, token)
    check_close(actual=case["logits"].data[rows], expected=expected)
    values, indices = (tensor.data for tensor in case["best"])
    for part, (lo, hi) in enumerate(((0, 38), (38, 77))):
        best = case["logits"].data[rows, lo:hi].max(-1)
        assert values[rows, part].equal(best.values) and indices[rows, part].long().equal(best.indices + lo)
    assert is_untouched(case["logits"].data[2:4]) and is_untouched(values[2:4]) and (indices[2:4] == -1).all()


def test_append_kv(harness, results):
    case, plan = results["attention"], harness.plan
    positions = plan.token_positions.data[:NUM_TOKENS]
    tables, norms = (case["cos_pos_embed"].data, case["sin_pos_embed"].data), (case["q_norm"].data, case["k_norm"].data)
    q, k, v = APPEND_KV.reference(case["input"].data[:NUM_TOKENS], positions, *tables, 2, 40, 0.3, *norms, EPS)
    check_close(actual=case["q"].data[:NUM_TOKENS], expected=q)
    assert is_untouched(case["q"].data[NUM_TOKENS:])
    for name, new, before in zip(("k_cache", "v_cache"), (k, v), results["caches before"], strict=True):
        for token, position in enumerate(positions.tolist()):
            page = plan.page_table.data[plan.token_sequences.data[token], position // 64]
            before[page, :, position % 64] = new[token]
        check_close(actual=case[name].data, expected=before)


def sequence_cache(harness, cache: torch.Tensor, sequence: int, length: int) -> torch.Tensor:
    """Keys or values [length, Hkv, Dh] of a sequence."""
    pages = cache[harness.plan.page_table.data[sequence].long()]
    return pages.transpose(1, 2).reshape(-1, *pages.shape[1::2])[:length]


def test_attention(harness, results):
    case, plan = results["attention"], harness.plan
    for sequence, (position, count) in WORK.items():
        first = int(plan.first_token.data[sequence])
        tokens = slice(first, first + count)
        k, v = (sequence_cache(harness, case[n].data, sequence, position + count) for n in ("k_cache", "v_cache"))
        positions = torch.arange(position, position + count)
        expected = BATCH_ATTENTION.reference(case["q"].data[tokens], k, v, positions)
        check_close(actual=case["output"].data[tokens].view(count, 6, 40), expected=expected)
    assert is_untouched(case["output"].data[NUM_TOKENS:])
    parts, lse = (tensor.data for tensor in case["parts"])
    merged = BATCH_MERGE.reference(parts[:, 5], lse[:, 5])
    assert parts.shape[0] == 1 and torch.allclose(merged, case["output"].data[5])


def test_merge_of_several_parts():
    parts, lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    expected = sum(parts[i] * 2 ** lse[i, :, None] for i in range(3)) / (2**lse).sum(0)[:, None]
    check_close(actual=BATCH_MERGE.reference(parts, lse), expected=expected.view(-1))


def test_positions_that_are_loaded_at_once():
    for split_tokens, head_dim, expected in ((256, 128, 128), (512, 80, 128), (256, 256, 64), (256, 64, 128)):
        assert block_positions(split_tokens, head_dim, itemsize=2) == expected
