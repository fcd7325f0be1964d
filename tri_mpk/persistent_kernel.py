"""The graph API: build a model from fused ops on named tensors, compile it to one kernel, launch it.

Names follow Mirage's PersistentKernel, so that its users find their way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from tri_mpk.distributed import Ranks, connect
from tri_mpk.errors import DeviceError
from tri_mpk.gpu_profile import GpuProfile, find_profile
from tri_mpk.ops.add_parts import ADD_PARTS
from tri_mpk.ops.all_gather import ALL_GATHER
from tri_mpk.ops.argmax import ARGMAX, MAILBOX_TOKENS
from tri_mpk.ops.attention import ATTENTION, default_scale
from tri_mpk.ops.attention_output import ATTENTION_OUTPUT
from tri_mpk.ops.batch_attention import BATCH_ATTENTION
from tri_mpk.ops.embedding import EMBEDDING
from tri_mpk.ops.linear_residual import LINEAR_RESIDUAL
from tri_mpk.ops.lm_head import LM_HEAD
from tri_mpk.ops.op import Op, OpCall, Policy, TensorHandle
from tri_mpk.ops.rank_argmax import RANK_ARGMAX
from tri_mpk.ops.rank_attention_output import RANK_ATTENTION_OUTPUT
from tri_mpk.ops.rank_embedding import RANK_EMBEDDING
from tri_mpk.ops.rank_linear import RANK_LINEAR
from tri_mpk.ops.rank_lm_head import RANK_LM_HEAD
from tri_mpk.ops.rank_rmsnorm_gated_linear import RANK_RMSNORM_GATED_LINEAR
from tri_mpk.ops.rank_rmsnorm_linear import RANK_RMSNORM_LINEAR
from tri_mpk.ops.rank_sample import RANK_SAMPLE
from tri_mpk.ops.rmsnorm_gated_linear import RMSNORM_GATED_LINEAR
from tri_mpk.ops.rmsnorm_linear import RMSNORM_LINEAR
from tri_mpk.ops.sample import SAMPLE, score_size
from tri_mpk.ops.sampling import MAX_VOCAB, NUM_INDICES, NUM_SCRATCH
from tri_mpk.ops.stop_request import STOP_REQUEST
from tri_mpk.program import Program, kernel_constants, plan
from tri_mpk.runtime import CudaRuntime, InterpreterRuntime, LaunchRequest, Runtime, shared_memory_limit
from tri_mpk.sampling import Sampling
from tri_mpk.scheduler.peers import MAX_RANKS
from tri_mpk.tuning import Tuning, choose_tuning, largest_block_kv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
POLICIES = ("static", "hybrid", "dynamic")
RING_SHARED_BYTES = 200 << 10  # less than this holds no weight rings worth having


class PersistentKernel:
    """A model graph and the persistent kernel made of it.

        mpk = PersistentKernel(world_size=1, rank=0, meta_tensors=[step, tokens])
        x = mpk.new_tensor((hidden_size,), torch.float32, name="x")
        mpk.embed_layer(input=mpk.tokens, weight=mpk.attach_input(table, name="table"), output=x)
        ...
        mpk.compile()
        mpk(num_tokens=prompt_length, max_new_tokens=100)   # tokens[prompt_length:] is now filled in

    Args:
        world_size, rank: as in torch.distributed. On several ranks every rank builds the same graph on its shards, and
            layers meet in symmetric tensors. `compile` is then a collective call, and every launch too.
        num_workers: persistent programs; None: one per SM (on a CPU one process per core, 2 to 4).
        meta_tensors: `step` int32 [1], the position of the next token to process, and `tokens` int64 [max_seq_len] or
            [1, max_seq_len]. The kernel reads and writes both.
        wait_bound_s: a wait inside the kernel that lasts longer ends the launch with MegakernelTimeout.
        profile: tasks leave time stamps, which `tri_mpk.profiler.read_profile` reads after a launch.
        tuning: the kernel's knobs, number of workers included; None: the cost model's choice for this GPU and for the
            first attention layer.
        policy: who decides which worker runs a task. "static": the host, before the launch. "dynamic": whichever worker
            is free takes the next task that has become ready. "hybrid": attention is dynamic, all else static. Layers
            have a `policy` of their own, "static" or "dynamic", which comes first. Where a matrix is dynamic, weights
            do not come through rings. One rank only.
        ranks: the connection to the other ranks; None: `compile` makes one from torch.distributed's world.
    """

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        num_workers: int | None = None,
        meta_tensors: Sequence[torch.Tensor] = (),
        *,
        wait_bound_s: float = 10.0,
        profile: bool = False,
        tuning: Tuning | None = None,
        policy: str = "static",
        ranks: Ranks | None = None,
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not supported; choose one of {', '.join(POLICIES)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}")
        if world_size > MAX_RANKS:
            raise NotImplementedError(f"world_size={world_size} is not supported; at most {MAX_RANKS} ranks are")
        if world_size > 1 and policy != "static":
            raise NotImplementedError(f"policy={policy!r} is not supported on several ranks so far; leave it out")
        if len(meta_tensors) != 2:
            raise ValueError(f"meta_tensors must be [step, tokens], got {len(meta_tensors)} tensors")
        step, tokens = meta_tensors
        if step.dtype != torch.int32 or step.numel() != 1:
            raise ValueError(f"step must be an int32 tensor of one element, got {step.dtype} {tuple(step.shape)}")
        if tokens.dtype != torch.int64 or tokens.numel() != tokens.shape[-1]:
            raise ValueError(f"tokens must be int64 [max_seq_len], got {tokens.dtype} {tuple(tokens.shape)}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers={num_workers} must be at least 1; leave it out for one per SM")
        if None not in (tuning, num_workers) and tuning.num_workers != num_workers:
            raise ValueError(
                f"num_workers={num_workers}, but the tuning has num_workers={tuning.num_workers}; leave one of them out"
            )
        if not wait_bound_s > 0:
            raise ValueError(f"wait_bound_s={wait_bound_s} must be positive")
        self.device = tokens.device
        self.world_size, self.rank, self.ranks = world_size, rank, ranks
        if tuning is not None:
            num_workers = tuning.num_workers
        check_capability(self.device)
        self.gpu, _ = find_profile(self.device)
        self.num_workers = default_num_workers(self.device, self.gpu) if num_workers is None else num_workers
        self.tuning = tuning
        self.has_bulk_copies = has_bulk_copies(self.device)
        self.panels = has_wgmma(self.device)  # weights of many-token products come in them
        self.wait_bound_s = wait_bound_s
        self.profile = profile
        self.policy = policy
        self.max_seq_len = tokens.shape[-1]
        self.tensors: dict[str, TensorHandle] = {}
        self.calls: list[OpCall] = []
        self.step = self.attach_input(step, name="step")
        self.tokens = self.attach_input(tokens, name="tokens")
        self.program: Program | None = None
        self.runtime: Runtime | None = None
        self.vocab_size = 1

    # ---- tensors ----

    def attach_input(self, tensor: torch.Tensor, name: str) -> TensorHandle:
        """A tensor that exists: weights, tables, caches. It is used where it lies.

        On a CPU its data moves to shared memory, in place; `tensor` stays valid.
        """
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, but the kernel is on {self.device}; move it there")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; attach a contiguous tensor (.contiguous())")
        if tensor.device.type == "cuda" and tensor.data_ptr() % 16:
            raise ValueError(f"{name} is not 16-byte aligned; attach a copy (.clone())")
        return self._add(TensorHandle(name, tuple(tensor.shape), tensor.dtype, tensor))

    def new_tensor(self, dims: tuple[int, ...], dtype: torch.dtype, name: str, symmetric: bool = False) -> TensorHandle:
        """A tensor for values between ops, allocated by `compile`.

        `symmetric`: it exists on every rank, at an address that all ranks know; dims [world_size, N]. Layers whose
        output it is write row `rank` of it on all ranks.
        """
        if symmetric and self.world_size == 1:
            raise ValueError(f"{name}: there is no other rank; pass symmetric=False")
        if symmetric and (len(dims) != 2 or dims[0] != self.world_size):
            raise ValueError(f"{name}: a symmetric tensor has dims (world_size={self.world_size}, N), got {dims}")
        return self._add(TensorHandle(name, tuple(dims), dtype, symmetric=symmetric))

    def _add(self, handle: TensorHandle) -> TensorHandle:
        if handle.name in self.tensors:
            raise ValueError(f"there is a tensor named {handle.name} already; names must differ")
        self.tensors[handle.name] = handle
        return handle

    def _tuned(self, num_kv_heads: int, head_dim: int) -> Tuning:
        """The knobs of the whole kernel; if none were given, the first attention decides."""
        if self.tuning is None:
            self.tuning = choose_tuning(self.gpu, num_kv_heads, head_dim, self.num_workers)
        return self.tuning

    # ---- layers ----

    def _call(
        self, op: Op, label: str | None, grid_dim: int | None, policy: str | None, tensors: dict, **options: object
    ) -> None:
        if self.program is not None:
            raise ValueError("this kernel is compiled; build a new PersistentKernel to change the graph")
        if grid_dim is not None and grid_dim < 1:
            raise ValueError(f"grid_dim={grid_dim}: the number of tasks must be at least 1; None cuts automatically")
        if policy is None:
            is_dynamic = self.policy == "dynamic" or (self.policy == "hybrid" and op in (ATTENTION, BATCH_ATTENTION))
            policy = Policy.DYNAMIC if is_dynamic else Policy.STATIC
        call = OpCall(op, label or f"{op.name}_{len(self.calls)}", tensors, options, grid_dim, Policy(policy))
        self.calls.append(call)

    def embed_layer(
        self,
        *,
        weight: TensorHandle,
        output: TensorHandle,
        input: TensorHandle | None = None,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        first_row: int = 0,
    ) -> None:
        """output [D] fp32 = weight[tokens[step]], weight [V, D].

        `weight` may hold the rows from `first_row` on only: then `output` is symmetric, [world_size, D], and the rows
        of ranks that do not have this token become zeros.
        """
        tensors = {"tokens": input or self.tokens, "weight": weight, "output": output}
        if output.symmetric:
            check_dims("embed_layer", output, "output", (self.world_size, weight.dims[1]))
            self._call(RANK_EMBEDDING, label, grid_dim, policy, tensors, rank=self.rank, first_row=first_row)
            return
        check_dims("embed_layer", output, "output", (weight.dims[1],))
        self._call(EMBEDDING, label, grid_dim, policy, tensors)

    def rmsnorm_linear_layer(
        self,
        *,
        input: TensorHandle,
        weight_norm: TensorHandle,
        weight_linear: TensorHandle,
        output: TensorHandle,
        bias: TensorHandle | None = None,
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        parts: TensorHandle | None = None,
        total: TensorHandle | None = None,
    ) -> None:
        """output [N] = weight_linear [N, D] @ rmsnorm(input [D]) + bias [N].

        With `parts` (symmetric, [world_size, D]) the input is input + parts[0] + parts[1] + ..., and `total` [D] fp32
        becomes that.
        """
        num_rows, hidden_size = matrix_dims("rmsnorm_linear_layer", weight_linear)
        check_dims("rmsnorm_linear_layer", input, "input", (hidden_size,))
        check_dims("rmsnorm_linear_layer", weight_norm, "weight_norm", (hidden_size,))
        check_dims("rmsnorm_linear_layer", output, "output", (num_rows,))
        if bias:
            check_dims("rmsnorm_linear_layer", bias, "bias", (num_rows,))
        tensors = {"input": input, "weight_norm": weight_norm, "weight_linear": weight_linear, "output": output}
        op, sum = self._of_sum("rmsnorm_linear_layer", RMSNORM_LINEAR, RANK_RMSNORM_LINEAR, input, parts, total)
        self._call(op, label, grid_dim, policy, tensors | {"bias": bias} | sum, eps=eps)

    def _of_sum(
        self,
        layer: str,
        op: Op,
        rank_op: Op,
        input: TensorHandle,
        parts: TensorHandle | None,
        total: TensorHandle | None,
    ) -> tuple[Op, dict[str, TensorHandle]]:
        """The form of an op for an input that may come in parts, and the tensors of that."""
        if (parts is None) != (total is None):
            raise ValueError(f"{layer}: parts and total go together, got parts={parts}, total={total}")
        if parts is None:
            return op, {}
        _check_symmetric(layer, parts, "parts", (self.world_size, *input.dims))
        check_dims(layer, total, "total", input.dims)
        return rank_op, {"parts": parts, "total": total}

    def rmsnorm_gated_linear_layer(
        self,
        *,
        input: TensorHandle,
        weight_norm: TensorHandle,
        weight_gate: TensorHandle,
        weight_up: TensorHandle,
        output: TensorHandle,
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        parts: TensorHandle | None = None,
        total: TensorHandle | None = None,
    ) -> None:
        """output [N] = silu(weight_gate @ x) * (weight_up @ x), x = rmsnorm(input [D]), weights [N, D].

        `parts` and `total` as in rmsnorm_linear_layer.
        """
        num_rows, hidden_size = matrix_dims("rmsnorm_gated_linear_layer", weight_gate)
        check_dims("rmsnorm_gated_linear_layer", weight_up, "weight_up", (num_rows, hidden_size))
        check_dims("rmsnorm_gated_linear_layer", input, "input", (hidden_size,))
        check_dims("rmsnorm_gated_linear_layer", weight_norm, "weight_norm", (hidden_size,))
        check_dims("rmsnorm_gated_linear_layer", output, "output", (num_rows,))
        tensors = {"input": input, "weight_norm": weight_norm, "weight_gate": weight_gate, "weight_up": weight_up}
        op, sum = self._of_sum(
            "rmsnorm_gated_linear_layer", RMSNORM_GATED_LINEAR, RANK_RMSNORM_GATED_LINEAR, input, parts, total
        )
        self._call(op, label, grid_dim, policy, tensors | {"output": output} | sum, eps=eps)

    def linear_layer(
        self,
        *,
        input: TensorHandle,
        weight: TensorHandle,
        output: TensorHandle,
        bias: TensorHandle | None = None,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output[rank] [N] on all ranks = weight [N, K] @ input [K] + bias [N]; `output` is symmetric.

        The parts of a layer whose columns are shared out. A bias belongs to one rank.
        """
        num_rows, k = matrix_dims("linear_layer", weight)
        check_dims("linear_layer", input, "input", (k,))
        _check_symmetric("linear_layer", output, "output", (self.world_size, num_rows))
        if bias:
            check_dims("linear_layer", bias, "bias", (num_rows,))
        tensors = {"input": input, "weight": weight, "output": output, "bias": bias}
        self._call(RANK_LINEAR, label, grid_dim, policy, tensors, rank=self.rank)

    def linear_with_residual_layer(
        self,
        *,
        input: TensorHandle,
        weight: TensorHandle,
        residual: TensorHandle,
        output: TensorHandle,
        bias: TensorHandle | None = None,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output [N] fp32 = residual [N] fp32 + weight [N, K] @ input [K] + bias [N]."""
        num_rows, k = matrix_dims("linear_with_residual_layer", weight)
        check_dims("linear_with_residual_layer", input, "input", (k,))
        check_dims("linear_with_residual_layer", residual, "residual", (num_rows,))
        check_dims("linear_with_residual_layer", output, "output", (num_rows,))
        if bias:
            check_dims("linear_with_residual_layer", bias, "bias", (num_rows,))
        tensors = {"input": input, "weight": weight, "residual": residual, "output": output, "bias": bias}
        self._call(LINEAR_RESIDUAL, label, grid_dim, policy, tensors)

    def new_attention_parts(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        name: str,
        num_splits: int | None = None,
    ) -> tuple[TensorHandle, TensorHandle]:
        """What attention leaves for its output layer: parts [S, H, Dh] of S splits of the KV length, and lse [S, H].

        `num_splits` None: as many as the workers need to have one each.
        """
        num_splits = num_splits or self._tuned(num_kv_heads, head_dim).num_splits
        return (
            self.new_tensor((num_splits, num_q_heads, head_dim), dtype, name=name),
            self.new_tensor((num_splits, num_q_heads), torch.float32, name=f"{name}.lse"),
        )

    def attention_layer(
        self,
        *,
        input: TensorHandle,
        k_cache: TensorHandle,
        v_cache: TensorHandle,
        page_table: TensorHandle,
        cos_pos_embed: TensorHandle,
        sin_pos_embed: TensorHandle,
        output: tuple[TensorHandle, TensorHandle],
        q_norm: TensorHandle | None = None,
        k_norm: TensorHandle | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output (parts, lse) = attention of the new token, whose q, k, v are `input` [(H + 2 Hkv) * Dh].

        Caches [num_pages, Hkv, page_size, Dh]; page_table int32 [pages of the sequence]; cos and sin [max_seq_len, Dh]
        fp32; q_norm and k_norm [Dh] as in Qwen3. The output, from `new_attention_parts`, is for attention_output_layer.
        """
        _, num_kv_heads, page_size, head_dim = k_cache.dims
        num_q_heads = _check_parts("attention_layer", "output", output, head_dim)
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"attention_layer: output has {num_q_heads} heads, which must be a multiple of the {num_kv_heads} heads"
                " of the KV cache"
            )
        check_dims("attention_layer", v_cache, "v_cache", k_cache.dims)
        check_dims("attention_layer", input, "input", ((num_q_heads + 2 * num_kv_heads) * head_dim,))
        tuning = self._tuned(num_kv_heads, head_dim)
        block_kv = min(tuning.block_kv, largest_block_kv(head_dim))
        if page_size % block_kv:
            raise ValueError(
                f"page_size={page_size} must be a multiple of {block_kv}, the tokens that are read at once"
            )
        tensors = {
            "input": input,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "page_table": page_table,
            "cos_pos_embed": cos_pos_embed,
            "sin_pos_embed": sin_pos_embed,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "parts": output[0],
            "lse": output[1],
        }
        scale = default_scale(head_dim) if scale is None else scale
        options = {"num_q_heads": num_q_heads, "scale": scale, "block_kv": block_kv, "eps": eps}
        options["split_tokens"] = tuning.split_tokens
        self._call(ATTENTION, label, grid_dim, policy, tensors, **options)

    def attention_output_layer(
        self,
        *,
        input: tuple[TensorHandle, TensorHandle],
        weight: TensorHandle,
        output: TensorHandle,
        residual: TensorHandle | None = None,
        bias: TensorHandle | None = None,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
    ) -> None:
        """output [N] fp32 = residual [N] fp32 + weight [N, H * Dh] @ merged parts [H * Dh] + bias [N].

        Without `residual`, `output` is symmetric, as in linear_layer.
        """
        num_rows, k = matrix_dims("attention_output_layer", weight)
        num_heads = _check_parts("attention_output_layer", "input", input)
        if num_heads * input[0].dims[-1] != k:
            raise ValueError(
                f"attention_output_layer: weight has {k} columns, but input has {num_heads} heads of"
                f" {input[0].dims[-1]}; they must agree"
            )
        if bias:
            check_dims("attention_output_layer", bias, "bias", (num_rows,))
        tensors = {"parts": input[0], "lse": input[1], "weight": weight, "residual": residual, "output": output}
        split_tokens = self._tuned(num_heads, input[0].dims[-1]).split_tokens
        if residual is None:
            _check_symmetric("attention_output_layer", output, "output", (self.world_size, num_rows))
            del tensors["residual"]
            self._call(
                RANK_ATTENTION_OUTPUT, label, grid_dim, policy, tensors | {"bias": bias},
                split_tokens=split_tokens, rank=self.rank,
            )  # fmt: skip
            return
        check_dims("attention_output_layer", residual, "residual", (num_rows,))
        check_dims("attention_output_layer", output, "output", (num_rows,))
        self._call(ATTENTION_OUTPUT, label, grid_dim, policy, tensors | {"bias": bias}, split_tokens=split_tokens)

    def lm_head_layer(
        self,
        *,
        input: TensorHandle,
        weight_norm: TensorHandle,
        weight_linear: TensorHandle,
        output: tuple[TensorHandle, TensorHandle],
        eps: float = 1e-6,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        parts: TensorHandle | None = None,
        all_logits: TensorHandle | None = None,
        first_row: int = 0,
    ) -> None:
        """Logits of the vocabulary, and per task the best value (fp32) and its index (int32): `output`, [num_tasks].

        With `parts` (as in rmsnorm_linear_layer) the weights are the rows of the vocabulary from `first_row` on, and
        `output` is symmetric, [world_size, num_tasks]. So is `all_logits`, [world_size, the most rows of any rank],
        fp32: there the logits of all ranks lie one after another, if a launch needs them to choose tokens.
        """
        vocab_size, hidden_size = matrix_dims("lm_head_layer", weight_linear)
        check_dims("lm_head_layer", input, "input", (hidden_size,))
        check_dims("lm_head_layer", weight_norm, "weight_norm", (hidden_size,))
        best_value, best_index = output
        check_dims("lm_head_layer", best_index, "output[1]", best_value.dims)
        self.vocab_size = vocab_size
        tensors = {"input": input, "weight_norm": weight_norm, "weight_linear": weight_linear}
        best = {"best_value": best_value, "best_index": best_index}
        if parts is not None:
            _check_symmetric("lm_head_layer", parts, "parts", (self.world_size, hidden_size))
            if all_logits is None or all_logits.numel < self.world_size * vocab_size:
                raise ValueError(
                    f"lm_head_layer: all_logits={all_logits} must hold the {vocab_size} rows of every rank"
                )
            for name, tensor in (("output[0]", best_value), ("output[1]", best_index), ("all_logits", all_logits)):
                _check_symmetric("lm_head_layer", tensor, name, (self.world_size, tensor.dims[-1]))
            self._call(
                RANK_LM_HEAD, label, grid_dim, policy, tensors | best | {"parts": parts, "all_logits": all_logits},
                eps=eps, rank=self.rank, first_row=first_row,
            )  # fmt: skip
            return
        self._call(LM_HEAD, label, grid_dim, policy, tensors | best, eps=eps)

    def argmax_layer(
        self,
        *,
        input: tuple[TensorHandle, TensorHandle],
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        asked: TensorHandle | None = None,
    ) -> None:
        """The most likely token goes to tokens[step + 1], and the step ends. `input` is lm_head_layer's output.

        On several ranks `asked` is stop_request_layer's output.
        """
        tensors = {"best_value": input[0], "best_index": input[1], "tokens": self.tokens}
        _check_ends("argmax_layer", self.world_size, asked=asked)
        if asked is None:
            self._call(ARGMAX, label, grid_dim, policy, tensors)
        else:
            self._call(RANK_ARGMAX, label, grid_dim, policy, tensors | {"asked": asked})

    def sample_layer(
        self,
        *,
        input: tuple[TensorHandle, TensorHandle],
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        asked: TensorHandle | None = None,
        all_logits: TensorHandle | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Like argmax_layer, but a launch may ask for tokens at random, a repetition penalty and log-probabilities:
        `LaunchRequest.sampling`. Behind lm_head_layer.

        On several ranks `asked` is stop_request_layer's output, `all_logits` that of lm_head_layer, and `vocab_size`
        counts the tokens of all ranks.
        """
        _check_ends("sample_layer", self.world_size, asked=asked, all_logits=all_logits, vocab_size=vocab_size)
        vocab_size = vocab_size or self.vocab_size
        if vocab_size > MAX_VOCAB.value:
            raise NotImplementedError(f"a vocabulary of {vocab_size} is not supported; at most {MAX_VOCAB.value} is")
        tensors = {"best_value": input[0], "best_index": input[1], "tokens": self.tokens}
        tensors["logprobs"] = self.new_tensor((self.max_seq_len,), torch.float32, name="logprobs")
        seen = torch.zeros(vocab_size, dtype=torch.int8, device=self.device)
        tensors["seen"] = self.attach_input(seen, name="seen")  # launches with a repetition penalty fill it in
        tensors["scores"] = self.new_tensor((score_size(vocab_size),), torch.float32, name="scores")
        tensors["scratch"] = self.new_tensor((NUM_SCRATCH.value,), torch.float32, name="sample.scratch")
        tensors["indices"] = self.new_tensor((NUM_INDICES.value,), torch.int32, name="sample.indices")
        if asked is None:
            self._call(SAMPLE, label, grid_dim, policy, tensors)
        else:
            self._call(RANK_SAMPLE, label, grid_dim, policy, tensors | {"asked": asked, "all_logits": all_logits})

    def stop_request_layer(self, *, output: TensorHandle, label: str | None = None) -> None:
        """Whether the hosts ask to stop, told to all ranks: `output` int32, symmetric, [world_size, 1]."""
        _check_symmetric("stop_request_layer", output, "output", (self.world_size, 1))
        self._call(STOP_REQUEST, label, None, None, {"output": output}, rank=self.rank)

    def all_gather_layer(
        self, *, input: TensorHandle, output: TensorHandle, grid_dim: int | None = None, label: str | None = None
    ) -> None:
        """output[rank] = input [N], on all ranks; `output` is symmetric, [world_size, N]. For all_reduce_layer, or for
        layers that add up parts themselves.
        """
        _check_symmetric("all_gather_layer", output, "output", (self.world_size, input.numel))
        self._call(ALL_GATHER, label, grid_dim, None, {"input": input, "output": output}, rank=self.rank)

    def add_parts_layer(
        self, *, input: TensorHandle, output: TensorHandle, grid_dim: int | None = None, label: str | None = None
    ) -> None:
        """output [N] = input[0] + input[1] + ..., `input` symmetric, [world_size, N]."""
        _check_symmetric("add_parts_layer", input, "input", (self.world_size, output.numel))
        self._call(ADD_PARTS, label, grid_dim, None, {"input": input, "output": output})

    def all_reduce_layer(
        self, *, input: TensorHandle, output: TensorHandle, grid_dim: int | None = None, label: str | None = None
    ) -> None:
        """output [N] = the sum of all ranks' input [N], in the order of the ranks, so that all have the same bits."""
        label = label or f"all_reduce_{len(self.calls)}"
        parts = self.new_tensor((self.world_size, input.numel), input.dtype, f"{output.name}.parts", symmetric=True)
        self.all_gather_layer(input=input, output=parts, grid_dim=grid_dim, label=f"{label} gather")
        self.add_parts_layer(input=parts, output=output, grid_dim=grid_dim, label=f"{label} sum")

    def op_layer(
        self,
        op: Op,
        *,
        grid_dim: int | None = None,
        label: str | None = None,
        policy: str | None = None,
        options: dict[str, object] | None = None,
        **tensors: TensorHandle,
    ) -> None:
        """An op of your own, see CONTRIBUTING.md; `tensors` and `options` are the arguments of its cut."""
        self._call(op, label, grid_dim, policy, tensors, **options or {})

    # ---- from graph to launch ----

    def plan(self) -> Program:
        """Everything before the device: tasks, events, queues, proof, source. Called by `compile`."""
        if self.program is None:
            if not any(call.op.ends_step for call in self.calls):
                raise ValueError("the graph has no argmax_layer, so that a step would never end; add one at the end")
            weights = [
                t for t in self.tensors.values() if len(t.dims) == 2 and t.dtype in DTYPES and t.data is not None
            ]
            streamed = [
                t for call in self.calls for n, t in call.tensors.items() if t in weights and n.startswith("weight")
            ]
            dtypes = {t.dtype for t in streamed}
            if len(dtypes) > 1:
                raise ValueError(f"weight matrices must have one type, got {sorted(map(str, dtypes))}; convert them")
            dtype = dtypes.pop() if dtypes else torch.float32  # no matrix at all: any type will do
            dynamic = [call for call in self.calls if call.policy is Policy.DYNAMIC]
            # a ring brings weights in an order that is known beforehand
            has_order = not any(t in streamed for call in dynamic for t in call.tensors.values())
            tuning = self._tuned(num_kv_heads=1, head_dim=1)  # without attention its knobs mean nothing
            constants = kernel_constants(
                dtype, [t.dims[1] for t in streamed], self.device.type == "cpu", self.has_bulk_copies and has_order,
                self.profile, bool(dynamic), tuning.prefetch_bytes, self.world_size,
            )  # fmt: skip
            panels = self.panels and not constants.ring  # both rings would not fit
            self.program = plan(self.calls, self.tensors, tuning, constants, self.rank, panels)
            if os.environ.get("TRI_MPK_DEBUG", "0") != "0":
                from tri_mpk.inspect import print_debug

                print_debug(self.program)
        return self.program

    def compile(self) -> None:
        """Plans, generates and compiles the kernel, and packs its queues for this device."""
        if self.runtime is not None:
            return
        program = self.plan()
        if self.world_size > 1 and self.ranks is None:
            self.ranks = connect(self.world_size, self.rank, self.device)
        common = (program, self.vocab_size, self._mailbox_words(), self.wait_bound_s, self.ranks)
        if self.device.type == "cuda":
            self.runtime = CudaRuntime(*common, cuda_device=self.device)
        elif self.device.type == "cpu":
            self.runtime = InterpreterRuntime(*common)
        else:
            raise DeviceError(f"a kernel on {self.device} can be planned, not run; use a cuda or cpu device")

    def _mailbox_words(self) -> int:
        return MAILBOX_TOKENS.value + self.max_seq_len

    def launch(self, request: LaunchRequest) -> Iterator[int]:
        """Starts the kernel and yields the new tokens while it runs. One launch, whatever the number of tokens."""
        chooses = request.last_step + 1 >= request.num_known
        if request.last_step + chooses >= self.max_seq_len:
            raise ValueError(
                f"last_step={request.last_step} does not fit the {self.max_seq_len} positions of tokens; choose less"
            )
        if request.sampling != Sampling() and not any(call.op in (SAMPLE, RANK_SAMPLE) for call in self.calls):
            raise ValueError("the graph has no sample_layer, so tokens are chosen greedily; leave sampling out")
        self.compile()
        return self.runtime.run(request)

    def __call__(
        self, num_tokens: int = 1, max_new_tokens: int | None = None, eos_token_id: int | Sequence[int] = ()
    ) -> int:
        """Processes tokens[step:num_tokens], then chooses up to `max_new_tokens` more (None: until max_seq_len).

        Returns the length of the sequence: tokens[:length] are valid and `step` stands at length - 1.
        """
        step = int(self.step.data)
        limit = self.max_seq_len if max_new_tokens is None else num_tokens + max_new_tokens
        if not step < num_tokens < limit <= self.max_seq_len:
            raise ValueError(
                f"num_tokens={num_tokens}, max_new_tokens={max_new_tokens} at step {step}: need step < num_tokens and"
                f" num_tokens + max_new_tokens <= {self.max_seq_len} (the length of tokens)"
            )
        eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        request = LaunchRequest(num_tokens, limit - 2, eos, logits_from=num_tokens - 1)
        return num_tokens + sum(1 for _ in self.launch(request))


def has_bulk_copies(device: torch.device) -> bool:
    """Whether weights can come through a ring in shared memory. Planning on the meta device is for a Hopper."""
    if device.type != "cuda":
        return device.type == "meta"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and shared_memory_limit(device) >= RING_SHARED_BYTES


def has_wgmma(device: torch.device) -> bool:
    """Whether weights of many-token products can come in panels: on Hopper. The meta device stands for one."""
    if device.type != "cuda":
        return device.type == "meta"
    return torch.cuda.get_device_capability(device)[0] == 9


def default_num_workers(device: torch.device, gpu: GpuProfile) -> int:
    """One per SM; on a CPU one per core, 2 to 4. Plans on the meta device are for the GPU of their profile."""
    if device.type == "cpu":
        return min(4, max(2, os.cpu_count() or 2))
    return gpu.num_sms


def check_capability(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise DeviceError(f"{name} has compute capability below {MIN_CAPABILITY}; use a newer GPU or device='cpu'")


def matrix_dims(layer: str, weight: TensorHandle) -> tuple[int, int]:
    if len(weight.dims) != 2:
        raise ValueError(f"{layer}: {weight.name} must be a matrix [N, K], got {weight.dims}")
    return weight.dims


def check_dims(layer: str, tensor: TensorHandle, argument: str, dims: tuple[int, ...]) -> None:
    if tensor.dims != dims:
        raise ValueError(f"{layer}: {argument}={tensor.name} must have dims {dims}, got {tensor.dims}")


def _check_symmetric(layer: str, tensor: TensorHandle, argument: str, dims: tuple[int, ...]) -> None:
    check_dims(layer, tensor, argument, dims)
    if not tensor.symmetric:
        raise ValueError(f"{layer}: {argument}={tensor.name} must be symmetric: new_tensor(..., symmetric=True)")


def _check_ends(layer: str, world_size: int, **arguments: object) -> None:
    """What ends a step takes these arguments on several ranks, and only there."""
    for name, value in arguments.items():
        if (value is None) != (world_size == 1):
            raise ValueError(f"{layer}: {name}= is for several ranks, which need it; there are {world_size}")


def _check_parts(
    layer: str, argument: str, parts: tuple[TensorHandle, TensorHandle], head_dim: int | None = None
) -> int:
    """The number of heads of what `new_attention_parts` returned; `head_dim` None: any."""
    if not isinstance(parts, tuple) or len(parts) != 2 or len(parts[0].dims) != 3:
        raise ValueError(f"{layer}: {argument} must be what new_attention_parts returned, (parts, lse); got {parts}")
    num_splits, num_heads, dim = parts[0].dims
    check_dims(layer, parts[0], f"{argument}[0]", (num_splits, num_heads, head_dim or dim))
    check_dims(layer, parts[1], f"{argument}[1]", (num_splits, num_heads))
    return num_heads
