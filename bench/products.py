"""How fast forms of the product of many tokens stream weights: what ops/batch_gemm.py was chosen by.

python bench/products.py    # on a GPU with `wgmma`; a minute

132 programs of 16 warps multiply 384 rows each of a [50688, 4096] matrix in bf16 with 1, 8 and all tokens of a block.
`3d`: each warp has its own part of K; `2d`: all warps share a tile, by `wgmma` from 64 rows on; `flat`: rows and K are
one loop, so that the pipeline of copies never runs dry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_PROGRAMS, ROWS_EACH, K = 132, 384, 4096


@triton.jit
def product_3d(
    w_ptr, x_ptr, y_ptr, num_tokens,
    NUM_ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    WARPS: tl.constexpr = 16
    segment = tl.arange(0, WARPS)[:, None, None] * TILE_K
    k = tl.arange(0, TILE_K)
    token = tl.arange(0, TOKENS)
    is_token = token < num_tokens
    x_at = x_ptr + token[None, None, :] * K + (segment + k[None, :, None])
    for first in tl.range(0, NUM_ROWS, ROWS, num_stages=1):
        row = tl.program_id(0) * NUM_ROWS + first + tl.arange(0, ROWS)
        w_at = w_ptr + row.to(tl.int64)[None, :, None] * K + (segment + k[None, None, :])
        acc = tl.zeros([WARPS, ROWS, TOKENS], tl.float32)
        for start in tl.range(0, K, WARPS * TILE_K, num_stages=STAGES):
            x = tl.load(x_at + start, mask=is_token[None, None, :], other=0.0)
            acc = tl.dot(tl.load(w_at + start), x, acc)
        tl.store(y_ptr + token[None, :] * N + row[:, None], tl.sum(acc, axis=0), mask=is_token[None, :])


@triton.jit
def product_2d(
    w_ptr, x_ptr, y_ptr, num_tokens,
    NUM_ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, TILE_K)
    token = tl.arange(0, TOKENS)
    is_token = token < num_tokens
    x_at = x_ptr + token[None, :] * K + k[:, None]
    rows = tl.program_id(0) * NUM_ROWS + tl.arange(0, ROWS)
    if FLAT:
        STEPS: tl.constexpr = K // TILE_K
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for i in tl.range(0, NUM_ROWS // ROWS * STEPS, num_stages=STAGES):
            start = i % STEPS * TILE_K
            row = rows + i // STEPS * ROWS
            w = tl.load(w_ptr + row.to(tl.int64)[:, None] * K + start + k[None, :])
            acc = tl.dot(w, tl.load(x_at + start, mask=is_token[None, :], other=0.0), acc)
            if i % STEPS == STEPS - 1:
                tl.store(y_ptr + token[None, :] * N + row[:, None], acc, mask=is_token[None, :])
                acc = tl.zeros([ROWS, TOKENS], tl.float32)
    else:
        for first in tl.range(0, NUM_ROWS, ROWS, num_stages=1):
            w_at = w_ptr + (rows + first).to(tl.int64)[:, None] * K + k[None, :]
            acc = tl.zeros([ROWS, TOKENS], tl.float32)
            for start in tl.range(0, K, TILE_K, num_stages=STAGES):
                x = tl.load(x_at + start, mask=is_token[None, :], other=0.0)
                acc = tl.dot(tl.load(w_at + start), x, acc)
            tl.store(y_ptr + token[None, :] * N + (rows + first)[:, None], acc, mask=is_token[None, :])


FORMS = [  # kernel, rows, tokens, columns of a tile (of a warp's part: 3d), stages, flat
    (product_3d, 32, 32, 32, 4, False),
    (product_3d, 32, 16, 32, 4, False),
    (product_3d, 16, 16, 64, 4, False),
    (product_2d, 32, 32, 256, 6, False),
    (product_2d, 32, 32, 256, 6, True),
    (product_2d, 64, 32, 256, 4, False),
    (product_2d, 64, 32, 256, 4, True),
    (product_2d, 64, 64, 256, 3, True),
    (product_2d, 64, 64, 128, 6, True),
    (product_2d, 128, 32, 128, 5, True),
]


def main() -> None:
    num_rows = NUM_PROGRAMS * ROWS_EACH
    w = torch.randn(num_rows, K, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, K, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(64, num_rows, device="cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for kernel, rows, tokens, tile_k, stages, flat in FORMS:
        constants = {"ROWS": rows, "TOKENS": tokens, "TILE_K": tile_k, "STAGES": stages, "FLAT": flat}

        def run(num_tokens: int, kernel=kernel, constants=constants):
            return kernel[(NUM_PROGRAMS,)](
                w, x, y, num_tokens, NUM_ROWS=ROWS_EACH, N=num_rows, K=K, num_warps=16, maxnreg=128, **constants
            )

        y.fill_(float("nan"))
        compiled = run(tokens)
        expected = x[:tokens].float() @ w.float().T
        error = float((y[:tokens] - expected).norm() / expected.norm())
        assert error < 1e-4, f"{constants}: relative L2 {error:.1e}"
        rates = []
        for num_tokens in (1, 8, tokens):
            ms = triton.testing.do_bench(lambda n=num_tokens, run=run: run(n), return_mode="median")
            rates.append(f"{w.numel() * 2 / ms / 1e9:5.2f}")
        form = f"{kernel.fn.__name__[-2:]} {'flat ' if flat else ''}".strip()
        name = f"{form}, {rows} rows x {tokens} tokens x {tile_k}, {stages} stages"
        print(f"{name:48s} {' '.join(rates)} TB/s, {compiled.n_regs} registers, {compiled.n_spills} spills")


if __name__ == "__main__":
    main()
