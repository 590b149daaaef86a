"""The way from tower to projector: residual, last norm, projector's norm and 2x2 gather at once.

In the order of either model line. The op is also compiled without what the tower leaves to it.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, VISION, Grid, Shapes, num_patches


def _merge_patches(
    grids: list[Grid], norm_first: bool, behind_tower: bool, device: torch.device
) -> dict[str, Any]:
    hidden_size, count = VISION.hidden_size, num_patches(grids)
    width = hidden_size * (1 if norm_first else VISION.merge_size**2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device=device)

    arguments = {
        "x": randn(count, hidden_size),
        "weight": randn(width),
        "bias": randn(width),
        "eps": 1e-5,
        "grid_thw": grids,
        "norm_first": norm_first,
    }
    if behind_tower:
        arguments["residual"] = randn(count, hidden_size)
        arguments["patch_norm"] = (randn(hidden_size), randn(hidden_size), VISION.eps)
    return arguments


def _case(name: str, grids: list[Grid], norm_first: bool, behind_tower: bool) -> Case:
    """Each patch read (and its residual) and written once, weights and biases read."""
    vectors = 2 * (1 if norm_first else VISION.merge_size**2) + (2 if behind_tower else 0)
    passes = 3 if behind_tower else 2
    num_bytes = (passes * num_patches(grids) + vectors) * VISION.hidden_size * DTYPE.itemsize
    name += ", 8B-Preview" if norm_first else ", 1.5"
    name += "" if behind_tower else ", alone"
    arguments = partial(_merge_patches, grids, norm_first, behind_tower)
    return Case("merge_patches", name, arguments, num_bytes)


def cases(shapes: Shapes) -> list[Case]:
    """Behind the tower at every shape, and from its features alone at the first."""
    mixed = [grids[0] for grids in shapes.grids.values()]  # many widths: a kernel of its own
    behind = [
        (name, grids, True) for name, grids in (shapes.grids | {"all of them": mixed}).items()
    ]
    first = next(iter(shapes.grids.items()))
    return [
        _case(name, grids, norm_first, behind_tower)
        for name, grids, behind_tower in (*behind, (*first, False))
        for norm_first in (True, False)
    ]
