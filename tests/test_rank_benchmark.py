"""What the benchmark of several ranks makes of its measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tri_mpk import rank_benchmark
from tri_mpk.account import RANK_EDITS, Queues
from tri_mpk.rank_benchmark import communication_of

ALONE, BARE = RANK_EDITS["no communication"], (Queues.without_copies,)
MS = {(): 2.0, ALONE: 1.9, BARE: 1.5, (*ALONE, *BARE): 1.1}  # ms of a step with these edits


@pytest.mark.parametrize(("bare_ms", "hidden"), [(1.5, 0.75), (1.2, 0.0), (1.15, 0.0), (1.0, 0.0)])
def test_what_is_exposed_and_what_is_hidden(bare_ms: float, hidden: float, monkeypatch: pytest.MonkeyPatch):
    """Without weights there are 0.4 ms of communication (or 0.1, 0.05, or noise), of which the real step shows 0.1."""
    now: list[tuple] = [()]

    @contextmanager
    def edited(model: str, edits: tuple) -> Iterator[None]:
        assert model == "a model"
        now.append(edits)
        yield
        now.pop()

    monkeypatch.setattr(rank_benchmark, "edited", edited)
    found = communication_of("a model", MS[()], lambda: (MS | {BARE: bare_ms})[now[-1]])
    assert now == [()] and found["no_communication_ms_p50"] == 1.9
    assert found["exposed_communication"] == pytest.approx(0.05)
    assert found["communication_ms"] == pytest.approx(bare_ms - 1.1)
    assert found["hidden_communication"] == pytest.approx(hidden, abs=1e-9)
