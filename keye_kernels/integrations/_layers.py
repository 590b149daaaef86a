"""Forwards of the pointwise parts that all families have: norms, gated and plain MLPs.

Modules keep their parameters and their other children; only what happens between GEMMs is ours.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from keye_kernels import gelu, layer_norm, rms_norm, silu_mul

Forward = Callable[..., Any]

# By class name, in transformers' activations.
_APPROXIMATIONS = {"GELUTanh": "tanh", "GELUActivation": "none"}


def rows(x: torch.Tensor) -> torch.Tensor:
    """All dims but the last as one: what our ops take."""
    return x.reshape(-1, x.shape[-1])


def norm(
    module: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The norm of x, or of x + residual and that sum, by a LayerNorm or an RMSNorm of the model."""
    added = None if residual is None else rows(residual)
    if isinstance(module, nn.LayerNorm):
        y = layer_norm(rows(x), module.weight, module.bias, module.eps, residual=added)
    else:
        y = rms_norm(rows(x), module.weight, module.variance_epsilon, residual=added)
    return y.view(x.shape) if residual is None else (y[0].view(x.shape), y[1].view(x.shape))


def rms_norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return norm(self, hidden_states)


def layer(first: str, attention: str, second: str, *, returns_tuple: bool = False) -> Forward:
    """Norm, attention, norm, MLP under these names, with the first sum inside the second norm."""

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = norm(getattr(self, first), hidden_states)
        attended = getattr(self, attention)(x, *args, **kwargs)
        weights = ()
        if isinstance(attended, tuple):
            attended, *weights = attended
        x, residual = norm(getattr(self, second), attended, residual=hidden_states)
        x = residual + self.mlp(x)
        if not returns_tuple:
            return x
        return (x, *weights) if kwargs.get("output_attentions") else (x,)

    return forward


def _linear(linear: nn.Linear, x: torch.Tensor, out: torch.Tensor) -> None:
    if linear.bias is None:
        torch.mm(x, linear.weight.t(), out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def swiglu_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    flat, width = rows(x), self.gate_proj.out_features
    if torch.is_grad_enabled() and (x.requires_grad or self.gate_proj.weight.requires_grad):
        # The products below would say the same less clearly.
        raise RuntimeError(
            f"{type(self).__name__} must not require a gradient: keye_kernels is forward-only, "
            "call the model under torch.inference_mode() or torch.no_grad()"
        )
    if torch.compiler.is_compiling():  # which takes no `out` that is part of a row
        gate_up = torch.cat([self.gate_proj(flat), self.up_proj(flat)], dim=1)
    else:  # to concatenate would cost what the op saves
        gate_up = flat.new_empty(flat.shape[0], 2 * width)
        _linear(self.gate_proj, flat, out=gate_up[:, :width])
        _linear(self.up_proj, flat, out=gate_up[:, width:])
    return self.down_proj(silu_mul(gate_up).view(*x.shape[:-1], width))


def approximation(activation: nn.Module) -> str | None:
    """What our op calls the model's activation, None where it is no GELU."""
    if type(activation) is nn.GELU:
        return activation.approximate
    return _APPROXIMATIONS.get(type(activation).__name__)


def linear_gelu(linear: nn.Module, activation: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The activation of the linear layer, whose bias is added in the same pass."""
    approximate = approximation(activation)
    if type(linear) is nn.Linear:
        y = gelu(F.linear(rows(x), linear.weight), approximate=approximate, bias=linear.bias)
    else:  # quantised, or with an adapter: it adds its bias itself
        y = gelu(rows(linear(x)), approximate=approximate)
    return y.view(*x.shape[:-1], y.shape[-1])


def gelu_mlp(first: str, activation: str, second: str) -> Forward:
    """Linear, activation, linear under these names."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        x = linear_gelu(getattr(self, first), getattr(self, activation), hidden_states)
        return getattr(self, second)(x)

    return forward
