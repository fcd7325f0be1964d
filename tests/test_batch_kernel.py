"""BatchKernel: what it refuses, by name, and the shape of the graph, planned without a device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from decoders import tiny_config
from hash_model import hash_kernel
from repeat_step import REPEAT_STEP
from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.inspect import critical_path
from tri_mpk.loading import empty_model
from tri_mpk.models import describe
from tri_mpk.models.batch_decoder import BatchOutput, build_batch, build_serving
from tri_mpk.sharding import Shard


def meta_kernel(**parameters: object) -> BatchKernel:
    step = torch.zeros(1, dtype=torch.int32, device="meta")
    tokens = torch.zeros(256, dtype=torch.int64, device="meta")
    return BatchKernel(
        meta_tensors=[step, tokens],
        **{"max_batch_size": 4, "max_tokens_per_step": 16, "num_workers": 8} | parameters,
    )


def build(kernel: BatchKernel, num_layers: int = 2, page_size: int = 128, num_pages: int | None = None) -> BatchOutput:
    config = tiny_config(num_hidden_layers=num_layers, num_key_value_heads=2)
    model = empty_model(config, torch.bfloat16)
    return build_batch(kernel, describe(config, 256), model, page_size, progress=False, num_pages=num_pages)


def test_a_layer_is_seven_hops():
    hops = []
    for num_layers in (1, 2):
        kernel = meta_kernel()
        output = build(kernel, num_layers)
        kernel.op_layer(REPEAT_STEP, logits=output.logits, label="end")
        program = kernel.plan()
        assert not program.constants.ring and all(task.stream is None for task in program.graph.tasks)
        hops.append(len(critical_path(program)))
        tasks = Counter(program.graph.ops[task.op] for task in program.graph.tasks)
        assert tasks["L00 qkv"] == tasks["L00 gate_up"] == tasks["L00 attention"] == tasks["lm_head"] == 8
        assert tasks["items"] == 1
    assert hops[1] - hops[0] == 7


def test_pages_of_all_sequences():
    kernel = meta_kernel()
    output = build(kernel, num_pages=5)
    assert output.plan.page_table.dims == (4, 2)
    assert kernel.tensors["L01.k_cache"].dims == (5, 2, 128, 32)
    assert build_dims(meta_kernel()) == (8, 2, 128, 32)


def build_dims(kernel: BatchKernel) -> tuple[int, ...]:
    build(kernel)
    return kernel.tensors["L00.v_cache"].dims


def test_a_graph_needs_an_end():
    kernel = meta_kernel()
    build(kernel)
    with pytest.raises(ValueError, match="a step would never end"):
        kernel.plan()


@pytest.mark.parametrize("profile", [False, True])
def test_ranks_have_the_same_kernel_and_end_a_step_together(profile):
    programs = [hash_kernel(world_size=2, rank=rank, profile=profile).plan() for rank in range(2)]
    assert programs[0].source == programs[1].source and "RANKS = tl.constexpr(2)" in programs[0].source
    assert programs[0].counters.step_count() == 2
    one = hash_kernel(profile=profile).plan()
    assert "RANKS = tl.constexpr(1)" in one.source and "end_step_tile" not in one.source
    assert ("timed_wait_for_any(task" in one.source) == profile


def test_refusals():
    with pytest.raises(ValueError, match="max_batch_size=0 must be from 1"):
        meta_kernel(max_batch_size=0)
    with pytest.raises(ValueError, match="max_tokens_per_step=40000 must be from 1 to 32768"):
        meta_kernel(max_tokens_per_step=40000)


def test_layers_check_dims():
    kernel = meta_kernel()
    plan = kernel.new_step_plan(2)
    x = kernel.new_residual(64, torch.bfloat16, "x")
    weight = kernel.attach_input(torch.zeros(32, 60, dtype=torch.bfloat16, device="meta"), "w")
    gain = kernel.attach_input(torch.zeros(64, dtype=torch.bfloat16, device="meta"), "gain")
    output = kernel.new_tensor((16, 32), torch.bfloat16, "y")
    with pytest.raises(ValueError, match="batch_linear_layer: the residual stream has 64 columns, expected 60"):
        kernel.batch_linear_layer(plan=plan, input=x, weight=weight, output=output)
    with pytest.raises(ValueError, match="batch_embed_layer: the residual stream has 64 columns, expected 60"):
        kernel.batch_embed_layer(plan=plan, weight=weight, next_norm=gain, output=x)
    with pytest.raises(ValueError, match="batch_linear_with_residual_layer: input=y must have dims"):
        kernel.batch_linear_with_residual_layer(plan=plan, input=output, weight=weight, residual=x, next_norm=gain)


def test_columns_of_the_residual_are_shared_out():
    x = meta_kernel(world_size=2, rank=1).new_residual(128, torch.bfloat16, "x")
    assert x.x.dims == (16, 64) and x.normed.dims == (2, 16 * 64) and x.parts.dims == (2, 16 * 64)
    with pytest.raises(ValueError, match="hidden_size=128 cannot be shared out among 3 ranks"):
        meta_kernel(world_size=3).new_residual(128, torch.bfloat16, "x")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_layer_of_several_ranks_is_proved(num_ranks):
    """Of all ranks together; each of them has the same tasks and events."""
    config = tiny_config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    programs = []
    for rank in range(num_ranks):
        shard = Shard(config, rank, num_ranks)
        kernel = meta_kernel(world_size=num_ranks, rank=rank, max_tokens_per_step=70)
        model = empty_model(shard.local_config(), torch.bfloat16)
        build_serving(kernel, describe(model.config, 256), model, 128, 8, False, shard)
        programs.append(kernel.plan())
        assert programs[-1].report.num_tasks == num_ranks * len(programs[-1].graph.tasks)
    assert len({program.source for program in programs}) == 1
    assert all(program.events.signals == programs[0].events.signals for program in programs)
