"""Names of ops: `L03 gate_up` is one of layer 3, `lm_head` belongs to none."""

from __future__ import annotations

import re


def split_label(label: str) -> tuple[int | None, str]:
    """Layer and kind: `L03 gate_up` -> (3, "gate_up"), `lm_head` -> (None, "lm_head")."""
    match = re.fullmatch(r"L(\d+) (.+)", label)
    return (int(match[1]), match[2]) if match else (None, label)
