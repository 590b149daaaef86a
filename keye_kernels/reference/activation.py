"""Definitions of gated SiLU and of GELU with its bias."""

import torch
import torch.nn.functional as F

from keye_kernels.reference._blocks import row_blocks


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """round(silu(gate)) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate) if out is None else out
    for gate_rows, up_rows, out_rows in row_blocks(gate, up, out):
        torch.mul(F.silu(gate_rows), up_rows, out=out_rows)
    return out


def gelu(
    x: torch.Tensor,
    *,
    approximate: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gelu(x + bias), fp32 inside, rounded once."""
    out = torch.empty_like(x) if out is None else out
    for x_rows, out_rows in row_blocks(x, out):
        total = x_rows if bias is None else x_rows.float() + bias.float()
        out_rows.copy_(F.gelu(total, approximate=approximate))
    return out
