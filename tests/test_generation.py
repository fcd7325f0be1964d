"""`generate` takes transformers' parameters and returns transformers' tokens, in one launch; all else is refused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from decoders import TINY, prompt, tiny_config, tiny_pair, transformers_model
from tri_mpk.generation import NEUTRAL_VALUES, WITHOUT_EFFECT, resolve
from tri_mpk.ops.sample import SAMPLE
from tri_mpk.sampling import Sampling

MAX_SEQ_LEN = 24
PROMPT = prompt(3)


@pytest.fixture(scope="module")
def pair():
    ours, theirs = tiny_pair(max_seq_len=MAX_SEQ_LEN)
    ours.compile()
    return ours, theirs


@pytest.fixture(scope="module")
def continuation(pair) -> list[int]:
    """The first new tokens of PROMPT."""
    return pair[1].generate(PROMPT, max_new_tokens=6)[0, 3:].tolist()


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value)

    def end(self) -> None:
        self.calls.append("end")


# ---- results ----


def test_tokens_and_result(pair):
    ours, theirs = pair
    launches = ours.kernel.runtime.num_launches
    result = ours.generate(PROMPT, max_new_tokens=6)
    assert torch.equal(result, theirs.generate(PROMPT, max_new_tokens=6))
    assert result.shape == (1, 9) and result.dtype == torch.int64 and result.device == PROMPT.device
    assert ours.kernel.runtime.num_launches == launches + 1


def test_eos_ends_the_text_and_belongs_to_it(pair, continuation):
    ours, theirs = pair
    for eos in (continuation[2], [95, continuation[2], 94], torch.tensor([continuation[2]])):
        result = ours.generate(PROMPT, max_new_tokens=6, eos_token_id=eos)
        expected = theirs.generate(PROMPT, max_new_tokens=6, eos_token_id=torch.as_tensor(eos).reshape(-1).tolist())
        assert torch.equal(result, expected)
        assert result.shape[1] <= 6


def test_a_prompt_that_ends_with_eos_goes_on(pair):
    ours, theirs = pair
    eos = int(PROMPT[0, -1])
    assert torch.equal(
        ours.generate(PROMPT, max_new_tokens=2, eos_token_id=eos),
        theirs.generate(PROMPT, max_new_tokens=2, eos_token_id=eos),
    )


def test_lists_int32_and_masks_of_ones_are_accepted(pair):
    ours, theirs = pair
    expected = theirs.generate(PROMPT, max_new_tokens=1)
    assert torch.equal(ours.generate(PROMPT.tolist(), max_new_tokens=1), expected)
    assert torch.equal(ours.generate(PROMPT.to(torch.int32), max_new_tokens=1), expected)
    mask = torch.ones_like(PROMPT)
    assert torch.equal(ours.generate(input_ids=PROMPT, attention_mask=mask, max_new_tokens=1), expected)


def test_the_whole_length_can_be_used(pair):
    ours, theirs = pair
    long = prompt(MAX_SEQ_LEN - 1)
    assert torch.equal(ours.generate(long, max_length=MAX_SEQ_LEN), theirs.generate(long, max_length=MAX_SEQ_LEN))


def test_streamer_gets_the_prompt_then_each_token_then_the_end(pair):
    ours, theirs = pair
    actual, expected = Recorder(), Recorder()
    ours.generate(PROMPT, max_new_tokens=3, streamer=actual)
    theirs.generate(PROMPT, max_new_tokens=3, streamer=expected)
    assert len(actual.calls) == len(expected.calls) == 5
    for call, other in zip(actual.calls, expected.calls, strict=True):
        assert torch.equal(call, other) if isinstance(other, torch.Tensor) else call == other


def test_the_first_token_arrives_while_the_kernel_runs(pair):
    ours, _ = pair
    runtime = ours.kernel.runtime

    class Impatient(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(bool(runtime.finished()) if value.numel() == 1 else None)

    streamer = Impatient()
    ours.generate(PROMPT[:, :2], max_new_tokens=4, streamer=streamer)
    assert streamer.calls[1] is False


def test_no_token_is_computed_by_torch(pair):
    """On a CPU, too, the kernel does all the work: matrix products of the parent process raise."""
    ours, theirs = pair
    expected = theirs.generate(PROMPT, max_new_tokens=2)
    forbidden = mock.Mock(side_effect=AssertionError("torch computes"))
    patches = [
        mock.patch.object(owner, name, forbidden)
        for owner, names in (
            (torch, ("matmul", "mm", "mv", "bmm", "addmm", "einsum", "argmax", "softmax", "rsqrt", "topk")),
            (torch.nn.functional, ("linear", "embedding", "scaled_dot_product_attention", "silu", "softmax")),
            (torch.Tensor, ("__matmul__", "matmul", "argmax", "softmax")),
        )
        for name in names
    ]
    for patch in patches:
        patch.start()
    try:
        result = ours.generate(PROMPT, max_new_tokens=2)
    finally:
        mock.patch.stopall()
    assert torch.equal(result, expected)


# ---- parameters, compared with transformers without running the kernel ----

LENGTHS = [
    ({"max_new_tokens": 5}, None, {}),
    ({"max_length": 9}, None, {}),
    ({"max_new_tokens": 4, "max_length": 30}, None, {}),
    ({}, None, {}),  # 20 new tokens
    ({}, None, {"max_length": 12}),
    ({}, None, {"max_new_tokens": 2}),
    ({"max_length": 11}, None, {"max_new_tokens": 2}),
    ({}, {"max_new_tokens": 3}, {"max_length": 12}),
    ({}, {"max_length": 8}, {"max_length": 12}),
    ({"max_new_tokens": 1}, {"max_length": 8}, {}),
    ({}, {"max_new_tokens": 4}, {"eos_token_id": 5}),  # an EOS of the checkpoint's counts beside generation_config
    ({"eos_token_id": None, "max_new_tokens": 8}, None, {"eos_token_id": 5}),
    ({"eos_token_id": -1, "max_new_tokens": 8}, None, {"eos_token_id": 5}),
    ({"eos_token_id": [60, 61], "max_new_tokens": 8}, None, {"eos_token_id": 5}),
    ({}, {"eos_token_id": 60}, {"eos_token_id": [5, 6], "max_length": 14}),
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 2}, None, {}),  # greedy: without effect
]


@pytest.mark.parametrize("length", [1, 25])
@pytest.mark.parametrize(("parameters", "given", "checkpoint"), LENGTHS)
def test_lengths_and_eos_as_in_transformers(parameters, given, checkpoint, length):
    model = transformers_model(tiny_config())
    input_ids = prompt(length)
    full = model.generate(input_ids, max_new_tokens=24)[0].tolist()
    model.generation_config = GenerationConfig(**rename_eos(checkpoint, full, length))
    generation_config = None if given is None else GenerationConfig(**rename_eos(given, full, length))
    parameters = rename_eos(parameters, full, length)
    arguments = {"attention_mask": None, "generation_config": generation_config, "parameters": parameters}

    def ours() -> list[int]:
        request = resolve(input_ids, model.generation_config, 256, TINY["vocab_size"], **arguments)
        text = full[: request.max_length]
        ends = [i for i in range(length, len(text)) if text[i] in request.eos_token_ids]
        return text[: ends[0] + 1] if ends else text

    try:
        expected = model.generate(input_ids, generation_config=generation_config, **parameters)[0].tolist()
    except ValueError:  # no room
        with pytest.raises(ValueError, match="max_new_tokens"):
            ours()
        return
    assert ours() == expected


def rename_eos(parameters: dict, full: list[int], length: int) -> dict:
    """EOS 5 stands for the fourth new token, 60 for the second; other ids never come."""
    names = {5: full[length + 3], 60: full[length + 1]}
    unused = iter(sorted(set(range(TINY["vocab_size"])) - set(full)))
    eos = parameters.get("eos_token_id")
    if eos is None:
        return parameters
    if isinstance(eos, list):
        return parameters | {"eos_token_id": [names.get(i) or next(unused) for i in eos]}
    return parameters | {"eos_token_id": eos if eos < 0 else names.get(eos) or next(unused)}


def call(**parameters: object):
    config = parameters.pop("config", GenerationConfig())
    return resolve(
        parameters.pop("input_ids", PROMPT), config, MAX_SEQ_LEN, TINY["vocab_size"],
        attention_mask=parameters.pop("attention_mask", None),
        generation_config=parameters.pop("generation_config", None), parameters=parameters,
    )  # fmt: skip


def test_the_default_length_stops_at_max_seq_len():
    assert call().max_length == 23
    assert call(input_ids=prompt(MAX_SEQ_LEN - 2)).max_length == MAX_SEQ_LEN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("num_return_sequences", 3),
        ("no_repeat_ngram_size", 2),
        ("min_new_tokens", 2),
        ("min_length", 10),
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [3]),
        ("stop_strings", ["x"]),
        ("max_time", 1.0),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("output_scores", True),
        ("prompt_lookup_num_tokens", 3),
        ("use_mtp", True),
        ("use_cache", False),
    ],
)
def test_unsupported_values_are_refused_wherever_they_come_from(name, value):
    with pytest.raises(NotImplementedError, match=name):
        call(**{name: value})
    config = GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(NotImplementedError, match=rf"{name}.*from generation_config"):
        call(generation_config=config)
    with pytest.raises(NotImplementedError, match=rf"{name}.*the checkpoint's generation_config"):
        call(config=config)
    assert call(config=config, **{name: NEUTRAL_VALUES[name][-1]}).max_length == 23  # the call can switch it off


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_processor", LogitsProcessorList()),
        ("stopping_criteria", StoppingCriteriaList()),
        ("prefix_allowed_tokens_fn", lambda batch, ids: [1]),
        ("assistant_model", object()),
        ("inputs_embeds", torch.zeros(1)),
        ("max_new_token", 5),
        ("past_key_values", ()),
        ("tokenizer", object()),
    ],
)
def test_unknown_names_are_refused(name, value):
    with pytest.raises(NotImplementedError, match=rf"\b{name}\b"):
        call(**{name: value})
    assert call(**{name: None}).max_length == 23


def test_no_parameter_of_transformers_is_dropped_silently():
    """What a GenerationConfig can say is either known here or refused."""
    for name in vars(GenerationConfig()).keys() - NEUTRAL_VALUES.keys() - WITHOUT_EFFECT:
        config = GenerationConfig()
        setattr(config, name, 3)
        with pytest.raises(NotImplementedError, match=name):
            call(generation_config=config)


def test_the_checkpoints_generation_config_is_obeyed(pair):
    ours, _ = pair
    refused = pytest.raises(NotImplementedError, match=r"num_beams=2 \(from the checkpoint's")
    with mock.patch.object(ours, "generation_config", GenerationConfig(num_beams=2)), refused:
        ours.generate(PROMPT)
    with mock.patch.object(ours, "generation_config", GenerationConfig(max_length=4)):
        assert ours.generate(PROMPT).shape == (1, 4)


# ---- bad input ----


@pytest.mark.parametrize(
    ("error", "text", "parameters"),
    [
        (NotImplementedError, "batch of 2", {"input_ids": torch.ones(2, 3, dtype=torch.int64)}),
        (NotImplementedError, "padding", {"attention_mask": torch.tensor([[0, 1, 1]])}),
        (ValueError, "attention_mask has shape", {"attention_mask": torch.ones(1, 2)}),
        (ValueError, "empty", {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}),
        (ValueError, "token 96", {"input_ids": [[1, 96]]}),
        (ValueError, "token -1", {"input_ids": [[-1, 5]]}),
        (ValueError, "integers", {"input_ids": torch.zeros(1, 3)}),
        (ValueError, "integers", {"input_ids": torch.ones(1, 3, dtype=torch.bool)}),
        (ValueError, "integers", {"input_ids": [1, 2, 3]}),
        (ValueError, "max_seq_len=24", {"input_ids": prompt(24)}),
        (ValueError, "max_seq_len=24", {"input_ids": prompt(60), "max_new_tokens": 3}),
        (ValueError, "max_seq_len=24", {"max_new_tokens": 22}),
        (ValueError, "max_length=3", {"max_length": 3}),
        (ValueError, "max_new_tokens", {"max_new_tokens": 0}),
        (ValueError, "max_new_tokens", {"max_new_tokens": -1}),
        (ValueError, "max_new_tokens", {"max_new_tokens": 2.5}),
        (ValueError, "max_new_tokens", {"max_new_tokens": True}),
        (ValueError, "max_length", {"max_length": "long"}),
        (ValueError, "eos_token_id=96", {"eos_token_id": 96}),
        (ValueError, "eos_token_id=1.5", {"eos_token_id": 1.5}),
        (NotImplementedError, "at most 32", {"eos_token_id": list(range(33))}),
        (NotImplementedError, "at most 32", {"eos_token_id": list(range(20)), "stop_token_ids": list(range(20))}),
        (ValueError, "stop_token_ids=96", {"stop_token_ids": [3, 96]}),
        (ValueError, "do_sample='yes'", {"do_sample": "yes"}),
        (ValueError, "temperature=0.0 must be", {"do_sample": True, "temperature": 0.0}),
        (ValueError, "top_k=-2 must be", {"do_sample": True, "top_k": -2}),
        (ValueError, "top_p=1.5 must be", {"do_sample": True, "top_p": 1.5}),
        (ValueError, "min_p=-0.1 must be", {"do_sample": True, "min_p": -0.1}),
        (ValueError, "repetition_penalty=0.0 must be", {"repetition_penalty": 0.0}),
        (ValueError, "seed=-1 must be", {"do_sample": True, "seed": -1}),
        (ValueError, "needs return_dict_in_generate", {"output_logprobs": True}),
        (NotImplementedError, "typical_p=0.5", {"do_sample": True, "typical_p": 0.5}),
    ],
)
def test_bad_input_is_named(error, text, parameters):
    with pytest.raises(error, match=text):
        call(**parameters)


def test_bad_input_launches_nothing(pair):
    ours, _ = pair
    launches = ours.kernel.runtime.num_launches
    streamer = Recorder()
    with pytest.raises(NotImplementedError):
        ours.generate(PROMPT, num_beams=2, streamer=streamer)
    with pytest.raises(ValueError, match="temperature"):
        ours.generate(PROMPT, do_sample=True, temperature=-1.0, streamer=streamer)
    assert ours.kernel.runtime.num_launches == launches and streamer.calls == []


# ---- sampling ----


def sampling_of(**parameters: object) -> Sampling:
    return call(**parameters).sampling


def test_sampling_takes_transformers_defaults_and_precedence():
    assert sampling_of() == sampling_of(temperature=0.3, top_k=3, min_p=0.5, seed=5, top_p=9.0) == Sampling(seed=0)
    assert sampling_of(do_sample=True, seed=5) == Sampling(True, top_k=50, seed=5)
    assert sampling_of(do_sample=True, seed=5, top_k=None, min_p=0.1) == Sampling(True, min_p=0.1, seed=5)
    checkpoint = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    given = GenerationConfig(top_k=7, temperature=0.5)
    expected = {"top_p": 0.95, "repetition_penalty": 1.05, "seed": 5}
    assert sampling_of(config=checkpoint, seed=5) == Sampling(True, 0.6, 20, **expected)
    assert sampling_of(config=checkpoint, generation_config=given, seed=5, temperature=0.4) == Sampling(
        True, 0.4, 7, **expected
    )
    assert sampling_of(config=checkpoint, do_sample=False) == Sampling(repetition_penalty=1.05)


def test_a_seed_makes_a_text_and_torch_makes_a_seed(pair):
    ours, _ = pair

    def text(**parameters: object) -> list[int]:
        return ours.generate(PROMPT, max_new_tokens=6, do_sample=True, temperature=1.5, **parameters)[0].tolist()

    first = text(seed=1)
    other = ours.generate(prompt(5, seed=9), max_new_tokens=3, do_sample=True, seed=2)
    assert text(seed=1) == first != text(seed=2)
    assert other.shape == (1, 8)
    torch.manual_seed(3)
    drawn = text(), text()
    torch.manual_seed(3)
    assert (text(), text()) == drawn and drawn[0] != drawn[1]
    state = torch.get_rng_state()
    ours.generate(PROMPT, max_new_tokens=1)
    assert torch.equal(torch.get_rng_state(), state)  # greedy decoding draws nothing


@pytest.mark.parametrize("penalty", [1.3, 0.7, 20.0])
def test_greedy_with_a_penalty_equals_transformers(pair, penalty):
    ours, theirs = pair
    for input_ids in (PROMPT, PROMPT.repeat(1, 2)):
        parameters = {"max_new_tokens": 10, "repetition_penalty": penalty}
        assert torch.equal(ours.generate(input_ids, **parameters), theirs.generate(input_ids, **parameters))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_log_probabilities_of_greedy_tokens_equal_transformers(pair, penalty):
    ours, theirs = pair
    parameters = {"max_new_tokens": 5, "return_dict_in_generate": True, "repetition_penalty": penalty}
    output = ours.generate(PROMPT, output_logprobs=True, **parameters)
    expected = theirs.generate(PROMPT, output_scores=True, **parameters)
    assert torch.equal(output.sequences, expected.sequences)
    scores = theirs.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(output.logprobs, scores, rtol=1e-4, atol=1e-4)
    assert ours.generate(PROMPT, **parameters).logprobs is None


def test_sampled_tokens_and_their_log_probabilities(pair):
    """Teacher-forced: at each position transformers' processed scores of the text so far say what was allowed."""
    ours, theirs = pair
    p = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    output = ours.generate(
        PROMPT, max_new_tokens=8, do_sample=True, seed=11, return_dict_in_generate=True, output_logprobs=True, **p
    )
    text = output.sequences[0]
    with torch.no_grad():
        logits = theirs(text[None]).logits[0]
    for i, logprob in enumerate(output.logprobs[0], PROMPT.shape[1]):
        expected = SAMPLE.reference(logits[i - 1], text[:i], **p)[text[i]].log()
        torch.testing.assert_close(logprob, expected, rtol=1e-3, atol=1e-3)


def test_extreme_parameters_are_greedy(pair):
    ours, _ = pair
    greedy = ours.generate(PROMPT, max_new_tokens=4)
    for parameters in ({"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert torch.equal(ours.generate(PROMPT, max_new_tokens=4, do_sample=True, **parameters), greedy)


def test_stop_ids_end_the_text_beside_eos(pair, continuation):
    ours, _ = pair
    expected = continuation[: continuation.index(continuation[2]) + 1]
    for parameters in (
        {"stop_token_ids": [95, continuation[2]]},
        {"stop_token_ids": [continuation[2]], "eos_token_id": 94},
    ):
        assert ours.generate(PROMPT, max_new_tokens=6, **parameters)[0, 3:].tolist() == expected


# ---- logits ----


def test_logits_of_every_position(pair):
    ours, theirs = pair
    with torch.no_grad():
        expected = theirs(PROMPT).logits
    output = ours(PROMPT, attention_mask=torch.ones_like(PROMPT), use_cache=True)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.forward(input_ids=PROMPT).logits, output.logits)


@pytest.mark.parametrize("parameters", [{"labels": PROMPT}, {"output_attentions": True}, {"past_key_values": ()}])
def test_unsupported_parameters_of_a_forward_are_refused(pair, parameters):
    with pytest.raises(NotImplementedError, match=next(iter(parameters))):
        pair[0](PROMPT, **parameters)


def test_a_forward_that_is_too_long(pair):
    with pytest.raises(ValueError, match="max_seq_len=24"):
        pair[0](prompt(25))
