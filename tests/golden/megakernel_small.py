"""A persistent decode kernel made by tri_mpk. Launch `megakernel` cooperatively, one program per worker.

variant 0: embedding(V=1024, D=256, BLOCK_D=256)
variant 1: rmsnorm_linear(D=256, EPS=1e-06, HAS_BIAS=False, SLOT_ROWS=16, BLOCK_N=256)
variant 2: attention(H=4, HKV=2, DH=64, NUM_SPLITS=66, SPLIT_TOKENS=128, PAGE_SIZE=128, SCALE=0.125, NORM=True, EPS=1e-06, BY_WARPS=True, BLOCK_H=8, BLOCK_DH=64, BLOCK_KV=32)
variant 3: attention_output(K=256, DH=64, NUM_SPLITS=66, SPLIT_TOKENS=128, HAS_BIAS=False, SLOT_ROWS=16, BLOCK_N=256)
variant 4: rmsnorm_gated_linear(D=256, EPS=1e-06, SLOT_ROWS=16, BLOCK_N=128)
variant 5: linear_residual(K=768, HAS_BIAS=False, SLOT_ROWS=16, BLOCK_N=256)
variant 6: lm_head(D=256, EPS=1e-06, SLOT_ROWS=16, BLOCK_N=256)
variant 7: sample(NUM_PARTS=132, V=1024, TURN=1024)
"""

import triton
import triton.language as tl

TASK_WORDS = tl.constexpr(24)  # int64 words of a task descriptor
PORTABLE = tl.constexpr(False)  # waits and signals as Triton atomics, not PTX
RING = tl.constexpr(24576)  # bytes of a slot of the weight rings; 0: plain loads
PREFETCH = tl.constexpr(524288)  # of weights into L2, while attention is awaited
BLOCK_K = tl.constexpr(256)  # columns of a weight tile, where there is no ring

MAILBOX_STOP = tl.constexpr(0)  # set by the host: stop at the next step that looks
MAILBOX_NUM_TOKENS = tl.constexpr(1)  # set by the kernel: so many tokens were chosen in this launch
MAILBOX_TOKENS = tl.constexpr(2)  # the tokens, in order
STOP_INTERVAL = tl.constexpr(16)  # steps between two looks at MAILBOX_STOP, each a journey over the bus
STATE_BYTES = tl.constexpr(16384)
MAX_MATRICES = tl.constexpr(4)  # that one prefetch reaches into
BARRIERS_OFFSET = tl.constexpr(512)
SQUARES_OFFSET = tl.constexpr(768)
PIECES_OFFSET = tl.constexpr(832)
SUMS_OFFSET = tl.constexpr(1024)
SUMS_ROWS = tl.constexpr(256)  # per warp
SUMS_BYTES = tl.constexpr(16384)
RING_OFFSET = tl.constexpr(19456)
STREAM_BYTES = tl.constexpr(32)
CHOICE_SEED = tl.constexpr(1)
CHOICE_TEMPERATURE = tl.constexpr(2)
CHOICE_TOP_K = tl.constexpr(3)  # 0: off
CHOICE_TOP_P = tl.constexpr(4)  # 1.0: off
CHOICE_MIN_P = tl.constexpr(5)  # 0.0: off
CHOICE_REPETITION_PENALTY = tl.constexpr(6)  # 1.0: off
CHOOSE_BEST = tl.constexpr(0)  # of what lm_head's tasks found
CHOOSE_AT_RANDOM = tl.constexpr(2)
SLOTS = tl.constexpr(512)
LISTED = tl.constexpr(1024)  # tokens that a list holds
MAX_VOCAB = tl.constexpr(1 << 19)  # a slot's tokens fit where a list's do
SURE = tl.constexpr(256)  # of the slots: the bound of a larger top-k would be too low for a list
KEY_BITS = tl.constexpr(20)  # of a sort key, for the token: more than there are
NUM_KEYS = tl.constexpr(1 << 20)
PARTIAL = tl.constexpr(0)  # a block's numbers on their way to one
SLOT = tl.constexpr(512)  # a number per slot
WEIGHT = tl.constexpr(1024)  # of the tokens that are left
FOUND = tl.constexpr(2048)  # scores as they are found
SORTED = tl.constexpr(3072)
TOKEN = tl.constexpr(0)  # those of WEIGHT and of SORTED
FOUND_TOKEN = tl.constexpr(1024)
NUM_FOUND = tl.constexpr(2048)
WARPS = tl.constexpr(16)
LANES = tl.constexpr(32)
TASK_VARIANT = tl.constexpr(0)  # variant | task index << 32
TASK_WAIT = tl.constexpr(1)  # event counter to wait for: its index in event_ptr
TASK_WAIT_COUNT = tl.constexpr(2)  # signals per step; 0: nothing to wait for
TASK_SIGNALS = tl.constexpr(3)  # two words, four int32 counter indices, -1 where unused
TASK_STREAM = tl.constexpr(5)  # four words: the weights that this task reads, a WeightStream or a PanelStream
TASK_STREAM_INDEX = tl.constexpr(9)  # which of the worker's streams that is (-1: none) | how many it has << 32
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
CONTROL_SHARED_BASE = tl.constexpr(14)  # shared memory from this byte on is ours, not the compiler's
CONTROL_RING_SLOTS = tl.constexpr(15)  # slots of the weight ring
CONTROL_EOS = tl.constexpr(16)  # 32 words
CONTROL_FIRST_STEP = tl.constexpr(49)  # position of the first token to process
CONTROL_CHOICE = tl.constexpr(50)  # how tokens are chosen: seven words, see ops/sample.py
DESCRIPTOR_BYTES = tl.constexpr(256)


# ---- scheduler/device.py ----


@triton.jit
def task_word(task, word, PORTABLE: tl.constexpr):
    if PORTABLE:
        return tl.load(task + word)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b64 $0, [$1];", "=l,r", [task + word * 8], dtype=tl.int64, is_pure=True, pack=1
        )


@triton.jit
def int_field(task, word, PORTABLE: tl.constexpr):
    return task_word(task, word, PORTABLE).to(tl.int32)


@triton.jit
def poll_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr, SCOPE: tl.constexpr):
    """Until `counter - wanted >= 0` as signed 32-bit numbers, so that counters may wrap around.

    SCOPE: "gpu", or "sys" where signals come from other ranks too.
    """
    if PORTABLE:
        bound = tl.load(control_ptr + CONTROL_WAIT_BOUND)
        polls = bound * 0
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope=SCOPE)
        while (seen - wanted < 0) & (polls < bound):
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope=SCOPE)
            aborted = tl.load(control_ptr + CONTROL_ABORT, volatile=True) != 0
            polls = tl.where(aborted, bound, polls + 1)
        if seen - wanted < 0:  # noqa: SIM102  Triton evaluates both sides of `and`
            if tl.atomic_cas(control_ptr + CONTROL_ABORT, bound * 0, bound * 0 + 1, sem="relaxed", scope="gpu") == 0:
                tl.store(control_ptr + CONTROL_STUCK_TASK, task_idx)
                tl.store(control_ptr + CONTROL_STUCK_SEEN, seen)
                tl.store(control_ptr + CONTROL_STUCK_WANTED, wanted)
        tl.debug_barrier()
    else:
        # Byte offsets are 8 x the CONTROL_ words above. Times are in units of 1024 ns, to hold one register through it.
        tl.inline_asm_elementwise(
            f"""{{
            .reg .pred p; .reg .s32 seen, left, polls; .reg .u32 tid, flag, start, time, limit; .reg .u64 wide;
            mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0; @p bra DONE;
            ld.acquire.{SCOPE}.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            mov.u64 wide, %globaltimer; shr.u64 wide, wide, 10; cvt.u32.u64 start, wide;
            MORE: mov.s32 polls, 0;
            POLL: ld.acquire.{SCOPE}.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            add.s32 polls, polls, 1; setp.lt.s32 p, polls, 1000; @p bra POLL;
            ld.relaxed.gpu.global.u32 flag, [$3 + 72]; setp.ne.u32 p, flag, 0; @p bra DONE;
            mov.u64 wide, %globaltimer; shr.u64 wide, wide, 10; cvt.u32.u64 time, wide; sub.u32 time, time, start;
            ld.global.u64 wide, [$3 + 40]; shr.u64 wide, wide, 10; min.u64 wide, wide, 0xfffffffe;
            cvt.u32.u64 limit, wide; setp.lt.u32 p, time, limit; @p bra MORE;
            atom.relaxed.gpu.global.cas.b32 flag, [$3 + 72], 0, 1; setp.ne.u32 p, flag, 0; @p bra DONE;
            cvt.s64.s32 wide, $4; st.global.s64 [$3 + 80], wide;
            cvt.s64.s32 wide, seen; st.global.s64 [$3 + 88], wide;
            cvt.s64.s32 wide, $2; st.global.s64 [$3 + 96], wide;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }}""",
            "=r,l,r,l,r",
            [counter_ptr.to(tl.int64), wanted, control_ptr.to(tl.int64), task_idx],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr):
    """Until this many signals have come, all of them from this GPU."""
    poll_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE, "gpu")


@triton.jit
def wait(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """What the producers of this task's event wrote may be read afterwards."""
    count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
    if count > 0:
        task_idx = (task_word(task, TASK_VARIANT, PORTABLE) >> 32).to(tl.int32)
        counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
        wait_counter(counter_ptr, epoch * count, task_idx, control_ptr, PORTABLE)


@triton.jit
def signal(task, event_ptr, PORTABLE: tl.constexpr):
    """All that this worker wrote may be read by whoever waits for this task's events. The next descriptor is there."""
    first = task_word(task, TASK_SIGNALS, PORTABLE)
    second = task_word(task, TASK_SIGNALS + 1, PORTABLE)
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
            cp.async.wait_all;
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
    task, event_ptr, control_ptr, epoch, step,
    tokens_ptr, table_ptr, y_ptr,  # in, in, out
    col0, num_cols,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    token = tl.load(tokens_ptr + step)
    token = tl.minimum(tl.maximum(token, 0), V - 1)  # after an abort anything may stand there
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    y = tl.load(table_ptr + token * D + col0 + cols, mask=mask, other=0.0)
    tl.store(y_ptr + col0 + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    signal(task, event_ptr, PORTABLE)


# ---- ops/gemv.py ----


@triton.constexpr_function
def segments_of(slot_rows):
    """Into how many segments a warp cuts the columns of each of so many rows. A's rows are 16, whatever they hold."""
    return 16 >> (slot_rows - 1).bit_length()


# ---- ops/warps.py ----


@triton.jit
def lane_place():
    """[WARPS, LANES]: warp, lane // 4 and lane % 4, the g and j by which the tensor cores lay out matrices."""
    zero = tl.zeros([WARPS, LANES], tl.int32)
    warp = tl.arange(0, WARPS)[:, None] + zero
    lane = tl.arange(0, LANES)[None, :] + zero
    return warp, lane // 4, lane % 4


# ---- ops/gemv.py ----


@triton.jit
def segment_columns(variant, block: tl.constexpr, K: tl.constexpr, SLOT_ROWS: tl.constexpr):
    """[WARPS, LANES]: the first of the 8 columns that a lane has of 32, and whether there are any.

    `variant`: the lane's segment of its warp's columns. Odd ones take pairs of blocks in the other order, so that lanes
    that read at the same time find their words in other banks.
    """
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    COLS: tl.constexpr = (K + 128 * SEGMENTS - 1) // (128 * SEGMENTS) * 8
    warp, g, j = lane_place()
    other: tl.constexpr = 1 if (COLS + 31) // 32 % 2 == 0 else 0  # a block without a partner stays where it is
    within = 32 * (block ^ (variant % 2 * other)) + 8 * j
    col = (warp * SEGMENTS + variant % SEGMENTS) * COLS + within
    return col, (within < COLS) & (col < K)


@triton.jit
def own_columns(part: tl.constexpr, K: tl.constexpr, SLOT_ROWS: tl.constexpr):
    """`segment_columns` of part `part` of what a thread has of x, as B wants it: its column is the lane's g."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
    warp, g, j = lane_place()
    if SEGMENTS >= 8:
        variant = g + part // BLOCKS * 8
    elif SEGMENTS == 4:
        variant = g // 2
    else:
        variant = g // 2 % 2
    return segment_columns(variant, part % BLOCKS, K, SLOT_ROWS)


# ---- ops/warps.py ----


@triton.jit
def load_words(ptr, wanted):
    """16 bytes of global memory as four words; zeros where `wanted` is 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r",
        [ptr.to(tl.int64), wanted],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def low_half(word, DTYPE: tl.constexpr):
    """The first of two 16-bit numbers in a word, in fp32."""
    if tl.bfloat16 == DTYPE:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def load_eight(ptr, wanted):
    """Eight elements from each pointer on, in fp32; zeros where `wanted` is 0."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    a, b, c, d = load_words(ptr, wanted)
    if tl.float32 == DTYPE:
        e, f, g, h = load_words(ptr + 4, wanted)
        return (
            a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True),
            c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True),
            e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True),
            g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True),
        )  # fmt: skip
    else:
        return (
            low_half(a, DTYPE), high_half(a, DTYPE), low_half(b, DTYPE), high_half(b, DTYPE),
            low_half(c, DTYPE), high_half(c, DTYPE), low_half(d, DTYPE), high_half(d, DTYPE),
        )  # fmt: skip


# ---- ops/gemv.py ----


@triton.jit
def load_segment(ptr, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """A thread's part of a vector [K] in fp32 registers. A gain is loaded so before the wait, activations after it."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        PARTS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS) * (2 if SEGMENTS == 16 else 1)
        values = ()
        for part in tl.static_range(PARTS):
            col, wanted = own_columns(part, K, SLOT_ROWS)
            values = values + load_eight(ptr + col, wanted.to(tl.int32))
        return values
    else:
        return ()


# ---- ops/warps.py ----


@triton.jit
def write_float(address, x):
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,f", [address, x], dtype=tl.int32, is_pure=False, pack=1
    )


# ---- ops/gemv.py ----


@triton.jit
def scale_segment(ring, x, gain, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """x * gain, part by part; leaves the sums of x^2 of all warps' columns in shared memory."""
    if RING:
        scaled = ()
        squares = tl.zeros([WARPS, LANES], tl.float32)
        for i in tl.static_range(len(x)):
            squares += x[i] * x[i]
            scaled = scaled + (x[i] * gain[i],)
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        if SEGMENTS < 8:  # so many lanes have the same columns
            squares *= SEGMENTS / 8.0
        write_float(ring[0] + SQUARES_OFFSET + tl.arange(0, WARPS) * 4, tl.sum(squares, axis=1))
        return scaled
    else:
        return ()


@triton.jit
def end_rows(RING: tl.constexpr):
    """Between `stream_rows` and `row_sums`, and between `row_sums` and the next `stream_rows`."""
    if RING:
        tl.debug_barrier()


# ---- ops/warps.py ----


@triton.jit
def pack_halves(low, high, DTYPE: tl.constexpr):
    """Two fp32 numbers as one word of two 16-bit ones."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


# ---- ops/gemv.py ----


@triton.jit
def split_segment(x, SLOT_ROWS: tl.constexpr, WEIGHT: tl.constexpr):
    """B's words, four per part: those of x rounded and those of the rest; of one B for both, what column g is of."""
    UNIT: tl.constexpr = 1.0 if tl.bfloat16 == WEIGHT else 16.0  # float16 ends at 65504: see `multiply_slot`
    warp, g, j = lane_place()
    rounded = ()
    rest = ()
    for i in tl.static_range(0, len(x), 2):
        a = x[i] / UNIT
        b = x[i + 1] / UNIT
        word = pack_halves(a, b, WEIGHT)
        more = pack_halves(a - low_half(word, WEIGHT), b - high_half(word, WEIGHT), WEIGHT)
        if segments_of(SLOT_ROWS) <= 4:
            word = tl.where(g % 2 == 0, word, more)
        rounded = rounded + (word,)
        rest = rest + (more,)
    return rounded, rest


@triton.jit
def await_slot(smem, slot, phase):
    """Until the slot is full."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra POLL;
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [smem + BARRIERS_OFFSET + slot * 8, phase],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# ---- ops/warps.py ----


@triton.jit
def read_words(address, wanted):
    """16 bytes of shared memory as four words; zeros where `wanted` is 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,r,r",
        [address, wanted],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


# ---- ops/gemv.py ----


@triton.jit
def read_slot(ring, variant, row, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """A lane's words of the slot to read, once it is full: four of A's row g and four of row g + 8 per block."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
    await_slot(ring[0], ring[2], ring[3])
    address = ring[0] + RING_OFFSET + ring[2] * RING
    words = ()
    for block in tl.static_range(BLOCKS):
        col, has_columns = segment_columns(variant, block, K, SLOT_ROWS)
        wanted = has_columns & (row < SLOT_ROWS)
        words = words + read_words(address + (row * K + col) * 2, wanted.to(tl.int32))
        if SEGMENTS == 16:
            col, has_columns = segment_columns(variant + 8, block, K, SLOT_ROWS)
        lower = row + 8 // SEGMENTS
        wanted = has_columns & (lower < SLOT_ROWS)
        words = words + read_words(address + (lower * K + col) * 2, wanted.to(tl.int32))
    return words


@triton.jit
def stream_word(smem, stream, offset):
    """Of a stream: its bytes (per matrix) at 16, the stream that follows at 24."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];",
        "=r,r",
        [smem - (stream + 1) * STREAM_BYTES + offset],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_stream(smem, stream):
    """The cursor at the start of the worker's stream number `stream`: (stream, address, bytes left, second, slot)."""
    start, second, num_bytes, slot_bytes = tl.inline_asm_elementwise(
        "ld.shared.v2.b64 {$0, $1}, [$4]; ld.shared.v2.b32 {$2, $3}, [$4 + 16];",
        "=l,=l,=r,=r,r",
        [smem - (stream + 1) * STREAM_BYTES],
        dtype=(tl.int64, tl.int64, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )
    return stream, start, num_bytes, second, slot_bytes


@triton.jit
def advance(smem, cursor, num_bytes):
    """The cursor so many bytes on, but not beyond the end of a matrix."""
    stream, addr, left, second, slot_bytes = cursor
    addr += num_bytes
    left -= num_bytes
    if left <= 0:
        if second != 0:
            addr = second
            second = second * 0
            left = stream_word(smem, stream, 16)
        else:
            stream, addr, left, second, slot_bytes = read_stream(smem, stream_word(smem, stream, 24))
    return (stream, addr, left, second, slot_bytes)


# ---- ops/warps.py ----


@triton.jit
def thread_index():
    return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)


# ---- ops/gemv.py ----


@triton.jit
def request_rows(smem, slot, phase, cursor, RING: tl.constexpr):
    """Copies the rows at the cursor into a slot, once all warps have read it, and moves the cursor on."""
    stream, addr, left, second, slot_bytes = cursor
    tl.inline_asm_elementwise(
        # One thread: lane 0 of the warp whose number the slot has, so that they take turns.
        """{
        .reg .pred p; .reg .u64 policy;
        setp.ne.u32 p, $7, $1; @p bra DONE;
        POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [$2 + 128], $3; @!p bra POLL;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], $6;
        setp.eq.u32 p, $6, 0; @p bra DONE;
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$4], [$5], $6, [$2], policy;
        DONE: mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,l,r,r",
        [
            slot * LANES,
            smem + BARRIERS_OFFSET + slot * 8,
            phase,
            smem + RING_OFFSET + slot * RING,
            addr,
            tl.minimum(left, slot_bytes),
            thread_index(),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    return advance(smem, cursor, slot_bytes)


@triton.jit
def release_slot(ring, RING: tl.constexpr):
    """This warp has read the current slot. The ring moves on, and the slot before is refilled: all warps may have read
    that one.
    """
    smem, slots, slot, phase, cursor = ring
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 p, $2, 0;
        @p mbarrier.arrive.shared::cta.b64 _, [$1 + 128];
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [smem + BARRIERS_OFFSET + slot * 8, thread_index() % LANES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    slot += 1
    if slot == slots:
        slot = slots * 0
        phase ^= 1
    older = slot - 2
    older_phase = phase
    if older < 0:
        older += slots
        older_phase = phase ^ 1
    cursor = request_rows(smem, older, older_phase, cursor, RING)
    return (smem, slots, slot, phase, cursor)


# ---- ops/warps.py ----


@triton.jit
def multiply_add(c, a, b, DTYPE: tl.constexpr):
    """[16, 16] @ [16, 8] of a warp, added to c (four numbers a lane; a are four words, b two)."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
            " {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
            [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
            " {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
            [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


# ---- ops/gemv.py ----


@triton.jit
def multiply_slot(words, rounded, rest, SLOT_ROWS: tl.constexpr, BLOCKS: tl.constexpr, WEIGHT: tl.constexpr):
    """What a lane has of the sums of A's rows g and g + 8: all of its segment in lanes where j is B's column."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    UNIT: tl.constexpr = 1.0 if tl.bfloat16 == WEIGHT else 16.0
    warp, g, j = lane_place()
    zero = tl.zeros([WARPS, LANES], tl.float32)
    c = (zero, zero, zero, zero)
    d = (zero, zero, zero, zero)
    for block in tl.static_range(BLOCKS):
        for i in tl.static_range(2):  # words 2 i and 2 i + 1 of the four that a lane has of a row
            upper = words[8 * block + 2 * i : 8 * block + 2 * i + 2]
            lower = words[8 * block + 2 * i + 4 : 8 * block + 2 * i + 6]
            a = (upper[0], lower[0], upper[1], lower[1])
            x = rounded[4 * block + 2 * i : 4 * block + 2 * i + 2]
            x_rest = rest[4 * block + 2 * i : 4 * block + 2 * i + 2]
            if SEGMENTS == 16:
                c = multiply_add(multiply_add(c, a, x, WEIGHT), a, x_rest, WEIGHT)
                x = rounded[4 * (BLOCKS + block) + 2 * i : 4 * (BLOCKS + block) + 2 * i + 2]
                x_rest = rest[4 * (BLOCKS + block) + 2 * i : 4 * (BLOCKS + block) + 2 * i + 2]
                d = multiply_add(multiply_add(d, a, x, WEIGHT), a, x_rest, WEIGHT)
            elif SEGMENTS == 8:
                c = multiply_add(c, a, x, WEIGHT)
                d = multiply_add(d, a, x_rest, WEIGHT)
            elif i == 0:
                c = multiply_add(c, a, x, WEIGHT)
            else:
                d = multiply_add(d, a, x, WEIGHT)
    if SEGMENTS == 16:  # A's rows g + 8 are segments g + 8, which only d has
        upper = tl.where(g % 2 == 0, c[0], c[1])
        lower = tl.where(g % 2 == 0, d[2], d[3])
    elif SEGMENTS == 8:
        upper = tl.where(g % 2 == 0, c[0] + d[0], c[1] + d[1])
        lower = tl.where(g % 2 == 0, c[2] + d[2], c[3] + d[3])
    else:
        upper = (c[0] + d[0]) + (c[1] + d[1])
        lower = (c[2] + d[2]) + (c[3] + d[3])
    return upper * UNIT, lower * UNIT


# ---- ops/warps.py ----


@triton.jit
def write_float_where(address, x, wanted):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,f,r",
        [address, x, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def shuffle(x, MASK: tl.constexpr):
    """x of the lane whose number is this one's XOR MASK."""
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 31, 0xffffffff;",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


# ---- ops/gemv.py ----


@triton.jit
def write_row_sums(sums, upper, lower, SLOT_ROWS: tl.constexpr):
    """Adds up the segments of each row and writes the sums of a slot's rows. `sums`: address of the warp's first one.

    Neighbours in segment differ in g and, so that j stays B's column, in j: lanes 4 g + j and that XOR a mask.
    """
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    warp, g, j = lane_place()
    if SEGMENTS == 1:
        write_float_where(sums + g * 4, upper, (j == g % 2) & (g < SLOT_ROWS))
        write_float_where(sums + (g + 8) * 4, lower, (j == g % 2) & (g + 8 < SLOT_ROWS))
    else:
        if SEGMENTS == 16:
            total = upper + lower
            total += shuffle(total, 4)
        else:  # even segments go on with A's row g, odd ones with row g + 8
            total = tl.where(g % 2 == 0, upper, lower)
            total += shuffle(tl.where(g % 2 == 0, lower, upper), 4 if SEGMENTS == 8 else 5)
        if SEGMENTS >= 8:
            total += shuffle(total, 9)
            total += shuffle(total, 18)
            write_float_where(sums + g * 4, total, (g < SLOT_ROWS) & (j == 0))
        else:
            if SEGMENTS == 4:
                total += shuffle(total, 10)
            row = g // SEGMENTS + g % 2 * (8 // SEGMENTS)
            write_float_where(sums + row * 4, total, (j == g % SEGMENTS) & (j < 2) & (row < SLOT_ROWS))


@triton.jit
def stream_rows(ring, x, place, num_rows, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Multiplies the next `num_rows` rows of the weight stream; their sums go to rows `place` and on."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
        warp, g, j = lane_place()
        rounded, rest = split_segment(x, SLOT_ROWS, WEIGHT)
        variant = g % 2 if SEGMENTS == 1 else g % SEGMENTS
        row = g // SEGMENTS  # in the slot, of A's row g; that of A's row g + 8 is half a slot on, if it is another one
        sums = ring[0] + SUMS_OFFSET + warp * (SUMS_ROWS * 4) + place * 4
        num_slots = (num_rows + SLOT_ROWS - 1) // SLOT_ROWS
        zero = tl.zeros([WARPS, LANES], tl.int32)
        words = ()
        for _ in tl.static_range(8 * BLOCKS):
            words = words + (zero,)
        if num_slots > 0:
            words = read_slot(ring, variant, row, K, SLOT_ROWS, RING)
            ring = release_slot(ring, RING)
        for slot in tl.range(0, num_slots, num_stages=1):
            now = words
            if slot + 1 < num_slots:
                words = read_slot(ring, variant, row, K, SLOT_ROWS, RING)
                ring = release_slot(ring, RING)
            upper, lower = multiply_slot(now, rounded, rest, SLOT_ROWS, BLOCKS, WEIGHT)
            write_row_sums(sums + slot * (SLOT_ROWS * 4), upper, lower, SLOT_ROWS)
    return ring


# ---- ops/warps.py ----


@triton.jit
def read_float(address):
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1
    )


# ---- ops/gemv.py ----


@triton.jit
def row_sums(
    ring, place, x_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, NORM: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products [BLOCK_N] of row block `block` with x (times gain); any number beyond `num_rows`."""
    if RING:
        address = ring[0] + SUMS_OFFSET + (place + tl.arange(0, BLOCK_N)) * 4
        total = tl.zeros([BLOCK_N], tl.float32)
        for warp in tl.static_range(WARPS):
            total += read_float(address + warp * (SUMS_ROWS * 4))
        return total
    else:
        first = tl.cast(block, tl.int64) * BLOCK_N
        weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
        rows = tl.arange(0, BLOCK_N)[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for col in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = col + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            if NORM:
                x *= tl.load(gain_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + rows * K + cols, mask=(rows < num_rows - first) & (cols < K), other=0.0)
            acc += w.to(tl.float32) * x
        return tl.sum(acc, axis=1)


@triton.jit
def dot_rows(
    ring, x, x_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, NORM: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products [BLOCK_N] of row block `block`, for ops with one matrix."""
    end_rows(RING)
    ring = stream_rows(ring, x, 0, tl.minimum(num_rows - block * BLOCK_N, BLOCK_N), K, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    return ring, row_sums(
        ring, 0, x_ptr, gain_ptr, weight_addr, block, num_rows, K, NORM, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
    )


@triton.jit
def inverse_rms(
    ring, x_ptr, K: tl.constexpr, EPS: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr, BLOCK_K: tl.constexpr
):
    """rsqrt(mean(x^2) + eps). With a ring: after `scale_segment` and a barrier."""
    if RING:
        total = read_float(ring[0] + SQUARES_OFFSET)
        for warp in tl.static_range(1, WARPS):
            total += read_float(ring[0] + SQUARES_OFFSET + warp * 4)
    else:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            squares += x * x
        total = tl.sum(squares, axis=0)
    return tl.rsqrt(total / K + EPS)


# ---- ops/rmsnorm_linear.py ----


@triton.jit
def rmsnorm_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, gain_ptr, weight_addr, bias_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            gain_ptr,
            weight_addr,
            block,
            num_rows,
            D,
            True,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        y *= inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        tl.store(y_ptr + row0 + row, y.to(y_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/attention.py ----


@triton.jit
def active_splits(step, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr):
    """How many of the splits have tokens, when there are `step` older ones."""
    return tl.minimum(tl.maximum((step + SPLIT_TOKENS - 1) // SPLIT_TOKENS, 1), NUM_SPLITS)


# ---- ops/warps.py ----


@triton.jit
def load_word(ptr, wanted):
    """4 bytes of global memory; zero where `wanted` is 0.

    Not tl.load, for which the compiler may choose another order of threads than [WARPS, LANES], for all that depends on
    it. Nothing of the work by warps would be right then.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0; @p ld.global.b32 $0, [$1]; }",
        "=&r,l,r",
        [ptr.to(tl.int64), wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# ---- ops/attention_by_warps.py ----


@triton.jit
def load_keys(cache_ptr, row, num_rows, DH: tl.constexpr, TILES: tl.constexpr):
    """Words of TILES * 16 keys from row `row` of the cache on, as `attend` wants them; zeros from `num_rows` on.

    Lane (g, j) has columns 32 c + 8 j to 32 c + 8 j + 7 of the tokens 8 n + g.
    """
    warp, g, j = lane_place()
    ptr = cache_ptr + (row + g) * DH + 8 * j
    words = ()
    for n in tl.static_range(2 * TILES):
        for c in tl.static_range((DH + 31) // 32):
            wanted = (8 * n + g < num_rows) & (32 * c + 8 * j < DH)
            words = words + load_words(ptr + (8 * n * DH + 32 * c), wanted.to(tl.int32))
    return words


@triton.jit
def load_values(cache_ptr, row, num_rows, DH: tl.constexpr, TILES: tl.constexpr):
    """The same of values: lane (g, j) has columns 64 c + 8 g to 64 c + 8 g + 7 of the tokens 8 n + 2 j, + 1."""
    warp, g, j = lane_place()
    ptr = cache_ptr + (row + 2 * j) * DH + 8 * g
    words = ()
    for n in tl.static_range(2 * TILES):
        for odd in tl.static_range(2):
            for c in tl.static_range((DH + 63) // 64):
                wanted = (8 * n + 2 * j + odd < num_rows) & (64 * c + 8 * g < DH)
                words = words + load_words(ptr + ((8 * n + odd) * DH + 64 * c), wanted.to(tl.int32))
    return words


# ---- ops/rotary.py ----


@triton.jit
def load_head(ptr, head, num_heads, HEADS: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr):
    """Rows `head` to `head + num_heads` of a [heads, Dh] matrix, and each element's partner in rotate_half."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    h = tl.arange(0, HEADS)[:, None]
    mask = (h < num_heads) & (d < DH)
    base = ptr + (head + h) * DH
    partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
    return tl.load(base + d, mask=mask, other=0.0), tl.load(base + partner, mask=mask, other=0.0)


@triton.jit
def rotate_head(
    x, x_partner, rstd, gain_ptr, cos_row, sin_row, DH: tl.constexpr, BLOCK_DH: tl.constexpr, NORM: tl.constexpr
):
    """Normalised (if NORM, by `rstd` and the gain) and rotated: x * cos + rotate_half(x) * sin."""
    d = tl.arange(0, BLOCK_DH)[None, :] + tl.zeros(x.shape, tl.int32)  # as few elements per thread as x has
    x = x.to(tl.float32)
    x_partner = x_partner.to(tl.float32)
    if NORM:
        partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
        x *= rstd * tl.load(gain_ptr + d, mask=d < DH, other=0.0).to(tl.float32)
        x_partner *= rstd * tl.load(gain_ptr + partner, mask=d < DH, other=0.0).to(tl.float32)
    return x * cos_row + tl.where(d < DH // 2, -x_partner, x_partner) * sin_row


# ---- ops/warps.py ----


@triton.jit
def write_half(address, x):
    """A 16-bit number to shared memory."""
    tl.inline_asm_elementwise(
        "{ .reg .b16 x; cvt.u16.u32 x, $2; st.shared.b16 [$1], x; mov.u32 $0, 0; }",
        "=r,r,r",
        [address, x.to(tl.int16, bitcast=True).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def over_tokens(x, WHAT: tl.constexpr):
    """The max or add of the eight lanes with one lane % 4."""
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .f32 other;
        shfl.sync.bfly.b32 other, $1, 4, 31, 0xffffffff; {WHAT}.f32 $0, $1, other;
        shfl.sync.bfly.b32 other, $0, 8, 31, 0xffffffff; {WHAT}.f32 $0, $0, other;
        shfl.sync.bfly.b32 other, $0, 16, 31, 0xffffffff; {WHAT}.f32 $0, $0, other;
        }}""",
        "=&f,f",
        [x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


# ---- ops/attention_by_warps.py ----


@triton.jit
def soften(scores, m, l):
    """A step of the online softmax of two heads: (new maxima, new sums, what scales older values, exponentials)."""
    new_m = ()
    new_l = ()
    alpha = ()
    for e in tl.static_range(2):
        top = scores[e]
        for i in tl.static_range(2 + e, len(scores), 2):
            top = tl.maximum(top, scores[i])
        top = tl.maximum(m[e], over_tokens(top, "max"))
        new_m = new_m + (top,)
        alpha = alpha + (tl.exp2(m[e] - top),)
    p = ()
    for i in tl.static_range(len(scores)):
        p = p + (tl.exp2(scores[i] - new_m[i % 2]),)
    for e in tl.static_range(2):
        sum = l[e] * alpha[e]
        for i in tl.static_range(e, len(scores), 2):
            sum += p[i]
        new_l = new_l + (sum,)
    return new_m, new_l, alpha, p


# ---- ops/warps.py ----


@triton.jit
def read_pair(address):
    """8 bytes of shared memory as two words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];",
        "=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


# ---- ops/attention_by_warps.py ----


@triton.jit
def score(q_at, keys, num_rows, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """k q. Lane (g, j) has, per 16 tokens, those of token g with heads 2 j and 2 j + 1 and of token g + 8 with both.

    -inf from token `num_rows` on. `q_at`: lane (g, j)'s part of head g in shared memory, as `load_keys` has one.
    """
    CHUNKS: tl.constexpr = (DH + 31) // 32
    warp, g, j = lane_place()
    zero = tl.zeros([WARPS, LANES], tl.float32)
    scores = ()
    for _ in tl.static_range(4 * TILES):
        scores = scores + (zero,)
    for i in tl.static_range(2 * CHUNKS):
        q = read_pair(q_at + (i // 2 * 32 + i % 2 * 4) * 2)
        sums = ()
        for t in tl.static_range(TILES):
            k = keys[8 * t * CHUNKS + 2 * i :: 4 * CHUNKS]
            k_next = keys[8 * t * CHUNKS + 2 * i + 1 :: 4 * CHUNKS]
            sums = sums + multiply_add(scores[4 * t : 4 * t + 4], (k[0], k[1], k_next[0], k_next[1]), q, DTYPE)
        scores = sums
    masked = ()
    for i in tl.static_range(4 * TILES):
        masked = masked + (tl.where(8 * (i // 2) + g < num_rows, scores[i], float("-inf")),)
    return masked


# ---- ops/warps.py ----


@triton.jit
def transpose(word):
    """[8, 8] 16-bit numbers of a warp, two a lane."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def low_halves(a, b):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def high_halves(a, b):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


# ---- ops/attention_by_warps.py ----


@triton.jit
def accumulate(acc, alpha, p, values, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """acc * alpha + v p. Lane (g, j) has, in fours, the columns 64 c + 8 g + 2 w and + 1 of the heads 2 j and + 1."""
    CHUNKS: tl.constexpr = (DH + 63) // 64
    WORDS: tl.constexpr = 4 * CHUNKS  # of one token
    weights = ()
    for t in tl.static_range(TILES):
        weights = weights + (
            transpose(pack_halves(p[4 * t], p[4 * t + 1], DTYPE)),
            transpose(pack_halves(p[4 * t + 2], p[4 * t + 3], DTYPE)),
        )
    result = ()
    for w in tl.static_range(WORDS):
        c = (
            acc[4 * w] * alpha[0],
            acc[4 * w + 1] * alpha[1],
            acc[4 * w + 2] * alpha[0],
            acc[4 * w + 3] * alpha[1],
        )
        for t in tl.static_range(TILES):
            v = values[4 * t * WORDS + w :: WORDS]  # of the tokens 2 j, + 1, + 8, + 9
            a = (low_halves(v[0], v[1]), high_halves(v[0], v[1]), low_halves(v[2], v[3]), high_halves(v[2], v[3]))
            c = multiply_add(c, a, weights[2 * t : 2 * t + 2], DTYPE)
        result = result + c
    return result


@triton.jit
def attend(q_at, keys, values, num_rows, m, l, acc, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """A warp's heads attend to TILES * 16 tokens, of which `num_rows` exist."""
    m, l, alpha, p = soften(score(q_at, keys, num_rows, DH, TILES, DTYPE), m, l)
    return m, l, accumulate(acc, alpha, p, values, DH, TILES, DTYPE)


# ---- ops/warps.py ----


@triton.jit
def write_floats(address, a, b, c, d, wanted):
    tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.s32 p, $6, 0; @p st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;
        }""",
        "=r,r,f,f,f,f,r",
        [address, a, b, c, d, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# ---- ops/attention_by_warps.py ----


@triton.jit
def merge_warps(
    smem, m, l, acc, parts_ptr, lse_ptr, head0,
    GROUP: tl.constexpr, DH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The part of a split and its lse from what each warp has, HEADS heads at a time."""
    PADDED: tl.constexpr = (DH + 63) // 64 * 64
    warp, g, j = lane_place()
    state = smem + SUMS_OFFSET
    sums = state + STATE_BYTES  # (maximum, sum) [WARPS, 8]
    write_floats(
        sums + (warp * 8 + 2 * j) * 8,
        m[0],
        over_tokens(l[0], "add"),
        m[1],
        over_tokens(l[1], "add"),
        (g == 0).to(tl.int32),
    )
    o = tl.arange(0, BLOCK)
    h = o // PADDED
    d = o % PADDED
    for first in tl.static_range(0, GROUP, HEADS):
        tl.debug_barrier()
        for e in tl.static_range(2):
            head = 2 * j + e - first
            wanted = ((head >= 0) & (head < HEADS)).to(tl.int32)
            at = state + ((warp * HEADS + head) * PADDED + 8 * g) * 4
            for c in tl.static_range(PADDED // 64):
                x = acc[16 * c + e :: 2]  # the columns 64 c + 8 g on
                write_floats(at + 256 * c, x[0], x[1], x[2], x[3], wanted)
                write_floats(at + 256 * c + 16, x[4], x[5], x[6], x[7], wanted)
        tl.debug_barrier()
        top = tl.full([BLOCK], -1e30, tl.float32)
        for w in tl.static_range(WARPS):
            top = tl.maximum(top, read_float(sums + (w * 8 + first + h) * 8))
        total = tl.zeros([BLOCK], tl.float32)
        out = tl.zeros([BLOCK], tl.float32)
        for w in tl.static_range(WARPS):
            at = sums + (w * 8 + first + h) * 8
            weight = tl.exp2(read_float(at) - top)
            total += weight * read_float(at + 4)
            out += weight * read_float(state + ((w * HEADS + h) * PADDED + d) * 4)
        mask = (first + h < GROUP) & (d < DH)
        tl.store(parts_ptr + (head0 + first + h) * DH + d, (out / total).to(parts_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + head0 + first + h, top + tl.log2(total), mask=mask & (d == 0))


@triton.jit
def norms_by_warps(smem, qkv_ptr, kv_head, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, EPS: tl.constexpr):
    """Address of rsqrt(mean(x^2) + eps) of the KV head's query heads and, as number 8, of its new key: a warp each."""
    GROUP: tl.constexpr = H // HKV
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    warp = tl.arange(0, WARPS)[:, None] + tl.zeros([WARPS, LANES], tl.int32)
    lane = tl.zeros([WARPS, LANES], tl.int32) + tl.arange(0, LANES)[None, :]
    head = tl.where(warp < GROUP, kv_head * GROUP + warp, H + kv_head)
    squares = tl.zeros([WARPS, LANES], tl.float32)
    for first in tl.static_range(0, DH, 2 * LANES):
        wanted = ((warp < GROUP) | (warp == 8)) & (first + 2 * lane < DH)
        word = load_word(qkv_ptr + head * DH + first + 2 * lane, wanted.to(tl.int32))
        squares += low_half(word, DTYPE) * low_half(word, DTYPE) + high_half(word, DTYPE) * high_half(word, DTYPE)
    norms = smem + SQUARES_OFFSET
    write_float(norms + tl.arange(0, WARPS) * 4, tl.rsqrt(tl.sum(squares, axis=1) / DH + EPS))
    tl.debug_barrier()
    return norms


@triton.jit
def attend_by_warps(
    task, event_ptr, control_ptr, epoch, step, smem,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,
    k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    PADDED: tl.constexpr = (DH + 63) // 64 * 64
    TILES: tl.constexpr = BLOCK_KV // 16
    DTYPE: tl.constexpr = k_cache_ptr.dtype.element_ty
    warp, g, j = lane_place()
    d = tl.arange(0, BLOCK_DH)[None, :] + tl.zeros([BLOCK_H, BLOCK_DH], tl.int32)
    h = tl.arange(0, BLOCK_H)[:, None] + tl.zeros([BLOCK_H, BLOCK_DH], tl.int32)
    is_first = split == 0
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // num_splits
    last = tl.where(split < num_splits, (split + 1) * num_blocks // num_splits, first)
    # nobody writes older rows of the cache in this step: the first blocks are on their way while we wait
    block = first + warp
    page = load_word(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, (block < last).to(tl.int32))
    row = (page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE
    num_rows = tl.where(block < last, step - block * BLOCK_KV, 0)
    keys = load_keys(k_cache_ptr, row, num_rows, DH, TILES)
    values = load_values(v_cache_ptr, row, num_rows, DH, TILES)
    new_page = tl.load(page_table_ptr + step // PAGE_SIZE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if split < num_splits:
        # all loads before the first use of one: they are under way together
        cos_row = tl.load(cos_ptr + step * DH + d, mask=d < DH, other=0.0)
        sin_row = tl.load(sin_ptr + step * DH + d, mask=d < DH, other=0.0)
        q, q_partner = load_head(qkv_ptr, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH)
        # the new key and value are row 0 of a block as large: fewer registers than a row that all warps hold
        k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, is_first.to(tl.int32), BLOCK_H, DH, BLOCK_DH)
        is_new = (d < DH) & (h == 0) & is_first
        v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=is_new, other=0.0)
        q_rstd = 1.0
        k_rstd = 1.0
        if NORM:
            norms = norms_by_warps(smem, qkv_ptr, kv_head, H, HKV, DH, EPS)
            q_rstd = read_float(norms + h * 4)
            k_rstd = read_float(norms + BLOCK_H * 4 + h * 0)
        q = rotate_head(q, q_partner, q_rstd, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
        q *= SCALE * 1.4426950408889634  # log2(e)
        q_at = smem + SUMS_OFFSET
        write_half(q_at + (h * PADDED + d) * 2, q.to(DTYPE))
        k_at = q_at + 4096
        v_at = q_at + 8192
        if is_first:  # the new token
            k_new = rotate_head(k_new, k_partner, k_rstd, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM).to(DTYPE)
            v_new = v_new.to(DTYPE)
            new_row = ((new_page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + new_row + d, k_new, mask=is_new)
            tl.store(v_cache_ptr + new_row + d, v_new, mask=is_new)
            write_half(k_at + (h * PADDED + d) * 2, k_new)
            write_half(v_at + (h * PADDED + d) * 2, v_new)
        tl.debug_barrier()
        q_at += (g * PADDED + 8 * j) * 2
        zero = tl.zeros([WARPS, LANES], tl.float32)
        m = (zero - 1e30, zero - 1e30)  # finite: the difference of two must be a number
        l = (zero, zero)
        acc = ()
        for _ in tl.static_range(PADDED // 4):
            acc = acc + (zero,)
        m, l, acc = attend(q_at, keys, values, num_rows, m, l, acc, DH, TILES, DTYPE)
        for _ in tl.range(1, (last - first + WARPS - 1) // WARPS, num_stages=1):
            block += WARPS
            page = load_word(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, (block < last).to(tl.int32))
            row = (page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE
            num_rows = tl.where(block < last, step - block * BLOCK_KV, 0)
            scores = score(q_at, load_keys(k_cache_ptr, row, num_rows, DH, TILES), num_rows, DH, TILES, DTYPE)
            m, l, alpha, p = soften(scores, m, l)
            # There are sixteen warps, and not registers enough for keys and values at once: values only when the keys
            # are used. The maximum is always above that, but the compiler does not know.
            num_rows = tl.where(m[0] > -2e30, num_rows, 0)
            values = load_values(v_cache_ptr, row, num_rows, DH, TILES)
            acc = accumulate(acc, alpha, p, values, DH, TILES, DTYPE)
        if is_first:  # the new token: token 0 of a block of the first warp's
            new_keys = ()
            new_values = ()
            for n in tl.static_range(2):
                for c in tl.static_range((DH + 31) // 32):
                    wanted = (g == 0) & (n == 0)
                    new_keys = new_keys + read_words(k_at + (32 * c + 8 * j) * 2, wanted.to(tl.int32))
                for odd in tl.static_range(2):
                    for c in tl.static_range(PADDED // 64):
                        wanted = (j == 0) & (n + odd == 0) & (64 * c + 8 * g < DH)
                        new_values = new_values + read_words(v_at + (64 * c + 8 * g) * 2, wanted.to(tl.int32))
            m, l, acc = attend(q_at, new_keys, new_values, tl.where(warp == 0, 1, 0), m, l, acc, DH, 1, DTYPE)
        HEADS: tl.constexpr = 256 // PADDED
        merge_warps(smem, m, l, acc, parts_ptr, lse_ptr, split * H + kv_head * GROUP, GROUP, DH, HEADS, 256)


# ---- ops/rotary.py ----


@triton.jit
def inverse_norms(x, DH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """rsqrt(mean(x^2) + eps) of each row, if NORM."""
    if NORM:
        x = x.to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, axis=1) / DH + EPS)[:, None]
    else:
        return 1.0


# ---- ops/attention.py ----


@triton.jit
def load_block(
    cache_ptr, page_table_ptr, kv_head, block, last, step,
    HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_KV, BLOCK_DH] of older tokens; zeros from `last` on."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    position = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    page = tl.load(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, mask=block < last, other=0).to(tl.int64)
    row = (page * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE + tl.arange(0, BLOCK_KV)
    wanted = (position < step) & (block < last)
    return tl.load(cache_ptr + row[:, None] * DH + d, mask=wanted[:, None] & (d < DH), other=0.0)


@triton.jit
def attend_by_blocks(
    task, event_ptr, control_ptr, epoch, step,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,
    k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    is_first = split == 0
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // num_splits
    last = (split + 1) * num_blocks // num_splits
    new_page = tl.load(page_table_ptr + step // PAGE_SIZE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if split < num_splits:
        cos_row = tl.load(cos_ptr + step * DH + d, mask=d < DH, other=0.0)
        sin_row = tl.load(sin_ptr + step * DH + d, mask=d < DH, other=0.0)
        q, q_partner = load_head(qkv_ptr, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH)
        q_rstd = inverse_norms(q, DH, NORM, EPS)
        q = rotate_head(q, q_partner, q_rstd, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
        q *= SCALE * 1.4426950408889634  # log2(e)
        m = tl.full([BLOCK_H], -1e30, tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DH], tl.float32)
        if is_first:  # the new token
            k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, 1, 1, DH, BLOCK_DH)
            v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=d < DH, other=0.0)
            k_rstd = inverse_norms(k_new, DH, NORM, EPS)
            k_new = rotate_head(k_new, k_partner, k_rstd, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
            k_new = k_new.to(k_cache_ptr.dtype.element_ty)
            v_new = v_new.to(v_cache_ptr.dtype.element_ty)
            row = ((new_page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + row + d, k_new, mask=d < DH)
            tl.store(v_cache_ptr + row + d, v_new, mask=d < DH)
            m = tl.sum(q.to(k_new.dtype).to(tl.float32) * k_new.to(tl.float32), axis=1)
            l += 1.0
            acc += v_new.to(tl.float32)
        q = q.to(k_cache_ptr.dtype.element_ty)
        for block in tl.range(first, last, num_stages=1):
            k = load_block(
                k_cache_ptr, page_table_ptr, kv_head, block, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV
            )
            v = load_block(
                v_cache_ptr, page_table_ptr, kv_head, block, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where((block * BLOCK_KV + tl.arange(0, BLOCK_KV) < step)[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
        h = tl.arange(0, BLOCK_H)
        head = split * H + kv_head * GROUP + h
        part = (acc / l[:, None]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + head[:, None] * DH + d, part, mask=(h < GROUP)[:, None] & (d < DH))
        tl.store(lse_ptr + head, m + tl.log2(l), mask=h < GROUP)


@triton.jit
def attention_tile(
    task, event_ptr, control_ptr, epoch, step, ring,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,  # in
    k_cache_ptr, v_cache_ptr,  # in and out
    parts_ptr, lse_ptr,  # out
    kv_head, split,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BY_WARPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_splits = active_splits(step, NUM_SPLITS, SPLIT_TOKENS)
    if BY_WARPS:
        attend_by_warps(
            task, event_ptr, control_ptr, epoch, step, ring[0], qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,
            page_table_ptr, k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
            H, HKV, DH, PAGE_SIZE, SCALE, NORM, EPS, BLOCK_H, BLOCK_DH, BLOCK_KV, PORTABLE,
        )  # fmt: skip
    else:
        attend_by_blocks(
            task, event_ptr, control_ptr, epoch, step, qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,
            page_table_ptr, k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
            H, HKV, DH, PAGE_SIZE, SCALE, NORM, EPS, BLOCK_H, BLOCK_DH, BLOCK_KV, PORTABLE,
        )  # fmt: skip
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/gemv.py ----


@triton.jit
def is_prefetcher(count):
    """In lane 0 of the last warp, for the first warp polls, if there is anything to wait for."""
    return (
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 tid; mov.u32 tid, %tid.x; setp.eq.u32 p, tid, 480; selp.b32 $0, $1, 0, p; }",
            "=r,r",
            [count],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        > 0
    )


@triton.jit
def copy_pieces(smem, scratch, addr, num_bytes, counter_ptr, count):
    """1 as soon as the counter has come to `count`, 0 if all bytes are requested before."""
    return tl.inline_asm_elementwise(
        # Piece i has barrier i % 2; it is requested in parts as large as the scratch area.
        """{
        .reg .pred p; .reg .s32 left, piece, size, part, x; .reg .u32 at; .reg .u64 from, step;
        ld.shared.b32 piece, [$1 + 16]; mov.s32 left, $4; mov.u64 from, $3;
        NEXT: setp.lt.s32 p, left, 1; @p bra ALL;
        ld.relaxed.gpu.global.s32 x, [$5]; sub.s32 x, x, $6; setp.ge.s32 p, x, 0; @p bra FIRED;
        and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 x, piece, 1, 1; xor.b32 x, x, 1;
        mbarrier.test_wait.parity.shared::cta.b64 p, [at], x; @!p bra NEXT;
        min.s32 size, left, 32768; sub.s32 left, left, size; add.s32 piece, piece, 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [at], size;
        PART: min.s32 part, size, 4096;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [from], part, [at];
        cvt.u64.u32 step, part; add.u64 from, from, step; sub.s32 size, size, part;
        setp.gt.s32 p, size, 0; @p bra PART; bra NEXT;
        FIRED: mov.s32 $0, 1; bra DONE;
        ALL: mov.s32 $0, 0;
        DONE: st.shared.b32 [$1 + 16], piece;
        }""",
        "=&r,r,r,l,r,l,r",
        [smem + PIECES_OFFSET, scratch, addr, num_bytes, counter_ptr.to(tl.int64), count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(task, event_ptr, epoch, ring, PORTABLE: tl.constexpr, RING: tl.constexpr, PREFETCH: tl.constexpr):
    """Has L2 fetch what follows in the stream, PREFETCH bytes at most, until the task's event has fired.

    One thread copies pieces of 32 KiB to where nobody reads them, two at a time: with more on their way, whatever else
    is loaded meanwhile waits behind them. Instructions that only prefetch are hints; an H200 drops most of so many.
    """
    if RING and PREFETCH > 0:
        smem, slots, slot, phase, cursor = ring
        count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
        if is_prefetcher(count):
            counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
            wanted = slots * 0 + PREFETCH
            for _ in tl.range(0, tl.minimum(slots, MAX_MATRICES), num_stages=1):  # not known: not unrolled
                if wanted > 0:
                    num_bytes = tl.minimum(cursor[2], wanted)
                    fired = copy_pieces(
                        smem, smem + RING_OFFSET + slots * RING, cursor[1], num_bytes, counter_ptr, epoch * count
                    )
                    wanted = tl.where(fired != 0, 0, wanted - num_bytes)
                    cursor = advance(smem, cursor, num_bytes)


# ---- ops/attention_output.py ----


@triton.jit
def merge_splits(
    x, top, total, parts_ptr, lse_ptr, first_split, num_splits,
    K: tl.constexpr, DH: tl.constexpr, SLOT_ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT more splits for a thread's part of the vector; per part: 8 sums, the largest lse, the weights' sum.

    All loads are under way together.
    """
    lse = ()
    parts = ()
    for i in tl.static_range(len(top)):
        col, is_there = own_columns(i, K, SLOT_ROWS)
        for s in tl.static_range(COUNT):
            wanted = is_there & (first_split + s < num_splits)
            at = first_split + s
            word = load_word(lse_ptr + at * (K // DH) + col // DH, wanted.to(tl.int32))
            lse = lse + (tl.where(wanted, word.to(tl.float32, bitcast=True), float("-inf")),)
            parts = parts + load_eight(parts_ptr + at * K + col, wanted.to(tl.int32))
    new_x = ()
    new_top = ()
    new_total = ()
    for i in tl.static_range(len(top)):
        highest = top[i]
        for s in tl.static_range(COUNT):
            highest = tl.maximum(highest, lse[i * COUNT + s])
        scale = tl.exp2(top[i] - highest)
        weights = ()
        sum = total[i] * scale
        for s in tl.static_range(COUNT):
            weight = tl.exp2(lse[i * COUNT + s] - highest)
            weights = weights + (weight,)
            sum += weight
        for e in tl.static_range(8):
            value = x[8 * i + e] * scale
            for s in tl.static_range(COUNT):
                value += weights[s] * parts[(i * COUNT + s) * 8 + e]
            new_x = new_x + (value,)
        new_top = new_top + (highest,)
        new_total = new_total + (sum,)
    return new_x, new_top, new_total


@triton.jit
def load_merged(
    parts_ptr, lse_ptr, num_splits, K: tl.constexpr, DH: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr
):
    """A thread's part of the merged vector [K] in fp32 registers, as `load_segment` loads one."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        PARTS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS) * (2 if SEGMENTS == 16 else 1)
        zero = tl.zeros([WARPS, LANES], tl.float32)
        x = ()
        top = ()
        total = ()
        for _ in tl.static_range(PARTS):
            top = top + (zero - 1e30,)  # finite: the difference of two must be a number
            total = total + (zero,)
            for _ in tl.static_range(8):
                x = x + (zero,)
        if num_splits <= 2:
            x, top, total = merge_splits(x, top, total, parts_ptr, lse_ptr, 0, num_splits, K, DH, SLOT_ROWS, 2)
        else:
            for split in tl.range(0, num_splits, 4, num_stages=1):
                x, top, total = merge_splits(x, top, total, parts_ptr, lse_ptr, split, num_splits, K, DH, SLOT_ROWS, 4)
        merged = ()
        for i in tl.static_range(PARTS):
            inverse = 1.0 / tl.maximum(total[i], 1e-30)  # nothing but zeros where there is no column
            for e in tl.static_range(8):
                merged = merged + (x[8 * i + e] * inverse,)
        return merged
    else:
        return ()


@triton.jit
def merged_columns(parts_ptr, lse_ptr, num_splits, cols, K: tl.constexpr, DH: tl.constexpr):
    """The merged vector at these columns; zeros from K on."""
    top = tl.zeros(cols.shape, tl.float32) - 1e30
    total = tl.zeros(cols.shape, tl.float32)
    x = tl.zeros(cols.shape, tl.float32)
    for split in tl.range(0, num_splits, num_stages=1):
        lse = tl.load(lse_ptr + split * (K // DH) + cols // DH, mask=cols < K, other=0.0)
        part = tl.load(parts_ptr + split * K + cols, mask=cols < K, other=0.0).to(tl.float32)
        highest = tl.maximum(top, lse)
        scale = tl.exp2(top - highest)
        weight = tl.exp2(lse - highest)
        x = x * scale + part * weight
        total = total * scale + weight
        top = highest
    return x / total


@triton.jit
def attention_output_tile(
    task, event_ptr, control_ptr, epoch, step, ring,
    parts_ptr, lse_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, in, out
    row0, num_rows,
    K: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, PREFETCH: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    prefetch_rows(task, event_ptr, epoch, ring, PORTABLE, RING, PREFETCH)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    rows = tl.arange(0, BLOCK_N)
    num_splits = active_splits(step, NUM_SPLITS, SPLIT_TOKENS)
    x = load_merged(parts_ptr, lse_ptr, num_splits, K, DH, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        y = tl.load(residual_ptr + row0 + row, mask=row < num_rows, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        if RING:
            ring, product = dot_rows(
                ring, x, lse_ptr, lse_ptr, weight_addr, block, num_rows,
                K, False, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            first = tl.cast(block, tl.int64) * BLOCK_N
            weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
            product = tl.zeros([BLOCK_N], tl.float32)
            for col in tl.range(0, K, BLOCK_K, num_stages=1):
                cols = col + tl.arange(0, BLOCK_K)
                mask = (row < num_rows)[:, None] & (cols < K)[None, :]
                w = tl.load(weight_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                merged = merged_columns(parts_ptr, lse_ptr, num_splits, cols, K, DH)
                product += tl.sum(w * merged[None, :], axis=1)
        tl.store(y_ptr + row0 + row, y + product, mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/rmsnorm_gated_linear.py ----


@triton.jit
def rmsnorm_gated_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, gain_ptr, gate_addr, up_addr, h_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    ring = stream_rows(ring, x, 0, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    ring = stream_rows(ring, x, BLOCK_N, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):  # with a ring, one block
        gate = row_sums(
            ring, 0, x_ptr, gain_ptr, gate_addr, block, num_rows, D, True, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
        )
        up = row_sums(
            ring, BLOCK_N, x_ptr, gain_ptr, up_addr, block, num_rows, D, True, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
        )
        rstd = inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        gate *= rstd
        h = gate / (1.0 + tl.exp(-gate)) * (up * rstd)
        row = block * BLOCK_N + rows
        tl.store(h_ptr + row0 + row, h.to(h_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/linear_residual.py ----


@triton.jit
def linear_residual_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = load_segment(x_ptr, K, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        base = tl.load(residual_ptr + row0 + row, mask=row < num_rows, other=0.0)
        if HAS_BIAS:
            base += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            x_ptr,
            weight_addr,
            block,
            num_rows,
            K,
            False,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        tl.store(y_ptr + row0 + row, base + y, mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/lm_head.py ----


@triton.jit
def best_of_block(ring, best, best_row, BLOCK_N: tl.constexpr, RING: tl.constexpr):
    """The largest values and their rows, the lowest of equal ones, as many as a warp has lanes: see ops/warps.py."""
    if RING:
        rows = tl.arange(0, BLOCK_N)
        lanes = tl.arange(0, 32)
        values_at = ring[0] + SUMS_OFFSET + SUMS_BYTES
        rows_at = values_at + BLOCK_N * 4
        write_float(values_at + rows * 4, best)
        write_float(rows_at + rows * 4, best_row.to(tl.float32, bitcast=True))
        tl.debug_barrier()
        value = tl.full([32], float("-inf"), tl.float32)
        row = tl.full([32], 0x7FFFFFFF, tl.int32)
        for first in tl.static_range(0, BLOCK_N, 32):
            next_value = read_float(values_at + (first + lanes) * 4)
            next_row = read_float(rows_at + (first + lanes) * 4).to(tl.int32, bitcast=True)
            row = tl.where((next_value > value) | ((next_value == value) & (next_row < row)), next_row, row)
            value = tl.maximum(value, next_value)
        return value, row
    else:
        return best, best_row


# ---- ops/gemv.py ----


@triton.jit
def skip_rows(ring, num_rows, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """Leaves out the weights of the present task, of which as many slots as the ring reaches are on their way."""
    if RING:
        smem, slots, slot, phase, cursor = ring
        num_slots = (num_rows + SLOT_ROWS - 1) // SLOT_ROWS
        reach = slots - 1
        if num_slots > reach:  # the cursor has not left them
            cursor = read_stream(smem, stream_word(smem, cursor[0], 24))
            ring = (smem, slots, slot, phase, cursor)
        for _ in tl.range(0, tl.minimum(num_slots, reach), num_stages=1):
            await_slot(smem, ring[2], ring[3])
            ring = release_slot(ring, RING)
    return ring


# ---- ops/lm_head.py ----


@triton.jit
def lm_head_tile(
    task, event_ptr, control_ptr, logits_ptr, epoch, step, ring,
    x_ptr, gain_ptr, weight_addr, best_value_ptr, best_index_ptr,  # in, in, in, out, out
    part, row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_row = tl.zeros([BLOCK_N], tl.int32)
    wanted = step >= tl.load(control_ptr + CONTROL_LOGITS_FROM)
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    num_blocks = (num_rows + BLOCK_N - 1) // BLOCK_N
    if not wanted:
        ring = skip_rows(ring, num_rows, SLOT_ROWS, RING)
        num_blocks = 0
    for block in tl.range(0, num_blocks, num_stages=1):
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            gain_ptr,
            weight_addr,
            block,
            num_rows,
            D,
            True,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        y *= inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        tl.store(row_ptr + row0 + row, y, mask=row < num_rows)
        better = (row < num_rows) & (y > best)
        best_row = tl.where(better, row, best_row)
        best = tl.where(better, y, best)
    best, best_row = best_of_block(ring, best, best_row, BLOCK_N, RING)
    value = tl.max(best, axis=0)
    tl.store(best_value_ptr + part, value)
    tl.store(best_index_ptr + part, row0 + tl.min(tl.where(best == value, best_row, 0x7FFFFFFF), axis=0))
    signal(task, event_ptr, PORTABLE)
    return ring


# ---- ops/argmax.py ----


@triton.jit
def best_of_parts(value_ptr, index_ptr, NUM_PARTS: tl.constexpr):
    """The index of the largest value, the lowest of equal ones.

    As many at a time as a warp has lanes: a reduction over more holds a register throughout the kernel (ops/warps.py).
    """
    parts = tl.arange(0, 32)
    value = tl.full([32], float("-inf"), tl.float32)
    index = tl.full([32], 0x7FFFFFFF, tl.int32)
    for first in tl.static_range(0, NUM_PARTS, 32):
        mask = first + parts < NUM_PARTS
        next_value = tl.load(value_ptr + first + parts, mask=mask, other=float("-inf"))
        next_index = tl.load(index_ptr + first + parts, mask=mask, other=0x7FFFFFFF)
        index = tl.where((next_value > value) | ((next_value == value) & (next_index < index)), next_index, index)
        value = tl.maximum(value, next_value)
    best = tl.max(value, axis=0)
    return tl.min(tl.where(value == best, index, 0x7FFFFFFF), axis=0).to(tl.int64)


# ---- ops/sample.py ----


@triton.jit
def float_word(choice_ptr, word):
    return tl.load(choice_ptr + word).to(tl.int32).to(tl.float32, bitcast=True)


# ---- ops/sampling.py ----


@triton.jit
def spread(N: tl.constexpr, PORTABLE: tl.constexpr):
    """0 to N - 1, thread by thread.

    Hidden from the compiler, lest what follows from a thread's index is kept in registers all through the kernel.
    """
    index = tl.arange(0, N)
    if not PORTABLE:
        index = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1)
        index = tl.max_contiguous(index, N)
    return index


@triton.jit
def tokens_of_turn(first, TURN: tl.constexpr, PORTABLE: tl.constexpr):
    """[TURN / 512, 512]: a column is a slot, and a thread's."""
    return first + tl.arange(0, TURN // SLOTS)[:, None] * SLOTS + spread(SLOTS, PORTABLE)[None, :]


@triton.jit
def write_scores(
    logits_ptr, seen_ptr, scores_ptr, penalty, temperature,  # in, in, out
    V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Logits after repetition penalty and temperature, and -inf behind the vocabulary. Returns the best of every slot.

    Divisions are rounded correctly: what ties in transformers ties here.
    """
    best = tl.full([SLOTS], float("-inf"), tl.float32)
    for first in tl.range(0, V, TURN, num_stages=1):
        token = tokens_of_turn(first, TURN, PORTABLE)
        score = tl.load(logits_ptr + token, mask=token < V, other=float("-inf"))
        if penalty != 1.0:
            seen = tl.load(seen_ptr + token, mask=token < V, other=0) != 0
            less = tl.where(score < 0.0, score * penalty, tl.div_rn(score, penalty))
            score = tl.where(seen, less, score)
        if temperature != 1.0:
            score = tl.div_rn(score, temperature)
        score += 0.0  # no negative zero, which would have a sort key of its own
        tl.store(scores_ptr + token, score)
        best = tl.maximum(best, tl.max(score, axis=0))
    tl.debug_barrier()
    return best


@triton.jit
def over_block(x, scratch_ptr, WHAT: tl.constexpr, PORTABLE: tl.constexpr):
    """The max, min or sum of [512], in all threads, always added up in the same order."""
    lanes = tl.arange(0, 32)
    tl.debug_barrier()  # the last one has been read
    tl.store(scratch_ptr + PARTIAL + spread(SLOTS, PORTABLE), x)
    tl.debug_barrier()
    total = tl.load(scratch_ptr + PARTIAL + lanes)
    for first in tl.range(32, SLOTS, 32, num_stages=1):
        other = tl.load(scratch_ptr + PARTIAL + first + lanes)
        if WHAT == "max":
            total = tl.maximum(total, other)
        elif WHAT == "min":
            total = tl.minimum(total, other)
        else:
            total += other
    if WHAT == "max":
        return tl.max(total, axis=0)
    elif WHAT == "min":
        return tl.min(total, axis=0)
    else:
        return tl.sum(total, axis=0)


@triton.jit
def nearest_lane(values, target):
    """The last of 32 values >= 0 that is not 0 and before which their sum is at most `target` (-1: there is none).

    And what is left of `target` there.
    """
    lanes = tl.arange(0, 32)
    before = tl.cumsum(values, axis=0) - values
    lane = tl.max(tl.where((values > 0.0) & (before <= target), lanes, -1), axis=0)
    return lane, target - tl.sum(tl.where(lanes == lane, before, 0.0), axis=0)


@triton.jit
def pick(values_ptr, target, N: tl.constexpr):
    """Likewise, the place among N values in memory, a multiple of 32 and 1024 at most."""
    PER_LANE: tl.constexpr = N // 32
    lanes = tl.arange(0, 32)
    sums = tl.zeros([32], tl.float32)
    for i in tl.range(0, PER_LANE, num_stages=1):
        sums += tl.load(values_ptr + lanes * PER_LANE + i)
    lane, target = nearest_lane(sums, target)
    values = tl.load(values_ptr + lane * PER_LANE + lanes, mask=lanes < tl.where(lane >= 0, PER_LANE, 0), other=0.0)
    place, target = nearest_lane(values, target)
    return tl.where(place >= 0, lane * PER_LANE + place, -1), target


@triton.jit
def note(scratch_ptr, indices_ptr, score, token, found, PORTABLE: tl.constexpr):
    """Puts what is found into the list, as long as there is room, and counts it. The order of the atomics is any."""
    if PORTABLE:
        counter_ptr = indices_ptr + NUM_FOUND + token * 0
        place = tl.atomic_add(counter_ptr, 1, mask=found, sem="relaxed", scope="cta")
        found = found & (place < LISTED)
        tl.store(scratch_ptr + FOUND + place, score, mask=found)
        tl.store(indices_ptr + FOUND_TOKEN + place, token, mask=found)
    else:  # Triton's own, too, sets registers under a predicate only: see ops/warps.py
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 place; .reg .u64 at;
            setp.ne.u32 p, $6, 0; mov.u32 place, 1024;
            @p atom.relaxed.cta.global.add.u32 place, [$1], 1; setp.lt.u32 p, place, 1024;
            mad.wide.u32 at, place, 4, $2; @p st.global.f32 [at], $4;
            mad.wide.u32 at, place, 4, $3; @p st.global.u32 [at], $5;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,l,f,r,r",
            [
                (indices_ptr + NUM_FOUND).to(tl.int64),
                (scratch_ptr + FOUND).to(tl.int64),
                (indices_ptr + FOUND_TOKEN).to(tl.int64),
                score,
                token,
                found.to(tl.int32),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def collect(
    scores_ptr, scratch_ptr, indices_ptr, least, top, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr
):
    """The tokens that reach a score, best first. Returns their number, and what the whole vocabulary weighs.

    If there are more of them than a list holds, there is no list.
    """
    tl.store(indices_ptr + NUM_FOUND, 0)
    tl.debug_barrier()
    weights = tl.zeros([SLOTS], tl.float32)
    for first in tl.range(0, V, TURN, num_stages=1):
        token = tokens_of_turn(first, TURN, PORTABLE)
        score = tl.load(scores_ptr + token)
        weights += tl.sum(tl.exp(score - top), axis=0)
        found = (score >= least) & (score > float("-inf"))
        note(scratch_ptr, indices_ptr, score, token, found, PORTABLE)
    mass = over_block(weights, scratch_ptr, "sum", PORTABLE)
    number = tl.load(indices_ptr + NUM_FOUND)
    if number <= LISTED:  # they were found in any order: count for each who comes before it
        places = spread(LISTED, PORTABLE)
        score = tl.load(scratch_ptr + FOUND + places, mask=places < number, other=float("-inf"))
        token = tl.load(indices_ptr + FOUND_TOKEN + places, mask=places < number, other=-1)
        rank = tl.zeros([LISTED], tl.int32)
        for first in tl.range(0, number, 4, num_stages=1):
            for i in tl.static_range(4):
                other = tl.load(scratch_ptr + FOUND + first + i, mask=first + i < number, other=float("-inf"))
                other_token = tl.load(indices_ptr + FOUND_TOKEN + first + i, mask=first + i < number, other=-1)
                rank += ((other > score) | ((other == score) & (other_token > token))).to(tl.int32)
        tl.store(scratch_ptr + SORTED + rank, score, mask=places < number)
        tl.store(indices_ptr + TOKEN + rank, token, mask=places < number)
        tl.debug_barrier()
    return number, mass


@triton.jit
def ordered_bits(score):
    """int32 that grows with the score."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def sort_key(score, token):
    """int64 that grows with the score, and with the index of equal ones."""
    return ordered_bits(score).to(tl.int64) * NUM_KEYS + token


@triton.jit
def reaches(score, token, key):
    """sort_key(score, token) >= key, in 32 bits."""
    bits, key_bits = ordered_bits(score), (key >> KEY_BITS).to(tl.int32)
    return (bits > key_bits) | ((bits == key_bits) & (token >= (key & (NUM_KEYS - 1)).to(tl.int32)))


@triton.jit
def search(
    scores_ptr, scratch_ptr, goal, lowest, top,
    BY_WEIGHT: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """A sort key from which on are as few tokens as are (or, BY_WEIGHT, weigh) `goal`; `lowest` if not even all do.

    For top-k equal scores have equal keys: it keeps all that are as good as the last one.
    """
    low, high = lowest, sort_key(top, NUM_KEYS)
    from_low, from_high = top * 0.0 + V, top * 0.0  # tokens from these keys on
    while (high - low > 1) & (from_low - from_high > 1.0):
        middle = low + (high - low) // 2
        number = tl.zeros([SLOTS], tl.float32)
        weights = tl.zeros([SLOTS], tl.float32)
        for first in tl.range(0, V, TURN, num_stages=1):
            token = tokens_of_turn(first, TURN, PORTABLE)
            score = tl.load(scores_ptr + token)
            reached = reaches(score, token if BY_WEIGHT else 0, middle)
            number += tl.sum(reached.to(tl.float32), axis=0)
            if BY_WEIGHT:
                weights += tl.sum(tl.where(reached, tl.exp(score - top), 0.0), axis=0)
        from_middle = over_block(number, scratch_ptr, "sum", PORTABLE)
        reach = over_block(weights, scratch_ptr, "sum", PORTABLE) if BY_WEIGHT else from_middle
        enough = reach >= goal
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        from_low = tl.where(enough, from_middle, from_low)
        from_high = tl.where(enough, from_high, from_middle)
    return low


@triton.jit
def weigh(scores_ptr, top, key, min_p, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr):
    """What the tokens from a sort key on weigh (exp(score - top), if that is min_p at least), by slots."""
    weights = tl.zeros([SLOTS], tl.float32)
    for first in tl.range(0, V, TURN, num_stages=1):
        token = tokens_of_turn(first, TURN, PORTABLE)
        score = tl.load(scores_ptr + token)
        weight = tl.exp(score - top)
        weights += tl.sum(tl.where(reaches(score, token, key) & (weight >= min_p), weight, 0.0), axis=0)
    return weights


@triton.jit
def cut_key(scores_ptr, scratch_ptr, top, top_k, top_p, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr):
    """The sort key from which on top-k and top-p keep tokens, for any number of them."""
    key = sort_key(top * 0.0 - 3.4028234e38, 0)  # of the lowest finite score
    if top_k > 0:
        key = search(scores_ptr, scratch_ptr, top_k.to(tl.float32), key, top, False, V, TURN, PORTABLE)
    if top_p < 1.0:
        mass = over_block(weigh(scores_ptr, top, key, 0.0, V, TURN, PORTABLE), scratch_ptr, "sum", PORTABLE)
        # what is less likely than the best by exp(-40) weighs nothing, were it the whole vocabulary
        key = tl.maximum(key, sort_key(top - 40.0, 0))
        goal = tl.maximum(top_p * mass, 1e-30)  # the best is always kept
        key = search(scores_ptr, scratch_ptr, goal, key, top, True, V, TURN, PORTABLE)
    return key


@triton.jit
def cut_vocabulary(
    scores_ptr, scratch_ptr, indices_ptr, uniform, top, top_k, top_p, min_p,
    V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The slot where `uniform` leads, for any number of tokens: its tokens' weights stand where a list's would.

    Returns what all that is left weighs, and where in the slot's part of it `uniform` leads.
    """
    key = cut_key(scores_ptr, scratch_ptr, top, top_k, top_p, V, TURN, PORTABLE)
    weights = weigh(scores_ptr, top, key, min_p, V, TURN, PORTABLE)
    left = over_block(weights, scratch_ptr, "sum", PORTABLE)
    tl.store(scratch_ptr + SLOT + spread(SLOTS, PORTABLE), weights)
    tl.debug_barrier()
    slot, target = pick(scratch_ptr + SLOT, uniform * left, SLOTS)
    places = spread(LISTED, PORTABLE)
    token = places * SLOTS + slot
    score = tl.load(scores_ptr + token, mask=token < tl.where(slot >= 0, V, 0), other=float("-inf"))
    weight = tl.exp(score - top)
    kept = reaches(score, token, key) & (weight >= min_p)
    tl.store(scratch_ptr + WEIGHT + places, tl.where(kept, weight, 0.0))
    tl.store(indices_ptr + TOKEN + places, token)
    return left, target


@triton.jit
def cut_list(scratch_ptr, number, mass, top, top_k, top_p, min_p, PORTABLE: tl.constexpr):
    """Weights of the listed tokens, 0 where they are cut off. Returns what the list, and what is left of it, weighs.

    `mass` is what the vocabulary weighs; for top-p after top-k, what that has left counts instead.
    """
    places = spread(LISTED, PORTABLE)
    score = tl.load(scratch_ptr + SORTED + places, mask=places < number, other=float("-inf"))
    if (top_k > 0) & (top_k < number):
        score = tl.where(score >= tl.load(scratch_ptr + SORTED + top_k - 1), score, float("-inf"))
    weight = tl.exp(score - top)
    tl.store(scratch_ptr + WEIGHT + places, weight)
    tl.debug_barrier()
    before = tl.zeros([LISTED], tl.float32)
    listed = top * 0.0
    for first in tl.range(0, number, 4, num_stages=1):
        for i in tl.static_range(4):
            other = tl.load(scratch_ptr + WEIGHT + first + i, mask=first + i < number, other=0.0)
            before += tl.where(first + i < places, other, 0.0)
            listed += other
    limit = tl.where(top_p < 1.0, top_p * tl.where(top_k > 0, listed, mass), float("inf"))
    kept = ((before < limit) | (places == 0)) & (weight >= min_p)
    weight = tl.where(kept, weight, 0.0)
    tl.debug_barrier()
    tl.store(scratch_ptr + WEIGHT + places, weight)
    left = tl.sum(tl.reshape(weight, [LISTED // SLOTS, SLOTS]), axis=0)
    return listed, over_block(left, scratch_ptr, "sum", PORTABLE)


@triton.jit
def reached_by(count, best, scratch_ptr, PORTABLE: tl.constexpr):
    """A score that at least `count` tokens reach, and few more: the count-th best of the slots' best."""
    slots = spread(SLOTS, PORTABLE)
    tl.store(scratch_ptr + SLOT + slots, best)
    tl.debug_barrier()
    rank = slots * 0
    for first in tl.range(0, SLOTS, 8, num_stages=1):
        for i in tl.static_range(8):
            other = tl.load(scratch_ptr + SLOT + first + i)
            rank += ((other > best) | ((other == best) & (first + i < slots))).to(tl.int32)
    return over_block(tl.where(rank == count - 1, best, float("-inf")), scratch_ptr, "max", PORTABLE)


@triton.jit
def sample(
    scores_ptr, scratch_ptr, indices_ptr, best, top, uniform, top_k, top_p, min_p,
    V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """A token at random and its log-probability. The token is -1 if no score is a number."""
    top_k = tl.where(top_k < V, top_k, 0)
    listed = top_k < 0
    target, left = uniform, uniform
    if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        # All that can be chosen reach `least`, if it comes from top-k or min-p. For top-p alone it is a guess.
        least = top * 0.0 - float("inf")
        sure = top_k >= 0
        if V > LISTED:
            by_top_k = (top_k > 0) & (top_k <= SURE)
            sure = by_top_k | ((min_p > 0.0) & ((top_k == 0) | (top_p >= 1.0)))
            if by_top_k | (min_p == 0.0):
                least = reached_by(tl.where(by_top_k, top_k, SURE), best, scratch_ptr, PORTABLE)
            if (min_p > 0.0) & ((top_k == 0) | (top_p >= 1.0)):  # else top-p needs all that top-k has left
                margin = 1e-3 + tl.abs(top) * 1e-6  # for rounding: the list is then cut exactly
                least = tl.maximum(least, top + tl.log(min_p) - margin)
        number, mass = collect(scores_ptr, scratch_ptr, indices_ptr, least, top, V, TURN, PORTABLE)
        if number <= LISTED:
            weight, left = cut_list(scratch_ptr, number, mass, top, top_k, top_p, min_p, PORTABLE)
            listed = sure | ((top_k == 0) & (weight >= top_p * mass))
            target = uniform * left
    if not listed:
        left, target = cut_vocabulary(
            scores_ptr, scratch_ptr, indices_ptr, uniform, top, top_k, top_p, min_p, V, TURN, PORTABLE
        )
    tl.debug_barrier()
    place, _ = pick(scratch_ptr + WEIGHT, target, LISTED)
    weight = tl.load(scratch_ptr + WEIGHT + tl.maximum(place, 0))
    token = tl.load(indices_ptr + TOKEN + tl.maximum(place, 0))
    return tl.where(place >= 0, token, -1), tl.log(weight / left)


@triton.jit
def best_score(scores_ptr, top, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr):
    """The first token of the largest score (as fp32), and what the whole vocabulary weighs, by slots."""
    best = tl.full([SLOTS], MAX_VOCAB, tl.float32)
    weights = tl.zeros([SLOTS], tl.float32)
    for first in tl.range(0, V, TURN, num_stages=1):
        token = tokens_of_turn(first, TURN, PORTABLE)
        score = tl.load(scores_ptr + token)
        weights += tl.sum(tl.exp(score - top), axis=0)
        place = tl.where(score == top, token, MAX_VOCAB).to(tl.float32)
        best = tl.minimum(best, tl.min(place, axis=0))
    return best, weights


# ---- ops/sample.py ----


@triton.jit
def choose(
    choice_ptr, choice, logits_ptr, seen_ptr, position, scores_ptr, scratch_ptr, indices_ptr,
    V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token for a position and its log-probability; -1 if no logit is a number. `choice_ptr`: the words CHOICE_."""
    penalty = float_word(choice_ptr, CHOICE_REPETITION_PENALTY)
    temperature = float_word(choice_ptr, CHOICE_TEMPERATURE)
    best = write_scores(logits_ptr, seen_ptr, scores_ptr, penalty, temperature, V, TURN, PORTABLE)
    top = over_block(best, scratch_ptr, "max", PORTABLE)
    if choice == CHOOSE_AT_RANDOM:
        uniform = tl.rand(tl.load(choice_ptr + CHOICE_SEED), position)
        top_k = tl.load(choice_ptr + CHOICE_TOP_K).to(tl.int32)
        top_p, min_p = float_word(choice_ptr, CHOICE_TOP_P), float_word(choice_ptr, CHOICE_MIN_P)
        token, logprob = sample(
            scores_ptr, scratch_ptr, indices_ptr, best, top, uniform, top_k, top_p, min_p, V, TURN, PORTABLE
        )
    else:
        first, weights = best_score(scores_ptr, top, V, TURN, PORTABLE)
        token = over_block(first, scratch_ptr, "min", PORTABLE).to(tl.int32)
        token = tl.where(token < V, token, -1)
        logprob = -tl.log(over_block(weights, scratch_ptr, "sum", PORTABLE))
    return token, logprob


@triton.jit
def next_token(
    control_ptr, choice, logits_ptr, position, goes_on, best_value_ptr, best_index_ptr, logprobs_ptr, seen_ptr,
    scores_ptr, scratch_ptr, indices_ptr,
    NUM_PARTS: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token for a position, as the launch wants it chosen. `goes_on`: the prompt does, so it does not matter."""
    token = best_of_parts(best_value_ptr, best_index_ptr, NUM_PARTS)
    if (choice != CHOOSE_BEST) & (goes_on == 0):
        chosen, logprob = choose(
            control_ptr + CONTROL_CHOICE, choice, logits_ptr, seen_ptr, position, scores_ptr, scratch_ptr, indices_ptr,
            V, TURN, PORTABLE,
        )  # fmt: skip
        token = tl.where(chosen >= 0, chosen.to(tl.int64), token)
        tl.store(logprobs_ptr + position, logprob)
        tl.store(seen_ptr + token, 1)
    return token


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
def finish_step(
    control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """The token goes to `tokens` and to the host, unless the prompt goes on. `stop`: this step is the last one."""
    if step + 1 >= num_known:
        tl.store(tokens_ptr + step + 1, token)
        publish_token(mailbox_ptr, step + 1 - num_known, token, PORTABLE)
        stop = stop | (tl.sum((is_eos_id & (eos == token)).to(tl.int32), axis=0) > 0)
    tl.store(step_ptr, step + 1)
    tl.store(control_ptr + CONTROL_STOP, stop.to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))


# ---- ops/sample.py ----


@triton.jit(noinline=True)
def sample_tile(
    task, event_ptr, control_ptr, logits_ptr, mailbox_ptr, epoch, step, step_ptr,
    best_value_ptr, best_index_ptr, tokens_ptr, logprobs_ptr, seen_ptr,  # in, in, out, out, in and out
    scores_ptr, scratch_ptr, indices_ptr,
    NUM_PARTS: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    choice = tl.load(control_ptr + CONTROL_CHOICE).to(tl.int32)
    asks = step % STOP_INTERVAL == 0
    stop_asked = tl.load(mailbox_ptr + MAILBOX_STOP, mask=asks, other=0, volatile=True) != 0
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    token = next_token(
        control_ptr, choice, row_ptr, step + 1, step + 1 < num_known, best_value_ptr, best_index_ptr, logprobs_ptr,
        seen_ptr, scores_ptr, scratch_ptr, indices_ptr, NUM_PARTS, V, TURN, PORTABLE,
    )  # fmt: skip
    stop = (step >= last_step) | stop_asked
    finish_step(
        control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop, PORTABLE
    )
    signal(task, event_ptr, PORTABLE)


# ---- ops/gemv.py ----


@triton.jit
def start_ring(queue_ptr, num_tasks, control_ptr, smem, TASK_WORDS: tl.constexpr, RING: tl.constexpr):
    """Notes which weights this worker reads, in order, and requests the first of them."""
    if RING:
        slots = tl.load(control_ptr + CONTROL_RING_SLOTS).to(tl.int32)
        num_streams = (tl.load(queue_ptr + TASK_STREAM_INDEX) >> 32).to(tl.int32)
        for first in tl.range(0, num_tasks, WARPS * LANES, num_stages=1):
            task = first + tl.arange(0, WARPS * LANES)
            task_ptr = queue_ptr + task.to(tl.int64) * TASK_WORDS
            mask = task < num_tasks
            stream = tl.load(task_ptr + TASK_STREAM_INDEX, mask=mask, other=-1).to(tl.int32)
            following = tl.where(stream + 1 == num_streams, 0, stream + 1)  # behind the last one: the next step
            tl.inline_asm_elementwise(
                """{
                .reg .pred p; .reg .u32 at; .reg .b32 low, low2;
                setp.lt.s32 p, $2, 0; @p bra DONE;
                mad.lo.s32 at, $2, -32, $1; cvt.u32.u64 low, $5; cvt.u32.u64 low2, $6;
                st.shared.v2.b64 [at], {$3, $4}; st.shared.v4.b32 [at + 16], {low, low2, $7, 0};
                DONE: mov.u32 $0, 0;
                }""",
                "=r,r,r,l,l,l,l,r",
                [
                    smem - STREAM_BYTES,
                    stream,
                    tl.load(task_ptr + TASK_STREAM, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 1, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 2, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 3, mask=mask, other=0),
                    following,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 at, left;
            setp.ne.u32 p, $2, 0; @p bra DONE;
            mov.u32 at, $1; mov.u32 left, 16;
            NEXT: mbarrier.init.shared::cta.b64 [at], 1; mbarrier.init.shared::cta.b64 [at + 128], 16;
            add.u32 at, at, 8; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;
            mbarrier.init.shared::cta.b64 [$1 + 320], 1; mbarrier.init.shared::cta.b64 [$1 + 328], 1;
            st.shared.b32 [$1 + 336], 0;
            fence.mbarrier_init.release.cluster;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }""",
            "=r,r,r",
            [smem + BARRIERS_OFFSET, thread_index()],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        zero = slots * 0
        if num_streams > 0:
            cursor = read_stream(smem, zero)
            for slot in tl.range(0, slots - 1, num_stages=1):  # a fresh barrier counts as empty
                cursor = request_rows(smem, slot, 1, cursor, RING)
        else:
            slots = zero  # nothing is on its way, and nothing ever will be
            cursor = (zero, zero.to(tl.int64), zero, zero.to(tl.int64), zero)
        return (smem, slots, zero, zero, cursor)
    else:
        return 0


@triton.jit
def drain_ring(ring, RING: tl.constexpr):
    """Until nothing is on its way: a program may not end while copies into its shared memory run."""
    if RING:
        smem, slots, slot, phase, cursor = ring
        for _ in tl.range(0, slots - 1, num_stages=1):
            await_slot(smem, slot, phase)
            slot += 1
            if slot == slots:
                slot = slots * 0
                phase ^= 1
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 piece, left, at, x;
            setp.ne.u32 p, $2, 480; @p bra DONE;
            ld.shared.b32 piece, [$1 + 16]; mov.u32 left, 2;
            NEXT: and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 x, piece, 1, 1; xor.b32 x, x, 1;
            POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [at], x; @!p bra POLL;
            add.u32 piece, piece, 1; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;
            DONE: mov.u32 $0, 0;
            }""",
            "=r,r,r",
            [smem + PIECES_OFFSET, thread_index()],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# ---- scheduler/device.py ----


@triton.jit
def worker_index(first_worker, PORTABLE: tl.constexpr):
    """Which worker this program is. Read again where it is needed: it is not worth a register in between."""
    if PORTABLE:
        return tl.program_id(0) + first_worker
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .u32 x; mov.u32 x, %ctaid.x; add.u32 $0, x, $1; }",
            "=r,r",
            [first_worker],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def shared_memory(control_ptr, PORTABLE: tl.constexpr):
    """Address of our part of shared memory, which lies behind the compiler's."""
    if PORTABLE:
        return 0
    else:
        smem = tl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        return smem + tl.load(control_ptr + CONTROL_SHARED_BASE).to(tl.int32)


@triton.jit
def fetch_task(queue_ptr, slot, turn, smem, TASK_WORDS: tl.constexpr, PORTABLE: tl.constexpr):
    """Starts to copy a task descriptor to shared memory, where it is when the present task has signalled.

    Every wait empties the L1 cache, and a descriptor word that came late would hold up all that wait for this task.
    """
    if not PORTABLE:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 at; .reg .u64 from;
            mov.u32 at, %tid.x; setp.ge.u32 p, at, $3; mad.wide.u32 from, at, 16, $1; mad.lo.u32 at, at, 16, $2;
            @!p cp.async.ca.shared.global [at], [from], 16;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r",
            [
                (queue_ptr + slot * TASK_WORDS).to(tl.int64),
                smem + turn % 2 * DESCRIPTOR_BYTES,
                smem * 0 + TASK_WORDS // 2,
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def await_fetch(smem, PORTABLE: tl.constexpr):
    """Until what `fetch_task` copies is there. `signal` does the same."""
    if not PORTABLE:
        tl.inline_asm_elementwise(
            "cp.async.wait_all; bar.sync 0; mov.u32 $0, $1;", "=r,r", [smem], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def task_address(queue_ptr, slot, turn, smem, TASK_WORDS: tl.constexpr, PORTABLE: tl.constexpr):
    """Where `task_word` finds the descriptor: a pointer, or an address in shared memory."""
    if PORTABLE:
        return queue_ptr + slot * TASK_WORDS
    else:
        # Nothing that is read from there may be read before this point, where the fetch is over. Otherwise the compiler
        # is free to read a word where it is used (`task_word`), so that it holds no register until then.
        return tl.inline_asm_elementwise(
            "mov.u32 $0, $1;", "=r,r", [smem + turn % 2 * DESCRIPTOR_BYTES], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def pointer_field(task, word, DTYPE: tl.constexpr, PORTABLE: tl.constexpr):
    """A pointer of the task descriptor; the compiler learns its 16-byte alignment from the arithmetic."""
    return tl.multiple_of((task_word(task, word, PORTABLE) // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


# ---- megakernel ----


@triton.jit
def megakernel(queue_ptr, queue_start_ptr, event_ptr, control_ptr, step_ptr, logits_ptr, mailbox_ptr, first_worker):
    """Worker w runs tasks queue_start[w] to queue_start[w + 1] of the queue once per epoch, until told to stop."""
    worker = worker_index(first_worker, PORTABLE)
    first_task = tl.load(queue_start_ptr + worker).to(tl.int64)
    num_tasks = tl.load(queue_start_ptr + worker + 1) - first_task.to(tl.int32)
    worker_queue_ptr = queue_ptr + first_task * TASK_WORDS
    epoch = tl.load(control_ptr + CONTROL_FIRST_EPOCH).to(tl.int32)
    smem = shared_memory(control_ptr, PORTABLE)
    ring = start_ring(worker_queue_ptr, num_tasks, control_ptr, smem, TASK_WORDS, RING)
    turn = 0
    fetch_task(worker_queue_ptr, 0, turn, smem, TASK_WORDS, PORTABLE)
    await_fetch(smem, PORTABLE)
    running = num_tasks > 0
    step = tl.load(control_ptr + CONTROL_FIRST_STEP).to(tl.int32)  # counted from here on: argmax writes step_ptr
    while running:
        # nothing is hoisted out of the variants: it would hold registers in all of them
        for slot in tl.range(0, num_tasks, num_stages=1, disable_licm=True):
            task = task_address(worker_queue_ptr, slot, turn, smem, TASK_WORDS, PORTABLE)
            next_slot = tl.where(slot + 1 == num_tasks, 0, slot + 1)
            fetch_task(worker_queue_ptr, next_slot, turn + 1, smem, TASK_WORDS, PORTABLE)
            turn ^= 1
            variant = int_field(task, TASK_VARIANT, PORTABLE)
            if variant == 0:  # embedding
                embedding_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    step,
                    tokens_ptr=pointer_field(task, 10, tl.int64, PORTABLE),
                    table_ptr=pointer_field(task, 11, tl.bfloat16, PORTABLE),
                    y_ptr=pointer_field(task, 12, tl.float32, PORTABLE),
                    col0=int_field(task, 13, PORTABLE),
                    num_cols=int_field(task, 14, PORTABLE),
                    V=1024,
                    D=256,
                    BLOCK_D=256,
                    PORTABLE=PORTABLE,
                )
            elif variant == 1:  # rmsnorm_linear
                ring = rmsnorm_linear_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    ring,
                    x_ptr=pointer_field(task, 10, tl.float32, PORTABLE),
                    gain_ptr=pointer_field(task, 11, tl.bfloat16, PORTABLE),
                    weight_addr=task_word(task, 12, PORTABLE),
                    bias_ptr=pointer_field(task, 13, tl.bfloat16, PORTABLE),
                    y_ptr=pointer_field(task, 14, tl.bfloat16, PORTABLE),
                    row0=int_field(task, 15, PORTABLE),
                    num_rows=int_field(task, 16, PORTABLE),
                    D=256,
                    EPS=1e-06,
                    HAS_BIAS=False,
                    SLOT_ROWS=16,
                    BLOCK_N=256,
                    PORTABLE=PORTABLE,
                    RING=RING,
                    WEIGHT=tl.bfloat16,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 2:  # attention
                ring = attention_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    step,
                    ring,
                    qkv_ptr=pointer_field(task, 10, tl.bfloat16, PORTABLE),
                    q_gain_ptr=pointer_field(task, 11, tl.bfloat16, PORTABLE),
                    k_gain_ptr=pointer_field(task, 12, tl.bfloat16, PORTABLE),
                    cos_ptr=pointer_field(task, 13, tl.float32, PORTABLE),
                    sin_ptr=pointer_field(task, 14, tl.float32, PORTABLE),
                    page_table_ptr=pointer_field(task, 15, tl.int32, PORTABLE),
                    k_cache_ptr=pointer_field(task, 16, tl.bfloat16, PORTABLE),
                    v_cache_ptr=pointer_field(task, 17, tl.bfloat16, PORTABLE),
                    parts_ptr=pointer_field(task, 18, tl.bfloat16, PORTABLE),
                    lse_ptr=pointer_field(task, 19, tl.float32, PORTABLE),
                    kv_head=int_field(task, 20, PORTABLE),
                    split=int_field(task, 21, PORTABLE),
                    H=4,
                    HKV=2,
                    DH=64,
                    NUM_SPLITS=66,
                    SPLIT_TOKENS=128,
                    PAGE_SIZE=128,
                    SCALE=0.125,
                    NORM=True,
                    EPS=1e-06,
                    BY_WARPS=True,
                    BLOCK_H=8,
                    BLOCK_DH=64,
                    BLOCK_KV=32,
                    PORTABLE=PORTABLE,
                )
            elif variant == 3:  # attention_output
                ring = attention_output_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    step,
                    ring,
                    parts_ptr=pointer_field(task, 10, tl.bfloat16, PORTABLE),
                    lse_ptr=pointer_field(task, 11, tl.float32, PORTABLE),
                    weight_addr=task_word(task, 12, PORTABLE),
                    bias_ptr=pointer_field(task, 13, tl.float32, PORTABLE),
                    residual_ptr=pointer_field(task, 14, tl.float32, PORTABLE),
                    y_ptr=pointer_field(task, 15, tl.float32, PORTABLE),
                    row0=int_field(task, 16, PORTABLE),
                    num_rows=int_field(task, 17, PORTABLE),
                    K=256,
                    DH=64,
                    NUM_SPLITS=66,
                    SPLIT_TOKENS=128,
                    HAS_BIAS=False,
                    SLOT_ROWS=16,
                    BLOCK_N=256,
                    PORTABLE=PORTABLE,
                    RING=RING,
                    PREFETCH=PREFETCH,
                    WEIGHT=tl.bfloat16,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 4:  # rmsnorm_gated_linear
                ring = rmsnorm_gated_linear_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    ring,
                    x_ptr=pointer_field(task, 10, tl.float32, PORTABLE),
                    gain_ptr=pointer_field(task, 11, tl.bfloat16, PORTABLE),
                    gate_addr=task_word(task, 12, PORTABLE),
                    up_addr=task_word(task, 13, PORTABLE),
                    h_ptr=pointer_field(task, 14, tl.bfloat16, PORTABLE),
                    row0=int_field(task, 15, PORTABLE),
                    num_rows=int_field(task, 16, PORTABLE),
                    D=256,
                    EPS=1e-06,
                    SLOT_ROWS=16,
                    BLOCK_N=128,
                    PORTABLE=PORTABLE,
                    RING=RING,
                    WEIGHT=tl.bfloat16,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 5:  # linear_residual
                ring = linear_residual_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    epoch,
                    ring,
                    x_ptr=pointer_field(task, 10, tl.bfloat16, PORTABLE),
                    weight_addr=task_word(task, 11, PORTABLE),
                    bias_ptr=pointer_field(task, 12, tl.bfloat16, PORTABLE),
                    residual_ptr=pointer_field(task, 13, tl.float32, PORTABLE),
                    y_ptr=pointer_field(task, 14, tl.float32, PORTABLE),
                    row0=int_field(task, 15, PORTABLE),
                    num_rows=int_field(task, 16, PORTABLE),
                    K=768,
                    HAS_BIAS=False,
                    SLOT_ROWS=16,
                    BLOCK_N=256,
                    PORTABLE=PORTABLE,
                    RING=RING,
                    WEIGHT=tl.bfloat16,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 6:  # lm_head
                ring = lm_head_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    logits_ptr,
                    epoch,
                    step,
                    ring,
                    x_ptr=pointer_field(task, 10, tl.float32, PORTABLE),
                    gain_ptr=pointer_field(task, 11, tl.bfloat16, PORTABLE),
                    weight_addr=task_word(task, 12, PORTABLE),
                    best_value_ptr=pointer_field(task, 13, tl.float32, PORTABLE),
                    best_index_ptr=pointer_field(task, 14, tl.int32, PORTABLE),
                    part=int_field(task, 15, PORTABLE),
                    row0=int_field(task, 16, PORTABLE),
                    num_rows=int_field(task, 17, PORTABLE),
                    D=256,
                    EPS=1e-06,
                    SLOT_ROWS=16,
                    BLOCK_N=256,
                    PORTABLE=PORTABLE,
                    RING=RING,
                    WEIGHT=tl.bfloat16,
                    BLOCK_K=BLOCK_K,
                )
            elif variant == 7:  # sample
                sample_tile(
                    task,
                    event_ptr,
                    control_ptr,
                    logits_ptr,
                    mailbox_ptr,
                    epoch,
                    step,
                    step_ptr,
                    best_value_ptr=pointer_field(task, 10, tl.float32, PORTABLE),
                    best_index_ptr=pointer_field(task, 11, tl.int32, PORTABLE),
                    tokens_ptr=pointer_field(task, 12, tl.int64, PORTABLE),
                    logprobs_ptr=pointer_field(task, 13, tl.float32, PORTABLE),
                    seen_ptr=pointer_field(task, 14, tl.int8, PORTABLE),
                    scores_ptr=pointer_field(task, 15, tl.float32, PORTABLE),
                    scratch_ptr=pointer_field(task, 16, tl.float32, PORTABLE),
                    indices_ptr=pointer_field(task, 17, tl.int32, PORTABLE),
                    NUM_PARTS=132,
                    V=1024,
                    TURN=1024,
                    PORTABLE=PORTABLE,
                )
            elif variant == -1:  # a worker without tasks
                signal(task, event_ptr, PORTABLE)
            else:  # a damaged queue: whoever waits for this task ends the launch
                await_fetch(smem, PORTABLE)
        # the step event; its count is not worth a register in between
        step_count = tl.load(control_ptr + CONTROL_STEP_COUNT).to(tl.int32)
        wait_counter(event_ptr, epoch * step_count, -1 - worker_index(first_worker, PORTABLE), control_ptr, PORTABLE)
        running = (tl.load(control_ptr + CONTROL_STOP) == 0) & (tl.load(control_ptr + CONTROL_ABORT) == 0)
        epoch += 1
        step += 1
    drain_ring(ring, RING)
