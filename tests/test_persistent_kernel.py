"""The graph API: every misuse is named where it happens, and a small graph does what it says."""

from __future__ import annotations

import re

import pytest
import torch

from tri_mpk import DeviceError, PersistentKernel
from tri_mpk.ops.argmax import STOP_INTERVAL
from tri_mpk.runtime import LaunchRequest
from tri_mpk.tuning import Tuning

META = torch.device("meta")


def meta_tensors(max_seq_len: int = 8, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    step = torch.zeros(1, dtype=torch.int32, device=device)
    return [step, torch.zeros(max_seq_len, dtype=torch.int64, device=device)]


@pytest.fixture
def mpk() -> PersistentKernel:
    return PersistentKernel(num_workers=2, meta_tensors=meta_tensors())


def attach(mpk: PersistentKernel, *dims: int, dtype: torch.dtype = torch.float32):
    return mpk.attach_input(torch.zeros(dims, dtype=dtype, device=mpk.device), name=f"t{len(mpk.tensors)}")


# ---- the constructor ----


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (NotImplementedError, "world_size=16", {"world_size": 16}),
        (NotImplementedError, "policy='hybrid'", {"world_size": 2, "policy": "hybrid"}),
        (ValueError, "rank=1", {"rank": 1}),
        (ValueError, "rank=-1", {"world_size": 2, "rank": -1}),
        (ValueError, "got 0 tensors", {"meta_tensors": []}),
        (ValueError, "got 1 tensors", {"meta_tensors": meta_tensors()[:1]}),
        (ValueError, "step must be an int32", {"meta_tensors": [torch.zeros(1), meta_tensors()[1]]}),
        (ValueError, "step must be", {"meta_tensors": [torch.zeros(2, dtype=torch.int32), meta_tensors()[1]]}),
        (ValueError, "tokens must be int64", {"meta_tensors": [meta_tensors()[0], torch.zeros(8)]}),
        (ValueError, "tokens must be", {"meta_tensors": [meta_tensors()[0], torch.zeros(2, 4, dtype=torch.int64)]}),
        (ValueError, "num_workers=0", {"num_workers": 0}),
        (ValueError, "wait_bound_s=0", {"wait_bound_s": 0}),
    ],
)
def test_bad_arguments(error, text, arguments):
    with pytest.raises(error, match=re.escape(text)):
        PersistentKernel(**({"meta_tensors": meta_tensors()} | arguments))


def test_tokens_may_have_a_batch_dimension_of_one():
    step, tokens = meta_tensors(8)
    assert PersistentKernel(num_workers=2, meta_tensors=[step, tokens[None]]).max_seq_len == 8


def test_unknown_argument():
    with pytest.raises(TypeError, match="num_worker"):
        PersistentKernel(num_worker=2, meta_tensors=meta_tensors())


# ---- tensors ----


def test_duplicate_names(mpk):
    mpk.new_tensor((4,), torch.float32, name="x")
    with pytest.raises(ValueError, match="named x already"):
        mpk.new_tensor((4,), torch.float32, name="x")
    with pytest.raises(ValueError, match="named step already"):
        mpk.attach_input(torch.zeros(3), name="step")


def test_tensor_that_is_not_contiguous(mpk):
    with pytest.raises(ValueError, match=r"w has strides \(1, 4\).*contiguous"):
        mpk.attach_input(torch.zeros(4, 4).t(), name="w")


def test_tensor_on_another_device(mpk):
    with pytest.raises(ValueError, match="w is on meta, but the kernel is on cpu"):
        mpk.attach_input(torch.zeros(4, device=META), name="w")


def test_the_end_of_a_step_on_several_ranks():
    """What only several ranks need is asked for there, and nowhere else."""
    best = [("best_value", torch.float32), ("best_index", torch.int32)]
    for world_size, named in ((1, "vocab_size"), (2, "all_logits")):
        mpk = PersistentKernel(world_size, 0, 2, meta_tensors(device=META))
        several = world_size > 1
        dims = (world_size, 2) if several else (2,)
        input = tuple(mpk.new_tensor(dims, dtype, name, symmetric=several) for name, dtype in best)
        asked = mpk.new_tensor((2, 1), torch.int32, "asked", symmetric=True) if several else None
        with pytest.raises(ValueError, match=f"sample_layer: {named}= is for several ranks"):
            mpk.sample_layer(input=input, asked=asked, vocab_size=64)
        with pytest.raises(ValueError, match="argmax_layer: asked= is for several ranks"):
            mpk.argmax_layer(input=input, asked=None if several else input[0])
    x, gain, weight, parts = (
        mpk.new_tensor(dims, torch.float32, name, symmetric=name in ("parts", "few"))
        for name, dims in (("x", (8,)), ("gain", (8,)), ("weight", (32, 8)), ("parts", (2, 8)))
    )
    few = mpk.new_tensor((2, 31), torch.float32, "few", symmetric=True)
    with pytest.raises(ValueError, match="must hold the 32 rows of every rank"):
        mpk.lm_head_layer(input=x, weight_norm=gain, weight_linear=weight, output=input, parts=parts, all_logits=few)


def test_symmetric_tensor(mpk):
    with pytest.raises(ValueError, match="symmetric=False"):
        mpk.new_tensor((4,), torch.float32, name="x", symmetric=True)


# ---- layers ----

LAYERS = {
    "embed_layer": {"weight": (5, 8), "output": (8,)},
    "rmsnorm_linear_layer": {"input": (8,), "weight_norm": (8,), "weight_linear": (6, 8), "output": (6,), "bias": (6,)},
    "rmsnorm_gated_linear_layer": {
        "input": (8,), "weight_norm": (8,), "weight_gate": (6, 8), "weight_up": (6, 8), "output": (6,)
    },
    "linear_with_residual_layer": {"input": (8,), "weight": (6, 8), "residual": (6,), "output": (6,), "bias": (6,)},
    "attention_layer": {
        "input": (256,), "k_cache": (2, 2, 128, 32), "v_cache": (2, 2, 128, 32), "page_table": (2,),
        "cos_pos_embed": (256, 32), "sin_pos_embed": (256, 32), "output[0]": (3, 4, 32), "output[1]": (3, 4),
    },
    "attention_output_layer": {
        "input[0]": (3, 4, 32), "input[1]": (3, 4), "weight": (6, 128), "residual": (6,), "output": (6,), "bias": (6,),
    },
    "lm_head_layer": {
        "input": (8,), "weight_norm": (8,), "weight_linear": (9, 8), "output[0]": (2,), "output[1]": (2,)
    },
}  # fmt: skip
# not looked at, or what others are compared with
UNCHECKED = {
    ("attention_layer", "page_table"), ("attention_layer", "cos_pos_embed"), ("attention_layer", "sin_pos_embed"),
    ("attention_layer", "k_cache"), ("attention_output_layer", "input[0]"), ("lm_head_layer", "output[0]"),
    ("embed_layer", "weight"), ("rmsnorm_linear_layer", "weight_linear"), ("rmsnorm_gated_linear_layer", "weight_gate"),
    ("linear_with_residual_layer", "weight"), ("attention_output_layer", "weight"), ("lm_head_layer", "weight_linear"),
}  # fmt: skip


def layer_tensors(mpk: PersistentKernel, layer: str, changed: dict[str, tuple[int, ...]] | None = None) -> dict:
    """Sound arguments of a layer, but for the dims of those in `changed`; `name[i]` is part of a tuple."""
    tensors = {}
    for name, dims in (LAYERS[layer] | (changed or {})).items():
        name, _, index = name.partition("[")
        tensor = attach(mpk, *dims)
        tensors[name] = (*tensors.get(name, ()), tensor) if index else tensor
    return tensors


@pytest.mark.parametrize("layer", LAYERS)
def test_sound_dims_are_accepted(mpk, layer):
    getattr(mpk, layer)(**layer_tensors(mpk, layer))
    assert len(mpk.calls) == 1


@pytest.mark.parametrize(
    ("layer", "argument"),
    [(layer, name) for layer, dims in LAYERS.items() for name in dims if (layer, name) not in UNCHECKED],
)
def test_wrong_dims_are_named(mpk, layer, argument):
    dims = LAYERS[layer][argument]
    tensors = layer_tensors(mpk, layer, {argument: dims[:-1] + (dims[-1] + 1,)})
    with pytest.raises(ValueError, match=rf"{layer}: {re.escape(argument)}=t\d+ must have dims \(.*\), got \("):
        getattr(mpk, layer)(**tensors)
    assert not mpk.calls


def test_weight_that_is_no_matrix(mpk):
    with pytest.raises(ValueError, match=r"must be a matrix \[N, K\], got \(8,\)"):
        mpk.rmsnorm_linear_layer(
            input=attach(mpk, 8), weight_norm=attach(mpk, 8), weight_linear=attach(mpk, 8), output=attach(mpk, 8)
        )


def test_heads_that_do_not_share_evenly(mpk):
    tensors = layer_tensors(mpk, "attention_layer", {"output[0]": (3, 5, 32), "output[1]": (3, 5)})
    with pytest.raises(ValueError, match="output has 5 heads, which must be a multiple of the 2 heads"):
        mpk.attention_layer(**tensors)


def test_weight_that_does_not_fit_the_heads(mpk):
    tensors = layer_tensors(mpk, "attention_output_layer", {"weight": (6, 120)})
    with pytest.raises(ValueError, match="weight has 120 columns, but input has 4 heads of 32; they must agree"):
        mpk.attention_output_layer(**tensors)
    assert not mpk.calls


@pytest.mark.parametrize(("layer", "argument"), [("attention_layer", "output"), ("attention_output_layer", "input")])
def test_attention_parts_come_as_a_pair(mpk, layer, argument):
    tensors = layer_tensors(mpk, layer)
    parts, lse = tensors[argument]
    for wrong in (parts, (parts,), (lse, parts), (parts, lse, lse)):
        with pytest.raises(ValueError, match=f"{layer}: {argument} must be what new_attention_parts returned"):
            getattr(mpk, layer)(**tensors | {argument: wrong})
    assert not mpk.calls


def test_attention_parts():
    """As many splits as asked for, or as the tuning says; the cost model's gives each worker one."""
    mpk = PersistentKernel(num_workers=7, meta_tensors=meta_tensors())
    parts, lse = mpk.new_attention_parts(6, 2, 64, torch.bfloat16, name="a", num_splits=5)
    assert (parts.name, parts.dims, parts.dtype) == ("a", (5, 6, 64), torch.bfloat16)
    assert (lse.name, lse.dims, lse.dtype) == ("a.lse", (5, 6), torch.float32)
    chosen, _ = mpk.new_attention_parts(6, 2, 64, torch.bfloat16, name="b")
    assert chosen.dims[0] * 2 >= 7
    tuning = Tuning(num_workers=2, slot_bytes=4096, block_kv=16, num_splits=9, split_tokens=32)
    tuned = PersistentKernel(meta_tensors=meta_tensors(), tuning=tuning)
    assert tuned.new_attention_parts(6, 2, 64, torch.bfloat16, name="a")[0].dims[0] == 9


def test_attention_and_its_output_split_alike():
    """Both derive the number of active splits from the position: neither may have a rule of its own."""
    tuning = Tuning(num_workers=2, slot_bytes=4096, block_kv=16, num_splits=9, split_tokens=32)
    mpk = PersistentKernel(meta_tensors=meta_tensors(), tuning=tuning)
    tensors = layer_tensors(mpk, "attention_layer")
    mpk.attention_layer(**tensors)
    mpk.attention_output_layer(**layer_tensors(mpk, "attention_output_layer") | {"input": tensors["output"]})
    mpk.argmax_layer(input=(attach(mpk, 1), attach(mpk, 1, dtype=torch.int32)))
    rules = [
        {name: dict(variant.constants)[name] for name in ("NUM_SPLITS", "SPLIT_TOKENS", "DH")}
        for variant in mpk.plan().variants[:2]
    ]
    assert rules == [{"NUM_SPLITS": 3, "SPLIT_TOKENS": 32, "DH": 32}] * 2


def test_page_size_that_blocks_do_not_divide(mpk):
    dims = {"k_cache": (2, 2, 100, 32), "v_cache": (2, 2, 100, 32)}
    with pytest.raises(ValueError, match="page_size=100 must be a multiple"):
        mpk.attention_layer(**layer_tensors(mpk, "attention_layer", dims))


def test_argmax_has_one_task(mpk):
    mpk.argmax_layer(input=(attach(mpk, 1), attach(mpk, 1, dtype=torch.int32)), grid_dim=2)
    with pytest.raises(ValueError, match="grid_dim=2"):
        mpk.plan()


# ---- from graph to launch ----


def copy_graph(device: torch.device | str = "cpu", tasks: int | None = None, max_seq_len: int = 8) -> PersistentKernel:
    """Token t is followed by t + 1: an embedding whose rows are one-hot, and a head that shifts."""
    mpk = PersistentKernel(num_workers=2, meta_tensors=meta_tensors(max_seq_len, device), wait_bound_s=30.0)
    eye = torch.eye(16, device=device)
    x = mpk.new_tensor((16,), torch.float32, name="x")
    mpk.embed_layer(weight=mpk.attach_input(eye, name="embedding"), output=x)
    y = mpk.new_tensor((16,), torch.float32, name="y")
    mpk.linear_with_residual_layer(
        input=x, weight=mpk.attach_input(0 * eye, name="zero"), residual=x, output=y, grid_dim=tasks
    )
    best = (mpk.new_tensor((2,), torch.float32, name="v"), mpk.new_tensor((2,), torch.int32, name="i"))
    mpk.lm_head_layer(
        input=y, weight_norm=mpk.attach_input(torch.ones(16, device=device), name="norm"),
        weight_linear=mpk.attach_input(eye.roll(1, 0).contiguous(), name="shift"), output=best,
    )  # fmt: skip
    mpk.argmax_layer(input=best)
    return mpk


@pytest.fixture(scope="module")
def counter() -> PersistentKernel:
    mpk = copy_graph()
    mpk.compile()
    return mpk


def restart(mpk: PersistentKernel, *tokens: int) -> None:
    mpk.step.data.zero_()
    mpk.tokens.data.zero_()
    mpk.tokens.data[: len(tokens)] = torch.tensor(tokens)


def test_a_graph_counts(counter):
    restart(counter, 3)
    assert counter(num_tokens=1, max_new_tokens=4) == 5
    assert counter.tokens.data.tolist() == [3, 4, 5, 6, 7, 0, 0, 0] and int(counter.step.data) == 4
    assert counter(num_tokens=5) == 8  # goes on where it stands, to the end
    assert counter.tokens.data.tolist() == list(range(3, 11))


def test_a_graph_stops_at_eos(counter):
    restart(counter, 9, 1)
    assert counter(num_tokens=2, eos_token_id=4) == 5
    assert counter.tokens.data.tolist() == [9, 1, 2, 3, 4, 0, 0, 0]
    restart(counter, 1)
    assert counter(num_tokens=1, eos_token_id=[14, 2]) == 2


def test_tokens_come_while_the_kernel_runs():
    interval = STOP_INTERVAL.value
    mpk = copy_graph(max_seq_len=8 * interval)
    mpk.compile()
    restart(mpk, 5)
    tokens = mpk.launch(LaunchRequest(num_known=1, last_step=8 * interval - 2))
    assert next(tokens) == 6
    assert not mpk.runtime.finished()
    tokens.close()  # asks it to stop, which it sees every so many steps
    step = int(mpk.step.data)  # of the token after the last one processed
    assert mpk.runtime.finished() and step < 8 * interval - 1 and (step - 1) % interval == 0
    assert mpk.tokens.data[: step + 1].tolist() == [(5 + i) % 16 for i in range(step + 1)]
    assert not mpk.tokens.data[step + 1 :].any()


@pytest.mark.parametrize(
    ("num_tokens", "max_new_tokens", "step"),
    [(0, 1, 0), (1, 0, 0), (1, 8, 0), (8, None, 0), (9, 1, 0), (3, 1, 3), (-1, None, 0), (7, 2, 0)],
)
def test_ranges_of_a_call(counter, num_tokens, max_new_tokens, step):
    restart(counter, 1)
    counter.step.data.fill_(step)
    launches = counter.runtime.num_launches
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens}, max_new_tokens={max_new_tokens} at step {step}"):
        counter(num_tokens=num_tokens, max_new_tokens=max_new_tokens)
    assert counter.runtime.num_launches == launches


def test_a_compiled_graph_is_closed(counter):
    with pytest.raises(ValueError, match="compiled"):
        counter.embed_layer(weight=counter.tensors["embedding"], output=counter.tensors["x"])


def test_a_graph_without_an_end(mpk):
    mpk.embed_layer(weight=attach(mpk, 4, 8), output=attach(mpk, 8))
    with pytest.raises(ValueError, match="no argmax_layer"):
        mpk.compile()


def test_weights_of_several_types(mpk):
    x, y = attach(mpk, 8), attach(mpk, 8)
    mpk.embed_layer(weight=attach(mpk, 4, 8), output=x)
    mpk.linear_with_residual_layer(input=x, weight=attach(mpk, 8, 8, dtype=torch.bfloat16), residual=x, output=y)
    mpk.argmax_layer(input=(attach(mpk, 1), attach(mpk, 1, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"one type.*torch\.bfloat16.*torch\.float32"):
        mpk.plan()


@pytest.mark.parametrize("tasks", [1, 3, 16])
def test_grid_dim_is_the_number_of_tasks(tasks):
    program = copy_graph(META, tasks).plan()
    assert sum(task.op == 1 for task in program.graph.tasks) == tasks


def test_a_graph_on_the_meta_device_is_planned_not_run():
    mpk = copy_graph(META)
    program = mpk.plan()
    assert program.report.num_tasks == len(program.graph.tasks) and program.num_workers == 2
    with pytest.raises(DeviceError, match="meta can be planned, not run"):
        mpk.compile()


def test_reading_what_nobody_writes_is_refused(mpk):
    hole = mpk.new_tensor((8,), torch.float32, name="hole")
    mpk.linear_with_residual_layer(input=hole, weight=attach(mpk, 8, 8), residual=attach(mpk, 8), output=attach(mpk, 8))
    mpk.argmax_layer(input=(attach(mpk, 1), attach(mpk, 1, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"unwritten read.*hole\[.*0:8\]"):
        mpk.plan()
