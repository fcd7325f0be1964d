"""Streaming a weight matrix: what all matrix-vector ops share.

A task's rows are dealt to the warps: in row block b, warp w has one row of row group 0 and one of row group 1. Each
warp owns a ring of slots in shared memory and asks the bulk copy engine for its own rows, chunk by chunk
(2 row groups x CHUNK_COLS columns). A slot is refilled as soon as its warp has read it, so that no two warps ever wait
for each other, and always with the chunk that the warp needs RING slots later, whichever task that belongs to: the
weight stream runs on while a worker waits for an event.

    slot        0        1        2        3
    holds       [read]   ready    ready    on its way
    next        chunk 4 is requested; it may be the first chunk of the worker's next task

`ring` is the state of that: shared memory, the slot to read next, and the cursor, which is the position of the next
chunk to request. The cursor walks the task descriptors by itself.

The activations of a task are staged in shared memory once, already multiplied by the gain of the norm.

Without RING (the interpreter, GPUs without bulk copies, weights that are not 16 bits wide or not aligned to 16 bytes)
the same functions load [BLOCK_N, BLOCK_K] tiles directly: right on any machine, and the definition of what the ring
does.
"""

import torch
import triton
import triton.language as tl

from tri_mpk.scheduler.device import (
    CONTROL_RING_SLOTS,
    CONTROL_SHARED_BASE,
    TASK_NEXT_STREAM,
    TASK_STREAM,
)

LANES = tl.constexpr(32)
CHUNK_COLS = tl.constexpr(512)
CHUNK_BYTES = tl.constexpr(2048)  # two rows of CHUNK_COLS 16-bit weights
MAX_SLOTS = tl.constexpr(16)
BARRIER_BYTES = tl.constexpr(2048)  # 8 per slot and warp, for 16 warps


@triton.jit
def thread_rows(BLOCK_N: tl.constexpr):
    """[BLOCK_N, LANES]: one element per thread, a warp per row. What the ring does is written on this shape."""
    return tl.arange(0, BLOCK_N)[:, None] + tl.zeros([1, LANES], tl.int32)


@triton.jit
def slot_barrier(ring, BLOCK_N: tl.constexpr):
    return ring[0] + (thread_rows(BLOCK_N) * MAX_SLOTS + ring[2]) * 8


@triton.jit
def slot_address(ring, BLOCK_N: tl.constexpr):
    return ring[0] + BARRIER_BYTES + (thread_rows(BLOCK_N) * ring[1] + ring[2]) * CHUNK_BYTES


@triton.jit
def activation_address(ring, BLOCK_N: tl.constexpr):
    return ring[0] + BARRIER_BYTES + ring[1] * (BLOCK_N * CHUNK_BYTES)


@triton.jit
def read_stream(record_ptr):
    """The cursor at the first chunk of a task's weights: (address, columns left, rows left in each group, the rest)."""
    start = tl.load(record_ptr + TASK_STREAM)
    row_stride = tl.load(record_ptr + TASK_STREAM + 1).to(tl.int32)
    group_stride = tl.load(record_ptr + TASK_STREAM + 2)
    rows = tl.load(record_ptr + TASK_STREAM + 3)
    shape = tl.load(record_ptr + TASK_STREAM + 4)
    cols = shape.to(tl.int32)
    return (
        start, cols, rows.to(tl.int32), (rows >> 32).to(tl.int32),
        row_stride, group_stride, cols, (shape >> 32).to(tl.int32),
    )  # fmt: skip


@triton.jit
def start_ring(last_task_ptr, control_ptr, RING: tl.constexpr, BLOCK_N: tl.constexpr):
    """Requests the first chunks of the worker's first weights. `last_task_ptr` is the last task of its queue."""
    if RING:
        smem = tl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        smem += tl.load(control_ptr + CONTROL_SHARED_BASE).to(tl.int32)
        slots = tl.load(control_ptr + CONTROL_RING_SLOTS).to(tl.int32)
        record_ptr = last_task_ptr + tl.load(last_task_ptr + TASK_NEXT_STREAM)
        ring = (smem, slots, slots * 0, slots * 0 + 1, record_ptr) + read_stream(record_ptr)
        barrier = slot_barrier(ring, BLOCK_N)
        address = slot_address(ring, BLOCK_N)
        tl.inline_asm_elementwise(
            # Lane 0 makes its warp's barriers. All lanes clear the warp's slots: what lies in a slot beyond the
            # columns of a matrix is multiplied by zero and must be a number.
            """{
            .reg .pred p; .reg .u32 lane, at, left;
            mov.u32 lane, %laneid; setp.ne.u32 p, lane, 0; @p bra CLEAR;
            mov.u32 at, $1; mov.u32 left, 16;
            NEXT: mbarrier.init.shared::cta.b64 [at], 1; add.u32 at, at, 8; sub.u32 left, left, 1;
            setp.ne.u32 p, left, 0; @p bra NEXT;
            fence.mbarrier_init.release.cluster;
            CLEAR: mad.lo.u32 at, lane, 16, $2; mul.lo.u32 left, $3, 4;
            MORE: st.shared.v4.b32 [at], {0, 0, 0, 0}; add.u32 at, at, 512; sub.u32 left, left, 1;
            setp.ne.u32 p, left, 0; @p bra MORE;
            fence.proxy.async.shared::cta;
            mov.u32 $0, 0;
            }""",
            "=r,r,r,r",
            [barrier, address, slots],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        for _ in tl.range(0, slots, num_stages=1):
            ring = request_chunk(ring, BLOCK_N)
        return ring
    else:
        return 0


@triton.jit
def request_chunk(ring, BLOCK_N: tl.constexpr):
    """Copies the chunk at the cursor into the current slot, which the warp has read, and moves both on by one."""
    smem, slots, slot, phase, record_ptr, addr, cols_left, rows0, rows1, row_stride, group_stride, cols, block = ring
    row = thread_rows(BLOCK_N)
    num_bytes = tl.minimum(cols_left, CHUNK_COLS) * 2
    source = addr + row.to(tl.int64) * row_stride
    tl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .u32 lane, bytes; .reg .u64 policy;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid; setp.ne.u32 p, lane, 0; @p bra DONE;
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
        add.u32 bytes, $5, $6;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], bytes;
        setp.eq.u32 p, $5, 0; @p bra DONE;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$2], [$3], $5, [$1], policy;
        setp.eq.u32 p, $6, 0; @p bra DONE;
        add.u32 bytes, $2, 1024;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [bytes], [$4], $6, [$1], policy;
        DONE: mov.u32 $0, 0;
        }""",
        "=r,r,r,l,l,r,r",
        [
            slot_barrier(ring, BLOCK_N),
            slot_address(ring, BLOCK_N),
            source,
            source + group_stride,
            tl.where(row < rows0, num_bytes, 0),
            tl.where(row < rows1, num_bytes, 0),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    addr += CHUNK_COLS * 2
    cols_left -= CHUNK_COLS
    if cols_left <= 0:
        addr += block.to(tl.int64) * row_stride - ((cols + CHUNK_COLS - 1) // CHUNK_COLS * (CHUNK_COLS * 2))
        cols_left = cols
        rows0 -= block
        rows1 -= block
        if rows0 <= 0:
            record_ptr += tl.load(record_ptr + TASK_NEXT_STREAM)
            addr, cols_left, rows0, rows1, row_stride, group_stride, cols, block = read_stream(record_ptr)
    slot += 1
    if slot == slots:
        slot = slots * 0
        phase ^= 1
    return (
        smem, slots, slot, phase, record_ptr,
        addr, cols_left, rows0, rows1, row_stride, group_stride, cols, block,
    )  # fmt: skip


@triton.jit
def await_chunk(ring, BLOCK_N: tl.constexpr):
    """Until the current slot is full."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra POLL;
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [slot_barrier(ring, BLOCK_N), ring[3]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def skip_stream(ring, num_blocks, K: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leaves out the weights of the present task, of which as many chunks as fit into the ring are on their way."""
    if RING:
        num_chunks = num_blocks * ((K + CHUNK_COLS - 1) // CHUNK_COLS)
        if num_chunks > ring[1]:  # the cursor has not left them
            record_ptr = ring[4] + tl.load(ring[4] + TASK_NEXT_STREAM)
            ring = (ring[0], ring[1], ring[2], ring[3], record_ptr) + read_stream(record_ptr)
        for _ in tl.range(0, tl.minimum(num_chunks, ring[1]), num_stages=1):
            await_chunk(ring, BLOCK_N)
            ring = request_chunk(ring, BLOCK_N)
    return ring


@triton.jit
def drain_ring(ring, RING: tl.constexpr, BLOCK_N: tl.constexpr):
    """Until nothing is on its way: a program may not end while copies into its shared memory run."""
    if RING:
        smem, slots, slot, phase, record_ptr, a, b, c, d, e, f, g, h = ring
        for _ in tl.range(0, slots, num_stages=1):
            await_chunk((smem, slots, slot, phase), BLOCK_N)
            slot += 1
            if slot == slots:
                slot = slots * 0
                phase ^= 1


@triton.jit
def read_words(address):
    """16 bytes of shared memory per thread, as four words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def write_word(address, word):
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;",
        "=r,r,r",
        [address, word],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def low_half(word, DTYPE: tl.constexpr):
    """The first of two 16-bit numbers in a word, in fp32."""
    if DTYPE == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def load_activations(
    x_ptr, gain_ptr, cols,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x[cols] in fp32 and its product with the gain of the norm; 0 beyond K.

    A residual stream comes in PARTS parts (those of a split K), which are added here in their order.
    """
    mask = cols < K
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * PART_STRIDE + cols, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        return x, x * tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        return x, x


@triton.jit
def stage_activations(
    ring, x_ptr, gain_ptr,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    RING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Makes the task's activations ready for `dot_row_block`. Returns sum(x^2), if there is a norm.

    In shared memory 256 columns of fp32 lie as the lanes read them, 16 bytes each: first columns 0-3 of every 8, then
    columns 4-7. Activations of 16 bits stay as they are.
    """
    if RING:
        threads: tl.constexpr = BLOCK_N * LANES
        padded: tl.constexpr = (K + CHUNK_COLS - 1) // CHUNK_COLS * CHUNK_COLS
        base = activation_address(ring, BLOCK_N)
        thread = tl.arange(0, threads)
        squares = tl.zeros([threads], tl.float32)
        if NORM or x_ptr.dtype.element_ty == tl.float32:
            for start in tl.static_range(0, padded, threads):
                cols = start + thread
                x, scaled = load_activations(x_ptr, gain_ptr, cols, K, PARTS, PART_STRIDE, NORM)
                squares += x * x
                place = cols // 256 * 256 + cols % 8 // 4 * 128 + cols % 256 // 8 * 4 + cols % 4
                write_word(base + place * 4, scaled.to(tl.int32, bitcast=True))
        else:
            word_ptr = x_ptr.to(tl.pointer_type(tl.int32))
            for start in tl.static_range(0, padded // 2, threads):
                word = tl.load(word_ptr + start + thread, mask=start + thread < K // 2, other=0)
                write_word(base + (start + thread) * 4, word)
        tl.debug_barrier()
        return tl.sum(squares, axis=0)
    else:
        total = tl.zeros([], tl.float32)
        if NORM:
            squares = tl.zeros([BLOCK_K], tl.float32)
            for start in tl.range(0, K, BLOCK_K, num_stages=1):
                cols = start + tl.arange(0, BLOCK_K)
                x, scaled = load_activations(x_ptr, gain_ptr, cols, K, PARTS, PART_STRIDE, NORM)
                squares += x * x
            total = tl.sum(squares, axis=0)
        return total


@triton.jit
def read_activations(address, col, FP32: tl.constexpr, DTYPE: tl.constexpr):
    """Eight staged activations per lane: columns col + 8 * lane and on, `col` a multiple of 256."""
    lane = tl.arange(0, LANES)[None, :]
    if FP32:
        a, b, c, d = read_words(address + col * 4 + lane * 16)
        e, f, g, h = read_words(address + col * 4 + lane * 16 + 512)
        return (
            a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True),
            c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True),
            e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True),
            g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True),
        )  # fmt: skip
    else:
        a, b, c, d = read_words(address + col * 2 + lane * 16)
        return (
            low_half(a, DTYPE), high_half(a, DTYPE), low_half(b, DTYPE), high_half(b, DTYPE),
            low_half(c, DTYPE), high_half(c, DTYPE), low_half(d, DTYPE), high_half(d, DTYPE),
        )  # fmt: skip


@triton.jit
def dot_words(acc, words, x, WEIGHT: tl.constexpr):
    for i in tl.static_range(4):
        acc += low_half(words[i], WEIGHT) * x[2 * i]
        acc += high_half(words[i], WEIGHT) * x[2 * i + 1]
    return acc


@triton.jit
def dot_row_block(
    ring, x_ptr, gain_ptr, weight_addr, group_stride, block, num_rows,
    K: tl.constexpr, ROW_STRIDE: tl.constexpr, GROUP_ROWS: tl.constexpr,
    PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products of row block `block` with the staged activations: two vectors [BLOCK_N], one per row group.

    Row group 1 lies GROUP_ROWS rows below group 0 (linear) or in another matrix altogether (GROUP_ROWS = 0: gate, up),
    `group_stride` bytes on. Rows beyond `num_rows` come out as any number.
    """
    if RING:
        FP32: tl.constexpr = NORM or x_ptr.dtype.element_ty == tl.float32
        address = activation_address(ring, BLOCK_N) + tl.zeros([BLOCK_N, LANES], tl.int32)
        acc0 = tl.zeros([BLOCK_N, LANES], tl.float32)
        acc1 = tl.zeros([BLOCK_N, LANES], tl.float32)
        for col in tl.range(0, K, CHUNK_COLS, num_stages=1):
            await_chunk(ring, BLOCK_N)
            chunk = slot_address(ring, BLOCK_N) + tl.arange(0, LANES)[None, :] * 16
            a0 = read_words(chunk)
            b0 = read_words(chunk + 512)
            a1 = read_words(chunk + 1024)
            b1 = read_words(chunk + 1536)
            ring = request_chunk(ring, BLOCK_N)
            x = read_activations(address, col, FP32, WEIGHT)
            acc0 = dot_words(acc0, a0, x, WEIGHT)
            acc1 = dot_words(acc1, a1, x, WEIGHT)
            x = read_activations(address, col + 256, FP32, WEIGHT)
            acc0 = dot_words(acc0, b0, x, WEIGHT)
            acc1 = dot_words(acc1, b1, x, WEIGHT)
        return ring, tl.sum(acc0, axis=1), tl.sum(acc1, axis=1)
    else:
        block_rows: tl.constexpr = BLOCK_N + GROUP_ROWS
        elem_bytes: tl.constexpr = WEIGHT.primitive_bitwidth // 8
        ptr0 = weight_addr + tl.cast(block, tl.int64) * (block_rows * ROW_STRIDE * elem_bytes)
        ptr1 = (ptr0 + group_stride).to(tl.pointer_type(WEIGHT))
        ptr0 = ptr0.to(tl.pointer_type(WEIGHT))
        rows = tl.arange(0, BLOCK_N)[:, None]
        rows0 = num_rows - block * block_rows
        acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        acc1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for col in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = col + tl.arange(0, BLOCK_K)[None, :]
            x, scaled = load_activations(x_ptr, gain_ptr, cols, K, PARTS, PART_STRIDE, NORM)
            offsets = rows * ROW_STRIDE + cols
            w0 = tl.load(ptr0 + offsets, mask=(rows < rows0) & (cols < K), other=0.0)
            w1 = tl.load(ptr1 + offsets, mask=(rows < rows0 - GROUP_ROWS) & (cols < K), other=0.0)
            acc0 += w0.to(tl.float32) * scaled
            acc1 += w1.to(tl.float32) * scaled
        return ring, tl.sum(acc0, axis=1), tl.sum(acc1, axis=1)


def staged_bytes(k: int, input_dtype: torch.dtype, norm: bool) -> int:
    """Shared memory that `stage_activations` fills, in whole kilobytes of two."""
    return -(-k // 512) * 512 * (4 if norm else input_dtype.itemsize) // 2048 * 2048 + 2048
