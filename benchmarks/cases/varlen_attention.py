"""Attention of the tower: within an image, within a frame (1.5), within a video (8B-Preview)."""

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from benchmarks.cases import Case, attention_loop_flops
from benchmarks.shapes import DTYPE, VISION, Shapes
from keye_kernels import attention_schedule

_LONGEST = 2**16  # a longer segment takes seconds per call for every provider


def _varlen_attention(
    lengths: list[int],
    scheduled: bool,
    device: torch.device,
    head_dim: int = VISION.head_dim,
    **others: bool,
) -> dict[str, Any]:
    shape = (sum(lengths), 3, VISION.num_heads, head_dim)
    q, k, v = torch.randn(shape, dtype=DTYPE, device=device).unbind(1)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
        **others,
    }
    if scheduled:
        schedule = attention_schedule(lengths, num_heads=VISION.num_heads, device=device)
        arguments["schedule"] = schedule
    return arguments


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: q, k, v read, out written. FLOP: both products at the real head_dim.

    With the schedule that the tower makes once for its layers; the first images also without.
    """
    segments = {name: [t * h * w for t, h, w in grids] for name, grids in shapes.grids.items()}
    for name, grids in shapes.videos.items():
        segments[f"{name}, each alone"] = [h * w for t, h, w in grids for _ in range(t)]
    segments |= shapes.segments
    calls = {name: (lengths, True) for name, lengths in segments.items()}
    calls |= {f"{name}, no schedule": (segments[name], False) for name in list(shapes.images)[1:3]}
    found = []
    width = VISION.num_heads * VISION.head_dim
    for name, (lengths, scheduled) in calls.items():
        if max(lengths) > _LONGEST:
            continue
        num_bytes = 4 * sum(lengths) * width * DTYPE.itemsize
        flops = 4 * sum(length**2 for length in lengths) * width
        arguments = partial(_varlen_attention, lengths, scheduled)
        case = Case("varlen_attention", name, arguments, num_bytes, flops)
        found.append(replace(case, loop_flops=attention_loop_flops))
    return found


def compiled_cases() -> list[Case]:
    """Compiled, never run: other sizes of heads, each where it comes nearest to spills.

    FLOP: as if nothing were masked.
    """
    found = []
    for head_dim, count, scheduled, others in (
        (64, 512, False, ["return_lse"]),
        (80, 16384, False, []),
        (96, 16384, False, ["causal"]),
        (128, 512, True, ["causal", "return_lse"]),
    ):
        width = VISION.num_heads * head_dim
        arguments = partial(
            _varlen_attention, [count], scheduled, head_dim=head_dim, **dict.fromkeys(others, True)
        )
        name = ", ".join([f"heads of {head_dim}, {count} tokens", *others])
        num_bytes = 4 * count * width * DTYPE.itemsize
        case = Case("varlen_attention", name, arguments, num_bytes, 4 * count**2 * width)
        found.append(replace(case, loop_flops=attention_loop_flops))
    return found
