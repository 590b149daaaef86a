"""Definition of the merging of patches."""

import torch

from keye_kernels._checks import Grid, grid_rows
from keye_kernels.reference.norm import layer_norm


def merge_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grid_thw: Grid,
    *,
    residual: torch.Tensor | None = None,
    patch_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    merge_size: int = 2,
    norm_first: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm per patch, then gather; or gather, then LayerNorm over the whole token.

    The residual add and the norm that may come before either round as ops of their own.
    """
    if residual is not None:
        x = x + residual
    if patch_norm is not None:
        x = layer_norm(x, *patch_norm)
    if norm_first:
        x = layer_norm(x, weight, bias, eps)
    tokens = []
    start = 0
    for t, h, w in grid_rows(grid_thw):
        h, w = h // merge_size, w // merge_size
        size = t * h * w * merge_size**2
        squares = x[start : start + size].view(t, h, merge_size, w, merge_size, -1).transpose(2, 3)
        tokens.append(squares.reshape(t * h * w, -1))
        start += size
    merged = torch.cat(tokens)
    if not norm_first:
        return layer_norm(merged, weight, bias, eps, out=out)
    return merged if out is None else out.copy_(merged)
