"""Definition of causal attention over a paged key/value cache."""

import torch

from keye_kernels._checks import check_cu_seqlens
from keye_kernels.reference._attention import Outputs, attend, log_sum_exp, outputs
from keye_kernels.reference._paged import cached_sequences


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
    out: torch.Tensor | Outputs | None = None,
) -> torch.Tensor | Outputs:
    """Causal attention of each sequence's queries over its pages; lse from explicit fp32 scores."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = outputs(q, out, return_lse)
    cu_q, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    for i, length in enumerate(lengths):
        if length < cu_q[i + 1] - cu_q[i]:
            raise ValueError(
                f"cache_seqlens must count the {cu_q[i + 1] - cu_q[i]} new tokens of sequence {i}, "
                f"got {length}"
            )
    cached = cached_sequences(k_cache, v_cache, block_table, lengths, max_seqlen_k)
    for i, (k, v) in enumerate(cached):
        rows = slice(cu_q[i], cu_q[i + 1])
        attend(q[None, rows], k[None], v[None], scale, True, out[None, rows])
        if lse is not None:
            log_sum_exp(q[rows], k, scale, True, lse[:, rows])
    return (out, lse) if return_lse else out
