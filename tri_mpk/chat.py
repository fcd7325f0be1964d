"""A conversation on a terminal. Each answer is one kernel launch, which reads the whole conversation again."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from tri_mpk.errors import MegakernelTimeout
from tri_mpk.model import CausalLM
from tri_mpk.terminal import new_token_limit, note, report

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help shows this."


class RecordingStreamer(TextStreamer):
    """Prints tokens and keeps them: what there is when an answer is stopped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        super().put(value)
        if value.dim() == 1:  # the prompt comes as [1, length], each new token as [1]
            self.tokens += value.tolist()


def converse(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    max_new_tokens: int | None,
    parameters: dict[str, object],
) -> None:
    """Reads lines and streams answers until /exit or the end of input."""
    start = [{"role": "system", "content": system}] if system else []
    note(HELP)
    history = list(start)
    while (line := read_line()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            history = list(start)
        elif line.startswith("/"):
            note(HELP)
        elif line:
            history.append({"role": "user", "content": line})
            try:
                text = answer(lm, tokenizer, history, max_new_tokens, parameters)
                history.append({"role": "assistant", "content": text})
            except (ValueError, MegakernelTimeout) as error:
                report(error)
                history.pop()
                note("the last message is forgotten; /reset starts afresh")


def read_line() -> str | None:
    """A line of the user, None at the end of input; Ctrl-C empties it."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then has a history and can be edited
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves")
        except EOFError:
            return None


def answer(
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    history: list[dict[str, str]],
    max_new_tokens: int | None,
    parameters: dict[str, object],
) -> str:
    """Streams the next message; Ctrl-C ends it early and keeps what there is."""
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    input_ids = prompt["input_ids"].long()
    streamer = RecordingStreamer(tokenizer)
    limit = new_token_limit(max_new_tokens, lm, input_ids.shape[1])
    try:
        lm.generate(input_ids, max_new_tokens=limit, streamer=streamer, **parameters)
    except KeyboardInterrupt:
        streamer.end()  # it holds back the last word until that is complete
    return tokenizer.decode(streamer.tokens, skip_special_tokens=True)
