"""How a launch chooses its tokens, as transformers names it. The kernel reads all of it as data."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tri_mpk.ops.sample import CHOOSE_AT_RANDOM, CHOOSE_BEST, CHOOSE_BEST_SCORE

SMALLEST, LARGEST = 1e-37, 1e37  # that fp32 holds in full precision


@dataclass(frozen=True, slots=True)
class Sampling:
    """`Sampling()` is greedy decoding; without `do_sample` only the penalty and log-probabilities count.

    Raises ValueError for what no distribution comes of.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: bool = False  # the tensor `logprobs` gets them, by position

    def __post_init__(self) -> None:
        greedy = "a positive number; for greedy decoding pass do_sample=False"
        _check("temperature", self.temperature, SMALLEST, LARGEST, greedy)
        _check("repetition_penalty", self.repetition_penalty, SMALLEST, LARGEST, "a positive number (1.0: off)")
        _check("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1 (1.0: off)")
        _check("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1 (0.0: off)")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r} must be an integer, 1 or more (0: all)")
        if not _is_integer(self.seed) or not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to 2**64 - 1")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0

    def words(self) -> list[int]:
        """The words CHOICE_ of ops/sample.py, from CHOICE on."""
        best = CHOOSE_BEST_SCORE if self.penalises or self.logprobs else CHOOSE_BEST
        choice = CHOOSE_AT_RANDOM if self.do_sample else best
        return [
            choice.value,
            self.seed - (self.seed >> 63 << 64),  # as int64
            _fp32_bits(self.temperature if self.do_sample else 1.0),
            min(self.top_k, (1 << 31) - 1),
            _fp32_bits(self.top_p),
            _fp32_bits(self.min_p),
            _fp32_bits(self.repetition_penalty),
        ]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, low: float, high: float, allowed: str) -> None:
    if not (_is_integer(value) or isinstance(value, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be {allowed}")


def _fp32_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]
