"""Attention of one new token per sequence over a paged key/value cache."""

import torch

from keye_kernels import reference
from keye_kernels._ops import define_op
from keye_kernels.paged_attention import check_paged

_paged_decode_attention_op = define_op(
    "paged_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor cache_seqlens, float softmax_scale, SymInt max_seqlen_k, Tensor(a!) out) -> ()",
    reference=reference.paged_decode_attention,
)


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    max_seqlen_k: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one new token per sequence to all of the sequence, read from the cache.

    Args:
        q: [batch_size, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 8 up to
            256. Any strides with a contiguous last dim.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``q``, pages in
            any order, page_size a multiple of 16. Rows past cache_seqlens are never read.
        block_table: [batch_size, max_pages] int32, pages of each sequence in order. Entries past
            the last page in use are never read.
        cache_seqlens: [batch_size] int32, tokens in the cache, the new one included. A row with 0
            (padding of a batch) gives 0.
        softmax_scale: Factor on q k^T, default head_dim ** -0.5.
        max_seqlen_k: Longest in cached tokens, or more.
        out: Like ``q``.

    Returns:
        [batch_size, num_heads, head_dim], dtype of ``q``, contiguous. Scores and softmax in fp32.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, the
            contents of cache_seqlens or the part of block_table in use do.
    """
    scale = check_paged(
        q, k_cache, v_cache, block_table, cache_seqlens, max_seqlen_k, softmax_scale, out
    )
    if q.shape[0] != block_table.shape[0]:
        raise ValueError(
            f"q must have one row per row of block_table ({block_table.shape[0]}), got {q.shape[0]}"
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.shape[0] > 0:
        _paged_decode_attention_op(
            q, k_cache, v_cache, block_table, cache_seqlens, scale, max_seqlen_k, out
        )
    return out
