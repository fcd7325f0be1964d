"""attention_output: any number of splits merged, projected and added to the residual; the same bits again."""

from __future__ import annotations

import pytest
import torch

from op_harness import OpHarness
from tolerances import check_close
from tri_mpk.ops.attention_output import ATTENTION_OUTPUT
from tri_mpk.tuning import Tuning

SPLIT_TOKENS = 16
TUNING = Tuning(num_workers=2, slot_bytes=4096, block_kv=16, num_splits=8, split_tokens=SPLIT_TOKENS)
SHIFTED = {torch.float32: (1e-3, 1e-3)}  # exponents around 2000 are rounded to 1e-4
# rows, heads, head size, bias, tasks, splits
ALIGNED = [
    (96, 2, 32, False, None, 8),
    (1100, 2, 32, True, None, 5),  # several row blocks per worker, the last one partial
    (70, 8, 128, True, None, 8),  # several blocks of columns
    (37, 4, 64, False, 5, 3),  # tasks of unequal length
    (1, 1, 32, False, None, 1),  # fewer rows than workers
]
ODD = [(33, 3, 34, True, None, 8), (64, 7, 80, False, 4, 4), (5, 13, 38, True, 2, 2)]  # rows start unaligned


@pytest.fixture(scope="module", params=[ALIGNED, ODD], ids=["aligned", "odd"])
def harness(request):
    torch.manual_seed(0)
    harness = OpHarness(max_seq_len=8 * SPLIT_TOKENS + 2, tuning=TUNING)
    harness.cases = [Case(harness, *shape) for shape in request.param]
    harness.compile()
    return harness


class Case:
    def __init__(self, harness: OpHarness, num_rows: int, num_heads: int, head_dim: int, bias: bool, tasks, splits):
        self.num_splits = splits
        # weights that differ much between splits and heads
        self.all_parts, self.all_lse = torch.randn(splits, num_heads, head_dim), 3 * torch.randn(splits, num_heads) + 5
        self.parts, self.lse = harness.attach(self.all_parts.clone()), harness.attach(self.all_lse.clone())
        k = num_heads * head_dim
        self.weight, self.residual = harness.input(num_rows, k, scale=k**-0.5), harness.input(num_rows)
        self.bias = harness.input(num_rows) if bias else None
        self.output = harness.output(num_rows)
        harness.mpk.attention_output_layer(
            input=(self.parts, self.lse), weight=self.weight, residual=self.residual, output=self.output,
            bias=self.bias, grid_dim=tasks,
        )  # fmt: skip

    def activate(self, num_splits: int) -> int:
        """The first splits are as they were, NaN in all others. Returns how many that are."""
        active = min(num_splits, self.num_splits)
        for handle, whole in ((self.parts, self.all_parts), (self.lse, self.all_lse)):
            handle.data.copy_(whole)
            handle.data[active:] = float("nan")
        return active

    def expected(self, active: int) -> torch.Tensor:
        return ATTENTION_OUTPUT.reference(
            self.parts.data[:active], self.lse.data[:active], self.weight.data, self.residual.data,
            self.bias and self.bias.data,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "num_splits"), [(0, 1), (16, 1), (17, 2), (32, 2), (48, 3), (49, 4), (80, 5), (96, 6), (112, 7), (128, 8)]
)
def test_active_splits_are_merged_and_no_others_read(harness, step, num_splits):
    active = [case.activate(num_splits) for case in harness.cases]
    harness.run(step=step)
    for case, count in zip(harness.cases, active, strict=True):
        check_close(actual=case.output.data, expected=case.expected(count))


def test_weights_far_beyond_fp32(harness):
    """2^lse of none of these is a number: only their differences may be exponents."""
    for sign in (1.0, -1.0):
        for case in harness.cases:
            case.activate(8)
            case.lse.data.add_(sign * 2000.0)
        harness.run(step=128)
        for case in harness.cases:
            check_close(actual=case.output.data, expected=case.expected(case.num_splits), table=SHIFTED)


def test_a_split_that_weighs_all(harness):
    """The others' shares are zeros, whatever they hold, and wherever in the order the heavy one is."""
    for heavy in range(3):
        for case in harness.cases:
            case.activate(8)
            case.lse.data.fill_(-500.0)
            case.lse.data[heavy % case.num_splits] = 500.0
        harness.run(step=128)
        for case in harness.cases:
            only = case.parts.data[heavy % case.num_splits].view(-1)
            expected = case.residual.data + case.weight.data @ only + (0.0 if case.bias is None else case.bias.data)
            check_close(actual=case.output.data, expected=expected)


def test_a_task_reads_whole_rows_and_all_parts(harness):
    for op, case in enumerate(harness.cases):
        num_rows, k = case.weight.dims
        tasks = harness.tasks(op)
        assert sum(task.fields["num_rows"] for task in tasks) == num_rows == case.output.numel
        splits, heads, _ = case.parts.dims
        for task in tasks:
            lo = task.fields["row0"]
            hi = lo + task.fields["num_rows"]
            assert {
                case.parts.box((0, splits), (0, heads)), case.lse.box((0, splits), (0, heads)),
                case.weight.span(lo * k, hi * k), case.residual.span(lo, hi),
            } <= set(task.reads)  # fmt: skip
            assert case.bias is None or case.bias.span(lo, hi) in task.reads
            assert task.writes == (case.output.span(lo, hi),)


@pytest.mark.parametrize("step", [0, 50, 128])
def test_same_bits_again(harness, step):
    for case in harness.cases:
        case.activate(8)
    harness.run(step=step)
    first = [case.output.data.clone() for case in harness.cases]
    harness.run(step=step)
    assert all(torch.equal(a, case.output.data) for a, case in zip(first, harness.cases, strict=True))


def test_the_reference_equals_softmax():
    """What the op is defined by: softmaxes of parts, weighed by their sums of exponentials, are the whole one."""
    scores, values = torch.randn(5, 30), torch.randn(30, 8)  # 5 heads, in base 2
    ranges = [(0, 7), (7, 8), (8, 30)]
    shares = [torch.exp2(scores[:, lo:hi]) for lo, hi in ranges]
    parts = torch.stack(
        [w / w.sum(1, keepdim=True) @ values[lo:hi] for w, (lo, hi) in zip(shares, ranges, strict=True)]
    )
    lse = torch.stack([w.sum(1).log2() for w in shares])
    merged = ATTENTION_OUTPUT.reference(parts, lse, torch.eye(40), torch.zeros(40))
    expected = torch.softmax(scores * torch.log(torch.tensor(2.0)), -1) @ values
    check_close(actual=merged.view(5, 8), expected=expected)
