"""Batch ops as a kernel of their own, for one step whose plan the test gives: see op_harness."""

from __future__ import annotations

import torch

from op_harness import OpHarness
from tri_mpk.batch_kernel import BatchKernel, Residual, StepPlan
from tri_mpk.ops.op import TensorHandle


class BatchHarness(OpHarness):
    def __init__(
        self, max_batch_size: int, max_tokens_per_step: int, num_pages: int, max_seq_len: int, num_workers: int = 2
    ):
        super().__init__(num_workers, max_seq_len)
        self.mpk = BatchKernel(
            num_workers=num_workers, meta_tensors=[self.mpk.step.data, self.mpk.tokens.data], wait_bound_s=30.0,
            max_batch_size=max_batch_size, max_tokens_per_step=max_tokens_per_step,
        )  # fmt: skip
        self.plan: StepPlan = self.mpk.new_step_plan(num_pages)

    def residual(self, size: int) -> Residual:
        """One that ops add to: with random numbers in it."""
        tokens, parts = self.mpk.max_tokens_per_step, min(size, self.mpk.num_workers)
        x = self.input(tokens, size)
        self.changing.add(x.name)
        return Residual(size, x, self.output(tokens, size), self.output(parts, tokens))

    def normed(self, size: int, parts: int = 3) -> Residual:
        """One that ops read: random numbers, and squares that they could have."""
        tokens = self.mpk.max_tokens_per_step
        squares = self.attach(torch.rand(parts, tokens) * size / parts + 0.1)
        return Residual(size, self.input(tokens, size), self.input(tokens, size), squares)

    def set_plan(self, work: dict[int, tuple[int, int]], silent: tuple[int, ...] = (), vocab_size: int = 2) -> None:
        """`work`: for each sequence the position of its first token and the number of tokens, in this order."""
        fill_plan(self.plan, {s: (p, torch.randint(vocab_size, (n,)).tolist()) for s, (p, n) in work.items()}, silent)


def fill_plan(plan: StepPlan, work: dict[int, tuple[int, list[int]]], silent: tuple[int, ...] = ()) -> None:
    """`work`: for each sequence the position of its first token, and the tokens. Those in `silent` choose none.

    What is not part of the plan holds numbers that no kernel could bear to use.
    """
    tensors: dict[str, TensorHandle] = {name: getattr(plan, name).data for name in plan.__slots__}
    for name in ("token_ids", "token_positions", "token_sequences", "first_token"):
        tensors[name].fill_(1 << 28)
    tensors["sequence_tokens"].zero_()
    tensors["output_token"].fill_(-1)
    at = 0
    for sequence, (position, ids) in work.items():
        tensors["first_token"][sequence] = at
        tensors["sequence_tokens"][sequence] = len(ids)
        end = at + len(ids)
        tensors["token_ids"][at:end] = torch.tensor(ids, dtype=torch.int32)
        tensors["token_positions"][at:end] = torch.arange(position, position + len(ids))
        tensors["token_sequences"][at:end] = sequence
        at = end
        if ids and sequence not in silent:
            tensors["output_token"][sequence] = at - 1
    tensors["num_tokens"].fill_(at)
