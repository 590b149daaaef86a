"""Attention of the tower: within an image, within a frame (1.5), within a video (8B-Preview)."""

from functools import partial
from itertools import accumulate
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import VISION, Shapes

DTYPE = torch.bfloat16
_LONGEST = 2**16  # a longer segment takes seconds per call for every provider


def _varlen_attention(lengths: list[int], device: torch.device) -> dict[str, Any]:
    shape = (sum(lengths), 3, VISION.num_heads, VISION.head_dim)
    q, k, v = torch.randn(shape, dtype=DTYPE, device=device).unbind(1)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
    }


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: q, k, v read, out written. FLOP: both products at the real head_dim."""
    segments = {name: [t * h * w for t, h, w in grids] for name, grids in shapes.grids.items()}
    for name, grids in shapes.videos.items():
        segments[f"{name}, each alone"] = [h * w for t, h, w in grids for _ in range(t)]
    found = []
    width = VISION.num_heads * VISION.head_dim
    for name, lengths in segments.items():
        if max(lengths) > _LONGEST:
            continue
        num_bytes = 4 * sum(lengths) * width * DTYPE.itemsize
        flops = 4 * sum(length**2 for length in lengths) * width
        arguments = partial(_varlen_attention, lengths)
        found.append(Case("varlen_attention", name, arguments, num_bytes, flops))
    return found
