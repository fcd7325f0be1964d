"""Serving: one launch that takes requests while it runs. `model.serve()` returns an Engine, `submit` a Stream.

    with model.serve() as engine:
        stream = engine.submit([1, 2, 3], max_new_tokens=20)
        for token in stream:      # or: async for token in stream
            ...

During a launch one thread of the host moves requests and results through the rings; it touches no device.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from tri_mpk.batch_kernel import BatchKernel
from tri_mpk.batch_state import BatchState
from tri_mpk.errors import EngineClosedError, EngineFullError, RankError
from tri_mpk.generation import GenerationRequest, resolve
from tri_mpk.ops import advance
from tri_mpk.rings import HostRings

MAX_WAITING = 4096  # requests that wait on the host, by default
IDLE_S = 100e-6  # between two looks at the rings


class Stream:
    """Tokens of one request as the kernel chooses them: an iterator, and an asynchronous one.

    Whoever reads slowly, or never, holds up nobody: tokens wait here, at most as many as were asked for.

    Attributes: request, tokens (all so far), logprobs (with output_logprobs=True), finish_reason: None as long as the
    request runs, then "stop" (an EOS or stop id), "length", "cancelled" or "error".
    """

    def __init__(self, engine: Engine, request: GenerationRequest):
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if request.sampling.logprobs else None
        self.finish_reason: str | None = None
        self._engine = engine
        self._ticket: int | None = None  # None: the kernel has not got it
        self._error: BaseException | None = None
        self._num_read = 0
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._num_read < len(self.tokens) or self.finish_reason)
            return self._next(StopIteration)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> int:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._num_read < len(self.tokens) or self.finish_reason:
                    return self._next(StopAsyncIteration)
                changed = loop.create_future()
                self._waiters.append((loop, changed))
            await changed

    def _next(self, end: type[Exception]) -> int:
        if self._num_read < len(self.tokens):
            self._num_read += 1
            return self.tokens[self._num_read - 1]
        if self._error is not None:
            raise self._error
        raise end

    def result(self, timeout: float | None = None) -> list[int]:
        """All new tokens, when the request has ended; raises TimeoutError, or what ended the kernel."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.finish_reason, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s; it goes on")
            if self._error is not None:
                raise self._error
            return list(self.tokens)

    def cancel(self) -> None:
        """Ends the request as soon as the kernel looks; what was chosen until then still comes. May be called twice."""
        self._engine._cancel(self)

    def _put(self, token: int | None, logprob: float, reason: str | None, error: BaseException | None = None) -> None:
        with self._changed:
            if token is not None:
                self.tokens.append(token)
                if self.logprobs is not None:
                    self.logprobs.append(logprob)
            if reason is not None:
                self.finish_reason, self._error = reason, error
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, changed in waiters:
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_wake, changed)


def _wake(changed: asyncio.Future) -> None:
    if not changed.done():
        changed.set_result(None)


def check_pages(request: GenerationRequest, state: BatchState) -> None:
    """ValueError for a request that would not fit if it were alone."""
    pages = -(-request.max_length // state.page_size)
    if pages > state.num_pages:
        raise ValueError(
            f"{len(request.prompt)} prompt tokens and {request.max_length - len(request.prompt)} new ones need {pages}"
            f" pages of {state.page_size} tokens, but there are {state.num_pages}; ask for fewer or load the model with"
            " more num_pages"
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a launch did: steps, those of them with tokens, their tokens, sequences that had to give their pages back,
    and pages that sequences began with because others begin with the same tokens."""

    steps: int
    busy_steps: int
    tokens: int
    preemptions: int
    shared_pages: int


class Engine:
    """A running kernel and the requests in it. Made by `model.serve`; all methods may be called from any thread.

    On several ranks all make an engine, submit the same requests in the same order, and close it. A cancel, or a
    `close(cancel=True)`, on one of them is enough.

    max_waiting: so many requests may wait on the host, beside those that the kernel knows; `submit` then waits.
    generator: where `submit` gets seeds from that are not given; None: torch's default one. It must draw the same on
        all ranks.
    """

    def __init__(
        self,
        kernel: BatchKernel,
        generation_config: GenerationConfig,
        vocab_size: int,
        max_waiting: int = MAX_WAITING,
        at_end: Callable[[], None] = lambda: None,
        generator: torch.Generator | None = None,
    ):
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting} must be at least 1")
        self.kernel = kernel
        self.generation_config, self.vocab_size, self.max_waiting = generation_config, vocab_size, max_waiting
        self.state, self.generator = kernel.state, generator
        self.statistics: Statistics | None = None  # of the launch, when it has ended
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}  # by ticket
        self._cancelled: list[Stream] = []
        self._has_started = threading.Event()
        self._is_closed = self._is_cancelled = False
        self._error: BaseException | None = None
        self._error_was_seen = False
        self._at_end = at_end
        kernel.compile()
        kernel.runtime.settle()
        self._thread = threading.Thread(target=self._serve, name="tri_mpk engine", daemon=True)
        self._thread.start()
        self._has_started.wait()  # ranks have met for the launch, and may meet for other things
        self._exit = _close_at_exit(weakref.ref(self))

    # ---- for users ----

    def submit(
        self,
        input_ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        timeout: float | None = None,
        **parameters: object,
    ) -> Stream:
        """Hands a prompt over: integers [length] or [1, length]. Parameters as in `model.generate`.

        Raises: ValueError or NotImplementedError for bad parameters, and for a request that the pages could never hold;
        EngineClosedError; EngineFullError if max_waiting requests still wait after `timeout` seconds (None: wait).
        """
        ids = torch.as_tensor(input_ids)
        ids = ids if ids.numel() else ids.long()  # an empty list has no type
        if parameters.get("output_logprobs"):
            parameters["return_dict_in_generate"] = True
        request = resolve(
            ids[None] if ids.dim() == 1 else ids,
            self.generation_config,
            self.kernel.max_seq_len,
            self.vocab_size,
            attention_mask=None,
            generation_config=generation_config,
            parameters=parameters,
            generator=self.generator,
        )
        return self.enqueue(request, timeout)

    def enqueue(self, request: GenerationRequest, timeout: float | None = None) -> Stream:
        """`submit` of parameters that are resolved already."""
        check_pages(request, self.state)
        stream = Stream(self, request)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < self.max_waiting, timeout)
            if self._is_closed:
                self._error_was_seen = True
                raise EngineClosedError(
                    "the engine is closed; make a new one with model.serve()"
                    if self._error is None
                    else f"the kernel has ended with {type(self._error).__name__}; make a new engine with model.serve()"
                ) from self._error
            if len(self._waiting) >= self.max_waiting:
                raise EngineFullError(
                    f"{self.max_waiting} requests wait already; try again later, or raise max_waiting"
                )
            self._waiting.append(stream)
        return stream

    def finish(self) -> None:
        """No more requests. Those that are there go on; the kernel ends with the last of them."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self, cancel: bool = False) -> None:
        """No more requests. Waits until all that are there have ended; with `cancel` they end now, as "cancelled".

        May be called twice, and with `cancel` while another thread waits here. Raises the error that has ended the
        kernel, if no stream and no `submit` has done so.
        """
        self._is_cancelled |= cancel
        self.finish()
        self._thread.join()
        atexit.unregister(self._exit)
        if self._error is not None and not self._error_was_seen:
            self._error_was_seen = True
            raise self._error

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    # ---- the thread ----

    def _serve(self) -> None:
        error = rings = None
        try:
            with self.kernel.serve():
                self._has_started.set()
                rings = HostRings(self.kernel.runtime.mailbox.numpy(), self.state.rings)
                while not self.kernel.runtime.finished():
                    if not self._move(rings):
                        time.sleep(IDLE_S)
            self.statistics = self._read_statistics()
            self._check_mismatch()
        except BaseException as failure:
            error = failure
        self._has_started.set()
        if rings is not None:
            self._deliver(rings)
        self._end(error)

    def _move(self, rings: HostRings) -> bool:
        """Whether anything was there to be moved."""
        moved = self._deliver(rings)
        with self._changed:
            while self._waiting and (ticket := rings.put(self._waiting[0].request)) is not None:
                stream = self._waiting.popleft()
                stream._ticket, self._running[ticket] = ticket, stream
                moved = True
                self._changed.notify_all()
            for stream in self._cancelled:
                if stream.finish_reason is None:
                    rings.cancel(stream._ticket)
            self._cancelled.clear()
            if self._is_cancelled:
                rings.stop(when_done=False)
            elif self._is_closed and not self._waiting:
                rings.stop(when_done=True)
        return moved

    def _deliver(self, rings: HostRings) -> bool:
        results = rings.take()
        for result in results:
            stream = self._running[result.ticket]
            if result.reason is not None:
                del self._running[result.ticket]
            stream._put(result.token, result.logprob, result.reason)
        return bool(results)

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            if stream.finish_reason is not None:
                return
            if stream._ticket is not None:
                self._cancelled.append(stream)
                return
            if stream in self._waiting:
                self._waiting.remove(stream)
                self._changed.notify_all()
        stream._put(None, 0.0, "cancelled")

    def _end(self, error: BaseException | None) -> None:
        """The launch is over: whoever has not got all of its tokens gets the error, or is cancelled."""
        with self._changed:
            self._is_closed, self._error = True, error
            left = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._error_was_seen = bool(left)
            self._changed.notify_all()
        for stream in left:
            stream._put(None, 0.0, "cancelled" if error is None else "error", error)
        self._at_end()

    def _check_mismatch(self) -> None:
        """Raises RankError if the launch has ended because ranks were given different requests."""
        if mismatch := int(self.state.counters.data[advance.MISMATCH.value]):
            raise RankError(
                [],
                f"submitted other requests: number {mismatch - 1}, from 0, is not the same on all ranks, or not there;"
                " every rank must run the same script, with the same seeds",
            )

    def _read_statistics(self) -> Statistics:
        counters = self.state.counters.data.tolist()
        names = (
            advance.NUM_STEPS, advance.NUM_BUSY_STEPS, advance.NUM_TOKENS, advance.NUM_PREEMPTIONS, advance.NUM_SHARED
        )  # fmt: skip
        return Statistics(*(counters[name.value] for name in names))


def _close_at_exit(engine: weakref.ref[Engine]) -> Callable[[], None]:
    """A kernel that nobody closes would keep the process alive, or be killed in the middle of a step."""

    def close() -> None:
        if (still := engine()) is not None:
            still.close(cancel=True)

    atexit.register(close)
    return close
