"""The rings of panels, by their PTX: whatever tasks come one after the other, what is multiplied is what is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_emulator import Emulator, statements_of
from tri_mpk.ops.panels import FEW_ROWS, MANY_ROWS, PANEL_TOKENS, TENSOR_MAP_BYTES, X_AT, X_BYTES

STATE, RINGS = 1 << 20, 0  # addresses: descriptors have 14 bits of 16 bytes
START, BEGIN = statements_of("start_panels"), statements_of("begin_panels")


@dataclass(frozen=True)
class Product:
    """A task: rows of K numbers of one matrix or of two, in blocks."""

    k: int
    num_rows: int
    block_rows: int
    row: int = 0
    two: bool = False
    name: int = 1

    @property
    def weights(self) -> int:  # a map's address
        return self.name << 16

    @property
    def second(self) -> int:
        return self.weights + 128 if self.two else 0

    @property
    def x_map(self) -> int:
        return self.weights + 256

    @property
    def panels(self) -> int:
        return 2 if self.two or self.block_rows > 32 or self.k < 1792 else 4

    @property
    def request_bytes(self) -> int:
        return 128 * (32 if self.two else -(-self.block_rows // 8) * 8)

    @property
    def stream(self) -> tuple[int, ...]:
        return self.weights, self.second, self.row, self.panels, self.request_bytes


class Worker(Emulator):
    """Runs products as `multiply_panels` does, and looks at what `wgmma` finds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.sizes: dict[int, int] = {}  # of requests, by map
        self.run(START, [STATE])

    def request_bytes(self, tensor_map: int) -> int:
        return self.sizes[tensor_map]

    def multiply(self, tid: int, weights: int, x: int) -> None:
        done = self.done[tid] = self.done.get(tid, -1) + 1
        panel, quarter = divmod(done, 4)
        column = 64 * panel
        rows, size = (MANY_ROWS.value, 4096) if self.num_tokens > 16 else (FEW_ROWS.value, 1024)
        x_map = self.product.x_map + (TENSOR_MAP_BYTES.value if rows == MANY_ROWS.value else 0)
        weights, x = weights - 32 * quarter, x - 32 * quarter
        assert X_AT.value <= x and x + (self.num_tokens - 1) // rows * size < X_AT.value + X_BYTES.value
        assert self.requests.get(weights) == (self.product.weights, column, self.block_row), "other weights"
        if self.product.two:
            assert self.requests.get(weights + 4096) == (self.product.second, column, self.block_row)
        for i in range((self.num_tokens - 1) // rows + 1):
            assert self.requests.get(x + i * size) == (x_map, column, self.first_token + i * rows), "other activations"

    def step(self, products: list[Product], num_tokens: int) -> None:
        """One after the other, each of which goes on with the ring but the last."""
        for product in products:
            self.sizes |= {product.weights: product.request_bytes, product.second: product.request_bytes}
            self.sizes |= {product.x_map: 1024, product.x_map + TENSOR_MAP_BYTES.value: 4096}
        for product, later in zip(products, [*products[1:], None], strict=True):
            self.run(BEGIN, [STATE, RINGS, *product.stream])
            for first_token in range(0, num_tokens, PANEL_TOKENS.value):
                self.multiply_tokens(product, later, first_token, num_tokens - first_token)
        assert not self.words[STATE + 400], "the ring is empty"

    def multiply_tokens(self, product: Product, later: Product | None, first_token: int, tokens_left: int) -> None:
        num_steps = (product.k + 127) // 128
        block = statements_of("multiply_block", STEPS=num_steps, TYPE="f16")
        num_blocks = -(-product.num_rows // product.block_rows)
        for i in range(num_blocks):
            row, is_last = product.row + i * product.block_rows, i + 1 == num_blocks
            following = (*product.stream[:2], product.row if is_last else row + product.block_rows, *product.stream[3:])
            if is_last and tokens_left <= PANEL_TOKENS.value:
                following = later.stream if later else (0, 0, 0, 0, 0)
            self.product, self.block_row, self.first_token, self.done = product, row, first_token, {}
            self.num_tokens = min(tokens_left, PANEL_TOKENS.value)
            inputs = [
                STATE, RINGS, *product.stream[:2], row, *product.stream[3:], *following, product.x_map, first_token,
                self.num_tokens, int(i == 0), int(not is_last),
            ]  # fmt: skip
            self.run(block, inputs)
            assert self.done == dict.fromkeys((0, 32, 64, 96), 8 * num_steps - 1)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 32, 33, 64, 65, 130])
def test_products_that_follow_one_another(num_tokens):
    qkv = Product(2048, 40, 40, row=80, name=1)
    gated = Product(1024, 50, 25, two=True, name=2)
    down = Product(1800, 16, 16, row=16, name=3)
    worker = Worker(seed=num_tokens)
    worker.step([qkv, gated, down, gated], num_tokens)
    worker.step([down, qkv], num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 16, 20, 64])
@pytest.mark.parametrize("k", [896, 1024, 1536, 2048])
def test_many_blocks_of_short_rows(k, num_tokens):
    """No ring is more than a block ahead, however many places it has."""
    worker = Worker()
    worker.step([Product(k, 90, 30, two=True), Product(k, 150, 50, name=2), Product(k, 20, 20, name=3)], num_tokens)


@st.composite
def products(draw: st.DrawFn, name: int) -> Product:
    """As `panel_streams` has them."""
    two = draw(st.booleans())
    limit = 32 if two else draw(st.sampled_from([32, 64]))
    num_rows = draw(st.integers(1, 32) if limit == 32 and not two else st.integers(33, 140))
    num_blocks = -(-num_rows // limit)
    block_rows = -(-num_rows // num_blocks)
    return Product(draw(st.integers(896 // 8, 280)) * 8, num_rows, block_rows, draw(st.integers(0, 99)), two, name)


@settings(deadline=None, max_examples=10)
@given(st.tuples(*map(products, range(1, 4))), st.lists(st.integers(1, 140), min_size=1, max_size=2), st.integers(0))
def test_any_products(tasks, steps, seed):
    worker = Worker(seed)
    for num_tokens in steps:
        worker.step(list(tasks), num_tokens)


def test_steps_of_different_numbers_of_tokens():
    worker = Worker()
    for num_tokens in (64, 3, 20, 100, 1):
        worker.step([Product(2048, 100, 50), Product(2048, 24, 24, name=2)], num_tokens)
