"""A persistent decode kernel made by tri_mpk. Launch `megakernel` cooperatively, one program per worker.

variant 0: embedding(V=1024, D=256, BLOCK_D=256)
variant 1: rmsnorm_linear(D=256, PARTS=1, EPS=1e-06, HAS_BIAS=False)
variant 2: attention(H=4, HKV=2, DH=64, NUM_SPLITS=66, PAGE_SIZE=128, SCALE=0.125, NORM=True, EPS=1e-06, BLOCK_H=16, BLOCK_DH=64, BLOCK_KV=64)
variant 3: attention_merge(H=4, DH=64, NUM_SPLITS=66, BLOCK_S=128, BLOCK_DH=64, BLOCK_KV=64)
variant 4: linear_residual(N=256, K_PART=256, ROW_STRIDE=256, RESIDUAL_PARTS=1, HAS_BIAS=False)
variant 5: rmsnorm_gated_linear(D=256, PARTS=1, EPS=1e-06)
variant 6: linear_residual(N=256, K_PART=768, ROW_STRIDE=768, RESIDUAL_PARTS=1, HAS_BIAS=False)
variant 7: lm_head(D=256, PARTS=1, EPS=1e-06)
variant 8: argmax(NUM_PARTS=132, BLOCK=256)
"""

import triton
import triton.language as tl

TASK_WORDS = tl.constexpr(24)  # int64 words of a task descriptor
PORTABLE = tl.constexpr(False)  # waits and signals as Triton atomics, not PTX
ALIGN = tl.constexpr(8)  # elements that every weight row is aligned to
BLOCK_N = tl.constexpr(16)  # rows and columns of a weight tile
BLOCK_K = tl.constexpr(256)

MAILBOX_STOP = tl.constexpr(0)  # set by the host: stop after this step
MAILBOX_NUM_TOKENS = tl.constexpr(1)  # set by the kernel: so many tokens were chosen in this launch
MAILBOX_TOKENS = tl.constexpr(2)  # the tokens, in order
TASK_VARIANT = tl.constexpr(0)  # variant | task index << 32
TASK_WAIT = tl.constexpr(1)  # event counter to wait for: its index in event_ptr
TASK_WAIT_COUNT = tl.constexpr(2)  # signals per step; 0: nothing to wait for
TASK_SIGNALS = tl.constexpr(3)  # two words, four int32 counter indices, -1 where unused
TASK_NEXT = tl.constexpr(5)  # five words: the weights which this worker reads next
CONTROL_FIRST_EPOCH = tl.constexpr(0)
CONTROL_NUM_KNOWN = tl.constexpr(1)  # tokens[:NUM_KNOWN] are given, later ones are chosen
CONTROL_LAST_STEP = tl.constexpr(2)  # position of the last token to process
CONTROL_LOGITS_FROM = tl.constexpr(3)  # logits are wanted from this position on
CONTROL_LOGITS_STRIDE = tl.constexpr(4)  # elements between the logits of two positions; 0: only the last
CONTROL_WAIT_BOUND = tl.constexpr(5)  # nanoseconds on a GPU, polls in the interpreter
CONTROL_NUM_EOS = tl.constexpr(6)
CONTROL_STEP_COUNT = tl.constexpr(7)  # signals of the step event per step
CONTROL_STOP = tl.constexpr(8)
CONTROL_ABORT = tl.constexpr(9)
CONTROL_STUCK_TASK = tl.constexpr(10)  # task index, or -1 - worker at the end of a step
CONTROL_STUCK_SEEN = tl.constexpr(11)
CONTROL_STUCK_WANTED = tl.constexpr(12)
CONTROL_LAST_EPOCH = tl.constexpr(13)
CONTROL_EOS = tl.constexpr(16)


# ---- scheduler/device.py ----


@triton.jit
def wait_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr):
    """Until `counter - wanted >= 0` as signed 32-bit numbers, so that counters may wrap around."""
    if PORTABLE:
        bound = tl.load(control_ptr + CONTROL_WAIT_BOUND)
        polls = bound * 0
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        while (seen - wanted < 0) & (polls < bound):
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            aborted = tl.load(control_ptr + CONTROL_ABORT, volatile=True) != 0
            polls = tl.where(aborted, bound, polls + 1)
        if seen - wanted < 0:  # noqa: SIM102  Triton evaluates both sides of `and`
            if tl.atomic_cas(control_ptr + CONTROL_ABORT, bound * 0, bound * 0 + 1, sem="relaxed", scope="gpu") == 0:
                tl.store(control_ptr + CONTROL_STUCK_TASK, task_idx)
                tl.store(control_ptr + CONTROL_STUCK_SEEN, seen)
                tl.store(control_ptr + CONTROL_STUCK_WANTED, wanted)
        tl.debug_barrier()
    else:
        tl.inline_asm_elementwise(  # byte offsets are 8 x the CONTROL_ words above
            """{
            .reg .pred p; .reg .s32 seen, left, polls; .reg .u32 tid, flag; .reg .u64 start, now, bound; .reg .s64 wide;
            mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0; @p bra DONE;
            ld.acquire.gpu.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            mov.u64 start, %globaltimer;
            MORE: mov.s32 polls, 0;
            POLL: ld.acquire.gpu.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            add.s32 polls, polls, 1; setp.lt.s32 p, polls, 1000; @p bra POLL;
            ld.relaxed.gpu.global.u32 flag, [$3 + 72]; setp.ne.u32 p, flag, 0; @p bra DONE;
            mov.u64 now, %globaltimer; sub.u64 now, now, start;
            ld.global.u64 bound, [$3 + 40]; setp.lt.u64 p, now, bound; @p bra MORE;
            atom.relaxed.gpu.global.cas.b32 flag, [$3 + 72], 0, 1; setp.ne.u32 p, flag, 0; @p bra DONE;
            cvt.s64.s32 wide, $4; st.global.s64 [$3 + 80], wide;
            cvt.s64.s32 wide, seen; st.global.s64 [$3 + 88], wide;
            cvt.s64.s32 wide, $2; st.global.s64 [$3 + 96], wide;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }""",
            "=r,l,r,l,r",
            [counter_ptr.to(tl.int64), wanted, control_ptr.to(tl.int64), task_idx],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """What the producers of this task's event wrote may be read afterwards."""
    count = tl.load(task_ptr + TASK_WAIT_COUNT).to(tl.int32)
    if count > 0:
        task_idx = (tl.load(task_ptr + TASK_VARIANT) >> 32).to(tl.int32)
        counter_ptr = event_ptr + tl.load(task_ptr + TASK_WAIT)
        wait_counter(counter_ptr, epoch * count, task_idx, control_ptr, PORTABLE)


@triton.jit
def signal(task_ptr, event_ptr, PORTABLE: tl.constexpr):
    """All that this worker wrote may be read by whoever waits for this task's events."""
    first = tl.load(task_ptr + TASK_SIGNALS)
    second = tl.load(task_ptr + TASK_SIGNALS + 1)
    if PORTABLE:
        tl.debug_barrier()
        for i in tl.static_range(4):
            pair = first if i < 2 else second
            counter = (pair >> (32 * (i % 2))).to(tl.int32)
            if counter >= 0:
                tl.atomic_add(event_ptr + counter, 1, sem="release", scope="gpu")
    else:
        # Lane i < 4 of the last warp signals the i-th event: the first warp may go on to wait for the next task's.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p, q; .reg .u32 tid, odd, first; .reg .s32 a, b, c, d; .reg .u64 address;
            bar.sync 0;
            mov.b64 {a, b}, $2; mov.b64 {c, d}, $3;
            mov.u32 tid, %tid.x; mov.u32 first, %ntid.x; sub.u32 first, first, 32; sub.u32 tid, tid, first;
            and.b32 odd, tid, 1; setp.ne.u32 p, odd, 0;
            selp.s32 a, b, a, p; selp.s32 c, d, c, p;
            setp.ge.u32 p, tid, 2; selp.s32 a, c, a, p;
            setp.lt.u32 p, tid, 4; setp.ge.and.s32 q, a, 0, p;
            mad.wide.s32 address, a, 4, $1;
            @q red.release.gpu.global.add.u32 [address], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,l",
            [event_ptr.to(tl.int64), first, second],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# ---- ops/embedding.py ----


@triton.jit
def embedding_tile(
    task_ptr, event_ptr, control_ptr, epoch,
    tokens_ptr, step_ptr, table_ptr, y_ptr,  # in, in, in, out
    col0, num_cols,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    token = tl.load(tokens_ptr + tl.load(step_ptr))
    token = tl.minimum(tl.maximum(token, 0), V - 1)  # after an abort anything may stand there
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    y = tl.load(table_ptr + token * D + col0 + cols, mask=mask, other=0.0)
    tl.store(y_ptr + col0 + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    signal(task_ptr, event_ptr, PORTABLE)


# ---- ops/gemv.py ----


@triton.jit
def load_stage(
    start, row_stride, group_stride, rows0, rows1, cols,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Four tiles: row group 0 at byte address `start`, row group 1 `group_stride` bytes on; 0 beyond rows and columns.

    ALIGN elements divide addresses, strides and column counts: the compiler sees that only through arithmetic.
    """
    align_bytes: tl.constexpr = ALIGN * WEIGHT.primitive_bitwidth // 8
    ptr0 = tl.multiple_of((start // align_bytes * align_bytes).to(tl.pointer_type(WEIGHT)), align_bytes)
    ptr1 = ((start + group_stride) // align_bytes * align_bytes).to(tl.pointer_type(WEIGHT))
    ptr1 = tl.multiple_of(ptr1, align_bytes)
    row_stride = row_stride // ALIGN * ALIGN
    cols = cols // ALIGN * ALIGN
    r = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_K)[None, :]
    offsets = r * row_stride + c
    mask0 = (r < rows0) & (c < cols)
    mask1 = (r < rows1) & (c < cols)
    mask2 = (r < rows0) & (c + BLOCK_K < cols)
    mask3 = (r < rows1) & (c + BLOCK_K < cols)
    w0 = tl.load(ptr0 + offsets, mask=mask0, other=0.0, eviction_policy="evict_first")
    w1 = tl.load(ptr1 + offsets, mask=mask1, other=0.0, eviction_policy="evict_first")
    w2 = tl.load(ptr0 + BLOCK_K + offsets, mask=mask2, other=0.0, eviction_policy="evict_first")
    w3 = tl.load(ptr1 + BLOCK_K + offsets, mask=mask3, other=0.0, eviction_policy="evict_first")
    return (w0, w1, w2, w3)


@triton.jit
def load_next(
    task_ptr,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first two stages of the weights that this worker reads after the given task."""
    start = tl.load(task_ptr + TASK_NEXT)
    row_stride = tl.load(task_ptr + TASK_NEXT + 1).to(tl.int32)
    group_stride = tl.load(task_ptr + TASK_NEXT + 2)
    rows = tl.load(task_ptr + TASK_NEXT + 3)
    cols = tl.load(task_ptr + TASK_NEXT + 4).to(tl.int32)
    rows0 = rows.to(tl.int32)
    rows1 = (rows >> 32).to(tl.int32)
    stage_bytes: tl.constexpr = 2 * BLOCK_K * WEIGHT.primitive_bitwidth // 8
    a = load_stage(start, row_stride, group_stride, rows0, rows1, cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)
    b = load_stage(
        start + stage_bytes, row_stride, group_stride, rows0, rows1, cols - 2 * BLOCK_K, WEIGHT, ALIGN, BLOCK_N, BLOCK_K
    )
    return (a, b)


@triton.jit
def load_activations(
    x_ptr, gain_ptr, col,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[col : col + BLOCK_K] in fp32, the same in all BLOCK_N rows, and its product with the gain of the norm.

    A residual stream comes in PARTS parts (those of a split K), which are added here in their order.
    """
    cols = col + tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    mask = cols < K
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * PART_STRIDE + cols, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        return x, x * tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        return x, x


@triton.jit
def dot_stage(
    acc0, acc1, squares, stage, x_ptr, gain_ptr, col,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for half in tl.static_range(2):
        x, scaled = load_activations(
            x_ptr, gain_ptr, col + half * BLOCK_K, K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K
        )
        acc0 += stage[2 * half].to(tl.float32) * scaled
        acc1 += stage[2 * half + 1].to(tl.float32) * scaled
        if NORM:
            squares += x * x
    return acc0, acc1, squares


@triton.jit
def dot_row_block(
    carry, x_ptr, gain_ptr, weight_addr, group_stride, block, num_rows,
    K: tl.constexpr, ROW_STRIDE: tl.constexpr, GROUP_ROWS: tl.constexpr,
    PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products of row block `block` with x: two vectors [BLOCK_N], one per row group, and sum(x^2) in every row.

    Row group 1 lies GROUP_ROWS rows below group 0 (linear) or in another matrix altogether (GROUP_ROWS = 0: gate, up).
    `carry` holds the first two stages of this block and is returned with those of the task's next one.
    """
    a, b = carry
    stage_cols: tl.constexpr = 2 * BLOCK_K
    num_stages: tl.constexpr = (K + 2 * stage_cols - 1) // (2 * stage_cols) * 2  # even: a and b alternate
    block_rows: tl.constexpr = BLOCK_N + GROUP_ROWS
    elem_bytes: tl.constexpr = WEIGHT.primitive_bitwidth // 8
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for stage in tl.range(0, num_stages, 2, num_stages=1):
        last = stage + 2 >= num_stages
        next_col = tl.where(last, 0, (stage + 2) * stage_cols)
        next_block = tl.where(last, block + 1, block)
        rows0 = num_rows - next_block * block_rows
        rows1 = rows0 - GROUP_ROWS
        start = weight_addr + (next_block * block_rows).to(tl.int64) * (ROW_STRIDE * elem_bytes) + next_col * elem_bytes
        cols = K - next_col
        acc0, acc1, squares = dot_stage(
            acc0, acc1, squares, a, x_ptr, gain_ptr, stage * stage_cols, K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K
        )
        a = load_stage(start, ROW_STRIDE, group_stride, rows0, rows1, cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)
        acc0, acc1, squares = dot_stage(
            acc0, acc1, squares, b, x_ptr, gain_ptr, (stage + 1) * stage_cols,
            K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        start += stage_cols * elem_bytes
        b = load_stage(
            start, ROW_STRIDE, group_stride, rows0, rows1, cols - stage_cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K
        )
    return (a, b), tl.sum(acc0, axis=1), tl.sum(acc1, axis=1), tl.sum(squares, axis=1)


# ---- ops/rmsnorm_linear.py ----


@triton.jit
def rmsnorm_linear_tile(
    task_ptr, event_ptr, control_ptr, epoch, carry,
    x_ptr, gain_ptr, weight_addr, bias_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PORTABLE: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    for block in tl.range(0, (num_rows + 2 * BLOCK_N - 1) // (2 * BLOCK_N), num_stages=1):
        carry, y0, y1, squares = dot_row_block(
            carry, x_ptr, gain_ptr, weight_addr, BLOCK_N * D * (WEIGHT.primitive_bitwidth // 8), block, num_rows,
            D, D, BLOCK_N, PARTS, D, True, WEIGHT, ALIGN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rstd = tl.rsqrt(squares / D + EPS)
        row = block * 2 * BLOCK_N + rows
        y0 *= rstd
        y1 *= rstd
        if HAS_BIAS:
            y0 += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
            y1 += tl.load(bias_ptr + row0 + row + BLOCK_N, mask=row + BLOCK_N < num_rows, other=0.0).to(tl.float32)
        tl.store(y_ptr + row0 + row, y0.to(y_ptr.dtype.element_ty), mask=row < num_rows)
        tl.store(y_ptr + row0 + row + BLOCK_N, y1.to(y_ptr.dtype.element_ty), mask=row + BLOCK_N < num_rows)
    signal(task_ptr, event_ptr, PORTABLE)
    return load_next(task_ptr, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)


# ---- ops/attention.py ----


@triton.jit
def load_head(
    ptr, gain_ptr, cos_row, sin_row, head, num_heads,
    HEADS: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Rows `head` to `head + HEADS` of a [heads, Dh] matrix, normalised and rotated: x * cos + rotate_half(x) * sin."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    h = tl.arange(0, HEADS)[:, None]
    mask = (h < num_heads) & (d < DH)
    partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
    base = ptr + (head + h) * DH
    x = tl.load(base + d, mask=mask, other=0.0).to(tl.float32)
    x_partner = tl.load(base + partner, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / DH + EPS)[:, None]
        x *= rstd * tl.load(gain_ptr + d, mask=d < DH, other=0.0).to(tl.float32)
        x_partner *= rstd * tl.load(gain_ptr + partner, mask=d < DH, other=0.0).to(tl.float32)
    return x * cos_row + tl.where(d < DH // 2, -x_partner, x_partner) * sin_row


@triton.jit
def attention_tile(
    task_ptr, event_ptr, control_ptr, epoch,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr, step_ptr,  # in
    k_cache_ptr, v_cache_ptr,  # in and out
    acc_ptr, max_ptr, sum_ptr,  # out
    kv_head, split,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    d_mask = d < DH
    step = tl.load(step_ptr)
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // NUM_SPLITS
    last = (split + 1) * num_blocks // NUM_SPLITS
    is_last = split == NUM_SPLITS - 1
    cos_row = tl.load(cos_ptr + step * DH + d, mask=d_mask, other=0.0)
    sin_row = tl.load(sin_ptr + step * DH + d, mask=d_mask, other=0.0)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    if is_last | (first < last):
        q = load_head(
            qkv_ptr, q_gain_ptr, cos_row, sin_row, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH, NORM, EPS
        ) * (SCALE * 1.4426950408889634)  # log2(e)
        m = tl.full([BLOCK_H], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DH], tl.float32)
        if is_last:  # the new token
            k_new = load_head(
                qkv_ptr + H * DH, k_gain_ptr, cos_row, sin_row, kv_head, 1, 1, DH, BLOCK_DH, NORM, EPS
            ).to(k_cache_ptr.dtype.element_ty)
            v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=d_mask, other=0.0)
            v_new = v_new.to(v_cache_ptr.dtype.element_ty)
            page = tl.load(page_table_ptr + step // PAGE_SIZE).to(tl.int64)
            row = ((page * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + row + d, k_new, mask=d_mask)
            tl.store(v_cache_ptr + row + d, v_new, mask=d_mask)
            m = tl.sum(q.to(k_new.dtype).to(tl.float32) * k_new.to(tl.float32), axis=1)
            l += 1.0
            acc += v_new.to(tl.float32)
        q = q.to(k_cache_ptr.dtype.element_ty)
        for block in tl.range(first, last, num_stages=2):
            position = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
            page = tl.load(page_table_ptr + block * BLOCK_KV // PAGE_SIZE).to(tl.int64)
            base = ((page * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE) * DH
            offsets = base + tl.arange(0, BLOCK_KV)[:, None] * DH + d
            mask = (position < step)[:, None] & d_mask
            k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where((position < step)[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
        h = tl.arange(0, BLOCK_H)
        head = split * H + kv_head * GROUP + h
        tl.store(acc_ptr + head[:, None] * DH + d, acc, mask=(h < GROUP)[:, None] & d_mask)
        tl.store(max_ptr + head, m, mask=h < GROUP)
        tl.store(sum_ptr + head, l, mask=h < GROUP)
    signal(task_ptr, event_ptr, PORTABLE)


# ---- ops/attention_merge.py ----


@triton.jit
def attention_merge_tile(
    task_ptr, event_ptr, control_ptr, epoch,
    acc_ptr, max_ptr, sum_ptr, step_ptr, out_ptr,  # in, in, in, in, out
    head,
    H: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DH)
    num_blocks = (tl.load(step_ptr) + BLOCK_KV - 1) // BLOCK_KV
    has_tokens = split * num_blocks // NUM_SPLITS < (split + 1) * num_blocks // NUM_SPLITS
    mask = (split < NUM_SPLITS) & (has_tokens | (split == NUM_SPLITS - 1))
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    m = tl.load(max_ptr + split * H + head, mask=mask, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m, axis=0))
    total = tl.sum(weight * tl.load(sum_ptr + split * H + head, mask=mask, other=0.0), axis=0)
    acc = tl.load(
        acc_ptr + (split * H + head)[:, None] * DH + d[None, :], mask=mask[:, None] & (d < DH)[None, :], other=0.0
    )
    out = tl.sum(acc * (weight / total)[:, None], axis=0)
    tl.store(out_ptr + head * DH + d, out.to(out_ptr.dtype.element_ty), mask=d < DH)
    signal(task_ptr, event_ptr, PORTABLE)


# ---- ops/linear_residual.py ----


@triton.jit
def linear_residual_tile(
    task_ptr, event_ptr, control_ptr, epoch, carry,
    x_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows, part,
    N: tl.constexpr, K_PART: tl.constexpr, ROW_STRIDE: tl.constexpr, RESIDUAL_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PORTABLE: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    for block in tl.range(0, (num_rows + 2 * BLOCK_N - 1) // (2 * BLOCK_N), num_stages=1):
        row = block * 2 * BLOCK_N + rows
        mask0 = row < num_rows
        mask1 = row + BLOCK_N < num_rows
        adds0 = mask0 & (part == 0)
        adds1 = mask1 & (part == 0)
        base0 = tl.zeros([BLOCK_N], tl.float32)
        base1 = tl.zeros([BLOCK_N], tl.float32)
        for residual_part in tl.static_range(RESIDUAL_PARTS):
            ptr = residual_ptr + residual_part * N + row0 + row
            base0 += tl.load(ptr, mask=adds0, other=0.0)
            base1 += tl.load(ptr + BLOCK_N, mask=adds1, other=0.0)
        if HAS_BIAS:
            base0 += tl.load(bias_ptr + row0 + row, mask=adds0, other=0.0).to(tl.float32)
            base1 += tl.load(bias_ptr + row0 + row + BLOCK_N, mask=adds1, other=0.0).to(tl.float32)
        carry, y0, y1, squares = dot_row_block(
            carry, x_ptr + part * K_PART, x_ptr,
            weight_addr, BLOCK_N * ROW_STRIDE * (WEIGHT.primitive_bitwidth // 8), block, num_rows,
            K_PART, ROW_STRIDE, BLOCK_N, 1, 0, False, WEIGHT, ALIGN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        ptr = y_ptr + part * N + row0 + row
        tl.store(ptr, base0 + y0, mask=mask0)
        tl.store(ptr + BLOCK_N, base1 + y1, mask=mask1)
    signal(task_ptr, event_ptr, PORTABLE)
    return load_next(task_ptr, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)


# ---- ops/rmsnorm_gated_linear.py ----


@triton.jit
def rmsnorm_gated_linear_tile(
    task_ptr, event_ptr, control_ptr, epoch, carry,
    x_ptr, gain_ptr, gate_addr, up_addr, h_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
    PORTABLE: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        carry, gate, up, squares = dot_row_block(
            carry, x_ptr, gain_ptr, gate_addr, up_addr - gate_addr, block, num_rows,
            D, D, 0, PARTS, D, True, WEIGHT, ALIGN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rstd = tl.rsqrt(squares / D + EPS)
        gate *= rstd
        h = gate / (1.0 + tl.exp(-gate)) * (up * rstd)
        row = block * BLOCK_N + rows
        tl.store(h_ptr + row0 + row, h.to(h_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task_ptr, event_ptr, PORTABLE)
    return load_next(task_ptr, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)


# ---- ops/lm_head.py ----


@triton.jit
def lm_head_tile(
    task_ptr, event_ptr, control_ptr, logits_ptr, epoch, carry,
    x_ptr, gain_ptr, weight_addr, step_ptr, best_value_ptr, best_index_ptr,  # in, in, in, in, out, out
    task, row0, num_rows,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
    PORTABLE: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_row = tl.zeros([BLOCK_N], tl.int32)
    step = tl.load(step_ptr)
    wanted = step >= tl.load(control_ptr + CONTROL_LOGITS_FROM)
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    num_blocks = tl.where(wanted, (num_rows + 2 * BLOCK_N - 1) // (2 * BLOCK_N), 0)
    for block in tl.range(0, num_blocks, num_stages=1):
        carry, y0, y1, squares = dot_row_block(
            carry, x_ptr, gain_ptr, weight_addr, BLOCK_N * D * (WEIGHT.primitive_bitwidth // 8), block, num_rows,
            D, D, BLOCK_N, PARTS, D, True, WEIGHT, ALIGN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rstd = tl.rsqrt(squares / D + EPS)
        y0 *= rstd
        y1 *= rstd
        row = block * 2 * BLOCK_N + rows
        mask0 = row < num_rows
        mask1 = row + BLOCK_N < num_rows
        tl.store(row_ptr + row0 + row, y0, mask=mask0)
        tl.store(row_ptr + row0 + row + BLOCK_N, y1, mask=mask1)
        best_row = tl.where(mask0 & (y0 > best), row, best_row)
        best = tl.where(mask0 & (y0 > best), y0, best)
        best_row = tl.where(mask1 & (y1 > best), row + BLOCK_N, best_row)
        best = tl.where(mask1 & (y1 > best), y1, best)
    value = tl.max(best, axis=0)
    tl.store(best_value_ptr + task, value)
    tl.store(best_index_ptr + task, row0 + tl.min(tl.where(best == value, best_row, 0x7FFFFFFF), axis=0))
    signal(task_ptr, event_ptr, PORTABLE)
    return load_next(task_ptr, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)


# ---- ops/argmax.py ----


@triton.jit
def publish_token(mailbox_ptr, num_tokens, token, PORTABLE: tl.constexpr):
    """The token, then the count that makes it visible to the host (release at system scope)."""
    tl.store(mailbox_ptr + MAILBOX_TOKENS + num_tokens, token)
    if PORTABLE:
        tl.debug_barrier()
        tl.atomic_add(mailbox_ptr + MAILBOX_NUM_TOKENS, 1, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(  # a plain store: not every host lets a GPU do atomics on its memory
            """{
            .reg .pred p; .reg .u32 tid; .reg .s64 count;
            bar.sync 0; mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0;
            cvt.s64.s32 count, $2; @!p st.release.sys.global.s64 [$1], count; mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [(mailbox_ptr + MAILBOX_NUM_TOKENS).to(tl.int64), num_tokens + 1],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def argmax_tile(
    task_ptr, event_ptr, control_ptr, mailbox_ptr, epoch,
    best_value_ptr, best_index_ptr, tokens_ptr, step_ptr,  # in, in, out, in and out
    NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    parts = tl.arange(0, BLOCK)
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    stop_asked = tl.load(mailbox_ptr + MAILBOX_STOP, volatile=True) != 0  # travels over the bus while we wait
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    step = tl.load(step_ptr)
    value = tl.load(best_value_ptr + parts, mask=parts < NUM_PARTS, other=float("-inf"))
    index = tl.load(best_index_ptr + parts, mask=parts < NUM_PARTS, other=0x7FFFFFFF)
    best = tl.max(value, axis=0)
    token = tl.min(tl.where(value == best, index, 0x7FFFFFFF), axis=0).to(tl.int64)
    stop = (step >= last_step) | stop_asked
    if step + 1 >= num_known:
        tl.store(tokens_ptr + step + 1, token)
        publish_token(mailbox_ptr, step + 1 - num_known, token, PORTABLE)
        stop = stop | (tl.sum((is_eos_id & (eos == token)).to(tl.int32), axis=0) > 0)
    tl.debug_barrier()  # every thread has read step
    tl.store(step_ptr, step + 1)
    tl.store(control_ptr + CONTROL_STOP, stop.to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))
    signal(task_ptr, event_ptr, PORTABLE)


# ---- scheduler/device.py ----


@triton.jit
def pointer_field(task_ptr, word, DTYPE: tl.constexpr):
    """A pointer of the task descriptor; the compiler learns its 16-byte alignment from the arithmetic."""
    return tl.multiple_of((tl.load(task_ptr + word) // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def int_field(task_ptr, word):
    return tl.load(task_ptr + word).to(tl.int32)


# ---- megakernel ----


@triton.jit
def megakernel(queue_ptr, queue_start_ptr, event_ptr, control_ptr, logits_ptr, mailbox_ptr, first_worker):
    """Worker w runs tasks queue_start[w] to queue_start[w + 1] of the queue once per epoch, until told to stop."""
    worker = tl.program_id(0) + first_worker
    first_task = tl.load(queue_start_ptr + worker).to(tl.int64)
    num_tasks = tl.load(queue_start_ptr + worker + 1) - first_task.to(tl.int32)
    worker_queue_ptr = queue_ptr + first_task * TASK_WORDS
    epoch = tl.load(control_ptr + CONTROL_FIRST_EPOCH).to(tl.int32)
    step_count = tl.load(control_ptr + CONTROL_STEP_COUNT).to(tl.int32)
    carry = load_next(worker_queue_ptr + (num_tasks - 1) * TASK_WORDS, tl.bfloat16, ALIGN, BLOCK_N, BLOCK_K)
    running = num_tasks > 0
    while running:
        # nothing is hoisted out of the variants: it would hold registers in all of them
        for slot in tl.range(0, num_tasks, num_stages=1, disable_licm=True):
            task_ptr = worker_queue_ptr + slot * TASK_WORDS
            variant = int_field(task_ptr, TASK_VARIANT)
            if variant == 0:  # embedding
                embedding_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    tokens_ptr=pointer_field(task_ptr, 10, tl.int64),
                    step_ptr=pointer_field(task_ptr, 11, tl.int32),
                    table_ptr=pointer_field(task_ptr, 12, tl.bfloat16),
                    y_ptr=pointer_field(task_ptr, 13, tl.float32),
                    col0=int_field(task_ptr, 14),
                    num_cols=int_field(task_ptr, 15),
                    V=1024,
                    D=256,
                    BLOCK_D=256,
                    PORTABLE=PORTABLE,
                )
            elif variant == 1:  # rmsnorm_linear
                carry = rmsnorm_linear_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    carry,
                    x_ptr=pointer_field(task_ptr, 10, tl.float32),
                    gain_ptr=pointer_field(task_ptr, 11, tl.bfloat16),
                    weight_addr=tl.load(task_ptr + 12),
                    bias_ptr=pointer_field(task_ptr, 13, tl.bfloat16),
                    y_ptr=pointer_field(task_ptr, 14, tl.bfloat16),
                    row0=int_field(task_ptr, 15),
                    num_rows=int_field(task_ptr, 16),
                    D=256,
                    PARTS=1,
                    EPS=1e-06,
                    HAS_BIAS=False,
                    PORTABLE=PORTABLE,
                    WEIGHT=tl.bfloat16,
                    ALIGN=ALIGN,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 2:  # attention
                attention_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    qkv_ptr=pointer_field(task_ptr, 10, tl.bfloat16),
                    q_gain_ptr=pointer_field(task_ptr, 11, tl.bfloat16),
                    k_gain_ptr=pointer_field(task_ptr, 12, tl.bfloat16),
                    cos_ptr=pointer_field(task_ptr, 13, tl.float32),
                    sin_ptr=pointer_field(task_ptr, 14, tl.float32),
                    page_table_ptr=pointer_field(task_ptr, 15, tl.int32),
                    step_ptr=pointer_field(task_ptr, 16, tl.int32),
                    k_cache_ptr=pointer_field(task_ptr, 17, tl.bfloat16),
                    v_cache_ptr=pointer_field(task_ptr, 18, tl.bfloat16),
                    acc_ptr=pointer_field(task_ptr, 19, tl.float32),
                    max_ptr=pointer_field(task_ptr, 20, tl.float32),
                    sum_ptr=pointer_field(task_ptr, 21, tl.float32),
                    kv_head=int_field(task_ptr, 22),
                    split=int_field(task_ptr, 23),
                    H=4,
                    HKV=2,
                    DH=64,
                    NUM_SPLITS=66,
                    PAGE_SIZE=128,
                    SCALE=0.125,
                    NORM=True,
                    EPS=1e-06,
                    BLOCK_H=16,
                    BLOCK_DH=64,
                    BLOCK_KV=64,
                    PORTABLE=PORTABLE,
                )
            elif variant == 3:  # attention_merge
                attention_merge_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    acc_ptr=pointer_field(task_ptr, 10, tl.float32),
                    max_ptr=pointer_field(task_ptr, 11, tl.float32),
                    sum_ptr=pointer_field(task_ptr, 12, tl.float32),
                    step_ptr=pointer_field(task_ptr, 13, tl.int32),
                    out_ptr=pointer_field(task_ptr, 14, tl.bfloat16),
                    head=int_field(task_ptr, 15),
                    H=4,
                    DH=64,
                    NUM_SPLITS=66,
                    BLOCK_S=128,
                    BLOCK_DH=64,
                    BLOCK_KV=64,
                    PORTABLE=PORTABLE,
                )
            elif variant == 4:  # linear_residual
                carry = linear_residual_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    carry,
                    x_ptr=pointer_field(task_ptr, 10, tl.bfloat16),
                    weight_addr=tl.load(task_ptr + 11),
                    bias_ptr=pointer_field(task_ptr, 12, tl.bfloat16),
                    residual_ptr=pointer_field(task_ptr, 13, tl.float32),
                    y_ptr=pointer_field(task_ptr, 14, tl.float32),
                    row0=int_field(task_ptr, 15),
                    num_rows=int_field(task_ptr, 16),
                    part=int_field(task_ptr, 17),
                    N=256,
                    K_PART=256,
                    ROW_STRIDE=256,
                    RESIDUAL_PARTS=1,
                    HAS_BIAS=False,
                    PORTABLE=PORTABLE,
                    WEIGHT=tl.bfloat16,
                    ALIGN=ALIGN,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 5:  # rmsnorm_gated_linear
                carry = rmsnorm_gated_linear_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    carry,
                    x_ptr=pointer_field(task_ptr, 10, tl.float32),
                    gain_ptr=pointer_field(task_ptr, 11, tl.bfloat16),
                    gate_addr=tl.load(task_ptr + 12),
                    up_addr=tl.load(task_ptr + 13),
                    h_ptr=pointer_field(task_ptr, 14, tl.bfloat16),
                    row0=int_field(task_ptr, 15),
                    num_rows=int_field(task_ptr, 16),
                    D=256,
                    PARTS=1,
                    EPS=1e-06,
                    PORTABLE=PORTABLE,
                    WEIGHT=tl.bfloat16,
                    ALIGN=ALIGN,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 6:  # linear_residual
                carry = linear_residual_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    epoch,
                    carry,
                    x_ptr=pointer_field(task_ptr, 10, tl.bfloat16),
                    weight_addr=tl.load(task_ptr + 11),
                    bias_ptr=pointer_field(task_ptr, 12, tl.bfloat16),
                    residual_ptr=pointer_field(task_ptr, 13, tl.float32),
                    y_ptr=pointer_field(task_ptr, 14, tl.float32),
                    row0=int_field(task_ptr, 15),
                    num_rows=int_field(task_ptr, 16),
                    part=int_field(task_ptr, 17),
                    N=256,
                    K_PART=768,
                    ROW_STRIDE=768,
                    RESIDUAL_PARTS=1,
                    HAS_BIAS=False,
                    PORTABLE=PORTABLE,
                    WEIGHT=tl.bfloat16,
                    ALIGN=ALIGN,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 7:  # lm_head
                carry = lm_head_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    logits_ptr,
                    epoch,
                    carry,
                    x_ptr=pointer_field(task_ptr, 10, tl.float32),
                    gain_ptr=pointer_field(task_ptr, 11, tl.bfloat16),
                    weight_addr=tl.load(task_ptr + 12),
                    step_ptr=pointer_field(task_ptr, 13, tl.int32),
                    best_value_ptr=pointer_field(task_ptr, 14, tl.float32),
                    best_index_ptr=pointer_field(task_ptr, 15, tl.int32),
                    task=int_field(task_ptr, 16),
                    row0=int_field(task_ptr, 17),
                    num_rows=int_field(task_ptr, 18),
                    D=256,
                    PARTS=1,
                    EPS=1e-06,
                    PORTABLE=PORTABLE,
                    WEIGHT=tl.bfloat16,
                    ALIGN=ALIGN,
                    BLOCK_N=BLOCK_N,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 8:  # argmax
                argmax_tile(
                    task_ptr,
                    event_ptr,
                    control_ptr,
                    mailbox_ptr,
                    epoch,
                    best_value_ptr=pointer_field(task_ptr, 10, tl.float32),
                    best_index_ptr=pointer_field(task_ptr, 11, tl.int32),
                    tokens_ptr=pointer_field(task_ptr, 12, tl.int64),
                    step_ptr=pointer_field(task_ptr, 13, tl.int32),
                    NUM_PARTS=132,
                    BLOCK=256,
                    PORTABLE=PORTABLE,
                )
        # the step event
        wait_counter(event_ptr, epoch * step_count, -1 - worker, control_ptr, PORTABLE)
        running = (tl.load(control_ptr + CONTROL_STOP) == 0) & (tl.load(control_ptr + CONTROL_ABORT) == 0)
        epoch += 1
