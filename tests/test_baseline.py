"""The baseline decoder and the reference equal transformers. Tiny models, no GPU."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import tri_mpk.baseline
from tri_mpk.baseline import (
    ATTENTIONS,
    BATCH_ATTENTIONS,
    StaticCacheDecoder,
    bucket,
    copy_bandwidth_gbps,
    layers_per_graph,
    measure_baseline,
    measure_batches,
    prefill_ms,
    reference_logits,
)

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(
        **TINY,
        head_dim=16,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": lambda: Qwen2Config(**TINY),
    "qwen3": lambda: Qwen3Config(**TINY, head_dim=16),
    "mistral": lambda: MistralConfig(**TINY, sliding_window=None),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose norms and biases are random too, so that none can be forgotten."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(dtype))
    rotary = model.model.rotary_emb
    inv_freq = rotary.inv_freq
    model.to(dtype)
    rotary.inv_freq = inv_freq  # .to(bfloat16) would round it; from_pretrained keeps it in fp32
    return model


@torch.no_grad()
def full_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0].float()


def decode(decoder: StaticCacheDecoder, tokens: torch.Tensor) -> torch.Tensor:
    steps = [decoder.step(tokens[i : i + 1], torch.tensor([i])) for i in range(len(tokens))]
    return torch.cat(steps)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_decoder_equals_transformers(family: str, pack: bool, attention: str):
    model = tiny_model(family)
    tokens = torch.randint(0, TINY["vocab_size"], (11,))
    expected = full_logits(model, tokens)
    decoder = StaticCacheDecoder(model, max_seq_len=512, pack=pack, attention=attention)
    actual = decode(decoder, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    assert actual.dtype == torch.float32 and actual.shape == (11, TINY["vocab_size"])
    assert not decoder.k_cache[:, :, :, 11:].any() and decoder.k_cache[:, :, :, :11].all()
    again = decoder.next_token(tokens[-1:], torch.tensor([10]))
    assert again.tolist() == [int(expected[-1].argmax())]
    torch.testing.assert_close(full_logits(model, tokens), expected)  # packing left it usable


@pytest.mark.parametrize("attention", sorted({*ATTENTIONS, *BATCH_ATTENTIONS}))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_of_sequences_of_different_lengths(family: str, attention: str):
    """Three sequences, each at a position of its own, equal three decoders of one."""
    model = tiny_model(family)
    tokens = torch.randint(0, TINY["vocab_size"], (3, 7))
    starts = torch.tensor([0, 5, 300])
    batch = StaticCacheDecoder(model, max_seq_len=512, attention=attention, batch_size=3)
    batch.k_cache.normal_()
    batch.v_cache.normal_()
    expected = []
    for i, start in enumerate(starts):
        one = StaticCacheDecoder(model, max_seq_len=512)
        one.k_cache.copy_(batch.k_cache[:, i : i + 1])
        one.v_cache.copy_(batch.v_cache[:, i : i + 1])
        steps = [one.step(tokens[i, n : n + 1], start[None] + n) for n in range(7)]
        expected.append(torch.cat(steps))
    actual = torch.stack([batch.step(tokens[:, n], starts + n) for n in range(7)], 1)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert batch.next_token(tokens[:, 6], starts + 6).tolist() == actual[:, -1].argmax(-1).tolist()


def test_reference_of_a_batch():
    model = tiny_model("qwen3")
    tokens = torch.tensor([5, 6, 7, 8])
    cache = torch.randn(2, 3, 4, 2, 9, 16)  # k and v, layers, sequences, heads, positions
    actual = reference_logits(model, *cache, tokens, 9)
    for i in range(4):
        expected = reference_logits(model, *cache[:, :, i : i + 1], tokens[i : i + 1], 9)
        torch.testing.assert_close(actual[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_reference_equals_transformers(family: str):
    model = tiny_model(family)
    tokens = torch.randint(0, TINY["vocab_size"], (9,))
    expected = full_logits(model, tokens)
    decoder = StaticCacheDecoder(model, max_seq_len=16)
    decode(decoder, tokens)
    decoder.k_cache[:, :, :, 8:] = float("nan")  # the reference makes its own entry at 8
    before = decoder.k_cache.clone()
    for position in (8, torch.tensor([8])):
        actual = reference_logits(model, decoder.k_cache, decoder.v_cache, tokens[8:], position)
        torch.testing.assert_close(actual[0], expected[8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.k_cache, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_reference_rounds_like_transformers(family: str):
    model = tiny_model(family, torch.bfloat16)
    tokens = torch.randint(0, TINY["vocab_size"], (9,))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[None, :8], past_key_values=cache)
        kv = [torch.stack([getattr(x, n) for x in cache.layers]) for n in ("keys", "values")]
        theirs = model(tokens[None, 8:], past_key_values=cache).logits[0, 0].float()
    exact = reference_logits(model, *kv, tokens[8:], 8)[0]
    bf16 = reference_logits(model, *kv, tokens[8:], 8, dtype=torch.bfloat16)[0]
    noise = (theirs - exact).norm()
    assert noise > 0
    assert (bf16 - theirs).norm() < 0.1 * noise  # the same bits, unless a kernel differs by shape

    decoder = StaticCacheDecoder(model, max_seq_len=16)
    decoder.k_cache[:, :, :, :8], decoder.v_cache[:, :, :, :8] = kv
    assert (decoder.step(tokens[8:], torch.tensor([8]))[0] - exact).norm() < 2 * noise


def test_reference_upcasts_a_bf16_model_exactly():
    model = tiny_model("qwen3", torch.bfloat16)
    decoder = StaticCacheDecoder(model, max_seq_len=16)
    decode(decoder, torch.arange(5))
    upcast = copy.deepcopy(model).float()
    cache = (decoder.k_cache, decoder.v_cache, torch.tensor([7]), 5)
    assert torch.equal(reference_logits(model, *cache), reference_logits(upcast, *cache))


def test_packed_parameters_are_views():
    model = tiny_model("qwen2")
    decoder = StaticCacheDecoder(model, max_seq_len=8)
    attention = model.model.layers[1].self_attn
    weight, bias = decoder.layers[1].qkv[0]
    for packed, name in itertools.product((weight, bias), ("q_proj", "k_proj", "v_proj")):
        part = getattr(attention, name)
        part = part.weight if packed is weight else part.bias
        assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert decoder.lm_head[0].data_ptr() == model.lm_head.weight.data_ptr()


def test_measure_reports_the_fastest():
    rows = measure_baseline(tiny_model("llama"), (3, 300), mode="eager", samples=5, replays=1)
    assert [(r["context"], r["cache_len"]) for r in rows] == [(3, 4), (300, 512)]
    for row in rows:
        assert set(row["tried"]) == {"eager/sdpa", "eager/split"}
        assert row["ms_p50"] == min(row["tried"].values())
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]


def test_measure_batches():
    model = tiny_model("llama")
    rows = list(measure_batches(model, (1, 3), 300, mode="eager", samples=2, replays=1))
    assert [(row["batch"], row["cache_len"]) for row in rows] == [(1, 512), (3, 512)]
    assert [set(row["tried"]) for row in rows] == [{"eager/sdpa", "eager/split"}, {"eager/split", "eager/rows"}]
    assert all(row["ms_p50"] == min(row["tried"].values()) > 0 for row in rows)


def test_prefill_leaves_the_model_as_it_was():
    model = tiny_model("qwen3")
    model.set_attn_implementation("eager")
    times = prefill_ms(model, 20, repeats=2)
    assert len(times) == 2 and min(times) > 0
    assert model.config._attn_implementation == "eager"


def test_bucket():
    assert [bucket(n) for n in (1, 2, 3, 512, 513)] == [1, 2, 4, 512, 1024]
    assert bucket(600, max_seq_len=768) == 768
    with pytest.raises(ValueError, match="context=9"):
        bucket(9, max_seq_len=8)


def test_copy_bandwidth():
    assert copy_bandwidth_gbps("cpu", buffer_bytes=1 << 20, repeats=3) > 0


def test_unsupported_models_are_refused():
    model = tiny_model("mistral")
    model.config.sliding_window = 64
    StaticCacheDecoder(model, max_seq_len=64)
    with pytest.raises(NotImplementedError, match="sliding_window=64"):
        StaticCacheDecoder(model, max_seq_len=65)
    with pytest.raises(ValueError, match="attention='flash'"):
        StaticCacheDecoder(model, max_seq_len=8, attention="flash")
    model.config.hidden_act = "gelu"
    with pytest.raises(NotImplementedError, match="hidden_act='gelu'"):
        StaticCacheDecoder(model, max_seq_len=8)
    with pytest.raises(ValueError, match="mode='fast'"):
        measure_baseline(model, (8,), mode="fast")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_step_is_one_graph_that_updates_the_cache_in_place(attention: str):
    model = tiny_model("qwen3")
    tokens = torch.randint(0, TINY["vocab_size"], (5,))
    decoder = StaticCacheDecoder(model, max_seq_len=512, attention=attention)
    storages = {layer.untyped_storage()._cdata for layer in decoder._k_layers}
    assert len(storages) == TINY["num_hidden_layers"]  # torch.compile sees no aliases
    addresses = [layer.data_ptr() for layer in decoder._k_layers]
    assert addresses == [layer.data_ptr() for layer in decoder.k_cache]

    expected = decode(decoder, tokens)
    written = decoder.k_cache.clone()
    decoder.allocate_cache(512)
    torch.compiler.reset()
    step = torch.compile(decoder.step, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        actual = [step(tokens[i : i + 1], torch.tensor([i])) for i in range(5)]
    torch.testing.assert_close(torch.cat(actual), expected)
    torch.testing.assert_close(decoder.k_cache, written)


def test_layers_of_equal_shape_are_compiled_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tri_mpk.baseline, "MAX_LAYERS_PER_GRAPH", 2)
    assert [layers_per_graph(num_layers) for num_layers in (1, 2, 3, 36)] == [1, 2, 1, 2]
    decoder = StaticCacheDecoder(tiny_model("qwen3"), max_seq_len=16)
    counter = CompileCounterWithBackend("aot_eager")
    tokens, at = torch.randint(0, TINY["vocab_size"], (5, 1)), torch.arange(5)[:, None]
    expected = [decoder.next_token(tokens[i], at[i]) for i in range(5)]
    written = decoder.k_cache.clone()
    decoder.allocate_cache(16)
    torch.compiler.reset()
    with torch.no_grad():
        next_token = decoder.compiled(backend=counter)
        assert [next_token(tokens[i], at[i]) for i in range(5)] == expected
    torch.testing.assert_close(decoder.k_cache, written)
    assert counter.frame_count == 3  # before the layers, any of the three layers, behind them
