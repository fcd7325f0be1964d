"""Checkpoints, models and configs: what loads, and what each failure says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tri_mpk
from decoders import prompt, tiny_config, transformers_model
from tri_mpk import CheckpointError, DeviceError, UnsupportedModelError
from tri_mpk.loading import check_memory, random_model, resolve_device, resolve_dtype, resolve_max_seq_len
from tri_mpk.models import describe

DEMO = Path(__file__).resolve().parents[1] / "demos" / "tiny"
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder of a checkpoint, to be damaged."""
    transformers_model(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(path: Path | str, **parameters: object):
    return tri_mpk.from_pretrained(path, device="cpu", max_seq_len=32, num_workers=2, progress=False, **parameters)


# ---- what loads ----


def test_the_demo_speaks_as_in_transformers():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    input_ids = tokenizer("Humpty", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model = load(DEMO)
    assert model.dtype == torch.float32 and model.device == CPU and model.max_seq_len == 32
    result = model.generate(input_ids, max_new_tokens=3)
    assert torch.equal(result, theirs.generate(input_ids, max_new_tokens=3))
    assert tokenizer.decode(result[0]).startswith("Humpty Dumpty")


def test_a_checkpoint_loads(checkpoint):
    model = load(str(checkpoint))
    assert model.config.hidden_size == 64
    assert load(checkpoint, dtype="float32").dtype == torch.float32


def test_the_configs_of_a_checkpoint_are_kept(checkpoint):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 4], "max_length": 9}))
    assert load(checkpoint).generation_config.eos_token_id == [3, 4]


def test_from_config_depends_on_the_seed_only():
    def weights(seed: int) -> list[torch.Tensor]:
        return [w.clone() for w in random_model(tiny_config("qwen3"), seed, torch.float32, CPU).parameters()]

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(99)
    assert torch.equal(weights(3)[0], first[0])
    model = tri_mpk.from_config(tiny_config("qwen3"), seed=3, device="cpu", num_workers=2, progress=False)
    table = model.kernel.tensors["embed_tokens"].data
    assert torch.equal(table, first[0]) and model.max_seq_len == 512


def test_random_weights_keep_the_residual_stream_at_order_one():
    model = random_model(tiny_config(num_hidden_layers=4), 0, torch.float32, CPU)
    with torch.no_grad():
        logits = model(prompt(8)).logits
    assert 0.3 < float(logits.std()) < 3.0


def test_random_tied_weights_stay_tied():
    model = random_model(tiny_config(tie_word_embeddings=True), 0, torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_from_model_leaves_the_model_usable():
    model = transformers_model(tiny_config("qwen2"))
    before = copy.deepcopy(model)
    ours = tri_mpk.from_model(model, device="cpu", max_seq_len=32, num_workers=2, progress=False)
    ours.compile()
    with torch.no_grad():
        assert torch.equal(model(prompt(5)).logits, before(prompt(5)).logits)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj", "layers.0.self_attn.o_proj", "lm_head"])
def test_weights_are_used_where_they_lie(shared_model, name):
    weight = dict(shared_model.model.named_parameters())[f"{'' if name == 'lm_head' else 'model.'}{name}.weight"]
    check_shared(shared_model, weight)


@pytest.mark.xfail(strict=True, reason="on a CPU packed weights move to shared memory, their views stay behind")
def test_packed_weights_are_used_where_they_lie(shared_model):
    check_shared(shared_model, shared_model.model.model.layers[0].self_attn.v_proj.weight)


class SharedModel:
    def __init__(self):
        self.model = transformers_model(tiny_config())
        self.ours = tri_mpk.from_model(self.model, device="cpu", max_seq_len=32, num_workers=2, progress=False)
        self.ours.compile()


@pytest.fixture(scope="module")
def shared_model():
    return SharedModel()


def check_shared(shared: SharedModel, weight: torch.Tensor) -> None:
    """A change of the transformers model's weight changes what the kernel computes."""
    ids = prompt(1)
    before = weight.data.clone()
    weight.data.mul_(-1.5)
    try:
        with torch.no_grad():
            expected = shared.model(ids).logits
        torch.testing.assert_close(shared.ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
    finally:
        weight.data.copy_(before)


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, tri_mpk; assert not {'torch', 'triton', 'transformers'} & set(sys.modules); tri_mpk.from_model"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what does not ----


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere", local_files_only=True)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_config_that_is_not_json(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CheckpointError, match="config"):
        load(checkpoint)


def test_folder_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_truncated_weights(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut short|weights"):
        load(checkpoint)


def change_weights(checkpoint: Path, change) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_missing_weight(checkpoint):
    change_weights(checkpoint, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*layers\.0\.mlp\.up_proj"):
        load(checkpoint)


def test_weight_of_another_shape(checkpoint):
    def change(weights: dict) -> None:
        weights["model.norm.weight"] = torch.ones(65)

    change_weights(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(65,\).*\(64,\)"):
        load(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint, value):
    change_weights(checkpoint, lambda weights: weights["model.layers.0.self_attn.o_proj.weight"][3, 4].fill_(value))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj\.weight holds NaN"):
        load(checkpoint)


@pytest.mark.parametrize("model_type", ["gpt2", "llama9"])
def test_unknown_architecture(checkpoint, model_type):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=model_type):
        load(checkpoint)


def test_quantized_checkpoint(checkpoint):
    path = checkpoint / "config.json"
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization))
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load(checkpoint)


def test_unsupported_feature_is_named_before_weights_load(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'"):
        load(checkpoint)


def test_errors_are_python_errors_too():
    assert issubclass(CheckpointError, OSError) and issubclass(UnsupportedModelError, NotImplementedError)
    assert issubclass(DeviceError, RuntimeError) and issubclass(tri_mpk.MegakernelTimeout, TimeoutError)
    assert issubclass(tri_mpk.WorkerDiedError, tri_mpk.TriMpkError)


# ---- device, type, length, memory ----


def test_bfloat16_on_a_cpu(checkpoint):
    with pytest.raises(ValueError, match=r"bfloat16.*CPU.*torch\.float32"):
        load(checkpoint, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int8, "float8_e4m3fn", "nonsense"])
def test_unknown_dtype(dtype):
    with pytest.raises(ValueError, match="not supported; choose one of"):
        resolve_dtype(dtype, torch.device("cuda"), tiny_config())


def test_dtype_defaults_to_the_checkpoints_on_a_gpu():
    config = tiny_config()
    config.dtype = torch.float16
    assert resolve_dtype(None, torch.device("cuda"), config) == torch.float16
    assert resolve_dtype("auto", CPU, config) == torch.float32


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="use device='cpu'"):
        resolve_device("cuda")
    assert resolve_device(None) == CPU


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_other_devices(device):
    with pytest.raises(DeviceError, match="choose 'cuda' or 'cpu'"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("version", "fine"), [("2.3.5", True), ("1.26.4", True), ("2.4.0", False), ("3.0.0rc1", False)]
)
def test_numpy_that_the_interpreter_cannot_work_with(monkeypatch, version, fine):
    monkeypatch.setattr(numpy, "__version__", version)
    if fine:
        assert resolve_device("cpu") == CPU
    else:
        with pytest.raises(DeviceError, match=rf"numpy<2.4 \(here: {version}\)"):
            resolve_device("cpu")


@pytest.mark.parametrize("max_seq_len", [-1, 0, 1])
def test_max_seq_len_too_small(max_seq_len):
    with pytest.raises(ValueError, match=f"max_seq_len={max_seq_len} must be at least 2"):
        resolve_max_seq_len(max_seq_len, tiny_config())


def test_max_seq_len_defaults_to_what_the_model_can():
    assert resolve_max_seq_len(None, tiny_config()) == 512
    assert resolve_max_seq_len(None, tiny_config(max_position_embeddings=1 << 17)) == 4096


def test_max_seq_len_beyond_the_model(checkpoint):
    with pytest.raises(ValueError, match="513"):
        tri_mpk.from_pretrained(checkpoint, device="cpu", max_seq_len=513)


def test_too_little_memory(monkeypatch):
    config = tiny_config(num_hidden_layers=4)
    needed = (256 << 20) + 4 * 2 * 4096 * 32 * 2  # fixed part, KV cache in bf16
    free = [needed - 1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    arguments = (config, describe(config, 512), torch.bfloat16, torch.device("cuda"), 4096)
    with pytest.raises(DeviceError, match=r"GiB are needed.*4096 tokens.*of 80.0 GiB are free.*smaller max_seq_len"):
        check_memory(*arguments)
    free[0] = needed * 2
    check_memory(*arguments)
    free[0] = 0
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: needed * 2)  # torch's own cache is free memory
    check_memory(*arguments)


def test_memory_is_checked_before_weights_load(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr("tri_mpk.loading.check_memory", lambda *arguments: calls.append(1) or stop())

    def stop():
        raise DeviceError("too little memory")

    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(DeviceError, match="too little memory"):
        load(checkpoint)
    assert calls


@pytest.mark.parametrize("num_workers", [0, -3])
def test_bad_num_workers(num_workers):
    with pytest.raises(ValueError, match="num_workers"):
        tri_mpk.from_model(transformers_model(tiny_config()), device="cpu", max_seq_len=32, num_workers=num_workers)
