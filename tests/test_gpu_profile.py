"""What is known about a GPU: bundled, stored or estimated; damaged files do no harm."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from tri_mpk import gpu_profile
from tri_mpk.gpu_profile import (
    BUNDLED,
    GpuProfile,
    bundled,
    default_profile,
    estimated,
    find_profile,
    store,
    stored,
    stored_path,
    with_sms,
)

A100 = {
    "multiprocessor_count": 108, "sm_clock_rate": 1_410_000, "mem_clock_rate": 1_215_000, "mem_bus_width": 5120,
    "max_shared_mem": 166_912,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRI_MPK_CACHE", str(tmp_path))
    return tmp_path


def test_every_bundled_file_is_a_profile_under_its_own_name():
    for path in BUNDLED.iterdir():
        profile = GpuProfile.parse(json.loads(path.read_text()))
        assert bundled(profile.name) == profile
    assert default_profile().num_sms == 132
    assert bundled("Nothing of that name") is None


def test_a_stored_profile_comes_back():
    profile = replace(default_profile(), name="NVIDIA Test 1", hop_s=1.25e-6)
    assert stored(profile.name) is None
    assert store(profile) == stored_path(profile.name)
    assert stored(profile.name) == profile


@pytest.mark.parametrize(
    "change", [{"hop_s": -1.0}, {"hop_s": "fast"}, {"num_sms": 0}, {"extra": 1}, {"name": "Another"}, {"hop_s": None}]
)
def test_a_damaged_file_is_ignored(change: dict):
    profile = replace(default_profile(), name="NVIDIA Test 1")
    path = store(profile)
    path.write_text(json.dumps(asdict(profile) | change))
    with pytest.warns(UserWarning, match="tri-mpk tune --measure"):
        assert stored(profile.name) is None


@pytest.mark.parametrize("name", [field.name for field in fields(GpuProfile)])
def test_profiles_check_themselves(name: str):
    for value in (None, 0, -1, float("inf"), float("nan"), True):
        with pytest.raises(ValueError, match=name):
            replace(default_profile(), **{name: value})


def test_estimates_of_an_unknown_gpu():
    profile = estimated("NVIDIA A100", A100)
    assert profile.num_sms == 108 and profile.shared_bytes == 166_912
    assert profile.bandwidth_bytes_per_s == pytest.approx(0.9 * 1.555e12, rel=1e-3)
    assert profile.hop_s > default_profile().hop_s  # its clock is lower
    silent = estimated("?", A100 | {"sm_clock_rate": 0, "mem_clock_rate": 0})
    assert 0 < silent.bandwidth_bytes_per_s < profile.bandwidth_bytes_per_s
    assert silent.hop_s == default_profile().hop_s


def test_without_a_gpu_plans_are_for_the_default():
    for device in ("cpu", "meta"):
        assert find_profile(torch.device(device)) == (default_profile(), "bundled")


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100"])
def test_measured_comes_before_bundled_before_estimated(name: str):
    with (
        mock.patch.object(torch.cuda, "get_device_name", return_value=name),
        mock.patch.object(gpu_profile, "device_properties", return_value=A100),
    ):
        cuda = torch.device("cuda", 0)
        first, source = find_profile(cuda)
        assert (first.name, first.num_sms) == (name, 108)
        assert source == ("bundled" if name == "NVIDIA H200" else "estimated")
        store(replace(default_profile(), name=name, hop_s=3e-6))
        profile, source = find_profile(cuda)
        assert source == "measured" and profile.hop_s == 3e-6 and profile.num_sms == 108


def test_a_part_of_a_gpu_has_a_part_of_the_bandwidth():
    whole = default_profile()
    half = with_sms(whole, 66)
    assert half.sm_bytes_per_s == whole.sm_bytes_per_s
    assert half.bandwidth_bytes_per_s == whole.bandwidth_bytes_per_s / 2
    assert with_sms(whole, 132) == whole
