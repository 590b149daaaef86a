"""Choose the next token of each request from its logits: greedy, or drawn with the request's seed.

Always two launches. The first splits the vocabulary over the GPU and writes the largest logit of
each group of tokens; in rows without top-k, also a draw and a sum of weights per block. The second
has one program per row, which reads only groups that can hold the chosen token.

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
    NOTHING,
    TILE,
    draw,
    group_bound,
    gumbel,
    keys_of,
    kth_key,
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
    group_keys_ptr, drawn_ptr, partial_ptr, stride_logits, stride_seen, vocab_size, num_blocks,
    HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
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
    keys = keys_of(
        logits_ptr + row * stride_logits, seen_ptr, penalty, tokens, vocab_size, HAS_SEEN
    )
    group_keys = tl.max(keys, axis=1)  # [BLOCK / GROUP]
    first = (row * num_blocks + block) * (BLOCK // GROUP)
    tl.store(group_keys_ptr + first + groups, group_keys)

    if (temperature > 0) & ((top_k <= 0) | (top_k >= vocab_size)):
        # Scores are relative to the block's largest logit: the row's is not known yet.
        top_key = tl.max(group_keys)
        scores = scores_of(keys, top_key, 1 / temperature.to(tl.float64))
        noisy = scores + gumbel(tokens, seed, step)
        best = tl.max(noisy)
        token = tl.min(tl.where(noisy == best, tokens, vocab_size))
        key = tl.max(tl.where(tokens == token, keys, NOTHING))
        drawn_ptr += row * 3 * num_blocks + block
        tl.store(drawn_ptr, token)
        tl.store(drawn_ptr + num_blocks, key)
        tl.store(drawn_ptr + 2 * num_blocks, top_key)
        partial_ptr += row * 2 * num_blocks + block
        tl.store(partial_ptr, best)
        if top_p < 1:
            tl.store(partial_ptr + num_blocks, tl.sum(tl.exp(scores)))


@triton.jit
def _combine_blocks(
    drawn_ptr, partial_ptr, num_blocks, top_key, inverse_temperature, top_p, BLOCKS: tl.constexpr
):
    """Combine the blocks' draws and sums: the row's token, its key, the row's sum of exp(score)."""
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < num_blocks
    block_top = tl.load(drawn_ptr + 2 * num_blocks + blocks, mask=mask, other=NOTHING)
    shift = scores_of(block_top, top_key, inverse_temperature)
    noisy = tl.load(partial_ptr + blocks, mask=mask, other=float("-inf")) + shift
    tokens = tl.load(drawn_ptr + blocks, mask=mask, other=0)
    keys = tl.load(drawn_ptr + num_blocks + blocks, mask=mask, other=NOTHING)
    block = tl.min(tl.where(noisy == tl.max(noisy), blocks, BLOCKS))
    token = tl.max(tl.where(blocks == block, tokens, 0))
    key = tl.max(tl.where(blocks == block, keys, NOTHING))
    # A bound, not `& (top_p < 1)`: Triton's interpreter fails to combine it with a mask.
    mask = blocks < tl.where(top_p < 1, num_blocks, 0)
    weights = tl.load(partial_ptr + num_blocks + blocks, mask=mask, other=0.0)
    return token, key, tl.sum(weights * tl.exp(shift))


@triton.jit
def _sample_choose_kernel(
    logits_ptr, seen_ptr, penalty_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, step_ptr,
    out_ptr, group_keys_ptr, list_ptr, drawn_ptr, partial_ptr, stride_logits, stride_seen,
    stride_out, vocab_size, num_groups, num_blocks,
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
        if has_top_k:
            token, key, total = 0, top_key, tl.full((), 0, tl.float64)
            low = group_bound(group_keys, top_key, rank)
        else:
            drawn_ptr += row * 3 * num_blocks
            partial_ptr += row * 2 * num_blocks
            token, key, total = _combine_blocks(
                drawn_ptr, partial_ptr, num_blocks, top_key, inverse_temperature, top_p, BLOCKS
            )
            low = key + 1

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
    drawn = torch.empty(batch_size, 3, num_blocks, **ints)  # token, its key, largest key
    partial = torch.empty(  # score + noise of that token, sum of exp(score)
        batch_size, 2, num_blocks, dtype=torch.float64, device=logits.device
    )
    exact = {"enable_fp_fusion": False}  # fma rounds once, the reference's product and sum twice
    has_seen = seen is not None
    stride_seen = seen.stride(0) if has_seen else 0
    row = (logits, seen, repetition_penalty, temperature, top_k, top_p, seed, step)
    _sample_scan_kernel[(batch_size * num_blocks,)](
        *row, group_keys, drawn, partial, logits.stride(0), stride_seen, vocab_size, num_blocks,
        HAS_SEEN=has_seen, BLOCK=_BLOCK, num_warps=scan_warps, **exact,
    )  # fmt: skip
    _sample_choose_kernel[(batch_size,)](
        *row, out, group_keys, listed, drawn, partial, logits.stride(0), stride_seen,
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
