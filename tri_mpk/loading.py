"""The front door: checkpoints, transformers models and bare configs become a CausalLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tri_mpk.batching import PAGE_SIZE, Batching
from tri_mpk.distributed import rank_device, resolve_world
from tri_mpk.errors import CheckpointError, DeviceError, UnsupportedModelError
from tri_mpk.model import CausalLM
from tri_mpk.models import FAMILIES, DecoderShape, describe
from tri_mpk.persistent_kernel import DTYPES
from tri_mpk.sharding import Shard, load_generation_config, random_shard, read_shard, shard_model
from tri_mpk.tuning import Tuning

DEFAULT_MAX_SEQ_LEN = 4096


def from_pretrained(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_len: int | None = None,
    num_workers: int | None = None,
    wait_bound_s: float = 10.0,
    tuning: Tuning | None = None,
    policy: str = "static",
    progress: bool = True,
    profile: bool = False,
    tensor_parallel: int | str = "auto",
    reduce_dtype: torch.dtype | str = torch.float32,
    max_batch_size: int = 1,
    max_tokens_per_step: int = 256,
    num_pages: int | None = None,
    page_size: int = PAGE_SIZE,
    **hub: object,
) -> CausalLM:
    """A checkpoint, by its folder or its name on the Hugging Face hub.

    Args:
        dtype: of weights and KV cache; None: the checkpoint's own on a GPU, float32 on a CPU.
        device: None: the current CUDA device if there is one, else the CPU (Triton's interpreter, for small models).
        max_seq_len: longest sequence, prompt and new tokens together; None: 4096 or the model's limit, if that is less.
        num_workers: None: one per SM, or what `tri-mpk tune` found.
        tuning: the kernel's knobs; None: what `tri-mpk tune` stored for this GPU and these shapes, else the cost
            model's choice.
        policy: "static": each worker has a queue; "hybrid": workers take attention's tasks as these become ready;
            "dynamic": all tasks. The same tokens and bits; see docs/design.md for what is known about speed.
        profile: record when every task waits, runs and signals; `model.profile()` then tells of the last launch.
        tensor_parallel: "auto": all ranks of torch.distributed, or of torchrun, each with its part of the model; 1: the
            whole model here. On several ranks, all of them make the same calls.
        reduce_dtype: in which ranks send each other what they add to the residual stream, itself in fp32. bfloat16 is
            half the traffic and as accurate as the same sum in transformers.
        max_batch_size: so many sequences run at a time, in one launch: see `CausalLM.serve`, and `generate` of batches.
            1: the kernel made for one sequence. Then the next three have no meaning.
        max_tokens_per_step: of all sequences together: one for each that decodes, the rest for prompts, in chunks.
        num_pages, page_size: of the KV cache; None: enough for max_batch_size sequences of max_seq_len.
        hub: passed to transformers (revision=, token=, cache_dir=, local_files_only=, ...).

    Raises: CheckpointError, UnsupportedModelError, DeviceError, ValueError.
    """
    rank, world_size = resolve_world(tensor_parallel)
    device = resolve_device(rank_device() if device is None and world_size > 1 else device)
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError) as error:
        if "model type" in str(error):
            raise UnsupportedModelError(f"{name_or_path}: {error}".splitlines()[0]) from error
        raise CheckpointError(f"cannot read the config of {name_or_path}: {error}") from error
    dtype = resolve_dtype(dtype, device, config)
    max_seq_len = resolve_max_seq_len(max_seq_len, config)
    of_batches = {
        "max_batch_size": max_batch_size, "max_tokens_per_step": max_tokens_per_step, "num_pages": num_pages,
        "page_size": page_size,
    }  # fmt: skip
    batching = Batching(**of_batches)
    others = {
        "max_seq_len": max_seq_len, "num_workers": num_workers, "wait_bound_s": wait_bound_s, "tuning": tuning,
        "policy": policy, "progress": progress, "profile": profile, "reduce_dtype": reduce_dtype,
    }  # fmt: skip
    if world_size > 1:
        shard = Shard(config, rank, world_size)
        check_memory(shard.local_config(), describe(config, max_seq_len), dtype, device, max_seq_len, batching)
        try:
            model = read_shard(name_or_path, shard, dtype, device, **hub)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError | CheckpointError):
                raise
            raise CheckpointError(
                f"cannot load the weights of {name_or_path}: {error}. Is a file missing or cut short?"
            ) from error
        load_generation_config(name_or_path, model, **hub)
        return _from_local(model, shard, dtype, device, batching=batching, **others)
    check_memory(config, describe(config, max_seq_len), dtype, device, max_seq_len, batching)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=dtype, device_map={"": device}, output_loading_info=True,
            ignore_mismatched_sizes=True, **hub,
        )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"cannot load the weights of {name_or_path}: {error}. Is a file missing or cut short? Download it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{name_or_path} lacks {len(missing)} weights, first of all {missing[0]}")
    for key, found, wanted in info["mismatched_keys"]:
        raise CheckpointError(
            f"{name_or_path}: {key} has shape {tuple(found)}, but the config asks for {tuple(wanted)};"
            " config.json and the weights do not belong together"
        )
    return from_model(model, device=device, tensor_parallel=1, **others, **of_batches)


def from_model(
    model: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_len: int | None = None,
    num_workers: int | None = None,
    wait_bound_s: float = 10.0,
    tuning: Tuning | None = None,
    policy: str = "static",
    progress: bool = True,
    profile: bool = False,
    tensor_parallel: int | str = "auto",
    reduce_dtype: torch.dtype | str = torch.float32,
    max_batch_size: int = 1,
    max_tokens_per_step: int = 256,
    num_pages: int | None = None,
    page_size: int = PAGE_SIZE,
) -> CausalLM:
    """A transformers causal LM. On a GPU its weights are used where they lie (moved and converted first if need be):
    the model keeps working, its q, k and v weights as views of one packed tensor. Do not train it afterwards.
    """
    if model.config.model_type not in FAMILIES:
        describe(model.config, 1)
    rank, world_size = resolve_world(tensor_parallel)
    if world_size > 1 and device is None and model.device.type in ("cpu", "meta"):
        device = rank_device()
    device = resolve_device(model.device if device is None and model.device.type != "meta" else device)
    dtype = resolve_dtype(dtype or (model.dtype if device.type != "cpu" else None), device, model.config)
    max_seq_len = resolve_max_seq_len(max_seq_len, model.config)
    describe(model.config, max_seq_len)
    batching = Batching(max_batch_size, max_tokens_per_step, num_pages, page_size)
    shard = None
    if world_size > 1:
        shard = Shard(model.config, rank, world_size)
        model = shard_model(model, shard, dtype, device)
    return _from_local(
        model, shard, dtype, device, max_seq_len, num_workers, wait_bound_s, tuning, policy, progress, profile,
        reduce_dtype, batching,
    )  # fmt: skip


def _from_local(
    model: nn.Module,
    shard: Shard | None,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
    num_workers: int | None,
    wait_bound_s: float,
    tuning: Tuning | None,
    policy: str,
    progress: bool,
    profile: bool,
    reduce_dtype: torch.dtype | str,
    batching: Batching,
) -> CausalLM:
    """A model whose weights are all that this rank needs: the whole model, or a shard."""
    model = model.to(device).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtype)  # parameters only: the rotary module's frequencies must stay in fp32
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} holds NaN or infinite values; the checkpoint is damaged or overflows {dtype}"
            )
    if isinstance(reduce_dtype, str):
        reduce_dtype = getattr(torch, reduce_dtype, reduce_dtype)
    if reduce_dtype not in DTYPES:
        raise ValueError(f"reduce_dtype={reduce_dtype} is not supported; choose one of {', '.join(map(str, DTYPES))}")
    return CausalLM(
        model, device, max_seq_len, num_workers, wait_bound_s, progress, profile, tuning, policy, shard, reduce_dtype,
        batching,
    )  # fmt: skip


def from_config(
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_len: int | None = None,
    num_workers: int | None = None,
    wait_bound_s: float = 10.0,
    tuning: Tuning | None = None,
    policy: str = "static",
    progress: bool = True,
    profile: bool = False,
    tensor_parallel: int | str = "auto",
    reduce_dtype: torch.dtype | str = torch.float32,
    max_batch_size: int = 1,
    max_tokens_per_step: int = 256,
    num_pages: int | None = None,
    page_size: int = PAGE_SIZE,
) -> CausalLM:
    """Random weights, made on the device: for benchmarks and tests. Ranks have parts of the same model."""
    rank, world_size = resolve_world(tensor_parallel)
    device = resolve_device(rank_device() if device is None and world_size > 1 else device)
    dtype = resolve_dtype(dtype, device, config)
    max_seq_len = resolve_max_seq_len(max_seq_len, config)
    shard = Shard(config, rank, world_size) if world_size > 1 else None
    local = config if shard is None else shard.local_config()
    batching = Batching(max_batch_size, max_tokens_per_step, num_pages, page_size)
    check_memory(local, describe(local, max_seq_len), dtype, device, max_seq_len, batching)
    model = random_model(config, seed, dtype, device) if shard is None else random_shard(shard, seed, dtype, device)
    return _from_local(
        model, shard, dtype, device, max_seq_len, num_workers, wait_bound_s, tuning, policy, progress, profile,
        reduce_dtype, batching,
    )  # fmt: skip


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The transformers model without memory for its weights: enough to plan a kernel."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Matrices are normal with the variance that keeps activations at one, norms are near one, biases small."""
    model = empty_model(config, dtype)
    weights = random_weights(model, seed, device)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its buffers were empty too
    for weight, (_, values) in zip(model.parameters(), weights, strict=True):
        weight.data.copy_(values)
    model.tie_weights()
    return model.eval()


def random_weights(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of a model, in order, one after another."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(name, tuple(parameter.shape), parameter.dtype) for name, parameter in model.named_parameters()]
    norms = {f"{name}.weight" for name, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    for name, shape, dtype in shapes:
        weight = torch.empty(shape, dtype=dtype, device=device)
        weight.normal_(0.0, shape[1] ** -0.5 if len(shape) == 2 else 0.02, generator=generator)
        yield name, weight.add_(1.0) if name in norms else weight


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device to run on, with its index; DeviceError when there is no such thing here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("device='cuda' was asked for, but PyTorch sees no CUDA GPU here; use device='cpu'")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise DeviceError(
            "TRITON_INTERPRET is set in this process, which would keep Triton from compiling; unset it:"
            " on a CPU the kernel is interpreted in processes of its own"
        )
    if device.type == "cpu":
        import numpy

        if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
            raise DeviceError(
                f"Triton's interpreter, which runs the kernel on a CPU, needs numpy<2.4 (here: {numpy.__version__});"
                " install it with `pip install 'tri_mpk[cpu]'`"
            )
        return device
    raise DeviceError(f"device={str(device)!r} is not supported; choose 'cuda' or 'cpu'")


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.bfloat16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; choose one of {', '.join(map(str, DTYPES))}")
    if device.type == "cpu" and dtype != torch.float32:
        raise ValueError(f"dtype={dtype} is not supported on a CPU (Triton's interpreter); use dtype=torch.float32")
    return dtype


def resolve_max_seq_len(max_seq_len: int | None, config: PreTrainedConfig) -> int:
    if max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, config.max_position_embeddings)
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len={max_seq_len} must be at least 2: a prompt token and a new one")
    return max_seq_len


def memory_bytes(
    config: PreTrainedConfig,
    shape: DecoderShape,
    dtype: torch.dtype,
    max_seq_len: int,
    batching: Batching = Batching(),  # noqa: B008  it is frozen
) -> int:
    """Device memory for weights and KV cache."""
    weights = sum(p.numel() for p in empty_model(config, dtype).parameters())
    tokens = batching.pages(max_seq_len) * batching.page_size
    cache = 2 * shape.num_layers * tokens * shape.num_kv_heads * shape.head_dim
    return (weights + cache) * dtype.itemsize


def check_memory(
    config: PreTrainedConfig,
    shape: DecoderShape,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
    batching: Batching = Batching(),  # noqa: B008
) -> None:
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = int(memory_bytes(config, shape, dtype, max_seq_len, batching) * 1.02) + (
        256 << 20
    )  # queues, buffers, one packed layer
    if needed > free:
        raise DeviceError(
            f"{needed / 2**30:.1f} GiB are needed on {device} (weights and a KV cache for"
            f" {batching.pages(max_seq_len) * batching.page_size if not batching.is_one else max_seq_len} tokens),"
            f" {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; choose a smaller max_seq_len or model"
        )
