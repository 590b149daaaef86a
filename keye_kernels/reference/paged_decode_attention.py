"""Definition of attention of one query per sequence over a paged key/value cache."""

import torch
import torch.nn.functional as F

from keye_kernels.reference._attention import Outputs, log_sum_exp, outputs
from keye_kernels.reference._paged import cached_sequences


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    max_seqlen_k: int,
    return_lse: bool = False,
    out: torch.Tensor | Outputs | None = None,
) -> torch.Tensor | Outputs:
    """Attention of one query per sequence over its pages; lse from explicit fp32 scores."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = outputs(q, out, return_lse)
    cached = cached_sequences(k_cache, v_cache, block_table, cache_seqlens.tolist(), max_seqlen_k)
    # The query heads of one key/value head act as its queries, so each key is read once.
    queries, results = (x.unflatten(1, (k_cache.shape[2], -1)) for x in (q, out))
    for i, (k, v) in enumerate(cached):
        if lse is not None:
            log_sum_exp(q[i : i + 1], k, scale, False, lse[:, i : i + 1])
        if k.shape[0] == 0:
            results[i] = 0
            continue
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        results[i] = F.scaled_dot_product_attention(queries[i : i + 1], k, v, scale=scale)[0]
    return (out, lse) if return_lse else out
