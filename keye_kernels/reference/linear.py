"""Definition of the linear layer."""

import torch
import torch.nn.functional as F

from keye_kernels.reference.activation import silu_mul
from keye_kernels.reference.norm import rms_norm


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """rms_norm, the product with its bias, then silu_mul or the residual add, each rounded."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if swiglu:
        return silu_mul(F.linear(x, weight, bias), out=out)
    if residual is not None:
        return torch.add(F.linear(x, weight, bias), residual, out=out)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)
