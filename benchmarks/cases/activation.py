"""silu_mul in the decoder, gelu in the tower and in the projector."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, VISION, Shapes, num_patches


def _silu_mul(num_tokens: int, device: torch.device) -> dict[str, Any]:
    gate_up = torch.randn(num_tokens, 2 * TEXT.intermediate_size, dtype=DTYPE, device=device)
    return {"gate_up": gate_up}


def _gelu(num_tokens: int, width: int, approximate: str, device: torch.device) -> dict[str, Any]:
    x = torch.randn(num_tokens, width, dtype=DTYPE, device=device)
    bias = torch.randn(width, dtype=DTYPE, device=device)
    return {"x": x, "approximate": approximate, "bias": bias}


def cases(shapes: Shapes) -> list[Case]:
    """gate and up read, out written; x read, out written."""
    found = []
    for name, count in shapes.tokens.items():
        num_bytes = 3 * count * TEXT.intermediate_size * DTYPE.itemsize
        found.append(Case("silu_mul", name, partial(_silu_mul, count), num_bytes))
    merged = VISION.hidden_size * VISION.merge_size**2
    for name, grids in shapes.grids.items():
        count = num_patches(grids)
        for width, approximate, rows in (
            (VISION.intermediate_size, "tanh", count),
            (merged, "none", count // VISION.merge_size**2),
        ):
            num_bytes = (2 * rows + 1) * width * DTYPE.itemsize
            arguments = partial(_gelu, rows, width, approximate)
            found.append(Case("gelu", f"{name}, {approximate}", arguments, num_bytes))
    return found
