"""Files that outlive a process: where they lie, and how they are read and written as a whole or not at all."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cache_dir() -> Path:
    """Where kernels and measurements are kept: $TRI_MPK_CACHE, else tri_mpk in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tri_mpk"
    return Path(os.environ.get("TRI_MPK_CACHE", default))


def slug(text: str) -> str:
    """A name as part of a file's name: `NVIDIA H200` -> `NVIDIA-H200`."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def write_whole(path: Path, text: str) -> None:
    """Other processes see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, parse: Callable[[Any], T], remedy: str) -> T | None:
    """What `parse` makes of a JSON file; None if there is no file, or, with a warning that ends with `remedy`, if the
    file cannot be read or `parse` refuses it (KeyError, TypeError, ValueError).
    """
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        warnings.warn(f"tri_mpk ignores {path}: {reason}. {remedy}", stacklevel=2)
        return None
