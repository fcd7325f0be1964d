"""Launches on a CPU: same bits every time, epochs that wrap around, planted faults, dead workers, Ctrl-C."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from decoders import prompt, tiny_pair
from tri_mpk import CausalLM, MegakernelTimeout, WorkerDiedError
from tri_mpk.account import SKIPPED
from tri_mpk.ops.argmax import STOP_INTERVAL
from tri_mpk.program import Program
from tri_mpk.runtime import InterpreterRuntime
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler.descriptor import EVENT_STRIDE, PackedQueues
from tri_mpk.scheduler.graph import STEP_EVENT

ROOT = Path(__file__).resolve().parents[1]
PROMPT = prompt(2)
NEW_TOKENS = 3
FEW_POLLS_S = 0.2  # 1000 polls: a wait bound that a sane launch of a tiny model never reaches within one step


@pytest.fixture(scope="module")
def pair():
    ours, theirs = tiny_pair()
    ours.compile()
    return ours, theirs.generate(PROMPT, max_new_tokens=NEW_TOKENS)


def generate(model: CausalLM, **parameters: object) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=NEW_TOKENS, **parameters)


def test_the_same_bits_every_time(pair):
    model, expected = pair
    logits = []
    for _ in range(3):
        assert torch.equal(generate(model), expected)
        logits.append(model.kernel.runtime.default_logits.clone())
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert torch.equal(model(PROMPT).logits, model(PROMPT).logits)


def test_earlier_text_leaves_no_trace(pair):
    model, expected = pair
    model.generate(prompt(7, seed=5), max_new_tokens=2)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("epoch", [2**31 - 3, -(2**31), -2, 2**30, 1])
def test_epochs_wrap_around(pair, epoch):
    """Steps before and after the wrap-around of the epoch, and of every counter at its own time."""
    model, expected = pair
    runtime = model.kernel.runtime
    runtime.set_epoch(epoch)
    for _ in range(2):
        assert torch.equal(generate(model), expected)
    steps = 2 * (PROMPT.shape[1] + NEW_TOKENS - 1)
    assert runtime.next_epoch == (epoch + steps + 2**31) % 2**32 - 2**31
    runtime.set_epoch(1)


# ---- planted faults ----


@pytest.fixture(scope="module")
def impatient():
    """A model whose waits end soon; small enough that no sane wait takes as long."""
    ours, theirs = tiny_pair(max_seq_len=16, wait_bound_s=FEW_POLLS_S * 20)
    ours.compile()
    return ours, theirs.generate(PROMPT, max_new_tokens=NEW_TOKENS)


def timeout_of(model: CausalLM) -> MegakernelTimeout:
    """The error of a launch that hangs, which must come in time."""
    model.kernel.runtime.wait_bound_s = FEW_POLLS_S
    started = time.monotonic()
    try:
        with pytest.raises(MegakernelTimeout) as caught:
            generate(model)
    finally:
        model.kernel.runtime.wait_bound_s = FEW_POLLS_S * 20
    assert time.monotonic() - started < 30
    return caught.value


def check_facts(error: MegakernelTimeout, program: Program) -> None:
    """The wait that gave up, and a chain of unfinished tasks that begins with it."""
    assert error.seen < error.wanted and 0 <= error.worker < 2
    consumers = {program.graph.task_name(t): t for t, event in enumerate(program.events.wait) if event == error.event}
    if error.task == "the end of the step":
        assert error.event == STEP_EVENT and error.op is error.layer is error.tile is None
    else:
        task = program.graph.tasks[consumers[error.task]]
        assert error.chain[0] == f"{error.task} (worker {error.worker})" and error.tile == task.tile
        assert error.op == program.variants[task.variant].op.name
        assert error.layer == (0 if program.graph.ops[task.op].startswith("L00 ") else None)
    for part in (error.task, f"event {error.event} stood at {error.seen}, wanted {error.wanted}", "wait_bound_s"):
        assert part in str(error)
    assert error.root_cause in str(error) and all(task in str(error) for task in error.chain[1:])


def test_a_lost_signal(impatient):
    """Whoever began to wait first gives up first; the root cause is the event all the same."""
    model, expected = impatient
    runtime, program = model.kernel.runtime, model.kernel.program
    event = next(e for e in range(1, len(program.events.events)) if program.events.events[e].count == 2)
    runtime.set_epoch(1)
    runtime.events[event * EVENT_STRIDE] -= 1
    error = timeout_of(model)
    check_facts(error, program)
    assert f"1 of 2 signals of event {event} never came" in error.root_cause
    assert all(program.graph.task_name(t) in error.root_cause for t in program.events.events[event].producers)
    last = next(t for t in range(len(program.graph.tasks)) if error.chain[-1].startswith(program.graph.task_name(t)))
    assert program.events.wait[last] == event
    assert torch.equal(generate(model), expected)


def test_a_lost_signal_of_the_step_event(impatient):
    model, expected = impatient
    runtime = model.kernel.runtime
    runtime.set_epoch(1)
    runtime.events[STEP_EVENT * EVENT_STRIDE] -= 1
    error = timeout_of(model)
    check_facts(error, model.kernel.program)
    assert error.task == "the end of the step" and error.event == STEP_EVENT and error.wanted == error.seen + 1
    assert f"signals of event {STEP_EVENT} never came" in error.root_cause
    assert torch.equal(generate(model), expected)


def test_a_fault_in_a_later_step(impatient):
    """The first launch is fine; the second begins at a later epoch, with one signal missing."""
    model, expected = impatient
    runtime = model.kernel.runtime
    runtime.set_epoch(1)
    assert torch.equal(generate(model), expected)
    runtime.events[EVENT_STRIDE] -= 1
    error = timeout_of(model)
    check_facts(error, model.kernel.program)
    assert error.wanted > model.kernel.program.events.events[error.event].count
    assert "signals of event 1 never came" in error.root_cause
    assert torch.equal(generate(model), expected)


def test_a_wait_that_is_too_short(impatient):
    """Nothing is wrong but the bound: every signal comes after all."""
    model, expected = impatient
    model.kernel.runtime.wait_bound_s = 1 / InterpreterRuntime.POLLS_PER_SECOND
    try:
        with pytest.raises(MegakernelTimeout, match=r"no signal is lost.*raise wait_bound_s") as caught:
            model.generate(PROMPT, max_new_tokens=10)
    finally:
        model.kernel.runtime.wait_bound_s = FEW_POLLS_S * 20
    check_facts(caught.value, model.kernel.program)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_that_never_arrives(impatient, monkeypatch, worker):
    """It is there, but does nothing any more; nobody waits for it for ever, the host included."""
    model, expected = impatient
    runtime, program = model.kernel.runtime, model.kernel.program
    monkeypatch.setattr(InterpreterRuntime, "LEAVE_BOUND_S", 1.0)
    monkeypatch.setattr(runtime, "wait_bound_s", FEW_POLLS_S * 3)
    runtime.set_epoch(1)
    stop = functools.partial(os.kill, runtime.workers[worker].pid, signal.SIGSTOP)
    with pytest.raises(MegakernelTimeout) as caught:
        model.generate(PROMPT, max_new_tokens=14, streamer=AtToken(2, stop))
    error = caught.value
    check_facts(error, program)
    assert error.worker == 1 - worker and "a worker that did not leave stopped before it had done" in error.root_cause
    assert error.chain[-1] in error.root_cause and error.chain[-1].endswith(f"(worker {worker})")
    assert torch.equal(generate(model), expected)


def with_corrupt_queues(change, check) -> None:
    """A model whose task descriptors `change` has damaged: `check(model)` sees it fail, then it is repaired."""
    pack = Program.pack

    def corrupt_pack(program: Program) -> PackedQueues:
        packed = pack(program)
        change(packed.words)
        return packed

    model, theirs = tiny_pair(max_seq_len=16, wait_bound_s=FEW_POLLS_S * 20)
    with mock.patch.object(Program, "pack", corrupt_pack):
        model.compile()
    check(model)
    for process in model.kernel.runtime.workers:  # new workers get sound queues
        process.kill()
    with pytest.raises(WorkerDiedError):
        generate(model)
    assert torch.equal(generate(model), theirs.generate(PROMPT, max_new_tokens=NEW_TOKENS))


def test_a_wait_that_counts_too_far():
    """Named although its worker may not be the first to give up."""
    count = words.TASK_WAIT_COUNT.value
    damaged = []

    def change(queue) -> None:
        damaged.append(int((queue[:, count] > 0).nonzero()[0][0]))
        queue[damaged[0], count] += 1

    def check(model: CausalLM) -> None:
        program = model.kernel.program
        task = program.schedule.queues[0][damaged[0]]
        error = timeout_of(model)
        check_facts(error, program)
        assert error.chain[-1] == f"{program.graph.task_name(task)} (worker 0)"
        assert f"the descriptor of {error.chain[-1]} is not what was packed" in error.root_cause
        if len(error.chain) == 1:
            assert error.seen == error.wanted - 1 and f"it wants {error.wanted} of event" in error.root_cause

    with_corrupt_queues(change, check)


def test_a_task_of_no_variant():
    """A task that no branch of the kernel runs never signals: its consumers say so."""
    variant = words.TASK_VARIANT.value

    def change(queue) -> None:
        queue[0, variant] = queue[0, variant] >> 32 << 32 | 77

    def check(model: CausalLM) -> None:
        error = timeout_of(model)
        program = model.kernel.program
        check_facts(error, program)
        assert error.chain[-1] == f"{program.graph.task_name(program.schedule.queues[0][0])} (worker 0)"
        assert f"the descriptor of {error.chain[-1]} is not what was packed" in error.root_cause

    with_corrupt_queues(change, check)


def test_a_task_that_only_signals():
    """What the account makes of tasks that it takes away: nobody waits for them in vain."""
    skipped = 1  # in the first queue, behind the embedding

    def change(queue) -> None:
        queue[skipped, words.TASK_VARIANT.value] = SKIPPED

    def check(model: CausalLM) -> None:
        program = model.kernel.program
        (output,) = program.graph.tasks[program.schedule.queues[0][skipped]].writes
        lo, hi = output.box[1]
        places = [region for task in program.graph.tasks for region in task.writes if region.tensor == output.tensor]
        assert [place for place in places if place.box[1][0] < hi and place.box[1][1] > lo] == [output]
        data = program.tensors[output.tensor].data.view(-1)[lo:hi]
        data.fill_(7.0)
        assert generate(model).shape == (1, PROMPT.shape[1] + NEW_TOKENS)
        assert bool((data == 7.0).all())

    with_corrupt_queues(change, check)


# ---- workers that die, Ctrl-C ----


class AtToken(BaseStreamer):
    """Does something at the n-th new token."""

    def __init__(self, n: int, action):
        self.left, self.action = n + 1, action  # the prompt is put first

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def end(self) -> None: ...


@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_killed_in_a_launch(impatient, worker):
    model, expected = impatient
    runtime = model.kernel.runtime
    runtime.set_epoch(1)
    with pytest.raises(WorkerDiedError, match=f"worker {worker}|process"):
        model.generate(PROMPT, max_new_tokens=14, streamer=AtToken(2, runtime.workers[worker].kill))
    assert torch.equal(generate(model), expected)
    assert torch.equal(generate(model), expected)


def test_a_worker_killed_between_launches(impatient):
    model, expected = impatient
    model.kernel.runtime.workers[1].kill()
    model.kernel.runtime.workers[1].wait()
    with pytest.raises(WorkerDiedError):
        generate(model)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_streamer_stops_the_kernel(pair, error):
    model, expected = pair

    def fail() -> None:
        raise error("enough")

    with pytest.raises(error, match="enough"):
        model.generate(PROMPT, max_new_tokens=60, streamer=AtToken(1, fail))
    assert model.kernel.runtime.finished()
    # it left at the end of the step, or of the next one, in which it looked whether to stop
    assert int(model.kernel.step.data) <= PROMPT.shape[1] + 3 + STOP_INTERVAL.value
    assert torch.equal(generate(model), expected)


SCRIPT = textwrap.dedent("""
    import sys, time
    from transformers.generation.streamers import BaseStreamer
    from decoders import prompt, tiny_pair

    class Say(BaseStreamer):
        def put(self, value): print(f"{'token' if value.numel() == 1 else 'prompt'}\\n", end="", flush=True)  # at once
        def end(self): pass

    model, theirs = tiny_pair(max_seq_len=512)
    expected = theirs.generate(prompt(2), max_new_tokens=2)
    model.compile()
    print(*(p.pid for p in model.kernel.runtime.workers), flush=True)
""")  # without `if __name__ == "__main__"`, as people write


def start_script(text: str) -> tuple[subprocess.Popen, list[int]]:
    """The script after SCRIPT, and the process ids of its workers."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(text)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2, process.communicate()
    return process, pids


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"workers {pids} outlive their host"
        time.sleep(0.05)


def test_a_plain_script_works_and_leaves_no_process(tmp_path):
    process, pids = start_script("""
        assert model.generate(prompt(2), max_new_tokens=2).tolist() == expected.tolist()
        print("equal")
    """)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out.strip() == "equal", errors
    assert_gone(pids)


def test_ctrl_c_and_a_killed_host():
    process, pids = start_script("""
        try:
            model.generate(prompt(2), max_new_tokens=500, streamer=Say())
            print("not interrupted", flush=True)
        except KeyboardInterrupt:
            print("interrupted", int(model.kernel.step.data), flush=True)
        assert model.generate(prompt(2), max_new_tokens=2).tolist() == expected.tolist()
        print("usable", flush=True)
        time.sleep(60)
    """)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["prompt", "token"]
    process.send_signal(signal.SIGINT)
    lines = iter(process.stdout.readline, "")
    outcome = next(line.split() for line in lines if line.strip() != "token")
    # it left before the end, however late the signal was sent: 500 steps take long
    assert outcome[0] == "interrupted" and int(outcome[1]) < 480, outcome
    assert next(lines).strip() == "usable"
    process.kill()
    process.communicate()
    assert_gone(pids)


def test_a_host_killed_in_a_launch():
    process, pids = start_script("""
        model.generate(prompt(2), max_new_tokens=500, streamer=Say())
    """)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["prompt", "token"]
    process.kill()
    process.communicate()
    assert_gone(pids)


def test_workers_end_with_their_model():
    model, _ = tiny_pair(max_seq_len=16)
    model.compile()
    pids = [process.pid for process in model.kernel.runtime.workers]
    del model
    assert_gone(pids)
