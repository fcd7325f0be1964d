"""Between the host and a kernel that serves requests: rings in memory of the host that the kernel can reach.

All of it is the mailbox, int64 words. Each ring has one producer and one consumer, counters that only grow, and a
number of places that is a power of 2. A counter is written with release, and read with acquire before what it vouches
for, both at system scope.

    word HOST_*, written by the host | KERNEL_*, written by the kernel
    RINGS: tickets [num_tickets]            host -> kernel: requests in the order in which they came
           records [num_tickets, RECORD]    of the request that holds a ticket, from its submission until its end
           results [num_results, 2]         kernel -> host: a token, an end, or both
           prompts [num_prompt_words]       host -> kernel: tokens of prompts, one after another, around the end

A ticket is a number below num_tickets that stands for a request while it lasts. The kernel gives the places of tickets
and prompts back as it takes requests in (KERNEL_REQUESTS); a record stays, because the host cancels a request there.
"""

import triton
import triton.language as tl

HOST_STOP = tl.constexpr(0)  # MAILBOX_STOP: STOP_NOW, or STOP_WHEN_DONE: no request will follow
HOST_REQUESTS = tl.constexpr(1)  # so many requests were handed over
HOST_RESULTS = tl.constexpr(2)  # so many results were taken
KERNEL_REQUESTS = tl.constexpr(8)  # so many requests were taken in; lies in a line of its own
KERNEL_RESULTS = tl.constexpr(9)  # so many results were written
RINGS = tl.constexpr(16)

STOP_NOW = tl.constexpr(1)
STOP_WHEN_DONE = tl.constexpr(2)

# Words of a request's record.
RECORD = tl.constexpr(64)  # words
RECORD_CANCEL = tl.constexpr(0)  # the host sets it at any time
RECORD_PROMPT = tl.constexpr(1)  # where its prompt begins in the ring
RECORD_PROMPT_LENGTH = tl.constexpr(2)
RECORD_MAX_LENGTH = tl.constexpr(3)  # of prompt and new tokens together
RECORD_NUM_ENDS = tl.constexpr(4)
RECORD_FINGERPRINT = tl.constexpr(5)  # of prompt and parameters, above 0: ranks compare it
RECORD_CHOICE = tl.constexpr(8)  # seven words: see sample.py
RECORD_ENDS = tl.constexpr(16)  # ids that end it
MAX_ENDS = tl.constexpr(32)

# A result: ticket | what | reason, and the token | fp32 bits of its log-probability << 32.
RESULT = tl.constexpr(2)  # words
RESULT_TOKEN = tl.constexpr(1 << 32)  # there is a token
RESULT_REASON = tl.constexpr(40)  # first bit of the reason why it is the last one; 0: it is not
END_OF_TEXT = tl.constexpr(1)
END_OF_LENGTH = tl.constexpr(2)
END_BY_CANCEL = tl.constexpr(3)

# A row of `asked`, what a rank's host had written when a step last looked: HOST_STOP to HOST_RESULTS, and then
ASKED_FIRST = tl.constexpr(3)  # number of the first request that was not taken in
ASKED_SLOTS = tl.constexpr(4)  # of every slot, whether its request is cancelled; then fingerprints, from that one on


@triton.jit
def acquired_word(word_ptr, PORTABLE: tl.constexpr):
    """A word of the host; what it wrote before may be read afterwards (volatile). Warps may see different values."""
    if PORTABLE:
        return tl.atomic_add(word_ptr, 0, sem="acquire", scope="sys")
    else:
        return tl.inline_asm_elementwise(  # a plain load: not every host lets a GPU do atomics on its memory
            "ld.acquire.sys.global.u64 $0, [$1];",
            "=l,l",
            [word_ptr.to(tl.int64)],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def publish_word(word_ptr, value, PORTABLE: tl.constexpr):
    """All that this worker has read and written of the rings is done when the host sees this int64."""
    if PORTABLE:
        tl.debug_barrier()
        tl.atomic_xchg(word_ptr, value, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 tid;
            bar.sync 0; mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0;
            @!p st.release.sys.global.u64 [$1], $2; mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [word_ptr.to(tl.int64), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
