"""Layers that process the tokens of many sequences in one step, and the plan of the step that they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tri_mpk.batch_state import BatchState, new_state
from tri_mpk.ops.advance import ADVANCE, RingSizes
from tri_mpk.ops.append_kv import APPEND_KV
from tri_mpk.ops.attention import default_scale
from tri_mpk.ops.batch_attention import BATCH_ATTENTION, block_tokens, num_item_parts
from tri_mpk.ops.batch_embedding import BATCH_EMBEDDING
from tri_mpk.ops.batch_gated_linear import BATCH_GATED_LINEAR
from tri_mpk.ops.batch_items import BATCH_ITEMS, ITEM_WORDS
from tri_mpk.ops.batch_linear import BATCH_LINEAR
from tri_mpk.ops.batch_linear_residual import BATCH_LINEAR_RESIDUAL
from tri_mpk.ops.batch_lm_head import BATCH_LM_HEAD
from tri_mpk.ops.batch_merge import BATCH_MERGE
from tri_mpk.ops.batch_sample import BATCH_SAMPLE
from tri_mpk.ops.end_step import RANK_END_STEP
from tri_mpk.ops.host_words import HOST_WORDS
from tri_mpk.ops.op import TensorHandle
from tri_mpk.ops.rank_batch_embedding import RANK_BATCH_EMBEDDING
from tri_mpk.ops.rank_batch_gather import RANK_BATCH_GATHER
from tri_mpk.ops.rank_batch_linear import RANK_BATCH_LINEAR
from tri_mpk.ops.rank_batch_residual import RANK_BATCH_RESIDUAL, num_blocks
from tri_mpk.ops.sample import score_size
from tri_mpk.ops.sampling import MAX_VOCAB, NUM_INDICES, NUM_SCRATCH
from tri_mpk.persistent_kernel import PersistentKernel, check_dims, matrix_dims
from tri_mpk.runtime import LaunchRequest

MAX_TOKENS_PER_STEP = 1 << 15  # an item of attention has 16 bits for its first token, and the sign
SPLIT_TOKENS = 256  # of the KV cache that an item of attention has, unless there would be more than MAX_SPLITS
MAX_SPLITS = 32


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which tokens a step processes. All are int32, S = sequences at most, T = tokens per step at most.

    Tokens of a sequence are neighbours, in the order of their positions.
    """

    num_tokens: TensorHandle  # [1]; 0: nothing to do
    token_ids: TensorHandle  # [T]
    token_positions: TensorHandle  # [T] each in its sequence
    token_sequences: TensorHandle  # [T]
    first_token: TensorHandle  # [S] of a sequence in this step
    sequence_tokens: TensorHandle  # [S] how many it has, 0: none
    output_token: TensorHandle  # [S] whose logits choose the next token; -1: none do
    page_table: TensorHandle  # [S, pages of a sequence]

    def tensors(self) -> dict[str, TensorHandle]:
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def max_tokens(self) -> int:
        return self.token_ids.numel

    @property
    def max_sequences(self) -> int:
        return self.first_token.numel


@dataclass(frozen=True, slots=True)
class StepWork:
    """What `batch_items_layer` makes of a plan: see ops/batch_items.py."""

    plan: StepPlan
    items: TensorHandle
    outputs: TensorHandle
    counts: TensorHandle
    num_q_heads: int
    num_kv_heads: int
    split_tokens: int

    @property
    def max_splits(self) -> int:
        return self.items.dims[0] // self.plan.max_tokens


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream, as whoever adds to it leaves it for the next matrix."""

    hidden_size: int  # D
    x: TensorHandle  # [T, D] fp32; on several ranks this rank's columns of it
    normed: TensorHandle  # [T, D] in the weights' type: x * gain of the next norm
    squares: TensorHandle  # [parts, T] fp32: sums of x^2
    parts: TensorHandle | None = None  # [ranks, T, columns of a rank], on several ranks: what each adds to x


class BatchKernel(PersistentKernel):
    """A PersistentKernel whose steps process up to `max_tokens_per_step` tokens of `max_batch_size` sequences.

    The layers here take the place of those for one token. Weights come by Triton's pipelined loads: there is no ring.
    """

    def __init__(self, *args, max_batch_size: int, max_tokens_per_step: int, **kwargs):
        super().__init__(*args, **kwargs)
        for name, value in (("max_batch_size", max_batch_size), ("max_tokens_per_step", max_tokens_per_step)):
            if not 1 <= value <= MAX_TOKENS_PER_STEP:
                raise ValueError(f"{name}={value} must be from 1 to {MAX_TOKENS_PER_STEP}")
        self.max_batch_size, self.max_tokens_per_step = max_batch_size, max_tokens_per_step
        self.has_bulk_copies = False  # for a ring, which these layers do not use
        self.step_plan: StepPlan | None = None  # of the steps that `advance_layer` ends
        self.state: BatchState | None = None

    # ---- tensors ----

    def new_step_plan(self, num_pages: int) -> StepPlan:
        """`num_pages`: of a sequence. All zeros, no sequence has an output token, and pages are dealt out in order."""
        tokens, sequences = self.max_tokens_per_step, self.max_batch_size

        def attach(name: str, *dims: int, fill: int = 0) -> TensorHandle:
            return self.attach_input(torch.full(dims, fill, dtype=torch.int32, device=self.device), name=name)

        pages = torch.arange(sequences * num_pages, dtype=torch.int32, device=self.device).view(sequences, num_pages)
        return StepPlan(
            attach("num_tokens", 1),
            attach("token_ids", tokens),
            attach("token_positions", tokens),
            attach("token_sequences", tokens),
            attach("first_token", sequences),
            attach("sequence_tokens", sequences),
            attach("output_token", sequences, fill=-1),
            self.attach_input(pages, name="page_table"),
        )

    def new_residual(
        self, hidden_size: int, dtype: torch.dtype, name: str, reduce_dtype: torch.dtype = torch.float32
    ) -> Residual:
        """`reduce_dtype`: of what ranks send each other to be added up."""
        tokens, ranks = self.max_tokens_per_step, self.world_size
        if hidden_size % ranks:
            raise ValueError(
                f"hidden_size={hidden_size} cannot be shared out among {ranks} ranks; choose a number that divides it"
            )
        if ranks > 1:
            width = hidden_size // ranks
            return Residual(
                hidden_size,
                self.new_tensor((tokens, width), torch.float32, name),
                self.new_tensor((ranks, tokens * width), dtype, f"{name}.normed", symmetric=True),
                self.new_tensor((ranks, num_blocks(width) * tokens), torch.float32, f"{name}.squares", symmetric=True),
                self.new_tensor((ranks, tokens * width), reduce_dtype, f"{name}.parts", symmetric=True),
            )
        return Residual(
            hidden_size,
            self.new_tensor((tokens, hidden_size), torch.float32, name),
            self.new_tensor((tokens, hidden_size), dtype, f"{name}.normed"),
            self.new_tensor((min(hidden_size, self.num_workers), tokens), torch.float32, f"{name}.squares"),
        )

    def new_best(self) -> tuple[TensorHandle, TensorHandle]:
        """Best value fp32 and index int32 [S, tasks], for batch_lm_head_layer."""
        dims = (self.max_batch_size, self.num_workers)
        return self.new_tensor(dims, torch.float32, "best_value"), self.new_tensor(dims, torch.int32, "best_index")

    # ---- layers ----

    def host_words_layer(
        self, *, page_size: int, num_pages: int, rings: RingSizes | None = None, label: str = "host words"
    ) -> BatchState:
        """What hosts ask for, read at the beginning of a step: the first layer of a graph that advance_layer ends.

        The KV cache has `num_pages` pages for all sequences together. `rings`: how many requests and results may be on
        their way.
        """
        if page_size < 1 or num_pages < 1:
            raise ValueError(f"page_size={page_size} and num_pages={num_pages} must be at least 1")
        state = new_state(self, page_size, num_pages, rings)
        tensors = {"slots": state.slots, "counters": state.counters, "asked": state.asked}
        self._call(HOST_WORDS, label, None, None, tensors, rings=state.rings, rank=self.rank)
        return state

    def batch_items_layer(
        self, *, plan: StepPlan, num_q_heads: int, num_kv_heads: int, label: str | None = None
    ) -> StepWork:
        """What there is to do for attention and the language model head in this step."""
        max_splits = min(MAX_SPLITS, -(-self.max_seq_len // SPLIT_TOKENS))
        split_tokens = -(-self.max_seq_len // (max_splits * SPLIT_TOKENS)) * SPLIT_TOKENS
        work = StepWork(
            plan,
            self.new_tensor((plan.max_tokens * max_splits, ITEM_WORDS.value), torch.int32, "items"),
            self.new_tensor((plan.max_sequences,), torch.int32, "outputs"),
            self.new_tensor((2,), torch.int32, "counts"),
            num_q_heads,
            num_kv_heads,
            split_tokens,
        )
        tensors = {
            "num_tokens": plan.num_tokens, "token_positions": plan.token_positions,
            "token_sequences": plan.token_sequences, "first_token": plan.first_token,
            "sequence_tokens": plan.sequence_tokens, "output_token": plan.output_token,
            "items": work.items, "outputs": work.outputs, "counts": work.counts,
        }  # fmt: skip
        tokens = block_tokens(num_q_heads, num_kv_heads)
        self._call(BATCH_ITEMS, label, None, None, tensors, block_tokens=tokens, split_tokens=split_tokens)
        return work

    def batch_embed_layer(
        self,
        *,
        plan: StepPlan,
        weight: TensorHandle,
        next_norm: TensorHandle,
        output: Residual,
        label: str | None = None,
        policy: str | None = None,
        first_row: int = 0,
    ) -> None:
        """output.x [T, D] = weight[token_ids], weight [V, D]; next_norm [D] is the gain of the norm that comes next.

        On several ranks `weight` are the table's rows from `first_row` on; other ranks have the others.
        """
        _check_residual("batch_embed_layer", output, weight.dims[1], next_norm)
        if output.parts:
            tensors = {
                "num_tokens": plan.num_tokens, "token_ids": plan.token_ids, "weight": weight, "parts": output.parts
            }  # fmt: skip
            self._call(RANK_BATCH_EMBEDDING, label, None, policy, tensors, rank=self.rank, first_row=first_row)
            self._add_parts(plan, output, next_norm, label, is_first=True)
            return
        tensors = {
            "num_tokens": plan.num_tokens, "token_ids": plan.token_ids, "weight": weight, "gain": next_norm,
            "output": output.x, "normed": output.normed, "squares": output.squares,
        }  # fmt: skip
        self._call(BATCH_EMBEDDING, label, None, policy, tensors)

    def batch_linear_layer(
        self,
        *,
        plan: StepPlan,
        input: Residual,
        weight: TensorHandle,
        output: TensorHandle,
        bias: TensorHandle | None = None,
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output [T, N] = weight [N, D] @ rmsnorm(input) + bias [N]."""
        num_rows, hidden_size = matrix_dims("batch_linear_layer", weight)
        _check_hidden_size("batch_linear_layer", input, hidden_size)
        check_dims("batch_linear_layer", output, "output", (plan.max_tokens, num_rows))
        if bias:
            check_dims("batch_linear_layer", bias, "bias", (num_rows,))
        tensors = {
            "num_tokens": plan.num_tokens, "input": input.normed, "squares": input.squares, "weight": weight,
            "output": output, "bias": bias,
        }  # fmt: skip
        self._call(BATCH_LINEAR, label, grid_dim, policy, tensors, eps=eps)

    def batch_linear_with_residual_layer(
        self,
        *,
        plan: StepPlan,
        input: TensorHandle,
        weight: TensorHandle,
        residual: Residual,
        next_norm: TensorHandle,
        bias: TensorHandle | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """residual.x [T, N] += weight [N, K] @ input [T, K] + bias [N]; next_norm [N] as in batch_embed_layer."""
        num_rows, k = matrix_dims("batch_linear_with_residual_layer", weight)
        check_dims("batch_linear_with_residual_layer", input, "input", (plan.max_tokens, k))
        _check_residual("batch_linear_with_residual_layer", residual, num_rows, next_norm)
        if bias:
            check_dims("batch_linear_with_residual_layer", bias, "bias", (num_rows,))
        if residual.parts:
            tensors = {
                "num_tokens": plan.num_tokens, "input": input, "weight": weight, "bias": bias, "parts": residual.parts
            }  # fmt: skip
            self._call(RANK_BATCH_LINEAR, label, None, policy, tensors, rank=self.rank)
            self._add_parts(plan, residual, next_norm, label)
            return
        tensors = {
            "num_tokens": plan.num_tokens, "input": input, "weight": weight, "gain": next_norm, "bias": bias,
            "residual": residual.x, "normed": residual.normed, "squares": residual.squares,
        }  # fmt: skip
        self._call(BATCH_LINEAR_RESIDUAL, label, None, policy, tensors)

    def _add_parts(
        self, plan: StepPlan, residual: Residual, next_norm: TensorHandle, label: str | None, is_first: bool = False
    ) -> None:
        """The end of a layer that leaves parts: all ranks together add them to the residual stream."""
        tensors = {
            "num_tokens": plan.num_tokens, "parts": residual.parts, "gain": next_norm, "residual": residual.x,
            "normed": residual.normed, "squares": residual.squares,
        }  # fmt: skip
        label = f"{label or len(self.calls)} sum"
        self._call(RANK_BATCH_RESIDUAL, label, None, None, tensors, rank=self.rank, is_first=is_first)

    def batch_gated_linear_layer(
        self,
        *,
        plan: StepPlan,
        input: Residual,
        weight_gate: TensorHandle,
        weight_up: TensorHandle,
        output: TensorHandle,
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output [T, N] = silu(weight_gate @ x) * (weight_up @ x), x = rmsnorm(input), weights [N, D]."""
        num_rows, hidden_size = matrix_dims("batch_gated_linear_layer", weight_gate)
        check_dims("batch_gated_linear_layer", weight_up, "weight_up", (num_rows, hidden_size))
        _check_hidden_size("batch_gated_linear_layer", input, hidden_size)
        check_dims("batch_gated_linear_layer", output, "output", (plan.max_tokens, num_rows))
        tensors = {
            "num_tokens": plan.num_tokens, "input": input.normed, "squares": input.squares,
            "weight_gate": weight_gate, "weight_up": weight_up, "output": output,
        }  # fmt: skip
        self._call(BATCH_GATED_LINEAR, label, grid_dim, policy, tensors, eps=eps)

    def batch_attention_layer(
        self,
        *,
        work: StepWork,
        input: TensorHandle,
        q: TensorHandle,
        k_cache: TensorHandle,
        v_cache: TensorHandle,
        cos_pos_embed: TensorHandle,
        sin_pos_embed: TensorHandle,
        parts: tuple[TensorHandle, TensorHandle],
        output: TensorHandle,
        q_norm: TensorHandle | None = None,
        k_norm: TensorHandle | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output [T, H * Dh] = attention of tokens whose q, k, v are `input` [T, (H + 2 Hkv) * Dh]. Three ops.

        Caches [num_pages, Hkv, page_size, Dh]; cos and sin [max_seq_len, Dh] fp32; q_norm and k_norm [Dh] as in Qwen3;
        q [T, H, Dh] and parts (of `new_batch_attention_parts`) are scratch, which layers may share.
        """
        plan, label = work.plan, label or f"attention_{len(self.calls)}"
        _, num_kv_heads, page_size, head_dim = k_cache.dims
        tokens, num_q_heads = plan.max_tokens, work.num_q_heads
        if num_kv_heads != work.num_kv_heads:
            raise ValueError(f"batch_attention_layer: {k_cache.name} has {num_kv_heads} heads, not {work.num_kv_heads}")
        check_dims("batch_attention_layer", v_cache, "v_cache", k_cache.dims)
        width = (num_q_heads + 2 * num_kv_heads) * head_dim
        check_dims("batch_attention_layer", input, "input", (tokens, width))
        check_dims("batch_attention_layer", q, "q", (tokens, num_q_heads, head_dim))
        check_dims("batch_attention_layer", output, "output", (tokens, num_q_heads * head_dim))
        check_dims("batch_attention_layer", parts[0], "parts[0]", (work.max_splits, *q.dims))
        of_tokens = {"token_positions": plan.token_positions, "token_sequences": plan.token_sequences}
        cache = {"page_table": plan.page_table, "q": q, "k_cache": k_cache, "v_cache": v_cache}
        append = {
            "num_tokens": plan.num_tokens, "input": input, "cos_pos_embed": cos_pos_embed,
            "sin_pos_embed": sin_pos_embed, "q_norm": q_norm, "k_norm": k_norm,
        }  # fmt: skip
        scale = default_scale(head_dim) if scale is None else scale
        self._call(APPEND_KV, f"{label} append", None, policy, of_tokens | cache | append, scale=scale, eps=eps)
        attend = {
            "counts": work.counts, "items": work.items, "parts": parts[0], "lse": parts[1],
        }  # fmt: skip
        split = {"split_tokens": work.split_tokens}
        self._call(BATCH_ATTENTION, label, None, policy, cache | attend, **split)
        merge = {
            "num_tokens": plan.num_tokens, "token_positions": plan.token_positions,
            "parts": parts[0], "lse": parts[1], "output": output,
        }  # fmt: skip
        num_parts = num_item_parts(num_kv_heads, self.num_workers)
        self._call(
            BATCH_MERGE, f"{label} merge", None, policy, merge, num_kv_heads=num_kv_heads, num_parts=num_parts, **split
        )

    def new_batch_attention_parts(
        self, work: StepWork, head_dim: int, dtype: torch.dtype, name: str
    ) -> tuple[TensorHandle, TensorHandle]:
        """What attention leaves for its merge: parts [max splits, T, H, Dh], and lse [max splits, T, H]."""
        dims = (work.max_splits, work.plan.max_tokens, work.num_q_heads)
        return (
            self.new_tensor((*dims, head_dim), dtype, name=name),
            self.new_tensor(dims, torch.float32, name=f"{name}.lse"),
        )

    def batch_lm_head_layer(
        self,
        *,
        work: StepWork,
        input: Residual,
        weight: TensorHandle,
        logits: TensorHandle,
        best: tuple[TensorHandle, TensorHandle],
        eps: float = 1e-6,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """logits [S, V] fp32 of sequences with an output token; best value and index [S, tasks], of `new_best`."""
        vocab_size, hidden_size = matrix_dims("batch_lm_head_layer", weight)
        plan = work.plan
        _check_hidden_size("batch_lm_head_layer", input, hidden_size)
        if logits.dims[0] != plan.max_sequences or logits.dims[1] < vocab_size:
            raise ValueError(
                f"batch_lm_head_layer: logits has dims {logits.dims}, expected ({plan.max_sequences}, {vocab_size})"
            )
        check_dims("batch_lm_head_layer", best[1], "best[1]", best[0].dims)
        self.vocab_size = vocab_size
        tensors = {
            "num_tokens": plan.num_tokens, "token_sequences": plan.token_sequences, "counts": work.counts,
            "outputs": work.outputs, "output_token": plan.output_token,
            "input": input.normed, "squares": input.squares, "weight": weight,
            "logits": logits, "best_value": best[0], "best_index": best[1],
        }  # fmt: skip
        self._call(BATCH_LM_HEAD, label, None, policy, tensors, eps=eps)

    def batch_gather_layer(
        self,
        *,
        plan: StepPlan,
        state: BatchState,
        best: tuple[TensorHandle, TensorHandle],
        logits: TensorHandle,
        first_row: int,
        num_rows: int,
        vocab_size: int,
        label: str = "gather",
    ) -> tuple[tuple[TensorHandle, TensorHandle], TensorHandle]:
        """Of what batch_lm_head_layer left on several ranks, all that choosing tokens needs: best value and index
        [S, ranks], logits [S, V]. They take the place of `best` and `logits`, which are of `num_rows` of `vocab_size`
        rows from `first_row` on.
        """
        dims, most = (self.world_size, self.max_batch_size), -(-vocab_size // self.world_size)
        all_value = self.new_tensor(dims, torch.float32, "all_best_value", symmetric=True)
        all_index = self.new_tensor(dims, torch.int32, "all_best_index", symmetric=True)
        all_logits = self.new_tensor((dims[0], dims[1] * most), torch.float32, "all_logits", symmetric=True)
        tensors = {
            "output_token": plan.output_token, "records": state.records, "best_value": best[0], "best_index": best[1],
            "logits": logits, "all_value": all_value, "all_index": all_index, "all_logits": all_logits,
        }  # fmt: skip
        rows = {"rank": self.rank, "first_row": first_row, "num_rows": num_rows, "vocab_size": vocab_size}
        self._call(RANK_BATCH_GATHER, label, None, None, tensors, **rows)
        self.vocab_size = vocab_size
        return (all_value, all_index), all_logits

    def advance_layer(
        self,
        *,
        plan: StepPlan,
        state: BatchState,
        input: tuple[TensorHandle, TensorHandle],
        logits: TensorHandle,
        label: str = "advance",
    ) -> None:
        """The end of a step: sequences get their tokens, requests come and go, and the next step gets its plan.

        `input` and `logits` are what batch_lm_head_layer leaves, `state` is what host_words_layer returned. Such a
        kernel is launched by `serve`. On several ranks all do the same, so all must have the same `input` and `logits`,
        as batch_gather_layer returns them.
        """
        if self.max_tokens_per_step < self.max_batch_size:
            raise ValueError(
                f"max_tokens_per_step={self.max_tokens_per_step} must be at least max_batch_size="
                f"{self.max_batch_size}: every sequence that decodes has a token in a step"
            )
        vocab_size = self.vocab_size if logits.symmetric else logits.dims[1]
        if not logits.symmetric:
            check_dims("advance_layer", logits, "logits", (self.max_batch_size, vocab_size))
            check_dims("advance_layer", input[0], "input[0]", (self.max_batch_size, input[0].dims[-1]))
        check_dims("advance_layer", input[1], "input[1]", input[0].dims)
        pages = (self.max_batch_size, -(-self.max_seq_len // state.page_size))
        check_dims("advance_layer", plan.page_table, "page_table", pages)
        if vocab_size > MAX_VOCAB.value:
            raise NotImplementedError(f"a vocabulary of {vocab_size} is not supported; at most {MAX_VOCAB.value} is")
        self.vocab_size = vocab_size
        self.step_plan, self.state = plan, state
        dims = (self.max_batch_size, score_size(vocab_size))
        marks = torch.zeros(dims, dtype=torch.int8, device=self.device)
        chosen = {
            "chosen": self.attach_input(torch.zeros(dims[0], dtype=torch.int32, device=self.device), name="chosen"),
            "logprobs": self.attach_input(torch.zeros(dims[0], device=self.device), name="logprobs"),
        }
        kept = state.tensors()
        sample = {
            "output_token": plan.output_token, "token_positions": plan.token_positions,
            "best_value": input[0], "best_index": input[1], "logits": logits,
            "seen": self.attach_input(marks, name="seen"),
            "scores": self.new_tensor(dims, torch.float32, name="scores"),
            "scratch": self.new_tensor((dims[0], NUM_SCRATCH.value), torch.float32, name="sample.scratch"),
            "indices": self.new_tensor((dims[0], NUM_INDICES.value), torch.int32, name="sample.indices"),
        } | {name: kept[name] for name in ("slots", "records", "tokens")}  # fmt: skip
        self._call(BATCH_SAMPLE, f"{label} sample", None, None, sample | chosen, vocab_size=vocab_size)
        tensors = plan.tensors() | kept | chosen
        self._call(ADVANCE, label, None, None, tensors, rings=state.rings, page_size=state.page_size)
        if self.world_size > 1:
            self._call(RANK_END_STEP, f"{label} end", None, None, {"counters": state.counters})

    # ---- launch ----

    def _mailbox_words(self) -> int:
        return super()._mailbox_words() if self.state is None else self.state.rings.num_words

    def launch(self, request: LaunchRequest) -> Iterator[int]:
        if self.state is not None:
            raise ValueError("a kernel of many sequences takes its requests from rings; use serve, or model.serve")
        return super().launch(request)

    def serve(self) -> AbstractContextManager[None]:
        """A launch that takes requests from the rings in its mailbox until it is told to stop: see tri_mpk/rings.py."""
        if self.state is None:
            raise ValueError("the graph has no advance_layer, so that no request could come in; add one at the end")
        self.compile()
        self.state.reset(self.step_plan)
        return self.runtime.launched(LaunchRequest.of_batches())


def _check_hidden_size(layer: str, residual: Residual, size: int) -> None:
    if residual.hidden_size != size:
        raise ValueError(f"{layer}: the residual stream has {residual.hidden_size} columns, expected {size}")


def _check_residual(layer: str, residual: Residual, size: int, next_norm: TensorHandle) -> None:
    _check_hidden_size(layer, residual, size)
    check_dims(layer, next_norm, "next_norm", (size,))
