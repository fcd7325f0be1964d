"""`tri-mpk generate` and `tri-mpk chat`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tri_mpk.cli.options import (
    CacheDirOption,
    DeviceOption,
    DoSampleOption,
    DtypeOption,
    EosOption,
    JsonOption,
    MaxNewTokensOption,
    MaxSeqLenOption,
    MinPOption,
    ModelArgument,
    NumWorkersOption,
    OfflineOption,
    PenaltyOption,
    PolicyOption,
    ProgressOption,
    RevisionOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TuningOption,
    WaitBoundOption,
    hub_options,
)
from tri_mpk.terminal import new_token_limit, note, spinner

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from tri_mpk.model import CausalLM


def load(
    name: str, hub: dict[str, object], progress: bool, tuning: Path | None = None, **parameters: object
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer, with the kernel compiled."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import tri_mpk
    from tri_mpk.aot import check_compiler
    from tri_mpk.inspect import load_config
    from tri_mpk.tuning_store import read_tuning

    check_compiler()
    if tuning is not None:
        parameters["tuning"] = read_tuning(tuning)
    if not progress:
        logging.disable_progress_bar()
    load_config(name, **hub)  # says most clearly what is wrong with a name
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    model = tri_mpk.from_pretrained(name, progress=progress, **parameters, **hub)
    if progress and model.tuning_source.startswith("measured"):
        note(f"tri-mpk: the kernel's knobs are those that tri-mpk tune {model.tuning_source}")
    with spinner("compiling the kernel (seconds from the cache, else up to a minute)", progress):
        model.compile()
    return model, tokenizer


def decoding_parameters(config: GenerationConfig, several_ranks: bool, **flags: object) -> dict[str, object]:
    """Parameters of `generate`: greedy decoding unless a flag asks for sampling; says what that leaves out."""
    given = {name: value for name, value in flags.items() if value is not None}
    if given.keys() - {"do_sample", "repetition_penalty"}:
        given.setdefault("do_sample", True)
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0}
    if not given.get("do_sample"):
        neutral["do_sample"] = False
    if several_ranks:
        neutral["repetition_penalty"] = 1.0
    asked = {name: getattr(config, name, None) for name in neutral.keys() - given.keys()}
    asked = {name: asked[name] for name in sorted(asked) if asked[name] not in (None, neutral[name])}
    if asked:
        settings = ", ".join(f"{name}={value}" for name, value in asked.items())
        how = "random" if given.get("do_sample") else "greedy (--do-sample: random)"
        note(f"tri-mpk: decoding is {how}; the checkpoint's {settings} is left out")
    return {name: neutral[name] for name in asked} | given


def read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt; give one as the second argument or on standard input")
    return sys.stdin.read().removesuffix("\n")


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text; '-' or none: standard input.")] = None,
    max_new_tokens: MaxNewTokensOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    wait_bound_s: WaitBoundOption = 10.0,
    tuning: TuningOption = None,
    policy: PolicyOption = "static",
    tensor_parallel: Annotated[
        str, typer.Option(metavar="auto|N", help="Ranks that share the model; auto: all that torchrun has started.")
    ] = "auto",
    reduce_dtype: Annotated[str, typer.Option(help="Of what ranks send each other.")] = "float32",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Above 1: the kernel of many sequences.")] = 1,
    max_tokens_per_step: Annotated[
        int, typer.Option(min=1, help="Of that kernel: how long a prompt's chunk is.")
    ] = 256,
    num_pages: Annotated[int | None, typer.Option(min=1, help="Of that kernel's KV cache.")] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 128,
    eos_token_id: EosOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    repetition_penalty: PenaltyOption = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text while it is made.")] = True,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    local_files_only: OfflineOption = False,
    progress: ProgressOption = True,
) -> None:
    """Continue a prompt, in one kernel launch; greedily, unless a flag asks otherwise.

    \b
    Examples:
      tri-mpk generate meta-llama/Llama-3.2-1B "The sea is" --max-new-tokens 50
      tri-mpk generate demos/tiny --device cpu --json < prompt.txt
      tri-mpk generate Qwen/Qwen3-8B "The sea is" --temperature 0.7 --top-p 0.9 --seed 1
      torchrun --nproc-per-node 2 -m tri_mpk generate Qwen/Qwen3-8B "The sea is"
    """
    text = read_prompt(prompt)
    lm, tokenizer = load(
        model, hub_options(revision, cache_dir, local_files_only), progress, dtype=dtype, device=device,
        max_seq_len=max_seq_len, num_workers=num_workers, wait_bound_s=wait_bound_s, tuning=tuning, policy=policy,
        tensor_parallel=tensor_parallel, reduce_dtype=reduce_dtype, max_batch_size=max_batch_size,
        max_tokens_per_step=max_tokens_per_step, num_pages=num_pages, page_size=page_size,
    )  # fmt: skip
    from transformers import TextStreamer

    streaming = stream and not as_json
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    parameters = decoding_parameters(
        lm.generation_config, lm.ranks is not None, do_sample=do_sample, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, seed=seed, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if eos_token_id:
        parameters["eos_token_id"] = list(eos_token_id)
    started = time.perf_counter()
    output = lm.generate(
        input_ids,
        max_new_tokens=new_token_limit(max_new_tokens, lm, input_ids.shape[1]),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streaming else None,
        **parameters,
    )
    seconds = time.perf_counter() - started
    tokens = output[0, input_ids.shape[1] :].tolist()
    result = {
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(tokens) / seconds, 2),
        "launches": lm.kernel.runtime.num_launches,
    }
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    if not streaming:
        print(result["text"])
    if progress:
        launches = result["launches"]
        note(
            f"tri-mpk: {len(tokens)} tokens in {seconds:.2f} s ({result['tokens_per_second']:.1f} per second,"
            f" prompt of {input_ids.shape[1]} included), {launches} launch{'' if launches == 1 else 'es'}"
        )


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: MaxNewTokensOption = None,
    max_seq_len: MaxSeqLenOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    num_workers: NumWorkersOption = None,
    wait_bound_s: WaitBoundOption = 10.0,
    tuning: TuningOption = None,
    policy: PolicyOption = "static",
    eos_token_id: EosOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    repetition_penalty: PenaltyOption = None,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    local_files_only: OfflineOption = False,
    progress: ProgressOption = True,
) -> None:
    """Talk to a model that has a chat template. Each answer is one kernel launch; greedy, unless a flag asks otherwise.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this.

    \b
    Example:
      tri-mpk chat Qwen/Qwen3-8B --system "Answer in one sentence."
    """
    from transformers import AutoTokenizer

    from tri_mpk.chat import converse
    from tri_mpk.inspect import load_config

    hub = hub_options(revision, cache_dir, local_files_only)
    load_config(model, **hub)
    if AutoTokenizer.from_pretrained(model, **hub).chat_template is None:
        raise ValueError(f"{model} has no chat template, so it is no chat model; try: tri-mpk generate {model} PROMPT")
    lm, tokenizer = load(
        model, hub, progress, dtype=dtype, device=device, max_seq_len=max_seq_len, num_workers=num_workers,
        wait_bound_s=wait_bound_s, tuning=tuning, policy=policy, tensor_parallel=1,
    )  # fmt: skip
    parameters = decoding_parameters(
        lm.generation_config, lm.ranks is not None, do_sample=do_sample, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, seed=seed, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if eos_token_id:
        parameters["eos_token_id"] = list(eos_token_id)
    converse(lm, tokenizer, system, max_new_tokens, parameters)
