"""How many requests a kernel holds at a time, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass

from tri_mpk.batch_kernel import MAX_TOKENS_PER_STEP

PAGE_SIZE = 128


@dataclass(frozen=True, slots=True)
class Batching:
    """`Batching()` is one sequence at a time, in the kernel made for that; more are a kernel of many sequences.

    max_tokens_per_step: of all sequences together: one for each that decodes, the rest for prompts, in chunks.
    num_pages: of the KV cache, `page_size` tokens each; None: enough for max_batch_size sequences of max_seq_len. With
        fewer, requests wait for pages, or give them back and are computed again.
    """

    max_batch_size: int = 1
    max_tokens_per_step: int = 256
    num_pages: int | None = None
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_tokens_per_step", "num_pages", "page_size"):
            value = getattr(self, name)
            if value is None and name == "num_pages":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.max_tokens_per_step > MAX_TOKENS_PER_STEP:
            raise ValueError(f"max_tokens_per_step={self.max_tokens_per_step} must be at most {MAX_TOKENS_PER_STEP}")
        if self.is_one:
            if self.num_pages is not None or self.page_size != PAGE_SIZE:
                raise ValueError("num_pages and page_size are for max_batch_size > 1; leave them out")
        elif self.max_tokens_per_step < self.max_batch_size:
            raise ValueError(
                f"max_tokens_per_step={self.max_tokens_per_step} must be at least max_batch_size={self.max_batch_size}:"
                " every sequence that decodes has a token in a step"
            )

    @property
    def is_one(self) -> bool:
        return self.max_batch_size == 1

    def pages(self, max_seq_len: int) -> int:
        """Of the KV cache."""
        return self.num_pages or self.max_batch_size * -(-max_seq_len // self.page_size)
