"""Work in processes of their own that tests wait for, begun before they ask for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest


@contextmanager
def ahead(request: pytest.FixtureRequest, argument: str, function: Callable) -> Iterator[dict[tuple, Future]]:
    """What `function` makes of all values that tests of this module have for an argument, in the order of the tests and
    as many at a time as there are cores. To be asked by the values, as tuples.
    """
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    values = [item.callspec.params[argument] for item in items if argument in item.callspec.params]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield {value: pool.submit(function, *value) for value in dict.fromkeys(map(tuple, values))}
    finally:
        pool.shutdown(cancel_futures=True)
