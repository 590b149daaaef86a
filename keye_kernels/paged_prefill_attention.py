"""Causal attention of new tokens over a paged key/value cache."""

import torch

from keye_kernels import _backends, reference
from keye_kernels._attention import attend
from keye_kernels._checks import check_length, check_paged, check_tensor
from keye_kernels._ops import define_op

_paged_prefill_attention_op = define_op(
    "paged_prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor cu_seqlens_q, Tensor cache_seqlens, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    reference=reference.paged_prefill_attention,
    tuples={"out": ("out", "lse")},
)


def _paged_prefill_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_q: int,  # noqa: ARG001 - what it bounds is read on the device
    max_seqlen_k: int,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    # The heads of a group are programs of their own, side by side, and not rows of one program: few
    # tokens make few programs, and packing would make them fewer still.
    attend(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, softmax_scale, True, out,
        lse=lse, block_table=block_table, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


_backends.register("paged_prefill_attention", "triton", _paged_prefill_attention_triton)
_backends.register_class(
    "paged_prefill_attention", lambda q, *args: ((q.shape[2],), (q.shape[0], args[6]))
)


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend causally from the last tokens of each sequence to all of it, read from the cache.

    The keys and values of the new tokens are in the cache already. So one call serves a whole
    prompt, a chunk of one, and the rest of one whose beginning was cached before.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16, packed; the queries of a sequence
            are its last tokens. head_dim a multiple of 8 up to 256. Any strides with a contiguous
            last dim.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``q``, pages in
            any order, page_size a multiple of 16. Rows past cache_seqlens are never read.
        block_table: [batch_size, max_pages] int32, pages of each sequence in order. Entries past
            the last page in use are never read.
        cu_seqlens_q: [batch_size + 1] int32, starts of the sequences in ``q``, first 0, last
            num_tokens.
        cache_seqlens: [batch_size] int32, tokens in the cache, the new ones included; at least the
            number of queries.
        max_seqlen_q, max_seqlen_k: Longest in queries and in cached tokens, or more, also more
            than there are queries or than block_table can name.
        softmax_scale: Factor on q k^T, above 0, default head_dim ** -0.5.
        return_lse: Also return the log-sum-exp of the scaled scores.
        out: Like ``q``.

    Returns:
        out [num_tokens, num_heads, head_dim], dtype of ``q``, contiguous; with ``return_lse`` the
        pair (out, lse), lse [num_heads, num_tokens] fp32, natural logarithm. Scores and softmax in
        fp32. Where few queries meet ``max_seqlen_k`` of 2048 or more, keys are split into pieces:
        another number of tokens or sequences, or another max_seqlen_k, may change their number, and
        so the order of sums. Otherwise a sequence gets the same bits whatever its neighbours hold.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, the
            contents of cu_seqlens_q, cache_seqlens or the part of block_table in use do.
    """
    scale, max_seqlen_k = check_paged(
        q, k_cache, v_cache, block_table, cache_seqlens, max_seqlen_k, softmax_scale, out
    )
    batch_size = block_table.shape[0]
    check_tensor("cu_seqlens_q", cu_seqlens_q, (batch_size + 1,), torch.int32, q.device)
    if batch_size == 0 and q.shape[0] > 0:
        raise ValueError(f"q must have no tokens where there is no sequence, got {q.shape[0]}")
    max_seqlen_q = min(check_length("max_seqlen_q", max_seqlen_q), q.shape[0])
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    if q.shape[0] > 0:
        _paged_prefill_attention_op(
            q,
            k_cache,
            v_cache,
            block_table,
            cu_seqlens_q,
            cache_seqlens,
            max_seqlen_q,
            max_seqlen_k,
            scale,
            out,
            lse,
        )
    return out if lse is None else (out, lse)
