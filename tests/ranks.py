"""Several ranks on this machine: processes started as torchrun does, each of which runs a case of rank_program.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent

REQUESTS = [  # of texts that are not chosen greedily
    {"do_sample": True, "seed": 5, "top_k": 0},
    {"do_sample": True, "seed": 2**64 - 1, "temperature": 1.7, "top_k": 40, "top_p": 0.95, "min_p": 0.001},
    {"do_sample": True, "seed": 7, "repetition_penalty": 1.5, "top_p": 0.7},
    {"repetition_penalty": 8.0},
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankProcesses:
    """`num_ranks` processes that run `case(**arguments)`; each prints JSON values, one a line."""

    def __init__(self, num_ranks: int, case: str, environment: dict[int, dict[str, str]] | None = None, **arguments):
        port = free_port()
        self.processes = []
        for rank in range(num_ranks):
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            }  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(TESTS / "rank_program.py"), case, json.dumps(arguments)],
                    env=os.environ | variables | (environment or {}).get(rank, {}),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def next(self, rank: int) -> Any:
        """The next value that a rank prints."""
        line = self.processes[rank].stdout.readline()
        if not line:
            raise AssertionError(f"rank {rank} ended: {self.processes[rank].communicate()[1][-3000:]}")
        return json.loads(line)

    def last(self, rank: int, timeout: float) -> Any:
        """The last value that a rank prints before it ends, which it must."""
        out, errors = self.processes[rank].communicate(timeout=timeout)
        assert self.processes[rank].returncode == 0, errors[-3000:]
        return json.loads(out.splitlines()[-1])


def run_ranks(num_ranks: int, case: str, timeout: float = 300.0, **arguments: Any) -> list[Any]:
    """What every rank says last."""
    with RankProcesses(num_ranks, case, **arguments) as ranks:
        return [ranks.last(rank, timeout) for rank in range(num_ranks)]
