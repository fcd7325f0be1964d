"""Run: a program's memory, its kernel, and launches, on a CUDA GPU or, in the interpreter, on a CPU.

A launch is described by `LaunchRequest`; `Runtime.run` starts it and yields the new tokens while the kernel runs. The
host touches nothing of the device meanwhile but the mailbox, which is its own pinned (or shared) memory.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from triton.compiler import CompiledKernel, make_backend

from tri_mpk.distributed import Ranks, symmetric_heap
from tri_mpk.errors import DeviceError, WorkerDiedError
from tri_mpk.generator import import_source, write_source
from tri_mpk.gpu_profile import device_properties
from tri_mpk.ops import argmax
from tri_mpk.program import COMPILE_OPTIONS, Program, SharedMemoryPlan
from tri_mpk.sampling import Sampling
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler import timing
from tri_mpk.scheduler.descriptor import EVENT_STRIDE, PackedQueues, heap_name
from tri_mpk.scheduler.watchdog import wrap_int32
from tri_mpk.shared_memory import SharedMemory
from tri_mpk.tensor_maps import fill_tensor_maps
from tri_mpk.watchdog import differing_tasks, stuck_text, timeout_error

CONTROL_WORDS = words.CONTROL_RECORDS.value
ARENA_BYTES = 2 << 20  # one page of a GPU's memory
MAX_EOS = 32
HEAP_ALIGN = 256  # bytes
RECORDED_STEPS = 32  # a profiled kernel keeps the time stamps of so many steps, the last ones of a launch
MAILBOX_STOP = argmax.MAILBOX_STOP.value
MAILBOX_NUM_TOKENS = argmax.MAILBOX_NUM_TOKENS.value
MAILBOX_TOKENS = argmax.MAILBOX_TOKENS.value


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What one launch has to do. Positions count from 0; the step tensor says where it begins."""

    num_known: int  # tokens given; the first chosen one goes to this position
    last_step: int  # position of the last token to process
    eos_token_ids: tuple[int, ...] = ()
    logits_from: int = 0  # first position whose logits are wanted
    sampling: Sampling = Sampling()  # needs a graph with sample_layer, unless it is greedy decoding
    logits: torch.Tensor | None = None  # [positions, V] fp32 for the logits of all positions; None: only the last

    @classmethod
    def of_batches(cls) -> LaunchRequest:
        """A launch of a kernel with an advance_layer, which takes its requests from the rings while it runs."""
        return cls(num_known=0, last_step=0)


class Runtime:
    """What the CUDA and the CPU runtime share: the control block, the mailbox, the epochs."""

    POLL_S = 50e-6  # between two looks of the host at a launch
    LEAVE_BOUND_S = 2.0  # so long, and the wait bound, ranks have to leave a launch that another one has given up

    def __init__(
        self,
        program: Program,
        vocab_size: int,
        mailbox_words: int,
        wait_bound_s: float,
        ranks: Ranks | None = None,
    ):
        self.program = program
        self.ranks = ranks  # None: there is only this one
        self.out_of_step = False  # counters do not stand where all ranks expect them
        self.failure = ""  # of the last launch, for other ranks
        self.vocab_size = vocab_size
        self.wait_bound_s = wait_bound_s
        self.mailbox_words = mailbox_words
        self.source_path = write_source(program.source)
        self.shared_memory: SharedMemoryPlan | None = None
        self.next_epoch = 1
        self.num_launches = 0
        self.last_steps = range(0)  # positions that the last launch processed
        self.absent: set[int] = set()  # workers that did not leave the last launch
        if ranks is not None:
            ranks.agree("the kernels of the ranks", {"kernel": self.source_path.name, "tuning": str(program.tuning)})

    def _allocate_state(self) -> None:
        if self.ranks is None:
            self.events = self.near_empty((self.program.counters.size,), torch.int32)
        else:
            self._allocate_heap()
        self.set_epoch(1)
        num_records = RECORDED_STEPS * self.step_records if self.program.constants.profile else 0
        self.control = self.empty((CONTROL_WORDS + num_records * timing.RECORD_WORDS.value,), torch.int64)
        self.mailbox = self.host_empty(self.mailbox_words)

    def _allocate_heap(self) -> None:
        """What other ranks reach: first the counters, then the symmetric tensors, at the same places on all ranks."""
        self.heap_offsets = {}
        size = -(-self.program.counters.size * 4 // HEAP_ALIGN) * HEAP_ALIGN
        for tensor in self.program.symmetric_tensors:
            self.heap_offsets[tensor.name] = size
            size += -(-tensor.numel * tensor.dtype.itemsize // HEAP_ALIGN) * HEAP_ALIGN
        self.heap = self.make_heap(size)
        self.events = self.heap[: self.program.counters.size * 4].view(torch.int32)
        for tensor in self.program.symmetric_tensors:
            begin = self.heap_offsets[tensor.name]
            flat = self.heap[begin : begin + tensor.numel * tensor.dtype.itemsize]
            tensor.data = flat.view(tensor.dtype).view(tensor.dims)

    @property
    def step_records(self) -> int:
        """Records of one step of a profiled kernel: of every task, and of every worker itself."""
        # a worker without tasks has a descriptor all the same
        queues, pools = self.program.schedule.queues, self.program.schedule.pools
        return sum(max(1, len(queue)) + timing.WORKER_RECORDS.value for queue in queues) + sum(map(len, pools))

    def read_records(self) -> torch.Tensor:
        """Time stamps of the last steps of the last launch: int64 [steps, records of a step, 4] on the CPU.

        Of the steps in `last_steps` these are the last ones, RECORDED_STEPS at most. scheduler/timing.py has the order.
        """
        records = self.control[CONTROL_WORDS:].cpu().view(RECORDED_STEPS, -1, timing.RECORD_WORDS.value)
        return records[[step % RECORDED_STEPS for step in self.last_steps[-RECORDED_STEPS:]]]

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` (any int32) the next one, as if the steps before it had run."""
        self.events.copy_(torch.from_numpy(self.program.counters.before(epoch)))
        self.next_epoch = epoch

    def run(self, request: LaunchRequest) -> Iterator[int]:
        """Launches once and yields the chosen tokens as they come; errors as in `launched`."""
        mailbox = self.mailbox.numpy()
        num_seen = 0
        with self.launched(request):
            while num_seen < mailbox[MAILBOX_NUM_TOKENS] or not self.finished():
                if num_seen < mailbox[MAILBOX_NUM_TOKENS]:
                    yield int(mailbox[MAILBOX_TOKENS + num_seen])
                    num_seen += 1
                else:
                    time.sleep(self.POLL_S)
        yield from mailbox[MAILBOX_TOKENS + num_seen : MAILBOX_TOKENS + mailbox[MAILBOX_NUM_TOKENS]].tolist()

    @contextlib.contextmanager
    def launched(self, request: LaunchRequest) -> Iterator[None]:
        """One launch, which has ended when this is left: if it has not by itself, it is asked to stop.

        The mailbox is zero when the launch begins. Raises MegakernelTimeout when a wait in the kernel exceeded its
        bound. On KeyboardInterrupt (or any other error) the kernel is asked to stop, too.
        """
        assert len(request.eos_token_ids) <= MAX_EOS, request.eos_token_ids
        if self.ranks is not None:
            self._meet(request)
        self.failure = ""
        control = torch.zeros(CONTROL_WORDS, dtype=torch.int64)
        control[words.CONTROL_FIRST_EPOCH.value] = self.next_epoch
        control[words.CONTROL_NUM_KNOWN.value] = request.num_known
        control[words.CONTROL_LAST_STEP.value] = request.last_step
        control[words.CONTROL_LOGITS_FROM.value] = request.logits_from
        control[words.CONTROL_LOGITS_STRIDE.value] = 0 if request.logits is None else request.logits.shape[-1]
        control[words.CONTROL_WAIT_BOUND.value] = self.wait_bound()
        control[words.CONTROL_NUM_EOS.value] = len(request.eos_token_ids)
        control[words.CONTROL_STEP_COUNT.value] = self.program.counters.step_count()
        if self.shared_memory is not None:
            control[words.CONTROL_SHARED_BASE.value] = self.shared_memory.base
            control[words.CONTROL_RING_SLOTS.value] = self.shared_memory.ring_slots
        if self.program.constants.profile:
            control[words.CONTROL_RECORDED_STEPS.value] = RECORDED_STEPS
            control[words.CONTROL_STEP_RECORDS.value] = self.step_records
        for i, token in enumerate(request.eos_token_ids, words.CONTROL_EOS.value):
            control[i] = token
        for i, word in enumerate(request.sampling.words(), words.CONTROL_CHOICE.value):
            control[i] = word
        if request.sampling.penalises:
            seen = self.program.tensors["seen"].data
            known = self.program.tensors["tokens"].data.view(-1)[: request.num_known]
            seen.zero_()
            seen[known] = 1  # those that the kernel chooses follow
        self.control[:CONTROL_WORDS].copy_(control)
        self.control[words.CONTROL_FIRST_STEP.value] = self.program.tensors["step"].data.view(())
        self.mailbox.zero_()
        self.num_launches += 1
        self.start(request)
        try:
            yield
        finally:
            self.mailbox[MAILBOX_STOP] = 1
            while not self.finished():
                time.sleep(self.POLL_S)
            self._check_outcome()

    def _meet(self, request: LaunchRequest) -> None:
        """All ranks are about to make the same launch, with counters that fit together."""
        step = int(self.program.tensors["step"].data)
        tokens = self.program.tensors["tokens"].data.view(-1)[: request.num_known].tolist()
        self.settle()
        facts = {
            "the range of steps": (step, request.num_known, request.last_step),
            "eos_token_ids": request.eos_token_ids,
            "sampling": request.sampling,
            "logits_from": (request.logits_from, request.logits is not None),
            "the prompt": zlib.crc32(repr(tokens).encode()),
        }
        self.ranks.agree("a launch", facts)
        epochs = self.ranks.meet("a launch", None if self.out_of_step else self.next_epoch)
        if None in epochs or len(set(epochs)) > 1:
            self.set_epoch(1)
            self.settle()
            self.ranks.meet("a fresh start")  # nobody signals before all have reset their counters
        self.out_of_step = False

    def _check_outcome(self) -> None:
        control = self.control[:CONTROL_WORDS].cpu()
        self.last_steps = range(0)
        outcome = f"launch {self.num_launches}"
        if self.ranks is not None and not control[words.CONTROL_ABORT.value]:
            self.ranks.say(outcome, self.failure)
        if control[words.CONTROL_ABORT.value]:
            counters = self.events.cpu()[: len(self.program.events.events) * EVENT_STRIDE : EVENT_STRIDE].tolist()
            if self.ranks is None:
                self.set_epoch(1)
                raise timeout_error(self.program, control.tolist(), counters, self.damaged_tasks(), self.absent)
            self.out_of_step = True  # other ranks may still signal; all reset their counters before the next launch
            self.ranks.say(outcome, stuck_text(self.program, control.tolist(), counters))
            silent, said = self.ranks.hear(outcome, self.LEAVE_BOUND_S + self.wait_bound_s)
            said.pop(self.ranks.rank, None)
            damaged = self.damaged_tasks()
            raise timeout_error(self.program, control.tolist(), counters, damaged, self.absent, silent, said)
        first_epoch, self.next_epoch = self.next_epoch, wrap_int32(int(control[words.CONTROL_LAST_EPOCH.value]) + 1)
        first_step = int(control[words.CONTROL_FIRST_STEP.value])
        self.last_steps = range(first_step, first_step + wrap_int32(self.next_epoch - first_epoch))

    def near_empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """For what all workers read and write all the time."""
        return self.empty(dims, dtype)

    # what the two kinds of device do differently
    def empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def make_heap(self, num_bytes: int) -> torch.Tensor: ...
    def settle(self) -> None: ...  # until what was written to the device is there
    def free(self, tensor: torch.Tensor) -> None: ...
    def host_empty(self, num_words: int) -> torch.Tensor: ...
    def wait_bound(self) -> int: ...
    def start(self, request: LaunchRequest) -> None: ...
    def finished(self) -> bool: ...
    def damaged_tasks(self) -> set[int]: ...


class CudaRuntime(Runtime):
    """One cooperative launch, one program per SM, on the current stream."""

    def __init__(
        self,
        program: Program,
        vocab_size: int,
        mailbox_words: int,
        wait_bound_s: float,
        ranks: Ranks | None = None,
        *,
        cuda_device: torch.device,
    ):
        super().__init__(program, vocab_size, mailbox_words, wait_bound_s, ranks)
        self.device = cuda_device
        self.arena = torch.zeros(ARENA_BYTES, dtype=torch.uint8, device=cuda_device)
        self.arena_used = 0
        self._allocate_state()
        for tensor in program.tensors.values():
            if tensor.data is None:
                tensor.data = self.near_empty(tensor.dims, tensor.dtype)
        if program.maps:
            fill_tensor_maps(program)
        self.default_logits = self.empty((self.vocab_size,), torch.float32)
        packed = program.pack()
        self.queue = torch.from_numpy(self._relocate(packed)).to(cuda_device)
        self.queue_start = torch.from_numpy(packed.queue_start).to(cuda_device)
        self.kernel = import_source(self.source_path).megakernel
        self.began, self.done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.compiled, self.shared_memory = self._compile()

    def empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dims, dtype=dtype, device=self.device)

    def near_empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """On one page of memory, as far as it reaches."""
        begin, num_bytes = self.arena_used, torch.Size(dims).numel() * dtype.itemsize
        if begin + num_bytes > ARENA_BYTES:
            return self.empty(dims, dtype)
        self.arena_used += -(-num_bytes // 256) * 256
        return self.arena[begin : begin + num_bytes].view(dtype).view(dims)

    def make_heap(self, num_bytes: int) -> torch.Tensor:
        heap, self.heap_addresses = symmetric_heap(num_bytes, self.device, self.ranks)
        return heap

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def host_empty(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int64, pin_memory=True)

    def wait_bound(self) -> int:
        return int(self.wait_bound_s * 1e9)

    def _relocate(self, packed: PackedQueues) -> np.ndarray:
        addresses = {name: tensor.data.data_ptr() for name, tensor in self.program.tensors.items()}
        if self.ranks is not None:
            addresses |= {heap_name(rank): address for rank, address in enumerate(self.heap_addresses)}
        return packed.relocate({name: addresses[name] for name in packed.tensor_names})

    def damaged_tasks(self) -> set[int]:
        return differing_tasks(self.program, self.queue.cpu().numpy(), self._relocate(self.program.pack()))

    def _arguments(self, logits: torch.Tensor | None) -> tuple:
        logits = self.default_logits if logits is None else logits
        step = self.program.tensors["step"].data
        return self.queue, self.queue_start, self.events, self.control, step, logits, self.mailbox, 0

    def _compile(self) -> tuple[CompiledKernel, SharedMemoryPlan]:
        with torch.cuda.device(self.device):
            compiled = self.kernel.warmup(
                *self._arguments(None),
                grid=(self.program.num_workers,),
                **COMPILE_OPTIONS,
            )
        limit = shared_memory_limit(self.device)
        # Triton asks the driver for what its metadata say; the weight rings come on top. It keeps the kernel it made,
        # so a second model of the same shapes finds the sum there.
        if not hasattr(compiled, "compiler_bytes"):
            compiled.compiler_bytes = compiled.metadata.shared
        plan = SharedMemoryPlan.divide(self.program, compiled.compiler_bytes, limit)
        compiled.metadata = compiled.metadata._replace(shared=plan.num_bytes)
        compiled.packed_metadata = make_backend(compiled.metadata.target).pack_metadata(compiled.metadata)
        return compiled, plan

    def start(self, request: LaunchRequest) -> None:
        num_workers = self.program.num_workers
        with torch.cuda.device(self.device):
            self.began.record()
            try:
                self.kernel[(num_workers,)](*self._arguments(request.logits), **COMPILE_OPTIONS)
            except RuntimeError as error:
                raise DeviceError(
                    f"{self.device} cannot run {num_workers} workers at once (an MPS share, a MIG slice or another"
                    f" program may hold some SMs): {error}. Choose fewer with num_workers=..."
                ) from error
            self.done.record()

    def finished(self) -> bool:
        return self.done.query()

    @property
    def last_launch_ms(self) -> float:
        """GPU time of the last launch."""
        return self.began.elapsed_time(self.done)


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    return device_properties(device)["max_shared_mem"]


class InterpreterRuntime(Runtime):
    """Triton's interpreter, one process per worker, over shared memory; waits are bounded by polls."""

    POLL_S = 2e-3  # the host needs the cores that workers run on
    POLLS_PER_SECOND = 5_000  # an interpreted poll takes 0.2 to 1 ms: the bound errs on the long side
    RANK_POLLS_PER_SECOND = 1_000  # on several ranks, whose workers yield between polls
    worker_script = Path(__file__).with_name("_interpreter_worker.py")
    LEAVE_BOUND_S = 10.0  # likewise workers: this and the wait bound without a signal, and they never leave

    def __init__(
        self,
        program: Program,
        vocab_size: int,
        mailbox_words: int,
        wait_bound_s: float,
        ranks: Ranks | None = None,
    ):
        super().__init__(program, vocab_size, mailbox_words, wait_bound_s, ranks)
        self.device = torch.device("cpu")
        self.memory = SharedMemory()
        for tensor in program.tensors.values():
            if tensor.symmetric:
                continue
            if tensor.data is None:
                tensor.data = self.empty(tensor.dims, tensor.dtype)
            self.memory.move(tensor.data)
        self._allocate_state()
        self.default_logits = self.empty((self.vocab_size,), torch.float32)
        self._start_workers()

    def empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.memory.empty(dims, dtype)

    def make_heap(self, num_bytes: int) -> torch.Tensor:
        heap = self.memory.empty((num_bytes,), torch.uint8)
        self.heaps = self.ranks.meet("the exchange of heaps", self.memory.locate(heap))
        return heap

    def _locate(self, name: str) -> tuple[str, int, int]:
        """File, its size, and the first byte of a tensor or of another rank's heap."""
        for rank in range(self.program.num_ranks):
            if name == heap_name(rank):
                return (*self.heaps[rank], 0)
        tensor = self.program.tensors[name]
        if tensor.symmetric:
            return (*self.heaps[self.ranks.rank], self.heap_offsets[name])
        return (*self.memory.locate(tensor.data), 0)

    def free(self, tensor: torch.Tensor) -> None:
        self.memory.free(tensor)

    def host_empty(self, num_words: int) -> torch.Tensor:
        return self.memory.empty((num_words,), torch.int64)

    def wait_bound(self) -> int:
        per_second = self.POLLS_PER_SECOND if self.ranks is None else self.RANK_POLLS_PER_SECOND
        return int(self.wait_bound_s * per_second)

    def _start_workers(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the workers
        self.workers = [
            subprocess.Popen(
                [sys.executable, str(self.worker_script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the host, which then asks the kernel to stop
            )
            for _ in range(self.program.num_workers)
        ]
        self._finalizer = weakref.finalize(self, _stop_workers, self.workers)
        self.selector = selectors.DefaultSelector()
        for worker, process in enumerate(self.workers):
            self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        packed = self.program.pack()
        tensors = self.program.tensors
        arguments = (self.events, self.control, tensors["step"].data, self.mailbox)
        message = {
            "what": "load",
            "ranks": self.program.num_ranks,
            "source": str(self.source_path),
            "tensors": [self._locate(name) for name in packed.tensor_names],
            "words": torch.from_numpy(packed.words),
            "positions": torch.from_numpy(packed.positions),
            "indices": torch.from_numpy(packed.tensors).long(),
            "signs": torch.from_numpy(packed.signs),
            "queue_start": torch.from_numpy(packed.queue_start),
            "arguments": [(*self.memory.locate(t), t.dtype) for t in arguments],
        }
        for worker, process in enumerate(self.workers):
            self._send(process, message | {"worker": worker})
        self.busy = set(range(len(self.workers)))
        while not self.finished(timeout=1.0):
            pass
        if self.ranks is not None and self.num_launches == 0:
            self.ranks.meet("the start of workers")  # until then heaps must be there to be opened

    def _send(self, process: subprocess.Popen, message: dict) -> None:
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
        except BrokenPipeError:
            self._fail("a worker process is gone")

    def start(self, request: LaunchRequest) -> None:
        if not self.workers:
            self._start_workers()
        logits = self.default_logits if request.logits is None else request.logits
        self.absent = set()
        self.progress = (0, time.monotonic())
        for process in self.workers:
            self._send(process, {"what": "run", "logits": self.memory.locate(logits)})
        self.busy = set(range(len(self.workers)))

    def finished(self, timeout: float = 0.0) -> bool:
        if self.busy:
            for key, _ in self.selector.select(timeout):
                try:
                    answer = pickle.load(key.fileobj)
                except EOFError:
                    answer = "the process ended"
                if answer is not None:
                    self._fail(f"worker {key.data}: {answer}")
                self.busy.discard(key.data)
        if self.busy and self.control[words.CONTROL_ABORT.value]:
            self._watch_leaving()
        return not self.busy

    def _watch_leaving(self) -> None:
        """After an abort, workers signal until they have left: without a signal for long, those still here are lost."""
        signals, since = self.progress
        if (now_given := int(self.events.sum())) != signals:
            self.progress = now_given, time.monotonic()
        elif time.monotonic() - since > self.LEAVE_BOUND_S + self.wait_bound_s:
            self.absent, self.busy, self.workers = self.busy, set(), []
            self._finalizer()

    def damaged_tasks(self) -> set[int]:
        """Every worker has a copy of the queues and follows its own part of it."""
        expected = self.program.pack()
        found = expected.words.copy()
        for worker, process in enumerate(self.workers):
            self._send(process, {"what": "queue"})
            lo, hi = expected.queue_start[worker : worker + 2]
            queue = pickle.load(process.stdout)
            found[lo:hi] = queue[lo:hi]
            found[expected.queue_start[-1] :] = queue[expected.queue_start[-1] :]  # those of pools
        return differing_tasks(self.program, found, expected.words)

    def _fail(self, reason: str) -> None:
        """One worker is lost, so no wait can be relied on: end all, start new ones, and say what happened."""
        self.busy = set()
        self._finalizer()
        self.stderr.seek(0)
        output = self.stderr.read().decode(errors="replace")[-2000:]
        if self.ranks is None:
            self.set_epoch(1)
        self.out_of_step, self.failure = True, "lost a worker process"
        self.control.zero_()  # else the end of this launch takes its last epoch from there
        self.workers = []
        raise WorkerDiedError(f"{reason}\n{output}".rstrip())


def _stop_workers(workers: list[subprocess.Popen]) -> None:
    for process in workers:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # what it had not read yet
            process.stdin.close()
        process.stdout.close()
