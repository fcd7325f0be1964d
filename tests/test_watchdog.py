"""What a MegakernelTimeout says, and which tasks a damaged queue belongs to."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tri_mpk import MegakernelTimeout
from tri_mpk.scheduler import Schedule
from tri_mpk.watchdog import differing_tasks


def test_a_long_chain_is_shortened_in_the_middle():
    chain = tuple(f"task {i}" for i in range(9))
    error = MegakernelTimeout("L01 down t3", 2, 7, 4, 6, op="linear", layer=1, tile=(3,), chain=chain, root_cause="x")
    assert error.chain == chain and (error.op, error.layer, error.tile) == ("linear", 1, (3,))
    assert "worker 2 waited too long before L01 down t3 (linear): event 7 stood at 4, wanted 6. Root cause: x. " in str(
        error
    )
    assert " Unfinished: task 0 <- task 1 <- task 2 <- 4 more <- task 7 <- task 8. " in str(error)


def test_damaged_records_belong_to_tasks():
    """Workers without tasks have a record too."""
    program = SimpleNamespace(schedule=Schedule([[3, 0], [], [1, 2]]))
    packed = np.zeros((5, 4), dtype=np.int64)
    found = packed.copy()
    assert differing_tasks(program, found, packed) == set()
    found[0, 3] = found[3, 1] = found[2, 0] = 1
    assert differing_tasks(program, found, packed) == {3, 1}
