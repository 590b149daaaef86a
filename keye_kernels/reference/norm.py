"""Definitions of the norms."""

import torch
import torch.nn.functional as F

from keye_kernels.reference._blocks import row_blocks

Pair = tuple[torch.Tensor, torch.Tensor | None]  # y, x + residual


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """round(x * rsqrt(mean(x^2) + eps)) * weight."""
    y, total = out if isinstance(out, tuple) else (out, None)
    if residual is not None:
        x = total = torch.add(x, residual, out=total)
    y = torch.empty_like(x) if y is None else y
    for x_rows, y_rows in row_blocks(x, y):
        # Without a weight F.rms_norm computes in fp32 and rounds once.
        torch.mul(F.rms_norm(x_rows, x.shape[-1:], None, eps), weight, out=y_rows)
    return y if residual is None else (y, total)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """(x - mean) * rsqrt(variance + eps) * weight + bias, fp32 inside, rounded once."""
    y, total = out if isinstance(out, tuple) else (out, None)
    if residual is not None:
        x = total = torch.add(x, residual, out=total)
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = normed if y is None else y.copy_(normed)
    return y if residual is None else (y, total)
