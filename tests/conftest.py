"""What all tests share: the gpu marker, a kernel cache of their own, fixed seeds, the tiny models."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest
import torch

NO_GPU = "PyTorch sees no CUDA GPU here"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped where there is none")
    if "TRI_MPK_CACHE" not in os.environ:
        # Generated sources only: compiled kernels stay in Triton's own cache, so a GPU run compiles each of them once.
        config.kernel_cache = tempfile.TemporaryDirectory(prefix="tri_mpk_tests_")
        os.environ["TRI_MPK_CACHE"] = config.kernel_cache.name


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "kernel_cache"):
        del os.environ["TRI_MPK_CACHE"]
        config.kernel_cache.cleanup()


def pytest_report_header() -> str:
    gpu = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"none ({NO_GPU}; tests marked gpu are skipped)"
    )
    return f"GPU: {gpu}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
