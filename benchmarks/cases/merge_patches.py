"""LayerNorm and the gather of each 2x2 square of patches, in the order of either model line."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import VISION, Grid, Shapes, num_patches

DTYPE = torch.bfloat16


def _merge_patches(grids: list[Grid], norm_first: bool, device: torch.device) -> dict[str, Any]:
    width = VISION.hidden_size * (1 if norm_first else VISION.merge_size**2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device)

    return {
        "x": randn(num_patches(grids), VISION.hidden_size),
        "weight": randn(width),
        "bias": randn(width),
        "eps": 1e-5,
        "grid_thw": grids,
        "norm_first": norm_first,
    }


def cases(shapes: Shapes) -> list[Case]:
    """Each patch read and written once, weight and bias read."""
    found = []
    mixed = [grids[0] for grids in shapes.grids.values()]  # many widths: a kernel of its own
    for name, grids in (shapes.grids | {"all of them": mixed}).items():
        for line, norm_first in (("8B-Preview", True), ("1.5", False)):
            vectors = 2 * (1 if norm_first else VISION.merge_size**2)
            elements = (2 * num_patches(grids) + vectors) * VISION.hidden_size
            arguments = partial(_merge_patches, grids, norm_first)
            num_bytes = elements * DTYPE.itemsize
            found.append(Case("merge_patches", f"{name}, {line}", arguments, num_bytes))
    return found
