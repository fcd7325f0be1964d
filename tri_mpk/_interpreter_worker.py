"""One worker of the CPU path: runs the generated kernel in Triton's interpreter, as a process of its own.

Started by runtime.py as a script, so that it imports nothing but torch and Triton. It reads pickled messages from
standard input and answers each with None (or with what was asked for) or the text of an exception; it ends when its
standard input does.
"""

import os
import sys

# a script's own folder comes first in the path, where tri_mpk/inspect.py would hide the standard library's
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != _HERE]

import dataclasses  # noqa: E402
import importlib.util  # noqa: E402
import pickle  # noqa: E402
import random  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def tune_interpreter() -> None:
    """Halves the time of Triton 3.6's interpreter, which per call of a device function spends a millisecond.

    It checks every sum for overflow (event counters may wrap around, so the check would also be wrong here), and
    patches triton.language anew for every call of a device function, though once per launch and module is enough.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch_lang = interpreter._patch_lang
    patched_modules = set()

    def patch_once(fn):
        if fn.__name__.endswith("kernel"):  # the end of a launch undoes all patches
            patched_modules.clear()
        elif fn.__module__ in patched_modules:
            return None
        patched_modules.add(fn.__module__)
        return patch_lang(fn)

    interpreter._patch_lang = patch_once


def delay_at_random(seed: str, worker: int) -> None:
    """For tests: workers stop for a moment here and there, before what others may see."""
    chance = random.Random(f"{seed}/{worker}")
    for name in ("create_atomic_rmw", "create_masked_store", "create_masked_load"):
        wrapped = getattr(interpreter.InterpreterBuilder, name)

        def delayed(*args, wrapped=wrapped, **kwargs):
            if chance.random() < 0.01:
                time.sleep(chance.random() * 0.02)
            return wrapped(*args, **kwargs)

        setattr(interpreter.InterpreterBuilder, name, delayed)


def yield_between_polls() -> None:
    """With several ranks there are more workers than cores: who waits leaves its core to those that work."""
    wrapped = interpreter.InterpreterBuilder.create_atomic_rmw
    last = None

    def patient(self, op, ptr, *args):
        nonlocal last
        place = int(np.ravel(ptr.data)[0])
        if place == last:
            time.sleep(0.0005)
        last = place
        return wrapped(self, op, ptr, *args)

    interpreter.InterpreterBuilder.create_atomic_rmw = patient


def open_tensor(path: str, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes // dtype.itemsize, dtype=dtype)


def load(message: dict) -> dict:
    """Maps the tensors, packs this process's descriptors and imports the kernel."""
    spec = importlib.util.spec_from_file_location("megakernel", message["source"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = {path: open_tensor(path, size, torch.uint8) for path, size, _ in message["tensors"]}
    shared = []
    for path, size, dtype in message["arguments"]:  # a heap is mapped once: counters and tensors lie in it
        whole = files[path] if path in files else open_tensor(path, size, torch.uint8)
        shared.append(whole[: size // dtype.itemsize * dtype.itemsize].view(dtype))
    bases = torch.tensor([files[path].data_ptr() + at for path, _, at in message["tensors"]], dtype=torch.int64)
    queue = message["words"].view(-1).clone()
    addresses = message["signs"] * bases[message["indices"]]
    queue.index_add_(0, message["positions"], addresses)
    return {
        "kernel": module.megakernel,
        "arguments": [queue, message["queue_start"], *shared],
        "relocations": (message["positions"], addresses),
        "keep": files,
        "worker": message["worker"],
        "task_words": message["words"].shape[1],
    }


def unpacked_queue(state: dict) -> np.ndarray:
    """The task descriptors as they are, without this process's addresses: equal in all workers."""
    positions, addresses = state["relocations"]
    queue = state["arguments"][0].index_add(0, positions, -addresses)
    return queue.view(-1, state["task_words"]).numpy()


def end_with_host(host: int) -> None:
    """A host that is killed in the middle of a launch cannot ask for a stop any more."""
    while os.getppid() == host:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_host, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    tune_interpreter()
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not garble the answers
    state: dict = {}
    while True:
        try:
            message = pickle.load(inbox)
        except EOFError:
            return
        answer = None
        try:
            if message["what"] == "load":
                state = load(message)
                if message["ranks"] > 1:
                    yield_between_polls()
                if seed := os.environ.get("TRI_MPK_TEST_DELAYS"):
                    delay_at_random(seed, message["worker"])
            elif message["what"] == "queue":
                answer = unpacked_queue(state)
            else:
                logits = open_tensor(*message["logits"], torch.float32)
                *arguments, mailbox = state["arguments"]
                state["kernel"][(1,)](*arguments, logits, mailbox, state["worker"])
        except BaseException:
            answer = traceback.format_exc()
        pickle.dump(answer, outbox)
        outbox.flush()


if __name__ == "__main__":
    main()
