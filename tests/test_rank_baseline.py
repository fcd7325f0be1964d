"""The baseline of several ranks as a command that the benchmark runs: what it makes of what the command says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tri_mpk.rank_baseline import run_baseline

COMMAND = f"""#!{sys.executable}
import json, os, sys, time
assert not any(name.startswith("TORCHELASTIC") for name in os.environ)
reduce = sys.argv[sys.argv.index("--reduce") + 1]
contexts = sys.argv[sys.argv.index("--context") + 1 : sys.argv.index("--attention")]
assert os.environ["MASTER_PORT"] == {{"nccl": "5001", "symmetric": "5002"}}[reduce], os.environ["MASTER_PORT"]
print("a word of some library")
for context in contexts:
    ms = int(context) + (2.0 if (reduce == "nccl") == (context == "64") else 1.0)
    print(json.dumps({{"context": int(context), "ms_p50": ms, "tried": {{"default/sdpa": ms}}}}), flush=True)
    if WHAT == "dies" and reduce == "symmetric":
        sys.exit("no peer access")
    if WHAT == "hangs" and reduce == "nccl":
        time.sleep(60)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(what: str) -> None:
        path = tmp_path / "python"
        path.write_text(COMMAND.replace("WHAT", repr(what)))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setenv("MASTER_PORT", "5000")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    return write


def test_the_fastest_way_counts_for_each_context(command):
    command("works")
    best, problems = run_baseline("a model", [64, 512])
    assert {context: row["ms_p50"] for context, row in best.items()} == {64: 65.0, 512: 513.0} and not problems
    assert best[64]["tried"] == {"nccl default/sdpa": 66.0, "symmetric default/sdpa": 65.0}
    assert best[512]["tried"] == {"nccl default/sdpa": 513.0, "symmetric default/sdpa": 514.0}


def test_one_that_dies_is_told_and_what_it_said_before_counts(command):
    command("dies")
    best, problems = run_baseline("a model", [64, 512])
    assert {context: row["ms_p50"] for context, row in best.items()} == {64: 65.0, 512: 513.0}
    assert problems == ["the baseline with symmetric failed: no peer access"]


def test_one_that_hangs_ends(command):
    command("hangs")
    best, problems = run_baseline("a model", [64], bound_s=2.0)
    assert best[64]["ms_p50"] == 65.0 and problems == ["the baseline with nccl took longer than 2 s"]


def test_none_is_asked_for():
    assert run_baseline("a model", [64], reduces=()) == ({}, [])
