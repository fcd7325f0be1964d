"""The model that users hold: a transformers causal LM whose text comes from one kernel launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.batching import PAGE_SIZE, Batching
from tri_mpk.distributed import Ranks, connect
from tri_mpk.generation import (
    GenerateOutput,
    GenerationRequest,
    check_input_ids,
    resolve,
    resolve_batch,
    seed_generator,
)
from tri_mpk.gpu_profile import find_profile
from tri_mpk.models import DecoderShape, describe
from tri_mpk.models.batch_decoder import build_serving
from tri_mpk.models.decoder import build
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.runtime import LaunchRequest
from tri_mpk.serving import MAX_WAITING, Engine, check_pages
from tri_mpk.sharding import Shard
from tri_mpk.tuning import Tuning
from tri_mpk.tuning_store import find_tuning

if TYPE_CHECKING:
    from tri_mpk.profiler import Profile


class CausalLM:
    """Made by `tri_mpk.from_pretrained`, `from_model` or `from_config`.

    Attributes: config, generation_config, device, dtype, max_seq_len, kernel (the PersistentKernel), tuning_source
    (where the kernel's knobs come from: "given", "cost model", or "measured" and when).
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        max_seq_len: int,
        num_workers: int | None = None,
        wait_bound_s: float = 10.0,
        progress: bool = True,
        profile: bool = False,
        tuning: Tuning | None = None,
        policy: str = "static",
        shard: Shard | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        batching: Batching = Batching(),  # noqa: B008  it is frozen
    ):
        self.config: PreTrainedConfig = model.config if shard is None else shard.config
        self.generation_config: GenerationConfig = model.generation_config or GenerationConfig()
        self.device = device
        self.dtype: torch.dtype = model.model.embed_tokens.weight.dtype
        self.max_seq_len = max_seq_len
        self.progress = progress
        self.shape: DecoderShape = describe(model.config, max_seq_len)
        step = torch.zeros(1, dtype=torch.int32, device=device)
        tokens = torch.zeros(max_seq_len, dtype=torch.int64, device=device)
        self.tuning_source = "cost model" if tuning is None else "given"
        if tuning is None and device.type == "cuda" and batching.is_one:
            tuning, self.tuning_source = find_tuning(find_profile(device)[0], self.shape, self.dtype, num_workers)
        self.shard = shard
        rank, world_size = (0, 1) if shard is None else (shard.rank, shard.world_size)
        self.ranks: Ranks | None = None
        if world_size > 1 and device.type != "meta":
            self.ranks = connect(world_size, rank, device)
            facts = {"config": self.config.to_json_string(), "dtype": str(self.dtype), "max_seq_len": max_seq_len}
            facts |= asdict(batching)
            self.ranks.agree("the models of the ranks", facts)
        self.batching = batching
        options = {
            "ranks": self.ranks, "num_workers": num_workers, "meta_tensors": [step, tokens],
            "wait_bound_s": wait_bound_s, "profile": profile, "tuning": tuning, "policy": policy,
        }  # fmt: skip
        if batching.is_one:
            self.kernel = PersistentKernel(world_size, rank, **options)
            build(self.kernel, self.shape, model, PAGE_SIZE, progress, shard, reduce_dtype)
        else:
            self.kernel = BatchKernel(
                world_size, rank, max_batch_size=batching.max_batch_size,
                max_tokens_per_step=batching.max_tokens_per_step, **options,
            )  # fmt: skip
            num_pages = batching.pages(max_seq_len)
            build_serving(
                self.kernel, self.shape, model, batching.page_size, num_pages, progress, shard, reduce_dtype
            )  # fmt: skip
        self._serving: Engine | None = None
        self._lock = threading.Lock()  # one launch at a time

    def compile(self) -> None:
        """Plans, verifies, generates and compiles the kernel now instead of at the first use."""
        if self.kernel.runtime is None:
            with tqdm(total=2, desc="compiling", disable=not self.progress, leave=False) as bar:
                self.kernel.plan()
                bar.update()
                self.kernel.compile()
                bar.update()

    def _launch(self, tokens: torch.Tensor, request: LaunchRequest):
        self.compile()
        self.kernel.step.data.zero_()
        self.kernel.tokens.data.view(-1)[: len(tokens)].copy_(tokens)
        return self.kernel.launch(request)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **parameters: object,
    ) -> torch.Tensor | GenerateOutput:
        """Text from the prompt to an EOS id or the length limit, in one kernel launch.

        Parameter names, defaults and their precedence are transformers': max_new_tokens, eos_token_id, do_sample,
        temperature, top_k (50 when sampling), top_p, min_p, repetition_penalty, ... Beside them there are

        seed: the text is a function of it, the prompt and the parameters. None: drawn from torch's default generator,
            on several ranks that of rank 0.
        stop_token_ids: end the text like EOS ids, which they do not replace.
        output_logprobs: see GenerateOutput. Needs return_dict_in_generate=True.

        `streamer.put` is called with every token while the kernel runs; for one prompt only, as in transformers.

        A model loaded with max_batch_size > 1 takes any number of prompts, padded on the left where attention_mask is
        zero; those beyond max_batch_size begin when others have ended. Prompt i draws from seed + i.

        Returns: int64 [1, prompt length + new tokens], on the device of `input_ids`, texts of a batch padded on the
        right with pad_token_id; a GenerateOutput with return_dict_in_generate=True.
        Raises: ValueError for bad input, NotImplementedError for what is not supported (beams, ...),
        MegakernelTimeout. After Ctrl-C the model stays usable.
        """
        if not self.batching.is_one:
            return self._generate_batch(input_ids, generation_config, attention_mask, streamer, parameters)
        request = resolve(
            input_ids,
            self.generation_config,
            self.max_seq_len,
            self.config.vocab_size,
            attention_mask=attention_mask,
            generation_config=generation_config,
            parameters=parameters,
        )
        (request,) = self._with_seeds_of_rank_0([request], parameters)
        length = len(request.prompt)
        launch = LaunchRequest(
            length, request.max_length - 2, request.eos_token_ids, length - 1, sampling=request.sampling
        )
        new_tokens = []
        with self._lock:
            if streamer is not None:
                self.compile()
                streamer.put(request.prompt[None])
            tokens = self._launch(request.prompt, launch)
            try:
                for token in tokens:
                    new_tokens.append(token)
                    if streamer is not None:
                        streamer.put(torch.tensor([token]))
            finally:
                tokens.close()  # asks the kernel to stop, and waits for it, if anything above raised
                if streamer is not None:
                    streamer.end()  # also after Ctrl-C: text streamers hold back the last word
            logprobs = None
            if request.sampling.logprobs:
                logprobs = self.kernel.tensors["logprobs"].data[length : length + len(new_tokens)].cpu().clone()
        device = input_ids.device if isinstance(input_ids, torch.Tensor) else self.device
        sequences = torch.cat((request.prompt, torch.tensor(new_tokens, dtype=torch.int64)))[None].to(device)
        if not request.return_dict:
            return sequences
        return GenerateOutput(sequences=sequences, logprobs=None if logprobs is None else logprobs[None].to(device))

    def _with_seeds_of_rank_0(
        self, requests: list[GenerationRequest], parameters: dict[str, object]
    ) -> list[GenerationRequest]:
        """Seeds that were drawn count from the first one of rank 0."""
        if self.ranks is None:
            return requests
        seed = requests[0].sampling.seed
        draws = requests[0].sampling.do_sample and parameters.get("seed") is None
        drawn = self.ranks.meet("a launch", seed if draws else None)[0]
        if not draws or drawn is None:  # the launch finds that they differ
            return requests
        return [
            replace(request, sampling=replace(request.sampling, seed=(drawn + i) % (1 << 64)))
            for i, request in enumerate(requests)
        ]

    def _generate_batch(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        generation_config: GenerationConfig | None,
        attention_mask: torch.Tensor | None,
        streamer: BaseStreamer | None,
        parameters: dict[str, object],
    ) -> torch.Tensor | GenerateOutput:
        self._check_not_serving()
        requests, pad = resolve_batch(
            input_ids,
            self.generation_config,
            self.max_seq_len,
            self.config.vocab_size,
            attention_mask=attention_mask,
            generation_config=generation_config,
            parameters=parameters,
        )
        if streamer is not None and len(requests) > 1:
            raise ValueError(f"a streamer is for one prompt, got {len(requests)}; leave it out, or use model.serve()")
        for request in requests:
            check_pages(request, self.kernel.state)
        requests = self._with_seeds_of_rank_0(requests, parameters)
        with self._serve(max_waiting=len(requests)) as engine:
            streams = [engine.enqueue(request) for request in requests]
            engine.finish()
            if streamer is not None:
                try:
                    streamer.put(requests[0].prompt[None])
                    for token in streams[0]:
                        streamer.put(torch.tensor([token]))
                finally:
                    streamer.end()
            new_tokens = [torch.tensor(stream.result()) for stream in streams]
        device = input_ids.device if isinstance(input_ids, torch.Tensor) else self.device
        new = nn.utils.rnn.pad_sequence(new_tokens, batch_first=True, padding_value=pad).to(device)
        sequences = torch.cat((torch.as_tensor(input_ids).to(device, torch.int64), new), dim=1)
        if not requests[0].return_dict:
            return sequences
        logprobs = None
        if requests[0].sampling.logprobs:
            each = [torch.tensor(stream.logprobs) for stream in streams]
            logprobs = nn.utils.rnn.pad_sequence(each, batch_first=True).to(device)
        return GenerateOutput(sequences=sequences, logprobs=logprobs)

    def serve(self, max_waiting: int = MAX_WAITING) -> Engine:
        """Starts the kernel, which takes requests until the engine is closed; use it in a `with` statement.

        Needs a model loaded with max_batch_size > 1, which does nothing else meanwhile. `max_waiting`: so many requests
        may wait on the host. See tri_mpk/serving.py and docs/serving.md. On several ranks a collective call.
        """
        if self.batching.is_one:
            raise ValueError("the model was loaded for one sequence at a time; load it with max_batch_size=8, say")
        self._check_not_serving()
        self._serving = self._serve(max_waiting, seed_generator(self.ranks))
        return self._serving

    def _serve(self, max_waiting: int, generator: torch.Generator | None = None) -> Engine:
        self._lock.acquire()
        try:
            self.compile()
            return Engine(
                self.kernel, self.generation_config, self.config.vocab_size, max_waiting, self._lock.release, generator
            )
        except BaseException:
            self._lock.release()
            raise

    def _check_not_serving(self) -> None:
        if self._serving is not None and self._serving.is_open:
            raise RuntimeError("the model is serving; submit requests to its engine, or close that first")

    @torch.no_grad()
    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **parameters: object
    ) -> CausalLMOutputWithPast:
        """Logits of every position: fp32 [1, length, V]."""
        if not self.batching.is_one:
            raise NotImplementedError(
                "model(): logits need a model loaded with max_batch_size=1; use generate or serve"
            )
        for name, value in parameters.items():
            if value is not None and not (value is True and name in ("use_cache", "return_dict")):
                raise NotImplementedError(f"model(): {name}={value!r} is not supported; leave it out")
        prompt = check_input_ids(input_ids, attention_mask, self.config.vocab_size)
        length = len(prompt)
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens exceed max_seq_len={self.max_seq_len}; load with a larger max_seq_len")
        with self._lock:
            self.compile()
            runtime = self.kernel.runtime
            logits = runtime.empty((length, self.kernel.vocab_size), torch.float32)
            for _ in self._launch(prompt, LaunchRequest(length + 1, length - 1, logits=logits)):
                raise AssertionError("a launch for logits chose a token")
            result = logits[None].clone() if self.device.type == "cpu" else logits[None]
            if self.ranks is not None:
                result = self.ranks.gather(result)
            runtime.free(logits)
        return CausalLMOutputWithPast(logits=result)

    forward = __call__

    def profile(self) -> Profile:
        """What the last launch did, task by task: of its last steps, 32 at most. Needs a model with profile=True.

        Raises: ValueError without profile=True, or before the first launch.
        """
        from tri_mpk.profiler import read_profile

        with self._lock:
            return read_profile(self.kernel)

    def eval(self) -> CausalLM:
        return self
