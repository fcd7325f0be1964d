"""The scheduler inside the kernel: task descriptors, waiting for events and signalling them.

A signal is a CTA barrier and then `red.release`; a wait is one thread polling `ld.acquire` and then a CTA barrier. Both
exist in a portable form (Triton atomics; what the interpreter runs) and as PTX, behind the constexpr PORTABLE.

Every wait is bounded. A worker whose bound is exceeded raises the abort flag with what it saw; all later waits give up
at once, so that every worker reaches the end of its queue, sees the flag and leaves. Nothing checks the flag on the
fast path.
"""

import triton
import triton.language as tl

# Words of a task descriptor (int64). Fields of the op follow from FIELDS on.
TASK_VARIANT = tl.constexpr(0)  # variant | task index << 32
TASK_WAIT = tl.constexpr(1)  # event counter to wait for: its index in event_ptr
TASK_WAIT_COUNT = tl.constexpr(2)  # signals per step; 0: nothing to wait for
TASK_SIGNALS = tl.constexpr(3)  # two words, four int32 counter indices, -1 where unused
TASK_STREAM = tl.constexpr(5)  # four words: the weights that this task reads, a WeightStream or a PanelStream
TASK_STREAM_INDEX = tl.constexpr(9)  # which of the worker's streams that is (-1: none) | how many it has << 32
TASK_FIELDS = tl.constexpr(10)

# Words of the control block (int64): what the host sets for a launch, and what the kernel tells it afterwards.
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
CONTROL_RECORDED_STEPS = tl.constexpr(60)  # a profiled kernel keeps records of so many steps, the last ones
CONTROL_STEP_RECORDS = tl.constexpr(61)  # records of one step: see timing.py
CONTROL_CLOCK = tl.constexpr(62)  # the interpreter's clock
CONTROL_RECORDS = tl.constexpr(64)  # the end of the control block; a profiled kernel's records follow

# Our part of shared memory begins with the descriptors of the present task and of the next one.
DESCRIPTOR_BYTES = tl.constexpr(256)
SHARED_BYTES = tl.constexpr(512)


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
def task_word(task, word, PORTABLE: tl.constexpr):
    if PORTABLE:
        return tl.load(task + word)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b64 $0, [$1];", "=l,r", [task + word * 8], dtype=tl.int64, is_pure=True, pack=1
        )


@triton.jit
def pointer_field(task, word, DTYPE: tl.constexpr, PORTABLE: tl.constexpr):
    """A pointer of the task descriptor; the compiler learns its 16-byte alignment from the arithmetic."""
    return tl.multiple_of((task_word(task, word, PORTABLE) // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


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
