"""Panels: which weights come in them, in what requests, and that all of it fits the rings."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tri_mpk.ops import panels
from tri_mpk.ops.batch_gated_linear import cut_batch_gated_linear
from tri_mpk.ops.batch_gemm import ROWS
from tri_mpk.ops.batch_linear import cut_batch_linear
from tri_mpk.ops.batch_lm_head import cut_batch_lm_head
from tri_mpk.ops.op import TENSOR_MAP_WORDS, TENSOR_MAPS, Cut, Machine, TensorHandle, TensorMap, TensorMaps, even_ranges
from tri_mpk.ops.panels import (
    FEW_ROWS,
    MANY_ROWS,
    OTHER_BYTES,
    PANEL,
    PANEL_SLOT_BYTES,
    PANEL_SLOTS,
    PANEL_STATE_BYTES,
    PANEL_TOKENS,
    RINGS_BYTES,
    SUMS_AT,
    SUMS_PITCH,
    TENSOR_MAP_BYTES,
    X_AT,
    X_BYTES,
    X_SLOTS,
    panel_streams,
)
from tri_mpk.scheduler.device import SHARED_BYTES
from tri_mpk.scheduler.graph import Address, PanelStream

MAX_TOKENS = 128
HOPPER = 227 << 10  # of a block
REPEAT = 1024  # bytes after which the swizzle repeats: 8 rows of 128
LONG = 2048  # columns: enough for any panels


def hopper(num_workers: int = 8) -> Machine:
    return Machine(num_workers, block_n=16, slot_bytes=0, maps=TensorMaps())


def matrix(num_rows: int, k: int, name: str = "w", dtype: torch.dtype = torch.bfloat16) -> TensorHandle:
    return TensorHandle(name, (num_rows, k), dtype)


def activations(k: int, name: str = "x") -> TensorHandle:
    return matrix(MAX_TOKENS, k, name)


def streams_of(
    block: int, k: int = LONG, two: bool = False, machine: Machine | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[PanelStream | None], Address | None]:
    """Of two tasks of `block` rows."""
    weight, second = matrix(2 * block, k, dtype=dtype), matrix(2 * block, k, "second", dtype) if two else None
    return panel_streams(machine or hopper(), weight, [(0, block), (block, 2 * block)], activations(k), second)


def maps_of(machine: Machine) -> list[TensorMap]:
    return list(machine.maps.places)


# ---- which weights ----


@pytest.mark.parametrize(("block", "two", "panels"), [(32, False, 4), (33, False, 2), (64, False, 2), (32, True, 2)])
def test_rows_must_fill_the_ring(block, two, panels):
    """With two panels in a slot if four are too many."""
    least = 7 * 2 * 64
    assert streams_of(block, least - 8, two) == ([None, None], None)
    for k, expected in ((least, 2), (2 * least - 8, 2), (2 * least, panels)):
        streams, x_map = streams_of(block, k, two)
        assert [stream.panels for stream in streams] == [expected] * 2 and x_map is not None


@pytest.mark.parametrize("k", [LONG - 1, LONG + 4, LONG + 7])
def test_rows_must_be_multiples_of_16_bytes(k):
    """As a tensor map's strides must be."""
    assert streams_of(64, k) == ([None, None], None)
    assert streams_of(64, k // 8 * 8)[1] is not None


def test_numbers_must_have_16_bits():
    assert streams_of(64, dtype=torch.float32) == ([None, None], None)
    assert streams_of(64, dtype=torch.float16)[1] is not None


def test_a_gpu_without_wgmma_has_no_panels():
    assert streams_of(64, machine=Machine(8, block_n=16, slot_bytes=0)) == ([None, None], None)


def test_weights_that_do_not_come_in_panels_need_no_maps():
    machine = hopper()
    streams_of(64, 64, machine=machine)
    assert maps_of(machine) == []


# ---- what a request brings ----


@pytest.mark.parametrize(
    ("rows", "two", "panels_of_slot", "box"),
    [
        (1, False, 4, 8),
        (12, False, 4, 16),
        (32, False, 4, 32),
        (33, False, 2, 40),
        (64, False, 2, 64),
        (65, False, 2, 40),  # blocks of 33 and 32
        (97, False, 2, 56),
        (200, False, 2, 56),
        (1, True, 2, 32),
        (33, True, 2, 32),
    ],
)
def test_panels_of_a_slot_and_rows_of_a_panel(rows, two, panels_of_slot, box):
    machine = hopper()
    streams, _ = streams_of(rows, two=two, machine=machine)
    assert [stream.row for stream in streams] == [0, rows]
    for stream in streams:
        assert (stream.panels, stream.request_bytes) == (panels_of_slot, box * 128)
        assert (stream.second is not None) == two and not stream.few_only
    weights = [m for m in maps_of(machine) if m.tensor != "x"]
    assert weights == [TensorMap(name, 2 * rows, LONG, box) for name in ["w", "second"][: 1 + two]]


def test_tasks_share_a_map_that_has_room_for_the_largest():
    machine = hopper()
    ranges = list(even_ranges(100, 3))
    streams, _ = panel_streams(machine, matrix(100, LONG), ranges, activations(LONG))
    assert [stream.row for stream in streams] == [0, 33, 66]
    assert {stream.start for stream in streams} == {Address(TENSOR_MAPS, 0)}
    assert {stream.request_bytes for stream in streams} == {40 * 128}  # 34 rows


def blocks(num_rows: int, limit: int) -> list[int]:
    """The blocks of a task as the kernel cuts them: `even_block`, and `multiply_panels` for the rest."""
    num_blocks = (num_rows + limit - 1) // limit
    block = (num_rows + num_blocks - 1) // num_blocks
    return [min(block, num_rows - done) for done in range(0, num_rows, block)]


def check_streams(cut: Cut, machine: Machine, k: int, limit: int) -> None:
    """Requests that have room for a task's blocks, fit a slot, and are not so few that the ring is two blocks ahead."""
    assert cut.constants["PANELS"] == all(task.panels for task in cut.tasks) == any(task.panels for task in cut.tasks)
    for task in (task for task in cut.tasks if task.panels):
        stream, found = task.panels, task.fields
        matrices = 1 + (stream.second is not None)
        assert stream.panels * stream.request_bytes * matrices <= PANEL_SLOT_BYTES.value
        assert stream.panels in (2, 4)  # a step are two
        assert k >= PANEL_SLOTS.value * stream.panels * PANEL.value
        box = maps_of(machine)[stream.start.offset // TENSOR_MAP_WORDS].box_rows
        assert box * PANEL.value * 2 == stream.request_bytes and stream.request_bytes % REPEAT == 0
        assert max(blocks(found["num_rows"], limit)) <= box <= ROWS.value // matrices
        assert stream.row == found["row0"]


shapes = {
    "num_rows": st.integers(1, 400) | st.integers(1, 40_000),
    "num_workers": st.integers(1, 160),
    "k": st.integers(1, 700).map(lambda n: 8 * n) | st.integers(1, 4000),
}


@settings(deadline=None, max_examples=200)
@given(**shapes)
@example(num_rows=6144, num_workers=132, k=4096)
@example(num_rows=33, num_workers=1, k=896)
@example(num_rows=65, num_workers=2, k=1792)  # 32 rows and 33
def test_all_blocks_of_a_linear_fit_their_slots(num_rows, num_workers, k):
    machine = hopper(num_workers)
    handles = {
        "num_tokens": TensorHandle("n", (1,), torch.int32), "input": activations(k),
        "squares": TensorHandle("squares", (3, MAX_TOKENS), torch.float32), "weight": matrix(num_rows, k),
        "output": matrix(MAX_TOKENS, num_rows, "y"),
    }  # fmt: skip
    cut = cut_batch_linear(machine, **handles, eps=1e-6)
    check_streams(cut, machine, k, ROWS.value // cut.constants["HALVES"])


@settings(deadline=None, max_examples=200)
@given(**shapes)
@example(num_rows=12288, num_workers=132, k=4096)
def test_all_blocks_of_gate_and_up_fit_their_slots(num_rows, num_workers, k):
    machine = hopper(num_workers)
    handles = {
        "num_tokens": TensorHandle("n", (1,), torch.int32), "input": activations(k),
        "squares": TensorHandle("squares", (3, MAX_TOKENS), torch.float32), "weight_gate": matrix(num_rows, k),
        "weight_up": matrix(num_rows, k, "up"), "output": matrix(MAX_TOKENS, num_rows, "h"),
    }  # fmt: skip
    cut = cut_batch_gated_linear(machine, **handles, eps=1e-6)
    check_streams(cut, machine, k, ROWS.value // 2)
    for task in (task for task in cut.tasks if task.panels):
        gate, up = (maps_of(machine)[a.offset // TENSOR_MAP_WORDS] for a in (task.panels.start, task.panels.second))
        assert (gate.tensor, up.tensor) == ("w", "up") and gate.box_rows == up.box_rows == ROWS.value // 2


@settings(deadline=None, max_examples=100)
@given(**shapes)
@example(num_rows=132 * 20, num_workers=132, k=4096)  # not more than 32 rows, though the op never takes halves of K
def test_all_blocks_of_the_head_fit_their_slots(num_rows, num_workers, k):
    machine, num_best = hopper(num_workers), min(num_rows, num_workers)
    small = {name: TensorHandle(name, (4,), torch.int32) for name in ("counts", "outputs", "output_token")}
    handles = {
        "num_tokens": TensorHandle("n", (1,), torch.int32),
        "token_sequences": TensorHandle("sequences", (MAX_TOKENS,), torch.int32), "input": activations(k),
        "squares": TensorHandle("squares", (3, MAX_TOKENS), torch.float32), "weight": matrix(num_rows, k),
        "logits": TensorHandle("logits", (4, num_rows), torch.float32),
        "best_value": TensorHandle("value", (4, num_best), torch.float32),
        "best_index": TensorHandle("index", (4, num_best), torch.int32),
    }  # fmt: skip
    cut = cut_batch_lm_head(machine, **small, **handles, eps=1e-6)
    check_streams(cut, machine, k, ROWS.value)
    assert all(task.panels.few_only for task in cut.tasks if task.panels)


# ---- tensor maps ----


def test_maps_of_activations_are_neighbours():
    """The kernel is told the first one, of FEW_ROWS tokens, and adds TENSOR_MAP_BYTES for the other."""
    machine, x = hopper(), activations(LONG)
    _, x_map = panel_streams(machine, matrix(64, LONG), [(0, 64)], x)
    place = x_map.offset // TENSOR_MAP_WORDS
    few, many = maps_of(machine)[place : place + 2]
    assert few == TensorMap("x", MAX_TOKENS, LONG, FEW_ROWS.value)
    assert many == TensorMap("x", MAX_TOKENS, LONG, MANY_ROWS.value)
    assert TENSOR_MAP_BYTES.value == 8 * TENSOR_MAP_WORDS


def test_products_of_the_same_activations_share_their_maps():
    machine, x = hopper(), activations(LONG)
    (first,), x_map = panel_streams(machine, matrix(64, LONG), [(0, 64)], x)
    (other,), same = panel_streams(machine, matrix(64, LONG, "v"), [(0, 64)], x)
    (again,), _ = panel_streams(machine, matrix(64, LONG), [(0, 64)], x)
    assert same == x_map and first == again and first.start != other.start
    assert [m.tensor for m in maps_of(machine)] == ["w", "x", "x", "v"]


def test_activations_in_rows_of_another_length_have_maps_of_their_own():
    machine = hopper()
    flat = TensorHandle("x", (1, MAX_TOKENS * LONG), torch.bfloat16)  # as those of several ranks
    _, wide = panel_streams(machine, matrix(64, LONG), [(0, 64)], flat)
    _, narrow = panel_streams(machine, matrix(64, LONG // 2, "v"), [(0, 64)], flat)
    assert [m for m in maps_of(machine) if m.tensor == "x"] == [
        TensorMap("x", num_rows, k, rows) for num_rows, k in ((128, LONG), (256, LONG // 2)) for rows in (8, 32)
    ]
    assert wide != narrow


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 32]))))
def test_maps_are_numbered_without_gaps_and_keep_their_numbers(asked):
    maps = TensorMaps()
    given = {}
    for name, num_rows, k, box in asked:
        address = maps.of(matrix(num_rows, k, name), num_rows, k, box)
        assert address.tensor == TENSOR_MAPS and given.setdefault((name, num_rows, k, box), address) == address
    places = sorted(address.offset for address in given.values())
    assert places == [TENSOR_MAP_WORDS * i for i in range(len(given))]
    assert [(m.tensor, m.num_rows, m.num_columns, m.box_rows) for m in maps.places] == list(given)


# ---- where things lie ----


def test_the_rings_lie_one_behind_the_other():
    assert X_AT.value == PANEL_SLOTS.value * PANEL_SLOT_BYTES.value
    assert SUMS_AT.value == X_AT.value + X_BYTES.value
    assert RINGS_BYTES.value == SUMS_AT.value + ROWS.value * SUMS_PITCH.value
    assert PANEL_SLOT_BYTES.value % REPEAT == X_AT.value % REPEAT == 0
    assert SUMS_PITCH.value >= 4 * PANEL_TOKENS.value and SUMS_PITCH.value % 8 == 0  # pairs of sums are stored


def test_everything_fits_a_block_of_hopper():
    begin = OTHER_BYTES.value + REPEAT  # where rings begin at the latest
    assert begin + RINGS_BYTES.value + SHARED_BYTES.value + PANEL_STATE_BYTES.value <= HOPPER


def test_barriers_and_state_do_not_overlap():
    """See the end of the module's docstring: bytes behind the descriptors."""
    full, empty, x_full, x_empty, state, filled = 0, 64, 128, 256, 384, 400
    assert full + 8 * PANEL_SLOTS.value <= empty and empty + 8 * PANEL_SLOTS.value <= x_full
    assert x_full + 8 * X_SLOTS.value <= x_empty and x_empty + 8 * X_SLOTS.value <= state
    assert state + 4 * 4 <= filled and filled + 4 <= PANEL_STATE_BYTES.value
    assert X_SLOTS.value <= 32  # phases are the bits of one word


def test_wgmma_reads_64_rows_from_any_place_within_the_rings():
    """However few a request brings: what is behind them counts for nothing, but must be there."""
    rows = 128 * ROWS.value
    assert X_AT.value + X_BYTES.value + rows <= RINGS_BYTES.value
    assert PANEL_SLOTS.value * PANEL_SLOT_BYTES.value + rows <= RINGS_BYTES.value


@pytest.mark.parametrize("num_tokens", range(1, PANEL_TOKENS.value + 1))
def test_any_number_of_tokens_has_places_for_two_steps_or_more(num_tokens):
    """As `multiply_block` reckons: requests of FEW_ROWS or MANY_ROWS tokens, a lane each, and two panels of a step."""
    rows = MANY_ROWS.value if num_tokens > 16 else FEW_ROWS.value
    requests = (num_tokens - 1) // rows + 1
    step_bytes = 2 * requests * rows * 128
    places = min(X_BYTES.value // step_bytes, X_SLOTS.value)
    assert places >= 2 and places * step_bytes <= X_BYTES.value
    assert 2 * requests <= 32 and rows * requests >= num_tokens and rows * 128 % REPEAT == 0


def test_functions_with_wgmma_are_not_called():
    """Or ptxas would have each instruction end before the next one begins."""
    for name in ("multiply_block", "multiply_panels", "begin_panels"):
        assert not getattr(panels, name).noinline, name


def test_a_row_of_sums_is_one_of_64():
    """Registers a0 to a31 of a warp's lane are 8 columns of 8 tokens: pairs of rows, 8 apart."""
    names = re.findall(r"a\d+", panels.SUMS.value)
    assert names == [f"a{i}" for i in range(ROWS.value * PANEL_TOKENS.value // 128)]
