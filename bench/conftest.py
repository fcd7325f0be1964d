"""Options and fixtures of the latency suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tri_mpk.benchmark import DEFAULT_CONTEXTS, Subject, free_memory, prepare, save_report
from tri_mpk.geometries import GEOMETRIES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tri_mpk latency")
    group.addoption("--geometry", action="append", help="repeat for several; default: all")
    group.addoption("--context", action="append", type=int, help="repeat for several; default: 64, 512, 4096")
    group.addoption("--num-tokens", type=int, default=32, help="tokens per launch")
    group.addoption("--launches", type=int, default=20)
    group.addoption("--no-baseline", action="store_true", help="skip torch.compile, which takes most of the time")
    group.addoption(
        "--save", type=Path, metavar="DIR", help="also save reports for bench/report.py, e.g. bench/results"
    )


def chosen_contexts(config: pytest.Config) -> list[int]:
    return config.getoption("--context", None) or list(DEFAULT_CONTEXTS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        names = metafunc.config.getoption("--geometry", None) or GEOMETRIES
        metafunc.parametrize("subject", names, indirect=True, scope="session")
        metafunc.parametrize("context", chosen_contexts(metafunc.config))


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """One geometry, built and compiled once for all contexts."""
    option = request.config.getoption
    subject = prepare(
        request.param,
        chosen_contexts(request.config),
        num_tokens=option("--num-tokens"),
        launches=option("--launches"),
        baseline=not option("--no-baseline"),
    )
    yield subject
    del subject
    free_memory()


@pytest.fixture(scope="session")
def rows(subject: Subject, request: pytest.FixtureRequest) -> Iterator[list[dict]]:
    """Collects a geometry's rows, and saves them as a report if --save was given."""
    rows: list[dict] = []
    yield rows
    folder = request.config.getoption("--save")
    if folder and rows:
        save_report(subject.report(rows), folder)
