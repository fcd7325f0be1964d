"""Choosing a token at random, by one worker: passes over the scores of a vocabulary in global memory.

What can be chosen is the upper part of an order: by score, equal scores by index, as a stable sort has it. top-k,
top-p and min-p each cut it off somewhere. Two ways lead there:

* the list: a lower bound that few tokens reach (from the largest scores of 512 slots of the vocabulary, or from min-p)
  is found without a sort. Who reaches it is collected, sorted and cut. Two passes over the vocabulary in all.
* the search, for what may keep many tokens (a large top-k, a flat distribution under top-p): every pass halves the sort
  keys that may be the last one, until they hold one token. About 20 passes.

One uniform number then picks from the cumulative weights of what is left.

Slot s is thread s, and has tokens s, s + 512, ...: a pass needs no other thread. What one thread has to know of others
goes through global memory, and is reduced within a warp: see ops/warps.py.
"""

import triton
import triton.language as tl

SLOTS = tl.constexpr(512)
LISTED = tl.constexpr(1024)  # tokens that a list holds
MAX_VOCAB = tl.constexpr(1 << 19)  # a slot's tokens fit where a list's do
SURE = tl.constexpr(256)  # of the slots: the bound of a larger top-k would be too low for a list
KEY_BITS = tl.constexpr(20)  # of a sort key, for the token: more than there are
NUM_KEYS = tl.constexpr(1 << 20)

# Elements of the scratch memory, fp32.
PARTIAL = tl.constexpr(0)  # a block's numbers on their way to one
SLOT = tl.constexpr(512)  # a number per slot
WEIGHT = tl.constexpr(1024)  # of the tokens that are left
FOUND = tl.constexpr(2048)  # scores as they are found
SORTED = tl.constexpr(3072)
NUM_SCRATCH = tl.constexpr(4096)
# The same for token indices, int32.
TOKEN = tl.constexpr(0)  # those of WEIGHT and of SORTED
FOUND_TOKEN = tl.constexpr(1024)
NUM_FOUND = tl.constexpr(2048)
NUM_INDICES = tl.constexpr(2064)


# ---- a block's numbers ----


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


# ---- passes over the vocabulary: TURN tokens at a time, whose loads are on their way together ----


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


# ---- top-k, top-p and min-p ----


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


# ---- the choice ----


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
