"""Definition of attention over packed sequences."""

import torch

from keye_kernels._checks import check_cu_seqlens
from keye_kernels.reference._attention import Outputs, attend, log_sum_exp, outputs


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
    out: torch.Tensor | Outputs | None = None,
    schedule: tuple | None = None,
) -> torch.Tensor | Outputs:
    """softmax(q k^T * softmax_scale) v per sequence; lse from explicit fp32 scores.

    A schedule is for kernels: its tiles are checked against the lengths, not used.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = outputs(q, out, return_lse)
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], max_seqlen_k)
    batch_size = len(cu_q) - 1
    lengths = [(cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]) for i in range(batch_size)]
    if schedule is not None:
        tiles, block_m = schedule[:2]
        planned = torch.bincount(tiles[:, 0], minlength=batch_size).tolist()
        needed = [-(-len_q // block_m) for len_q, _ in lengths]
        if planned != needed:
            raise ValueError(
                f"schedule must have {needed} tiles for the lengths in cu_seqlens_q, got {planned}"
            )
    first = 0
    while first < batch_size:
        # Neighbours of the same length share one call: frames of a video come by the dozen.
        last = first + 1
        while last < batch_size and lengths[last] == lengths[first]:
            last += 1
        queries, keys = slice(cu_q[first], cu_q[last]), slice(cu_k[first], cu_k[last])
        shape_q, shape_k = ((last - first, length) for length in lengths[first])
        attend(
            q[queries].unflatten(0, shape_q),
            k[keys].unflatten(0, shape_k),
            v[keys].unflatten(0, shape_k),
            scale,
            causal,
            out[queries].unflatten(0, shape_q),
        )
        first = last
    if lse is not None:
        for i in range(batch_size):
            queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            log_sum_exp(q[queries], k[keys], scale, causal, lse[:, queries])
    return (out, lse) if return_lse else out
