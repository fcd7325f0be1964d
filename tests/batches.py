"""Decoders that process many tokens in a step, driven by the host one step at a time."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from transformers import PreTrainedModel

from batch_harness import fill_plan
from decoders import tiny_config, transformers_model
from repeat_step import REPEAT_STEP
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.models import describe
from tri_mpk.models.batch_decoder import build_batch
from tri_mpk.runtime import LaunchRequest


class BatchDecoder:
    """A BatchKernel whose plans the host writes: one launch is one step. Pages are dealt out at random."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch_size: int = 4,
        max_tokens_per_step: int = 16,
        max_seq_len: int = 64,
        page_size: int = 64,
        num_workers: int | None = 2,
        policy: str = "static",
    ):
        device = model.device
        step, tokens = torch.zeros(1, dtype=torch.int32), torch.zeros(max_seq_len, dtype=torch.int64)
        self.kernel = BatchKernel(
            num_workers=num_workers, meta_tensors=[step.to(device), tokens.to(device)], wait_bound_s=30.0,
            policy=policy, max_batch_size=max_batch_size, max_tokens_per_step=max_tokens_per_step,
        )  # fmt: skip
        self.model = model
        self.output = build_batch(self.kernel, describe(model.config, max_seq_len), model, page_size, progress=False)
        self.kernel.op_layer(REPEAT_STEP, logits=self.output.logits, label="end")
        self.random = torch.Generator().manual_seed(2)
        self.lengths = [0] * max_batch_size  # tokens of each sequence in the cache
        self.texts: list[list[int]] = [[] for _ in range(max_batch_size)]

    def compile(self) -> None:
        if self.kernel.runtime is not None:
            return
        own = {handle.name for handle in self.kernel.tensors.values() if handle.data is None}
        self.kernel.compile()
        for handle in self.kernel.tensors.values():  # what no step has written must not matter
            if handle.name in own or handle.name.endswith("_cache"):
                handle.data.fill_(float("nan") if handle.dtype.is_floating_point else 1 << 28)
        pages = self.output.plan.page_table.data
        order = torch.randperm(pages.numel(), generator=self.random, dtype=torch.int32)
        pages.copy_(order.view(pages.shape))

    @cached_property
    def theirs(self) -> PreTrainedModel:
        """transformers' model with the same weights, in fp32."""
        return copy.deepcopy(self.model).float()

    def forget(self) -> None:
        """All sequences are empty."""
        self.lengths = [0] * len(self.lengths)
        self.texts = [[] for _ in self.texts]

    def tokens(self, *lengths: int) -> list[list[int]]:
        return [torch.randint(96, (n,), generator=self.random).tolist() for n in lengths]

    def step(self, work: dict[int, list[int]], silent: tuple[int, ...] = (), repeats: int = 1) -> torch.Tensor:
        """One step in which sequences get these tokens, in this order. Logits [S, V]; NaN rows of those without.

        Sequences in `silent` choose no token: their prompt goes on. `repeats`: the same step again, in one launch.
        """
        self.compile()
        fill_plan(self.output.plan, {s: (self.lengths[s], ids) for s, ids in work.items()}, silent)
        for sequence, ids in work.items():
            self.lengths[sequence] += len(ids)
            self.texts[sequence] += ids
        for handle in (self.output.logits, self.output.best_value):
            handle.data.fill_(float("nan"))
        self.output.best_index.data.fill_(-1)
        self.kernel.step.data.zero_()
        assert list(self.kernel.runtime.run(LaunchRequest(1 << 20, repeats - 1))) == []
        return self.output.logits.data.clone()

    def expected(self, sequence: int, model: PreTrainedModel | None = None) -> torch.Tensor:
        """Logits [V] of transformers (of `theirs`) after all that a sequence has been given."""
        model = self.theirs if model is None else model
        with torch.no_grad():
            return model(torch.tensor([self.texts[sequence]], device=model.device)).logits[0, -1].float()


def tiny_batches(family: str = "llama", changes: dict | None = None, **parameters: object) -> BatchDecoder:
    """A tiny model with random weights, on two worker processes."""
    return BatchDecoder(transformers_model(tiny_config(family, **changes or {})), **parameters)
