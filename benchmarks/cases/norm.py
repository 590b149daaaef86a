"""Norms with the residual add in front, as the layers of decoder and tower call them."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, VISION, Shapes, num_patches


def _norm(
    rows: int, width: int, vectors: tuple[str, ...], eps: float, device: torch.device
) -> dict[str, Any]:
    x, residual = (torch.randn(rows, width, dtype=DTYPE, device=device) for _ in range(2))
    weights = {name: torch.randn(width, dtype=DTYPE, device=device) for name in vectors}
    return {"x": x, **weights, "eps": eps, "residual": residual}


def cases(shapes: Shapes) -> list[Case]:
    """x and residual read, norm and sum written, weight (and bias) read."""
    patches = {name: num_patches(grids) for name, grids in shapes.grids.items()}
    found = []
    for op, counts, model, vectors in (
        ("rms_norm", shapes.tokens, TEXT, ("weight",)),
        ("layer_norm", patches, VISION, ("weight", "bias")),
    ):
        for name, rows in counts.items():
            num_bytes = (4 * rows + len(vectors)) * model.hidden_size * DTYPE.itemsize
            arguments = partial(_norm, rows, model.hidden_size, vectors, model.eps)
            found.append(Case(op, name, arguments, num_bytes))
    return found
