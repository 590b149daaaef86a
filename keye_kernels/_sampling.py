"""Device functions of `sample`: logits as integer keys, scores, noise, search in listed groups."""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)  # tokens per group: 128 bytes of bf16, one cache line
TILE = tl.constexpr(32)  # groups that the second launch reads at once
SPAN = tl.constexpr(16)  # adjacent groups that `draw_from_all` reads at once

NOTHING = tl.constexpr(-(2**31) + 2**23 - 1)  # key of -inf, below all others
LARGEST = tl.constexpr(3.4028234663852886e38)

LN_2 = tl.constexpr(0.6931471805599453)
BOUND_OFFSET = tl.constexpr(159 + 2.0**-14)  # `bound_of` leaves it out and says why it is enough


@triton.jit
def logit_of(key):
    """Logit of a key. The operation on bits is its own inverse: `key_of` makes keys by it."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(logit):
    """int32 that sorts as the logit does: -0 as 0, +inf as the largest fp32. NaN is not allowed."""
    bits = tl.minimum(tl.where(logit == 0, 0.0, logit), LARGEST).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logits_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN: tl.constexpr):
    """Penalised logits, fp32; -inf for NaN and past the end."""
    mask = (tokens >= 0) & (tokens < vocab_size)
    x = tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    if HAS_SEEN:
        # A bound, not `& (penalty != 1)`: Triton's interpreter fails to combine it with a mask.
        mask = (tokens >= 0) & (tokens < tl.where(penalty != 1, vocab_size, 0))
        seen = tl.load(seen_ptr + tokens, mask=mask, other=0)
        # div_rn: Triton's plain fp32 division is not correctly rounded.
        x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    return x


@triton.jit
def keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN: tl.constexpr):
    """Keys of the penalised logits; NOTHING for -inf, NaN and past the end."""
    return key_of(logits_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN))


@triton.jit
def scores_of(keys, top_key, inverse_temperature):
    """(logit - largest logit) / temperature, fp64; -inf for NOTHING."""
    logits, top = logit_of(keys).to(tl.float64), logit_of(top_key).to(tl.float64)
    return tl.where(keys > NOTHING, (logits - top) * inverse_temperature, float("-inf"))


@triton.jit
def philox(tokens, seed, step):
    """First two words of Philox4x32-10, uint32; counter (token, step, 0), key seed.

    One 64-bit product gives both words that a round needs; `tl.philox` computes two products.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = tokens.to(tl.uint32), step.to(tl.uint32), (step >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c2)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1


@triton.jit
def gumbel(tokens, seed, step):
    """Noise of each token at its request's step, fp64."""
    w0, w1 = philox(tokens, seed, step)
    u = ((w0.to(tl.int64) << 20 | w1.to(tl.int64) >> 12).to(tl.float64) + 0.5) * 2.0**-52
    return -tl.log(-tl.log(u))


@triton.jit
def bound_scale(temperature):
    """4 / (ln 2 * temperature), fp32: never subnormal, and finite at subnormal temperatures."""
    return tl.minimum(5.770780163555854 / temperature, LARGEST)


@triton.jit
def score_bound(logits, top, scale):
    """(logit - top) / (ln 2 * temperature), fp32. By quarters, whose difference cannot overflow."""
    return tl.fma(logits, 0.25, -0.25 * top) * scale


@triton.jit
def bound_of(logits, top, scale, w0):
    """Upper bound of (score + noise) / ln 2 - BOUND_OFFSET, computed in fp32.

    Scores are relative to ``top``, w0 is the first word of `philox`. Proof, with noise
    g = -ln(-ln(u)) and m = 2^32 - 1 - w0:

    - u < (w0 + 1) / 2^32, so -ln(u) >= 1 - u > m / 2^32 and g / ln 2 < 32 - log2(m).
    - Let bits be the integer that has the bits of m as fp32. log2(1 + f) >= f for f in [0, 1], so
      log2(m) >= bits / 2^23 - 127. If m = 0, bits = 0; then g / ln 2 < 53, as 1 - u >= 2^-53.

    So (score + g) / ln 2 < score / ln 2 - bits / 2^23 + 159. What rounding takes from the right
    side matters only for the token that is drawn, whose score / ln 2 is -58.2 or more: g / ln 2
    lies between -5.2 and 53, since 2^-53 < -ln(u) <= 53 ln 2, and the largest logit has score 0.
    Rounding takes at most

    - 2^-15.2 in the score, also where it is the sum of two, token to group and group to row: 7
      times 2^-24 of it (ln 2, difference and product 1 each, the quotient 4: `div.full` has 2 ulp),
      and 2^-20 in subnormal quarters and differences, as scale < 2^128. Where scale is cut to
      LARGEST, the score comes out higher, which a bound may.
    - 2^-23 where m becomes fp32, and 2^-17 where bits do: bits < 2^31.
    - 2^-17 in the sum here, and 2^-17 where the group's score is added: both are below 2^8.

    The sum of these is less than 2^-14, hence BOUND_OFFSET.
    """
    bits = (w0 ^ 0xFFFFFFFF).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.fma(bits.to(tl.float32), -(2.0**-23), score_bound(logits, top, scale))


@triton.jit
def middle_of(low, high):
    """(low + high) / 2, rounded up, without their sum, which may overflow int32."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def group_bound(group_keys, top_key, top_k):
    """A lower bound of the top_k-th largest key: at least top_k groups have a maximum >= it.

    At most max(top_k, TILE) groups do, but for ties. With fewer than top_k, it is the lowest key.
    """
    low, high = NOTHING + 1, top_key
    count = tl.sum((group_keys >= low).to(tl.int32))
    while (low < high) & (count > tl.maximum(top_k, TILE)):
        middle = middle_of(low, high)
        reach = group_keys >= middle
        reaching = tl.sum(reach.to(tl.int32))
        if reaching >= top_k:
            low = tl.min(tl.where(reach, group_keys, top_key))
            count = reaching
        else:
            high = tl.max(tl.where(reach, NOTHING, group_keys))
    return low


@triton.jit
def listed_tokens(list_ptr, start, num_listed):
    """Tokens of TILE listed groups; negative past the end of the list."""
    entries = start + tl.arange(0, TILE)
    groups = tl.load(list_ptr + entries, mask=entries < num_listed, other=-1)
    return groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [TILE, GROUP]


@triton.jit
def kth_key(
    logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low, high, top_k,
    HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The top_k-th largest key of the listed groups, known to lie between low and high."""
    while low < high:
        middle = middle_of(low, high)
        count = tl.zeros((TILE, GROUP), tl.int32)
        above = tl.full((TILE, GROUP), high, tl.int32)  # lowest key >= middle
        below = tl.full((TILE, GROUP), NOTHING, tl.int32)  # highest key < middle
        for start in range(0, num_listed, TILE):
            tokens = listed_tokens(list_ptr, start, num_listed)
            keys = keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN)
            reach = keys >= middle
            count += reach.to(tl.int32)
            above = tl.where(reach, tl.minimum(above, keys), above)
            below = tl.where(reach, below, tl.maximum(below, keys))
        if tl.sum(count) >= top_k:
            low = tl.min(above)
        else:
            high = tl.max(below)
    return low


@triton.jit
def weight_of(
    logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low, top_key,
    inverse_temperature, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Sum of exp(score) over the listed tokens whose key is at least low."""
    weight = tl.zeros((TILE, GROUP), tl.float64)
    for start in range(0, num_listed, TILE):
        tokens = listed_tokens(list_ptr, start, num_listed)
        keys = keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN)
        scores = scores_of(keys, top_key, inverse_temperature)
        weight += tl.where(keys >= low, tl.exp(scores), 0.0)
    return tl.sum(weight)


@triton.jit
def draw(
    logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low, top_key,
    inverse_temperature, seed, step, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """The listed token with key >= low whose score + noise is largest, and its key."""
    best = tl.full((TILE, GROUP), float("-inf"), tl.float64)
    best_token = tl.full((TILE, GROUP), vocab_size, tl.int32)
    best_key = tl.full((TILE, GROUP), NOTHING, tl.int32)
    for start in range(0, num_listed, TILE):
        tokens = listed_tokens(list_ptr, start, num_listed)
        keys = keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN)
        noisy = scores_of(keys, top_key, inverse_temperature) + gumbel(tokens, seed, step)
        better = (keys >= low) & (noisy > best)  # tokens ascend: a tie keeps the lowest
        best = tl.where(better, noisy, best)
        best_token = tl.where(better, tokens, best_token)
        best_key = tl.where(better, keys, best_key)
    largest = tl.max(best)
    token = tl.min(tl.where(best == largest, best_token, vocab_size))
    key = tl.max(tl.where(best_token == token, best_key, NOTHING))
    return token, key


@triton.jit
def draw_from_all(
    logits_ptr, seen_ptr, penalty, vocab_size, group_keys, bounds_ptr, num_groups, top_key,
    temperature, inverse_temperature, seed, step, GROUPS: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Token with the largest score + noise of the row, and its key.

    Reads SPAN groups at a time, from the highest bound down, until no bound reaches the largest
    score + noise found. That is after the first time in nearly all rows.
    """
    groups = tl.arange(0, GROUPS)
    bounds = tl.load(bounds_ptr + groups, mask=groups < num_groups, other=float("-inf"))
    bounds += score_bound(logit_of(group_keys), logit_of(top_key), bound_scale(temperature))
    token, key = vocab_size, NOTHING
    best = tl.full((), float("-inf"), tl.float64)
    highest = tl.max(bounds)
    while (highest.to(tl.float64) + BOUND_OFFSET) * LN_2 >= best:
        span = tl.min(tl.where(bounds == highest, groups, GROUPS)) // SPAN
        near = (span * SPAN + tl.arange(0, SPAN)) * GROUP
        tokens = near[:, None] + tl.arange(0, GROUP)[None, :]
        keys = keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN)
        noisy = scores_of(keys, top_key, inverse_temperature) + gumbel(tokens, seed, step)
        largest = tl.max(noisy)
        first = tl.min(tl.where(noisy == largest, tokens, vocab_size))
        if (largest > best) | ((largest == best) & (first < token)):
            best, token = largest, first
            key = tl.max(tl.where(tokens == first, keys, NOTHING))
        bounds = tl.where(groups // SPAN == span, float("-inf"), bounds)
        highest = tl.max(bounds)
    return token, key
