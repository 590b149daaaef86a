"""Raw uint8 patches to embeddings with positions."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, VISION, Grid, Shapes, num_patches

PATCH = 3 * VISION.patch_size**2  # pixels, 588


def _patch_embed(grids: list[Grid], device: torch.device) -> dict[str, Any]:
    size, hidden_size = VISION.patch_size, VISION.hidden_size
    shape = (num_patches(grids), 3, size, size)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device)

    return {
        "pixels": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "weight": randn(hidden_size, 3, size, size) * PATCH**-0.5,
        "bias": randn(hidden_size),
        "position_table": randn(VISION.position_grid**2, hidden_size),
        "grid_thw": grids,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: pixels, weight, bias and position table read, embeddings written. FLOP: the GEMM."""
    found = []
    weights = VISION.hidden_size * (PATCH + 1 + VISION.position_grid**2) * DTYPE.itemsize
    for name, grids in shapes.grids.items():
        count = num_patches(grids)
        num_bytes = count * PATCH + weights + count * VISION.hidden_size * DTYPE.itemsize
        flops = 2 * count * PATCH * VISION.hidden_size
        found.append(Case("patch_embed", name, partial(_patch_embed, grids), num_bytes, flops))
    return found
