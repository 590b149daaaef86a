"""Choose the next token of each request from its logits: greedy, or drawn with the request's seed.

Always two launches. The first splits the vocabulary over the GPU and writes the largest logit of
each group of tokens; in rows without top-k, also a bound of score + g per group and, with top-p, a
sum of weights per block. The second has one program per row, which reads only groups that can hold
the chosen token. So fp64 noise is computed for the few tokens whose bound in fp32 is high enough.

Top-p needs no search for its threshold. It keeps the tokens above some logit, so: take the token
with the largest score + g. While the tokens with larger logits already weigh top_p, that token is
not kept: take the largest score + g among those instead. The first round succeeds with probability
top_p or more, later ones are ever rarer.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, reference
from keye_kernels._checks import FLOAT_DTYPES, check_tensor
from keye_kernels._ops import define_op
from keye_kernels._sampling import (
    GROUP,
    LARGEST,
    NOTHING,
    TILE,
    bound_of,
    bound_scale,
    draw,
    draw_from_all,
    group_bound,
    key_of,
    keys_of,
    kth_key,
    logit_of,
    logits_of,
    philox,
    scores_of,
    weight_of,
)

_sample_op = define_op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, "
    "Tensor step, Tensor? repetition_penalty, Tensor? seen, Tensor(a!) out) -> ()",
    reference=reference.sample,
)

# The same for every batch size: the sums of a row must not depend on the other rows.
_BLOCK = 1024  # tokens per program of the first launch


class LaunchConfig(NamedTuple):
    """Group maxima that a program of the second launch holds, and the warps of each launch."""

    max_groups: int
    scan_warps: int
    choose_warps: int


def launch_config(num_groups: int) -> LaunchConfig:
    """Choose the launches.

    8 logits per thread in both: one 16-byte load in 16-bit types. The second takes more warps for
    vocabularies past 2^18, whose group maxima would fill its registers.
    """
    size = triton.next_power_of_2(num_groups)
    return LaunchConfig(size, 4, min(max(size // 512, 8), 32))


@triton.jit
def _sample_scan_kernel(
    logits_ptr, seen_ptr, penalty_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, step_ptr,
    group_keys_ptr, bounds_ptr, block_keys_ptr, weights_ptr, stride_logits, stride_seen,
    vocab_size, num_blocks, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // num_blocks).to(tl.int64)
    block = pid % num_blocks
    # Loaded before the logits, so that all these loads are in flight together.
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    seed = tl.load(seed_ptr + row)
    step = tl.load(step_ptr + row)
    penalty = 1.0
    if HAS_SEEN:
        penalty = tl.load(penalty_ptr + row)
        seen_ptr += row * stride_seen
    groups = tl.arange(0, BLOCK // GROUP)
    tokens = block * BLOCK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = logits_of(
        logits_ptr + row * stride_logits, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN
    )
    group_keys = key_of(tl.max(logits, axis=1))  # [BLOCK / GROUP]
    first = (row * num_blocks + block) * (BLOCK // GROUP)
    tl.store(group_keys_ptr + first + groups, group_keys)

    if (temperature > 0) & ((top_k <= 0) | (top_k >= vocab_size)):
        if top_p < 1:
            block_key = tl.max(group_keys)
            scores = scores_of(key_of(logits), block_key, 1 / temperature.to(tl.float64))
            tl.store(block_keys_ptr + row * num_blocks + block, block_key)
            tl.store(weights_ptr + row * num_blocks + block, tl.sum(tl.exp(scores)))
        # Bounds are relative to the group's largest logit: the row's is not known yet.
        top = tl.maximum(logit_of(group_keys), -LARGEST)  # finite
        w0, _ = philox(tokens, seed, step)
        bounds = bound_of(logits, top[:, None], bound_scale(temperature), w0)
        tl.store(bounds_ptr + first + groups, tl.max(bounds, axis=1))


@triton.jit
def _sample_choose_kernel(
    logits_ptr, seen_ptr, penalty_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, step_ptr,
    out_ptr, group_keys_ptr, list_ptr, bounds_ptr, block_keys_ptr, weights_ptr, stride_logits,
    stride_seen, stride_out, vocab_size, num_groups, num_blocks,
    HAS_SEEN: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    seed = tl.load(seed_ptr + row)
    step = tl.load(step_ptr + row)
    penalty = 1.0
    if HAS_SEEN:
        penalty = tl.load(penalty_ptr + row)
        seen_ptr += row * stride_seen
    logits_ptr += row * stride_logits
    list_ptr += row * num_groups
    groups = tl.arange(0, GROUPS)
    group_keys_ptr += row * num_groups
    group_keys = tl.load(group_keys_ptr + groups, mask=groups < num_groups, other=NOTHING)
    top_key = tl.max(group_keys)

    if top_key == NOTHING:
        token = -1
    elif not (temperature > 0):
        group = tl.min(tl.where(group_keys == top_key, groups, GROUPS))
        near = group * GROUP + tl.arange(0, TILE)[:, None] * GROUP
        tokens = near + tl.arange(0, GROUP)[None, :]
        keys = keys_of(logits_ptr, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN)
        token = tl.min(tl.where(keys == top_key, tokens, vocab_size))
    else:
        inverse_temperature = 1 / temperature.to(tl.float64)
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        has_top_p = top_p < 1
        rank = top_k.to(tl.int32)
        total = tl.full((), 0, tl.float64)
        if has_top_k:
            token, key = 0, top_key
            low = group_bound(group_keys, top_key, rank)
        else:
            token, key = draw_from_all(
                logits_ptr, seen_ptr, penalty, vocab_size, group_keys,
                bounds_ptr + row * num_groups, num_groups, top_key, temperature,
                inverse_temperature, seed, step, GROUPS, HAS_SEEN,
            )  # fmt: skip
            low = key + 1
            if has_top_p:
                blocks = tl.arange(0, BLOCKS)
                mask = blocks < num_blocks
                block_keys_ptr += row * num_blocks
                weights_ptr += row * num_blocks
                block_keys = tl.load(block_keys_ptr + blocks, mask=mask, other=NOTHING)
                weights = tl.load(weights_ptr + blocks, mask=mask, other=0.0)
                shift = scores_of(block_keys, top_key, inverse_temperature)
                total = tl.sum(weights * tl.exp(shift))

        if has_top_k | has_top_p:
            # List the groups whose maximum is at least low, in rising order; no other is read.
            reach = (group_keys >= low).to(tl.int32)
            num_listed = tl.sum(reach)
            tl.store(list_ptr + tl.cumsum(reach, axis=0) - 1, groups, mask=reach != 0)
            tl.debug_barrier()  # each thread reads what others wrote
            if has_top_k:
                low = kth_key(
                    logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low, top_key,
                    rank, HAS_SEEN,
                )  # fmt: skip
                if has_top_p:
                    total = weight_of(
                        logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low,
                        top_key, inverse_temperature, HAS_SEEN,
                    )  # fmt: skip
            needed = top_p.to(tl.float64) * total
            searching = has_top_k | has_top_p
            to_draw = has_top_k  # without top-k the first launch has drawn a token
            while searching:
                if to_draw:
                    token, key = draw(
                        logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low,
                        top_key, inverse_temperature, seed, step, HAS_SEEN,
                    )  # fmt: skip
                low = key + 1
                searching = has_top_p
                if has_top_p:
                    above = weight_of(
                        logits_ptr, seen_ptr, penalty, vocab_size, list_ptr, num_listed, low,
                        top_key, inverse_temperature, HAS_SEEN,
                    )  # fmt: skip
                    searching = (above > 0) & (above >= needed)
                to_draw = searching
    tl.store(out_ptr + row * stride_out, token.to(tl.int64))


def _sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    repetition_penalty: torch.Tensor | None,
    seen: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    batch_size, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    num_groups = num_blocks * (_BLOCK // GROUP.value)
    max_groups, scan_warps, choose_warps = launch_config(num_groups)
    ints = {"dtype": torch.int32, "device": logits.device}
    group_keys = torch.empty(batch_size, num_groups, **ints)
    listed = torch.empty(batch_size, num_groups, **ints)
    bounds = torch.empty(batch_size, num_groups, dtype=torch.float32, device=logits.device)
    block_keys = torch.empty(batch_size, num_blocks, **ints)
    weights = torch.empty(batch_size, num_blocks, dtype=torch.float64, device=logits.device)
    between = (bounds, block_keys, weights)
    exact = {"enable_fp_fusion": False}  # fma rounds once, the reference's product and sum twice
    has_seen = seen is not None
    stride_seen = seen.stride(0) if has_seen else 0
    row = (logits, seen, repetition_penalty, temperature, top_k, top_p, seed, step)
    _sample_scan_kernel[(batch_size * num_blocks,)](
        *row, group_keys, *between, logits.stride(0), stride_seen, vocab_size, num_blocks,
        HAS_SEEN=has_seen, BLOCK=_BLOCK, num_warps=scan_warps, **exact,
    )  # fmt: skip
    _sample_choose_kernel[(batch_size,)](
        *row, out, group_keys, listed, *between, logits.stride(0), stride_seen,
        out.stride(0), vocab_size, num_groups, num_blocks,
        HAS_SEEN=has_seen, GROUPS=max_groups, BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=choose_warps, **exact,
    )  # fmt: skip


_backends.register("sample", "triton", _sample_triton)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    *,
    repetition_penalty: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the next token of each row.

    In this order, on fp32 logits:

    1. NaN becomes -inf. Logits of ``seen`` tokens are divided by ``repetition_penalty`` where
       positive, multiplied by it where not. +inf becomes the largest fp32.
    2. ``temperature`` 0: the largest logit, the lowest token on ties. Done.
    3. ``top_k``: keep the logits not below the k-th largest, so ties with it stay.
    4. ``top_p``: with score = (logit - largest logit) * (1 / temperature) and p = softmax(score)
       over those kept, in fp64, keep the fewest largest logits whose p add up to ``top_p``, and
       ties with the last of them. At least one stays.
    5. Take the largest ``score + g`` (fp64, lowest token on ties) of those kept,
       g = -log(-log(u)), which draws from their softmax (Gumbel-max). u depends on the request's
       seed, the step and the token, and on nothing else: with Philox4x32-10, key (low, high word
       of seed), counter (token, low word of step, high word of step, 0) and first two words of
       result w0, w1: u = (w0 * 2^20 + floor(w1 / 2^12) + 0.5) / 2^52.

    The last bits of fp64 sums, exp and log may differ between backends or devices. They decide
    about one draw in 10^13, which may then give another token; everything else is exact.

    Args:
        logits: [batch_size, vocab_size], fp32 / fp16 / bf16. Rows may be strided.
        temperature: [batch_size] fp32, at least 0; 0 is greedy.
        top_k: [batch_size] int64, at least 0; 0, or vocab_size and more, is off.
        top_p: [batch_size] fp32, in [0, 1]; 1 is off.
        seed: [batch_size] int64, any value.
        step: [batch_size] int64, number of the token in its request; each step draws anew.
        repetition_penalty: [batch_size] fp32, positive; 1 is off. Comes with ``seen``.
        seen: [batch_size, vocab_size] bool, tokens the penalty applies to. Rows may be strided.
        out: [batch_size] int64.

    Returns:
        Tokens, [batch_size] int64. A row without a logit above -inf gives -1: the model that made
        it is broken.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, a
            parameter lies outside its range.

    Source: order of the logits processors in transformers; Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3" (SC 2011) for Philox.
    """
    check_tensor("logits", logits, (None, None), FLOAT_DTYPES)
    batch_size, vocab_size = logits.shape
    device = logits.device
    if vocab_size == 0:
        raise ValueError("logits must have at least one column, got 0")
    check_tensor("temperature", temperature, (batch_size,), torch.float32, device)
    check_tensor("top_k", top_k, (batch_size,), torch.int64, device)
    check_tensor("top_p", top_p, (batch_size,), torch.float32, device)
    check_tensor("seed", seed, (batch_size,), torch.int64, device)
    check_tensor("step", step, (batch_size,), torch.int64, device)
    if (repetition_penalty is None) != (seen is None):
        missing = "seen" if seen is None else "repetition_penalty"
        raise ValueError(f"repetition_penalty and seen must come together, got no {missing}")
    if seen is not None:
        check_tensor("repetition_penalty", repetition_penalty, (batch_size,), torch.float32, device)
        check_tensor("seen", seen, logits.shape, torch.bool, device)
    if out is None:
        out = logits.new_empty(batch_size, dtype=torch.int64)
    else:
        check_tensor("out", out, (batch_size,), torch.int64, device)
    if batch_size > 0:
        _sample_op(logits, temperature, top_k, top_p, seed, step, repetition_penalty, seen, out)
    return out
