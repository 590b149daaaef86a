"""Matrix products of a decode step, with what surrounds them in a layer."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, Shapes

_HEADS = TEXT.num_heads * TEXT.head_dim
_ALL_HEADS = (TEXT.num_heads + 2 * TEXT.num_kv_heads) * TEXT.head_dim

# out_features, in_features, what surrounds the product
MATRICES = {
    "qkv": (_ALL_HEADS, TEXT.hidden_size, "norm"),
    "o": (TEXT.hidden_size, _HEADS, "residual"),
    "gate_up": (2 * TEXT.intermediate_size, TEXT.hidden_size, "norm, swiglu"),
    "down": (TEXT.hidden_size, TEXT.intermediate_size, "residual"),
    "head": (TEXT.vocab_size, TEXT.hidden_size, ""),
}


def _arguments(
    rows: int, width: int, in_features: int, around: str, device: torch.device
) -> dict[str, Any]:
    weight = torch.randn(width, in_features, dtype=DTYPE, device=device).mul_(in_features**-0.5)
    found = {"x": torch.randn(rows, in_features, dtype=DTYPE, device=device), "weight": weight}
    if "norm" in around:
        found["norm_weight"] = torch.rand(in_features, dtype=DTYPE, device=device)
        found["eps"] = TEXT.eps
    if "swiglu" in around:
        found["swiglu"] = True
    if "residual" in around:
        found["residual"] = torch.randn(rows, width, dtype=DTYPE, device=device)
    return found


def cases(shapes: Shapes) -> list[Case]:
    """Weight, x, the norm's weight and the residual read, out written."""
    found = []
    for name, (whole, in_features, around) in MATRICES.items():
        width = whole // shapes.weight_share
        for rows in shapes.decode_rows:
            elements = width * in_features + rows * in_features
            elements += in_features if "norm" in around else 0
            elements += rows * (width // 2 if "swiglu" in around else width)
            elements += rows * width if "residual" in around else 0
            found.append(
                Case(
                    "linear",
                    f"{name}, {rows} row{'s' if rows > 1 else ''}",
                    partial(_arguments, rows, width, in_features, around),
                    elements * DTYPE.itemsize,
                    2 * rows * width * in_features,
                )
            )
    return found
