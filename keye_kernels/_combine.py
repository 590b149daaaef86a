"""The second launch of attention whose keys were split: it adds up the pieces of each query."""

import torch
import triton
import triton.language as tl

ROUND = 32  # pieces that are combined at once, of one query per sequence
_ROUND_OF_MANY = 8  # of many queries, which have few pieces each


@triton.jit(do_not_specialize=["stride_lse", "num_pieces", "max_seqlen_k"])
def _combine_kernel(
    sums_ptr, stats_ptr, seqlens_ptr, out_ptr, lse_ptr, stride_out, stride_out_head, stride_lse,
    num_heads, num_pieces, max_seqlen_k,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, head = pid // num_heads, pid % num_heads
    cols = tl.arange(0, BLOCK)
    used = num_pieces
    if seqlens_ptr is not None:
        num_keys = tl.minimum(tl.load(seqlens_ptr + row), max_seqlen_k)
        used = tl.minimum(tl.cdiv(num_keys, KEYS), num_pieces)
    peak, total = float("-inf"), 0.0
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, used, ROUND):
        pieces = first + tl.arange(0, ROUND)
        mask = pieces < used
        rows = pid * num_pieces + pieces
        peaks = tl.load(stats_ptr + 2 * rows, mask, other=float("-inf"))
        totals = tl.load(stats_ptr + 2 * rows + 1, mask, other=0.0)
        sums_ptrs = sums_ptr + rows[:, None] * HEAD_DIM + cols[None, :]
        sums = tl.load(sums_ptrs, mask[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)
        above = tl.maximum(peak, tl.max(peaks))
        minus = tl.where(above == float("-inf"), 0.0, -above)  # no key seen yet
        shrink, grow = tl.exp2(peak + minus), tl.exp2(peaks + minus)
        acc = acc * shrink + tl.sum(sums * grow[:, None], axis=0)
        total = total * shrink + tl.sum(totals * grow)
        peak = above
    if lse_ptr is not None:
        lse = (peak + tl.log2(total)) * 0.6931471805599453  # ln 2
        tl.store(lse_ptr + head * stride_lse + row, lse)
    acc = acc / tl.where(total == 0, 1.0, total)
    out_ptrs = out_ptr + row * stride_out + head * stride_out_head + cols
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), cols < HEAD_DIM)


def combine(
    sums: torch.Tensor,
    stats: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    cache_seqlens: torch.Tensor | None = None,
    max_seqlen_k: int = 0,
    keys: int = 1,
) -> None:
    """Add up the pieces of each query.

    Args:
        sums: [num_tokens, num_heads, num_pieces, head_dim], fp32, values times weights.
        stats: [num_tokens, num_heads, num_pieces, 2], fp32: largest score in base 2, and the sum of
            the weights relative to it; -inf and 0 for a piece without keys.
        out: [num_tokens, num_heads, head_dim].
        lse: [num_heads, num_tokens] fp32, or None.
        cache_seqlens: Given if nothing is written for pieces without keys: keys of each token, at
            most ``max_seqlen_k``. They fill as many pieces as there are tiles of ``keys``.
    """
    num_tokens, num_heads, num_pieces, head_dim = sums.shape
    _combine_kernel[(num_tokens * num_heads,)](
        sums, stats, cache_seqlens, out, lse, out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), num_heads, num_pieces, max_seqlen_k,
        HEAD_DIM=head_dim, BLOCK=max(triton.next_power_of_2(head_dim), 16), KEYS=keys,
        ROUND=_ROUND_OF_MANY if cache_seqlens is None else ROUND, num_warps=2,
    )  # fmt: skip
