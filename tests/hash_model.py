"""A "model" of one cheap op, whose right answers are known in closed form: logits are a hash of all tokens so far.

It reads the tokens back from pages, so that a page that two sequences share, a token that was skipped, or a sequence
that was recomputed wrongly changes all tokens from there on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.generation import GenerationRequest
from tri_mpk.ops.advance import RingSizes
from tri_mpk.ops.op import Cut, Op, TensorHandle, next_power_of_2
from tri_mpk.ops.sample import SAMPLE
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task

VOCAB_SIZE = 64
NUM_PARTS = 2
POINTERS = {"logits": "logit_rows"}  # the kernel itself has a logits_ptr


@triton.jit
def hash_model_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, token_positions_ptr, token_sequences_ptr, output_token_ptr, page_table_ptr,
    cache_ptr, logit_rows_ptr, best_value_ptr, best_index_ptr,
    S: tl.constexpr, L: tl.constexpr, V: tl.constexpr, PAGE_SIZE: tl.constexpr, MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    number = tl.load(num_tokens_ptr)
    if number > 0:
        t = tl.arange(0, BLOCK_T)
        token = tl.load(token_ids_ptr + t, mask=t < number, other=0)
        position = tl.load(token_positions_ptr + t, mask=t < number, other=0)
        sequence = tl.load(token_sequences_ptr + t, mask=t < number, other=0)
        page = tl.load(page_table_ptr + sequence * MAX_PAGES + position // PAGE_SIZE, mask=t < number, other=0)
        tl.store(cache_ptr + page * PAGE_SIZE + position % PAGE_SIZE, token, mask=t < number)
        tl.debug_barrier()
        s = tl.arange(0, BLOCK_S)
        output = tl.load(output_token_ptr + s, mask=s < S, other=-1)
        last = tl.load(token_positions_ptr + output, mask=output >= 0, other=-1)
        p = tl.arange(0, BLOCK_L)[None, :]
        known = p <= last[:, None]
        page = tl.load(page_table_ptr + s[:, None] * MAX_PAGES + p // PAGE_SIZE, mask=known, other=0)
        token = tl.load(cache_ptr + page * PAGE_SIZE + p % PAGE_SIZE, mask=known, other=-1)
        hashed = tl.sum((token + 1) * (2 * p + 3), axis=1) & 0xFFFF
        v = tl.arange(0, V)[None, :]
        logits = ((hashed[:, None] * (2 * v + 1) * 7 + v * v * 13) % 1009).to(tl.float32) / 128.0
        chooses = (output >= 0)[:, None]
        tl.store(logit_rows_ptr + s[:, None] * V + v, logits, mask=chooses)
        for part in tl.static_range(2):
            half = tl.where((v // (V // 2)) == part, logits, -1.0)
            best = tl.max(half, axis=1)
            index = tl.min(tl.where(half == best[:, None], v, V), axis=1)
            tl.store(best_value_ptr + s * 2 + part, best, mask=output >= 0)
            tl.store(best_index_ptr + s * 2 + part, index, mask=output >= 0)
    signal(task, event_ptr, PORTABLE)


def cut_hash_model(machine, *, page_size: int, grid_dim=None, **tensors: TensorHandle) -> Cut:
    names = list(tensors)
    cut = Cut(
        {
            "S": tensors["output_token"].numel, "L": 0, "V": tensors["logits"].dims[1], "PAGE_SIZE": page_size,
            "MAX_PAGES": tensors["page_table"].dims[1], "BLOCK_T": next_power_of_2(tensors["token_ids"].numel),
            "BLOCK_S": next_power_of_2(tensors["output_token"].numel),
            "BLOCK_L": next_power_of_2(tensors["page_table"].dims[1] * page_size),
        },
        {f"{POINTERS.get(name, name)}_ptr": tensors[name] for name in names},
    )  # fmt: skip
    written = [tensors["cache"].whole()]
    written += [tensors[n].columns(0, tensors[n].dims[1]) for n in ("logits", "best_value", "best_index")]
    reads = tuple(tensors[name].whole() for name in names[: names.index("cache") + 1])
    cut.tasks.append(Task(0, (0,), reads, tuple(written), 1, fields=cut.addresses()))
    return cut


def next_logits(tokens: list[int]) -> torch.Tensor:
    """fp32 [V], after these tokens."""
    hashed = sum((token + 1) * (2 * p + 3) for p, token in enumerate(tokens)) & 0xFFFF
    v = np.arange(VOCAB_SIZE)
    return torch.tensor((hashed * (2 * v + 1) * 7 + v * v * 13) % 1009, dtype=torch.float32) / 128


HASH_MODEL = Op("hash_model", hash_model_tile, cut_hash_model, next_logits)


def hash_kernel(
    max_batch_size: int = 4,
    max_tokens_per_step: int = 8,
    page_size: int = 4,
    num_pages: int | None = None,
    max_seq_len: int = 32,
    rings: RingSizes | None = None,
    wait_bound_s: float = 20.0,
    **options: object,
) -> BatchKernel:
    """On two workers. Ranks have no part each: all compute the same."""
    meta = [torch.zeros(1, dtype=torch.int32), torch.zeros(max_seq_len, dtype=torch.int64)]
    mpk = BatchKernel(
        num_workers=2, meta_tensors=meta, wait_bound_s=wait_bound_s, max_batch_size=max_batch_size,
        max_tokens_per_step=max_tokens_per_step, **options,
    )  # fmt: skip
    sequence_pages = -(-max_seq_len // page_size)
    num_pages = num_pages or max_batch_size * sequence_pages
    plan = mpk.new_step_plan(sequence_pages)
    state = mpk.host_words_layer(page_size=page_size, num_pages=num_pages, rings=rings)
    cache = torch.full((max(num_pages, 1), page_size), -1, dtype=torch.int32)
    logits = mpk.new_tensor((max_batch_size, VOCAB_SIZE), torch.float32, name="logits")
    best = (
        mpk.new_tensor((max_batch_size, NUM_PARTS), torch.float32, name="best_value"),
        mpk.new_tensor((max_batch_size, NUM_PARTS), torch.int32, name="best_index"),
    )
    read = {n: t for n, t in plan.tensors().items() if n not in ("first_token", "sequence_tokens")}
    mpk.op_layer(
        HASH_MODEL,
        label="model",
        options={"page_size": page_size},
        **read,
        cache=mpk.attach_input(cache, name="cache"),
        logits=logits,
        best_value=best[0],
        best_index=best[1],
    )
    mpk.advance_layer(plan=plan, state=state, input=best, logits=logits)
    return mpk


def greedy_tokens(request: GenerationRequest) -> list[int]:
    """What the request gets, whatever runs beside it."""
    return expected_tokens(request, lambda logits, tokens: int(logits.argmax()))


def penalised_tokens(request: GenerationRequest) -> list[int]:
    penalty = request.sampling.repetition_penalty
    reference = SAMPLE.reference

    def choose(logits: torch.Tensor, tokens: list[int]) -> int:
        return int(reference(logits, torch.tensor(tokens), repetition_penalty=penalty).argmax())

    return expected_tokens(request, choose)


def expected_tokens(request: GenerationRequest, choose: Callable[[torch.Tensor, list[int]], int]) -> list[int]:
    tokens = request.prompt.tolist()
    while len(tokens) < request.max_length:
        tokens.append(choose(next_logits(tokens), tokens))
        if tokens[-1] in request.eos_token_ids:
            break
    return tokens[len(request.prompt) :]
