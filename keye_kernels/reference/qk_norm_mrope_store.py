"""Definition of what the decoder does with its qkv before attention."""

import torch
import torch.nn.functional as F

from keye_kernels._checks import check_range
from keye_kernels.reference._blocks import blocks
from keye_kernels.reference.rope import mrope_angles, rotate


def qk_norm_mrope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    mrope_section: list[int],
    theta: float,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """rms_norm per head of q and k, then mrope_, then k and v to their slots."""
    num_pages, page_size, _, head_dim = k_cache.shape
    slots = slot_mapping.tolist()
    check_range("slot_mapping", slots, -1, num_pages * page_size)
    heads = qkv.unflatten(1, (-1, head_dim))
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
    normed = torch.empty_like(qk)
    for rows in blocks(qk):
        # Without a weight F.rms_norm computes in fp32 and rounds once.
        torch.mul(F.rms_norm(qk[rows], (head_dim,), None, eps), weight, out=normed[rows])
    angles = mrope_angles(positions, mrope_section, theta, interleaved=False)
    rotate(normed, angles, out=normed)
    q, k = normed.split((num_heads, num_kv_heads), dim=1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.copy_(q)
    if min(slots, default=0) < 0:
        stored = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[stored], k[stored], v[stored]
    pages, rows = slot_mapping // page_size, slot_mapping % page_size
    k_cache[pages, rows] = k
    v_cache[pages, rows] = v
    return out
