"""The host's side of the rings in ops/rings.py: requests go in, results come out. One thread uses it, and no device."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from tri_mpk.generation import GenerationRequest
from tri_mpk.ops import rings as words
from tri_mpk.ops.advance import RingSizes

HOST_STOP, HOST_REQUESTS = words.HOST_STOP.value, words.HOST_REQUESTS.value
HOST_RESULTS = words.HOST_RESULTS.value
KERNEL_REQUESTS, KERNEL_RESULTS = words.KERNEL_REQUESTS.value, words.KERNEL_RESULTS.value
STOP_NOW, STOP_WHEN_DONE = words.STOP_NOW.value, words.STOP_WHEN_DONE.value
REASONS = {
    words.END_OF_TEXT.value: "stop",
    words.END_OF_LENGTH.value: "length",
    words.END_BY_CANCEL.value: "cancelled",
}


@dataclass(frozen=True, slots=True)
class Result:
    ticket: int
    token: int | None
    logprob: float
    reason: str | None  # why it is the last one of its request; None: it is not


def fingerprint(record: np.ndarray, prompt: np.ndarray) -> int:
    """63 bits of prompt and parameters, above 0."""
    digest = hashlib.blake2b(record.tobytes() + prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


class HostRings:
    """The rings of one launch, in its mailbox, which must be zero."""

    def __init__(self, mailbox: np.ndarray, sizes: RingSizes):
        self.mailbox, self.sizes = mailbox, sizes
        self.tickets = mailbox[words.RINGS.value : sizes.records_at]
        self.records = mailbox[sizes.records_at : sizes.results_at].reshape(sizes.tickets, -1)
        self.results = mailbox[sizes.results_at : sizes.prompts_at].reshape(sizes.results, -1)
        self.prompts = mailbox[sizes.prompts_at : sizes.num_words]
        self.free_tickets = deque(range(sizes.tickets))
        self.num_requests = self.num_taken = 0
        self.prompts_end = 0  # tokens of prompts handed over so far
        self.prompt_begins: deque[int] = deque()  # of requests that the kernel has not taken in yet

    def put(self, request: GenerationRequest) -> int | None:
        """Hands a request over and returns its ticket; None if there is no room for it now."""
        length = len(request.prompt)
        num_queued = self.num_requests - int(self.mailbox[KERNEL_REQUESTS])
        while len(self.prompt_begins) > num_queued:
            self.prompt_begins.popleft()
        begin = self.prompt_begins[0] if self.prompt_begins else self.prompts_end
        if not self.free_tickets or self.prompts_end + length - begin > self.sizes.prompts:
            return None
        ticket = self.free_tickets.popleft()
        at = self.prompts_end & (self.sizes.prompts - 1)
        prompt = request.prompt.numpy()
        head = min(length, self.sizes.prompts - at)
        self.prompts[at : at + head] = prompt[:head]
        self.prompts[: length - head] = prompt[head:]
        record = np.zeros(words.RECORD.value, dtype=np.int64)
        record[words.RECORD_PROMPT_LENGTH.value] = length
        record[words.RECORD_MAX_LENGTH.value] = request.max_length
        record[words.RECORD_NUM_ENDS.value] = len(request.eos_token_ids)
        choice = request.sampling.words()
        record[words.RECORD_CHOICE.value : words.RECORD_CHOICE.value + len(choice)] = choice
        ends = words.RECORD_ENDS.value
        record[ends : ends + len(request.eos_token_ids)] = request.eos_token_ids
        record[words.RECORD_FINGERPRINT.value] = fingerprint(record, prompt)
        record[words.RECORD_PROMPT.value] = at  # which a fingerprint does not know
        self.records[ticket] = record
        self.tickets[self.num_requests & (self.sizes.tickets - 1)] = ticket
        self.prompt_begins.append(self.prompts_end)
        self.prompts_end += length
        self.num_requests += 1
        self.mailbox[HOST_REQUESTS] = self.num_requests
        return ticket

    def cancel(self, ticket: int) -> None:
        """The request that holds this ticket ends as soon as the kernel looks."""
        self.records[ticket, words.RECORD_CANCEL.value] = 1

    def take(self) -> list[Result]:
        """All results so far. The ticket of a request that has ended is free then."""
        num_written = int(self.mailbox[KERNEL_RESULTS])
        if num_written == self.num_taken:
            return []
        places = np.arange(self.num_taken, num_written) & (self.sizes.results - 1)
        first, second = self.results[places].T
        tickets = (first & 0xFFFFFFFF).tolist()
        has_token = (first & words.RESULT_TOKEN.value != 0).tolist()
        reasons = (first >> words.RESULT_REASON.value).tolist()
        tokens = (second & 0xFFFFFFFF).tolist()
        logprobs = (second >> 32).astype(np.int32).view(np.float32).tolist()
        results = [
            Result(ticket, token if has else None, logprob, REASONS[reason] if reason else None)
            for ticket, has, token, logprob, reason in zip(tickets, has_token, tokens, logprobs, reasons, strict=True)
        ]
        self.num_taken = num_written
        self.mailbox[HOST_RESULTS] = num_written
        self.free_tickets.extend(result.ticket for result in results if result.reason)
        return results

    def stop(self, when_done: bool) -> None:
        """Ends the launch: now, or when all requests handed over so far are done."""
        self.mailbox[HOST_STOP] = STOP_WHEN_DONE if when_done else STOP_NOW
