"""How fast forms of the product of many tokens stream weights: what ops/batch_gemm.py was chosen by.

python bench/products.py    # on a GPU with `wgmma`; a minute

132 programs of 16 warps multiply as many rows each as the tasks of Qwen3-8B have, in bf16, with 1, 8 and all tokens of
a form. `nested`: the pipeline of copies begins anew with each block of 64 rows. `flat`: rows and K are one loop.
`halves`: the same, and 32 rows and both halves of K are the 64 rows of a tile, for tasks that have no more. Forms of
one shape, but for halves, must agree in every bit: tokens may not depend on how many others there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NUM_PROGRAMS, ROWS, MOST_TOKENS = 132, tl.constexpr(64), 256
SHAPES = {"gate_up": (186, 4096), "down_proj": (31, 12288), "qkv": (47, 4096), "lm_head": (1150, 4096)}  # rows each, K


@triton.jit
def product(
    w_ptr, x_ptr, y_ptr, num_tokens, num_rows,
    N: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr, HALVES: tl.constexpr,
    TOKENS: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ROWS // HALVES
    HALF: tl.constexpr = K // HALVES
    STEPS: tl.constexpr = HALF // TILE_K
    row0 = tl.program_id(0) * num_rows
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    block_rows = (num_rows + num_blocks - 1) // num_blocks
    tile_row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TOKENS * HALVES)[None, :]
    k = tl.arange(0, TILE_K)
    w_at = w_ptr + (row0 + tile_row % BLOCK).to(tl.int64) * K + tile_row // BLOCK * HALF + k[None, :]
    x_at = x_ptr + column % TOKENS * K + column // TOKENS * HALF + k[:, None]
    acc = tl.zeros([ROWS, TOKENS * HALVES], tl.float32)
    for begin in tl.range(0, 1 if FLAT else num_blocks, num_stages=1):
        for i in tl.range(0, (num_blocks if FLAT else 1) * STEPS, num_stages=STAGES):
            done = (begin + i // STEPS) * block_rows
            start = i % STEPS * TILE_K
            is_row = tile_row % BLOCK < tl.minimum(block_rows, num_rows - done)
            w = tl.load(w_at + (done * K + start), mask=is_row, other=0.0)
            acc = tl.dot(w, tl.load(x_at + start, mask=column % TOKENS < num_tokens, other=0.0), acc)
            if i % STEPS == STEPS - 1:
                of_halves = tl.reshape(acc, (HALVES, BLOCK, HALVES, TOKENS))
                half = tl.arange(0, HALVES)
                same = half[:, None, None, None] == half[None, None, :, None]
                y = tl.sum(tl.sum(tl.where(same, of_halves, 0.0), axis=2), axis=0)
                row, token = tl.arange(0, BLOCK)[:, None], tl.arange(0, TOKENS)[None, :]
                mask = (row < tl.minimum(block_rows, num_rows - done)) & (token < num_tokens)
                tl.store(y_ptr + token * N + row0 + done + row, y, mask=mask)
                acc = tl.zeros([ROWS, TOKENS * HALVES], tl.float32)


@dataclass(frozen=True, slots=True)
class Form:
    kind: str  # nested, flat or halves
    tokens: int
    tile_k: int
    stages: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.tokens} tokens x {self.tile_k}, {self.stages} stages"

    def constants(self) -> dict[str, int]:
        halves = 2 if self.kind == "halves" else 1
        flat = self.kind != "nested"
        return {"FLAT": flat, "HALVES": halves, "TOKENS": self.tokens, "TILE_K": self.tile_k, "STAGES": self.stages}


FORMS = [
    Form("nested", 64, 128, 6),
    Form("flat", 64, 128, 6),
    Form("flat", 32, 128, 8),
    Form("flat", 32, 256, 4),
    Form("flat", 16, 256, 5),
    Form("flat", 128, 128, 4),
    Form("flat", 256, 64, 4),
    Form("halves", 64, 128, 4),
    Form("halves", 32, 128, 6),
    Form("halves", 16, 128, 8),
]


def measure(name: str, form: Form, w: torch.Tensor, x: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """Prints a line. Returns the product of a few tokens, which must be `first` where that is given."""
    num_rows, k = SHAPES[name]
    y = torch.full((MOST_TOKENS, len(w)), torch.nan, device="cuda")

    def run(num_tokens: int):
        return product[(NUM_PROGRAMS,)](
            w, x, y, num_tokens, num_rows, N=len(w), K=k, num_warps=16, maxnreg=128, **form.constants()
        )

    compiled = run(form.tokens)
    expected = x[: form.tokens].float() @ w.float().T
    error = float((y[: form.tokens] - expected).norm() / expected.norm())
    assert error < 1e-4, f"{name}, {form}: relative L2 {error:.1e}"
    assert first is None or torch.equal(y[: len(first)], first), f"{name}, {form}: other bits than the form before"
    rates = []
    for num_tokens in (1, 8, form.tokens):
        ms = triton.testing.do_bench(lambda n=num_tokens: run(n), return_mode="median")
        rates.append(f"{w.numel() * 2 / ms / 1e9:5.2f}")
    print(f"{name:10s} {form!s:36s} {' '.join(rates)} TB/s, {compiled.n_regs} registers, {compiled.n_spills} spills")
    return y[:8].clone()


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for name, (num_rows, k) in SHAPES.items():
        w = torch.randn(NUM_PROGRAMS * num_rows, k, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(MOST_TOKENS, k, device="cuda", dtype=torch.bfloat16)
        first: dict[bool, torch.Tensor] = {}
        for form in FORMS:
            halves = form.kind == "halves"
            if num_rows <= 32 or not halves:
                first[halves] = measure(name, form, w, x, first.get(halves))


if __name__ == "__main__":
    main()
