"""Device functions of `sample`: logits as integer keys, scores, noise, search in listed groups."""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)  # tokens per group: 128 bytes of bf16, one cache line
TILE = tl.constexpr(32)  # groups that the second launch reads at once

NOTHING = tl.constexpr(-(2**31) + 2**23 - 1)  # key of -inf, below all others
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def logit_of(key):
    """Logit of a key. The operation on bits is its own inverse: `keys_of` makes keys by it."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN: tl.constexpr):
    """int32 keys that sort as the penalised logits do; NOTHING for -inf, NaN and past the end."""
    mask = (tokens >= 0) & (tokens < vocab_size)
    x = tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    if HAS_SEEN:
        # A bound, not `& (penalty != 1)`: Triton's interpreter fails to combine it with a mask.
        mask = (tokens >= 0) & (tokens < tl.where(penalty != 1, vocab_size, 0))
        seen = tl.load(seen_ptr + tokens, mask=mask, other=0)
        # div_rn: Triton's plain fp32 division is not correctly rounded.
        x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
    x = tl.minimum(tl.where(x == 0, 0.0, x), LARGEST)  # -0 ties with 0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def scores_of(keys, top_key, inverse_temperature):
    """(logit - largest logit) / temperature, fp64; -inf for NOTHING."""
    logits, top = logit_of(keys).to(tl.float64), logit_of(top_key).to(tl.float64)
    return tl.where(keys > NOTHING, (logits - top) * inverse_temperature, float("-inf"))


@triton.jit
def gumbel(tokens, seed, step):
    """Noise of each token at its request's step, fp64."""
    low, high = step.to(tl.int32), (step >> 32).to(tl.int32)
    w0, w1, _, _ = tl.philox(seed, tokens, low, high, 0)
    u = ((w0.to(tl.int64) << 20 | w1.to(tl.int64) >> 12).to(tl.float64) + 0.5) * 2.0**-52
    return -tl.log(-tl.log(u))


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
