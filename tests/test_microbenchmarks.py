"""What measures a GPU: its kernels compile for Hopper and wait with a bound; its numbers become a profile."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tri_mpk import microbenchmarks
from tri_mpk.errors import DeviceError
from tri_mpk.gpu_profile import default_profile, find_profile
from tri_mpk.microbenchmarks import BLOCK, NUM_WARPS, hop_kernel, measure_profile, stream_kernel

H200 = {
    "multiprocessor_count": 132, "sm_clock_rate": 1_980_000, "mem_clock_rate": 3_201_000, "mem_bus_width": 6144,
    "max_shared_mem": 232_448,
}  # fmt: skip


def ptx(kernel, signature: dict[str, str], constants: dict[str, object]) -> str:
    names = list(signature)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}).asm["ptx"]


def test_streaming_loads_sixteen_bytes_per_thread():
    text = ptx(stream_kernel, {"x_ptr": "*i32", "out_ptr": "*i32"}, {"BLOCK": BLOCK})
    wide = text.count("v4.b32")
    assert wide >= BLOCK // (32 * NUM_WARPS * 4), text


@pytest.mark.parametrize("loads", [False, True])
def test_hops_are_barriers_releases_and_bounded_waits(loads: bool):
    signature = {
        "x_ptr": "*i32", "out_ptr": "*i32", "event_ptr": "*i32", "control_ptr": "*i64", "num_hops": "i32",
        "num_blocks": "i32",
    }  # fmt: skip
    text = ptx(hop_kernel, signature, {"LOADS": loads, "BLOCK": BLOCK})
    signal = text.index("atom.global.gpu.release.add")
    assert text.rindex("bar.sync", 0, signal) > 0  # all threads have come before one signals
    assert "ld.acquire.gpu.global.s32" in text and "%globaltimer" in text
    loads_at = text.find("v4.b32")
    assert (0 < loads_at < signal) == loads, "the loads must be on their way when the program signals"


def test_measured_numbers_become_a_profile(monkeypatch: pytest.MonkeyPatch):
    slow = H200 | {"sm_clock_rate": 990_000}
    monkeypatch.setattr(microbenchmarks, "device_properties", lambda _: slow)
    monkeypatch.setattr(microbenchmarks, "memory_to_read", lambda _: torch.zeros(BLOCK, dtype=torch.int32))
    monkeypatch.setattr(microbenchmarks, "measure_bandwidth", lambda _: 4e12)
    monkeypatch.setattr(microbenchmarks, "measure_hop", lambda _, num, loads: 3e-6 if loads else 1e-6)
    monkeypatch.setattr(torch.cuda, "device", lambda _: mock.MagicMock())
    for name, scale in (("NVIDIA H200", 1), ("NVIDIA X", 2)):  # known, or estimated from half the clock
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        profile = measure_profile(torch.device("cuda", 0))
        assert (profile.name, profile.num_sms, profile.bandwidth_bytes_per_s) == (name, 132, 4e12)
        assert (profile.hop_s, profile.queue_s) == (1e-6, pytest.approx(2e-6))
        assert profile.task_s == default_profile().task_s * scale


def test_too_little_memory_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 << 20, 1 << 40))
    with pytest.raises(DeviceError, match="100 MiB of cuda:0 are free"):
        microbenchmarks.memory_to_read(torch.device("cuda", 0))


@pytest.mark.gpu
def test_measured_on_this_gpu():
    device = torch.device("cuda", 0)
    profile = measure_profile(device)
    known, source = find_profile(device)
    assert 0.3e-6 < profile.hop_s < 10e-6 and profile.queue_s < 20e-6
    assert profile.bandwidth_bytes_per_s > 1e11
    if source == "bundled":
        assert profile.bandwidth_bytes_per_s == pytest.approx(known.bandwidth_bytes_per_s, rel=0.15)
        assert profile.hop_s == pytest.approx(known.hop_s, rel=1.0)
