"""Attention over packed sequences of different lengths, each attending to itself alone."""

import torch

from keye_kernels import reference
from keye_kernels._checks import (
    FLOAT_DTYPES,
    check_finite,
    check_head_dim,
    check_heads,
    check_length,
    check_tensor,
)
from keye_kernels._ops import define_op

_varlen_attention_op = define_op(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()",
    reference=reference._varlen_attention,
)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each sequence of a packed batch: softmax(q k^T * softmax_scale) v.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 8 up to
            256. Any strides with a contiguous last dim, so views of a packed qkv work.
        k, v: [num_keys, num_kv_heads, head_dim], dtype of ``q``; query head i reads key/value head
            ``i // (num_heads // num_kv_heads)``.
        cu_seqlens_q, cu_seqlens_k: [batch_size + 1] int32, sequence starts, first 0, last
            num_tokens or num_keys. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: Longest sequence, or more.
        softmax_scale: Factor on q k^T, default head_dim ** -0.5.
        causal: The last query of a sequence sees all its keys, the one before it all but the last,
            and so on.
        return_lse: Also return the log-sum-exp of the scaled scores.
        out: Like ``q``.

    Returns:
        out [num_tokens, num_heads, head_dim], dtype of ``q``, contiguous; with ``return_lse`` the
        pair (out, lse), lse [num_heads, num_tokens] fp32, natural logarithm. A query without a
        visible key gives 0 and -inf. Scores and softmax in fp32.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, the
            contents of cu_seqlens do.

    Source: argument order and masks of flash_attn_varlen_func (flash-attn 2.1 and later), which
    also has dropout_p, window_size, softcap, alibi_slopes and block_table: leave them out.
    """
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    num_tokens, num_heads, head_dim = q.shape
    check_tensor("k", k, (None, None, head_dim), q.dtype, q.device)
    check_tensor("v", v, k.shape, q.dtype, q.device)
    check_heads(num_heads, k.shape[1])
    check_head_dim(head_dim)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (None,), torch.int32, q.device)
    check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, torch.int32, q.device)
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    check_finite("softmax_scale", scale)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q must have at least 1 element, got 0")
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        check_tensor("out", out, q.shape, q.dtype, q.device)
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32) if return_lse else None
    if num_tokens > 0:
        _varlen_attention_op(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, out, lse
        )
    return out if lse is None else (out, lse)
