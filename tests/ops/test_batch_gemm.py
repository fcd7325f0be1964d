"""The matrix ops with few, some and many tokens: other loops, which leave the same numbers."""

from __future__ import annotations

import pytest
import torch

from batch_harness import BatchHarness
from tolerances import check_close
from tri_mpk.ops.batch_gated_linear import BATCH_GATED_LINEAR
from tri_mpk.ops.batch_gemm import MANY, halves
from tri_mpk.ops.batch_linear import BATCH_LINEAR
from tri_mpk.ops.batch_linear_residual import BATCH_LINEAR_RESIDUAL
from tri_mpk.ops.batch_lm_head import BATCH_LM_HEAD

EPS = 1e-5
MAX_TOKENS = 300
NUM_TOKENS = [1, 32, 33, 64, 65, 256, 257, 300]
SHAPES = [(96, 300), (45, 129)]  # rows, columns; tasks of one block of rows, and of one for which K is cut in halves


@pytest.fixture(scope="module", params=NUM_TOKENS)
def case(request):
    """Each op once, for a step of so many tokens, each of which is a sequence's last."""
    torch.manual_seed(request.param)
    num_tokens = request.param
    harness = BatchHarness(max_batch_size=MAX_TOKENS, max_tokens_per_step=MAX_TOKENS, num_pages=1, max_seq_len=64)
    harness.set_plan({s: (0, 1) for s in range(num_tokens)})
    mpk, plan, ops = harness.mpk, harness.plan, {"num_tokens": num_tokens}
    for rows, k in SHAPES:
        linear = {"input": harness.normed(k), "weight": harness.input(rows, k, scale=k**-0.5)}
        linear["output"] = harness.output(MAX_TOKENS, rows)
        mpk.batch_linear_layer(plan=plan, eps=EPS, **linear)
        residual = {"input": harness.input(MAX_TOKENS, k), "weight": linear["weight"]}
        residual |= {"residual": harness.residual(rows), "next_norm": harness.gain(rows)}
        before = residual["residual"].x.data.clone()
        mpk.batch_linear_with_residual_layer(plan=plan, **residual)
        gated = {"input": linear["input"], "weight_gate": linear["weight"]}
        gated |= {"weight_up": harness.input(rows, k, scale=k**-0.5), "output": harness.output(MAX_TOKENS, rows)}
        mpk.batch_gated_linear_layer(plan=plan, eps=EPS, **gated)
        ops[rows] = linear, residual | {"before": before}, gated
    work = mpk.batch_items_layer(plan=plan, num_q_heads=2, num_kv_heads=1)
    best = harness.output(MAX_TOKENS, 2), mpk.new_tensor((MAX_TOKENS, 2), torch.int32, "index")
    head = {"input": ops[96][0]["input"], "weight": harness.input(130, 300, scale=300**-0.5)}
    head["logits"] = harness.output(MAX_TOKENS, 130)
    mpk.batch_lm_head_layer(work=work, eps=EPS, best=best, **head)
    ops["lm_head"] = head | {"best": best}
    harness.run()
    return ops


def check(actual: torch.Tensor, expected: torch.Tensor, num_tokens: int) -> None:
    check_close(actual=actual[:num_tokens], expected=expected[:num_tokens])
    assert actual[num_tokens:].isnan().all()


@pytest.mark.parametrize("rows", [rows for rows, _ in SHAPES])
def test_matrices(case, rows):
    linear, residual, gated = case[rows]
    x = linear["input"]
    normed = x.normed.data, x.squares.data
    check(linear["output"].data, BATCH_LINEAR.reference(*normed, linear["weight"].data, EPS), case["num_tokens"])
    weights = gated["weight_gate"].data, gated["weight_up"].data
    check(gated["output"].data, BATCH_GATED_LINEAR.reference(*normed, *weights, EPS), case["num_tokens"])
    tokens, gain = slice(case["num_tokens"]), residual["next_norm"].data
    expected, normed, squares = BATCH_LINEAR_RESIDUAL.reference(
        residual["input"].data[tokens], residual["weight"].data, residual["before"][tokens], gain
    )
    output = residual["residual"]
    check_close(actual=output.x.data[tokens], expected=expected)
    assert output.x.data[case["num_tokens"] :].equal(residual["before"][case["num_tokens"] :])
    check(output.normed.data, normed, case["num_tokens"])
    check_close(actual=output.squares.data[:, tokens].sum(0), expected=squares)


def test_logits(case):
    head, num_tokens = case["lm_head"], case["num_tokens"]
    x, token = head["input"], torch.arange(num_tokens)
    expected = BATCH_LM_HEAD.reference(x.normed.data, x.squares.data, head["weight"].data, EPS, token)
    check(head["logits"].data, expected, num_tokens)
    for part, columns in enumerate((slice(0, 65), slice(65, 130))):
        best = head["logits"].data[:num_tokens, columns].max(-1)
        assert head["best"][0].data[:num_tokens, part].equal(best.values)
        assert head["best"][1].data[:num_tokens, part].long().equal(best.indices + columns.start)


def test_both_forms_are_tested():
    assert max(NUM_TOKENS) > MANY.value and [halves(rows // 2) for rows, _ in SHAPES] == [1, 2]
