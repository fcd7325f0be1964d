"""tri_mpk: a Hugging Face language model as one persistent Triton kernel.

import tri_mpk
model = tri_mpk.from_pretrained("Qwen/Qwen3-8B")
tokens = model.generate(input_ids, max_new_tokens=100)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if not (Path(__file__).parent / "ops").exists():  # in a checkout, ops/ and scheduler/ stand beside this folder
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from tri_mpk.errors import (
        CheckpointError,
        DeviceError,
        MegakernelTimeout,
        RankError,
        TriMpkError,
        UnsupportedModelError,
        WorkerDiedError,
    )
    from tri_mpk.loading import from_config, from_model, from_pretrained
    from tri_mpk.model import CausalLM
    from tri_mpk.persistent_kernel import PersistentKernel
    from tri_mpk.tuning import Tuning

__version__ = "0.1.0"

_HOMES = {
    "CausalLM": "tri_mpk.model",
    "PersistentKernel": "tri_mpk.persistent_kernel",
    "Tuning": "tri_mpk.tuning",
    "from_config": "tri_mpk.loading",
    "from_model": "tri_mpk.loading",
    "from_pretrained": "tri_mpk.loading",
    "CheckpointError": "tri_mpk.errors",
    "DeviceError": "tri_mpk.errors",
    "MegakernelTimeout": "tri_mpk.errors",
    "RankError": "tri_mpk.errors",
    "TriMpkError": "tri_mpk.errors",
    "UnsupportedModelError": "tri_mpk.errors",
    "WorkerDiedError": "tri_mpk.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Loaded at first use: `import tri_mpk` itself imports neither torch nor transformers."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tri_mpk' has no attribute {name!r}")
