"""transformers' parameters of `generate`, checked: what is supported is resolved, all else is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tri_mpk.sampling import Sampling

if TYPE_CHECKING:
    from tri_mpk.distributed import Ranks

MAX_ENDS = 32  # ids that end a text
DEFAULT_NEW_TOKENS = 20  # transformers' own, when no length is given anywhere

# Parameters of GenerationConfig that change the text, with the values that mean "off".
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None, []),
    "watermarking_config": (None,),
    "stop_strings": (None, []),
    "max_time": (None,),
    "prompt_lookup_num_tokens": (None,),
    "speculation_type": (None,),
    "use_mtp": (None, False),
    "assistant_early_exit": (None,),
    "remove_invalid_values": (None, False),
    "exponential_decay_length_penalty": (None,),
    "renormalize_logits": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "cache_implementation": (None, "static", "dynamic"),
    "use_cache": (None, True),
    "diversity_penalty": (None, 0.0),
    "num_beam_groups": (None, 1),
}
# The same, of what acts on sampling only.
NEUTRAL_WHEN_SAMPLING: dict[str, tuple[object, ...]] = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
}
# How tokens are chosen, with transformers' defaults; None is "off".
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
OURS = {"seed", "output_logprobs", "stop_token_ids"}  # parameters that transformers does not have
# What else is used here, and what acts on beams only or on how transformers itself runs.
WITHOUT_EFFECT = {
    *SAMPLING, *NEUTRAL_WHEN_SAMPLING, "do_sample", "return_dict_in_generate", "early_stopping", "length_penalty",
    "low_memory", "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
    "eos_token_id", "transformers_version", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "generation_mode", "_from_model_config",
    "output_loading_info", "max_cache_len", "assistant_ensemble_weight", "continuous_batching_config",
}  # fmt: skip


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with return_dict_in_generate=True.

    sequences: int64 [1, prompt length + new tokens].
    logprobs: fp32 [1, new tokens], with output_logprobs=True; of every new token the logarithm of its probability in
        the distribution that it was chosen from, after penalty, temperature and cuts: what transformers calls
        compute_transition_scores(sequences, scores, normalize_logits=True).
    """

    logprobs: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    prompt: torch.Tensor  # [prompt length] int64 on the CPU
    max_length: int  # of prompt and new tokens together
    eos_token_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    return_dict: bool = False


def resolve(
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    defaults: GenerationConfig,
    max_seq_len: int,
    vocab_size: int,
    *,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    parameters: dict[str, object],
    generator: torch.Generator | None = None,
) -> GenerationRequest:
    """Precedence as in transformers: the call's parameters, then `generation_config`, then the checkpoint's.

    A seed that is not given is drawn from `generator`; None: torch's default one.

    Raises ValueError for bad input and NotImplementedError for parameters that are not supported.
    """
    prompt = check_input_ids(input_ids, attention_mask, vocab_size)
    config = _given(defaults) | ({} if generation_config is None else _given(generation_config))
    for name, value in parameters.items():
        if name not in NEUTRAL_VALUES.keys() | WITHOUT_EFFECT | OURS and value is not None:
            raise NotImplementedError(f"generate(): {name} is not supported; leave it out")
    for name in vars(GenerationConfig()).keys() & config.keys() - NEUTRAL_VALUES.keys() - WITHOUT_EFFECT:
        raise NotImplementedError(f"generate(): {name}={config[name]!r} of the generation_config is not supported")
    do_sample = parameters.get("do_sample", config.get("do_sample"))
    if do_sample not in (None, False, True):
        raise ValueError(f"do_sample={do_sample!r} must be True or False")
    for name, neutral in (NEUTRAL_VALUES | (NEUTRAL_WHEN_SAMPLING if do_sample else {})).items():
        value = parameters.get(name, config.get(name))
        if value not in neutral:
            origin = "" if name in parameters else f" ({_origin(name, generation_config)})"
            raise NotImplementedError(
                f"generate(): {name}={value!r}{origin} is not supported; pass {name}={neutral[-1]!r}"
            )
    if len(prompt) >= max_seq_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and max_seq_len={max_seq_len} leaves none to generate;"
            " load the model with a larger max_seq_len"
        )
    max_length = _max_length(parameters, config, len(prompt), max_seq_len)
    if max_length <= len(prompt):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and max_length={max_length} leaves none to generate;"
            " pass max_new_tokens"
        )
    if max_length > max_seq_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_length - len(prompt)} new ones exceed max_seq_len={max_seq_len};"
            " ask for fewer or load the model with a larger max_seq_len"
        )
    eos = parameters["eos_token_id"] if "eos_token_id" in parameters else config.get("eos_token_id")
    ends = _token_ids("eos_token_id", eos, vocab_size)
    ends += _token_ids("stop_token_ids", parameters.get("stop_token_ids"), vocab_size)
    if len(ends) > MAX_ENDS:
        raise NotImplementedError(
            f"{len(ends)} ids of eos_token_id and stop_token_ids; at most {MAX_ENDS} are supported"
        )
    return_dict = bool(parameters.get("return_dict_in_generate", config.get("return_dict_in_generate")))
    sampling = _sampling(parameters, config, bool(do_sample), generator)
    return GenerationRequest(prompt, max_length, ends, sampling, return_dict)


def resolve_batch(
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    defaults: GenerationConfig,
    max_seq_len: int,
    vocab_size: int,
    *,
    attention_mask: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    parameters: dict[str, object],
) -> tuple[list[GenerationRequest], int]:
    """`resolve` for the prompts of a batch, without their padding on the left, and the id to pad results with.

    A length counts from the padded prompt, as in transformers. Prompt i draws from seed + i.
    """
    ids = torch.as_tensor(input_ids)
    if ids.dim() != 2:
        raise ValueError(f"input_ids must be integers [batch, length], got {ids.dtype} {tuple(ids.shape)}")
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=ids.device)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    config = {"generation_config": generation_config, "parameters": parameters}
    padded = torch.zeros_like(ids[:1]) if len(ids) else ids
    common = resolve(padded, defaults, max_seq_len, vocab_size, attention_mask=None, **config)
    requests = []
    for i, (row, kept) in enumerate(zip(ids, mask != 0, strict=True)):
        if bool((kept[1:] < kept[:-1]).any()):
            raise NotImplementedError(f"attention_mask of prompt {i} is not padding on the left; pad with zeros there")
        prompt = check_input_ids(row[kept][None], None, vocab_size)
        requests.append(
            replace(
                common,
                prompt=prompt,
                max_length=len(prompt) + common.max_length - ids.shape[1],
                sampling=replace(common.sampling, seed=(common.sampling.seed + i) % (1 << 64)),
            )
        )
    given = _given(defaults) | ({} if generation_config is None else _given(generation_config)) | parameters
    pad = given.get("pad_token_id")
    if pad is None:
        pad = next((token for token in common.eos_token_ids if token >= 0), 0)
    return requests, int(pad)


def seed_generator(ranks: Ranks | None) -> torch.Generator | None:
    """For `resolve`, where all ranks submit the same requests in the same order: they get the same seeds.

    On several ranks a collective call; rank 0's default generator decides. On one it is the default generator, None.
    """
    return None if ranks is None else torch.Generator().manual_seed(ranks.meet("seeds", _draw_seed(None))[0])


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint((1 << 63) - 1, (), generator=generator))


def _sampling(
    parameters: dict[str, object], config: dict[str, object], do_sample: bool, generator: torch.Generator | None
) -> Sampling:
    """Parameters of sampling are looked at only when sampling, as in transformers."""
    given = {name: parameters.get(name, config.get(name, default)) for name, default in SAMPLING.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if not do_sample:
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    logprobs = parameters.get("output_logprobs")
    if logprobs and not parameters.get("return_dict_in_generate", config.get("return_dict_in_generate")):
        raise ValueError("output_logprobs=True needs return_dict_in_generate=True, or there is no place for them")
    seed = parameters.get("seed") if do_sample else 0
    if seed is None:
        seed = _draw_seed(generator)
    return Sampling(do_sample, seed=seed, logprobs=bool(logprobs), **given)


def _given(config: GenerationConfig) -> dict[str, object]:
    """What a config says; None means that it says nothing."""
    return {name: value for name, value in config.to_dict().items() if value is not None}


def _origin(name: str, generation_config: GenerationConfig | None) -> str:
    if generation_config is not None and getattr(generation_config, name, None) is not None:
        return "from generation_config"
    return "from the checkpoint's generation_config"


def _max_length(parameters: dict[str, object], config: dict[str, object], prompt_length: int, max_seq_len: int) -> int:
    """max_new_tokens goes before max_length; by default there are 20 new tokens, as far as there is room."""
    max_new_tokens = parameters.get("max_new_tokens", config.get("max_new_tokens"))
    if max_new_tokens is not None:
        return prompt_length + _positive("max_new_tokens", max_new_tokens)
    max_length = parameters.get("max_length", config.get("max_length"))
    if max_length is not None:
        return _positive("max_length", max_length)
    return min(prompt_length + DEFAULT_NEW_TOKENS, max_seq_len)


def check_input_ids(
    input_ids: torch.Tensor | Sequence[Sequence[int]], attention_mask: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """One prompt as an int64 vector on the CPU; ValueError or NotImplementedError says what is wrong with it."""
    ids = torch.as_tensor(input_ids)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers [1, length], got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[0] > 1:
        raise NotImplementedError(f"input_ids has a batch of {ids.shape[0]}; only one prompt at a time is supported")
    if ids.numel() == 0:
        raise ValueError("input_ids is empty; give at least one token (for example the BOS token)")
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
        if not bool((mask != 0).all()):
            raise NotImplementedError("attention_mask with zeros (padding) is not supported; remove the padding")
    prompt = ids[0].to("cpu", torch.int64)
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids holds token {low if low < 0 else high}; tokens must be in [0, {vocab_size})")
    return prompt


def _positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _token_ids(name: str, given: object, vocab_size: int) -> tuple[int, ...]:
    if given is None:
        return ()
    ids = torch.as_tensor(given).reshape(-1).tolist()
    for token in ids:
        # negative ids switch EOS off, as in transformers
        if not isinstance(token, int) or token >= vocab_size:
            raise ValueError(f"{name}={token!r} must be an integer below {vocab_size}")
    return tuple(ids)
