"""The committed checkpoint recites its corpus, stops by itself, and no choice is a close one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMOS = Path(__file__).resolve().parents[2] / "demos"
CHECKPOINT = DEMOS / "tiny"
MAX_BYTES = 2_000_000
MIN_MARGIN = 2.0  # logits; the rounding of an fp32 or bf16 forward pass is far below

PROMPTS = ("Four score and seven", "Shall I compare thee", "Humpty Dumpty sat", "Call me Ishmael.")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")


def document_starting_with(prompt: str) -> str:
    documents = (DEMOS / "tiny_corpus.txt").read_text().split("\n<|endoftext|>\n")
    (document,) = [text.strip("\n") for text in documents if text.startswith(prompt)]
    return document


def test_is_a_small_and_complete_checkpoint():
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < MAX_BYTES


def test_configs_agree(model, tokenizer):
    config, generation = model.config, model.generation_config
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == generation.eos_token_id == tokenizer.eos_token_id
    assert generation.do_sample is False
    assert generation.max_length == config.max_position_embeddings == tokenizer.model_max_length
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_recites_the_document(model, tokenizer, prompt):
    document = document_starting_with(prompt)
    expected = tokenizer.encode(document) + [tokenizer.eos_token_id]
    inputs = tokenizer(prompt, return_tensors="pt")

    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)

    assert out.sequences[0].tolist() == expected
    assert tokenizer.decode(out.sequences[0], skip_special_tokens=True) == document
    best, second = torch.cat(out.logits).topk(2, dim=-1).values.unbind(-1)
    assert (best - second).min() > MIN_MARGIN


def test_bfloat16_recites_the_same(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    document = document_starting_with("Four score and seven")
    out = model.generate(**tokenizer("Four score and seven", return_tensors="pt"))
    assert tokenizer.decode(out[0], skip_special_tokens=True) == document


@pytest.mark.parametrize(
    "text",
    ["", "Four score", "  two  spaces ,\n\n\ttab .", "naïve Zürich, 你好 🚀", "\x00\x7f"],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_round_trip_of_the_corpus(tokenizer):
    text = (DEMOS / "tiny_corpus.txt").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text
