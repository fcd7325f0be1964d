"""One rank's part of a model: which rows or columns of every weight it holds, and the model made of them.

Shared out are heads (q, k, v by rows, o by columns), the intermediate size (gate and up by rows, down by columns) and
the vocabulary (embedding and lm_head by rows). KV heads are on several ranks where there are fewer than ranks. All else
is on every rank, but for the bias of o, which belongs to rank 0. Source: arXiv:1909.08053.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from tri_mpk.errors import CheckpointError, UnsupportedModelError

Read = Callable[[str, tuple[slice, ...]], torch.Tensor]  # part of a parameter of the whole model


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `world_size` of a model with this config. Raises UnsupportedModelError if that cannot be."""

    config: PreTrainedConfig
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        config, world_size = self.config, self.world_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        for what, number in (("num_attention_heads", heads), ("intermediate_size", config.intermediate_size)):
            if number % world_size:
                raise UnsupportedModelError(
                    f"{what}={number} cannot be shared out among {world_size} ranks; choose a number of ranks that"
                    " divides it"
                )
        if kv_heads % world_size and world_size % kv_heads:
            raise UnsupportedModelError(
                f"num_key_value_heads={kv_heads} can be neither shared out nor repeated among {world_size} ranks;"
                " choose a divisor or a multiple of it"
            )

    @property
    def first_row(self) -> int:
        """Of the vocabulary."""
        return self.rank * self.config.vocab_size // self.world_size

    @property
    def num_rows(self) -> int:
        return (self.rank + 1) * self.config.vocab_size // self.world_size - self.first_row

    @property
    def kv_heads(self) -> range:
        total = self.config.num_key_value_heads
        first = self.rank * total // self.world_size
        return range(first, first + max(1, total // self.world_size))

    def local_config(self) -> PreTrainedConfig:
        """The config of this rank's part, as of a model of its own."""
        config = copy.deepcopy(self.config)
        config.head_dim = head_dim(self.config)
        config.num_attention_heads //= self.world_size
        config.num_key_value_heads = len(self.kv_heads)
        config.intermediate_size //= self.world_size
        config.vocab_size = self.num_rows
        config.pad_token_id = None  # may be another rank's
        return config

    def part(self, name: str) -> tuple[slice, ...]:
        """What this rank holds of a parameter, along its dimensions."""
        share = self._share
        *_, module, kind = name.split(".")
        if module in ("embed_tokens", "lm_head"):
            return (slice(self.first_row, self.first_row + self.num_rows),)
        if module == "q_proj":
            return (share(self.config.num_attention_heads * head_dim(self.config)),)
        if module in ("k_proj", "v_proj"):
            size = head_dim(self.config)
            return (slice(self.kv_heads.start * size, self.kv_heads.stop * size),)
        if module in ("gate_proj", "up_proj"):
            return (share(self.config.intermediate_size),)
        if module == "o_proj" and kind == "weight":
            return slice(None), share(self.config.num_attention_heads * head_dim(self.config))
        if module == "down_proj" and kind == "weight":
            return slice(None), share(self.config.intermediate_size)
        return ()

    def _share(self, size: int) -> slice:
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def local_model(shard: Shard, dtype: torch.dtype, device: torch.device, read: Read) -> nn.Module:
    """A transformers model of this rank's weights, each of which `read` gives."""
    from tri_mpk.loading import empty_model

    config = shard.local_config()
    model = empty_model(config, dtype)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its buffers were empty too
    model.tie_weights()  # first, so that tied weights are read once
    for name, parameter in model.named_parameters():
        part = read(name, shard.part(name))
        if tuple(part.shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"{name}: rank {shard.rank} gets {tuple(part.shape)} of it, but the config asks for"
                f" {tuple(parameter.shape)}; config.json and the weights do not belong together"
            )
        parameter.data.copy_(part)
        if shard.rank and name.endswith("o_proj.bias"):
            parameter.data.zero_()
    return model.eval()


def shard_model(model: nn.Module, shard: Shard, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """This rank's part of a model that lies in memory."""
    weights = dict(model.named_parameters())
    local = local_model(shard, dtype, device, lambda name, part: weights[name].data[part])
    local.generation_config = model.generation_config
    return local


def random_shard(shard: Shard, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """This rank's part of `random_model`: each weight is made whole, and what belongs to others is dropped."""
    from tri_mpk.loading import empty_model, random_weights

    whole = random_weights(empty_model(shard.config, dtype), seed, device)
    order = iter(whole)

    def read(name: str, part: tuple[slice, ...]) -> torch.Tensor:
        made, weight = next(order)
        assert made == name, (made, name)
        return weight[part]

    return local_model(shard, dtype, device, read)


def checkpoint_files(name_or_path: str | os.PathLike, **hub: object) -> dict[str, Path]:
    """The safetensors file of every weight of a checkpoint. Those of other formats are refused."""

    def find(file: str) -> Path | None:
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / file
            return path if path.is_file() else None
        try:
            found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub)
        except OSError as error:
            raise CheckpointError(f"cannot load {file} of {name_or_path}: {error}") from error
        return None if found is None else Path(found)

    if (index := find("model.safetensors.index.json")) is not None:
        places = json.loads(index.read_text())["weight_map"]
        files = {file: find(file) for file in sorted(set(places.values()))}
        lost = [file for file, path in files.items() if path is None]
        if lost:
            raise CheckpointError(f"{name_or_path} lacks {lost[0]}; download it again")
        return {name: files[file] for name, file in places.items()}
    if (path := find("model.safetensors")) is not None:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    raise CheckpointError(f"{name_or_path} has no safetensors files, from which alone a part can be read; convert it")


def read_shard(
    name_or_path: str | os.PathLike, shard: Shard, dtype: torch.dtype, device: torch.device, **hub: Any
) -> nn.Module:
    """This rank's part of a checkpoint. Nothing else of it is read."""
    places = checkpoint_files(name_or_path, **hub)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(name: str, part: tuple[slice, ...]) -> torch.Tensor:
            if name not in places:
                raise CheckpointError(f"{name_or_path} lacks the weight {name}")
            path = places[name]
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, "pt"))
            if not part:
                return files[path].get_tensor(name)
            return files[path].get_slice(name)[part if len(part) > 1 else part[0]]

        return local_model(shard, dtype, device, read)


def load_generation_config(name_or_path: str | os.PathLike, model: nn.Module, **hub: object) -> None:
    """A checkpoint without one keeps what follows from its config."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
