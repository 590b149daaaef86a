"""Forwards of the pointwise parts that all families have: norms, gated and plain MLPs.

Modules keep their parameters and children; our ops replace only what lies between GEMMs. A child
that `_guard.is_itself` does not accept is called as it is.
"""

import inspect
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations

from keye_kernels import gelu, layer_norm, rms_norm, silu_mul
from keye_kernels.integrations._guard import LINEAR, fits, is_itself, known

Forward = Callable[..., Any]
Maker = Callable[[ModuleType, Forward], Forward]

LAYER_NORM = known(nn.LayerNorm)
SILU = known(nn.SiLU, activations.SiLUActivation)
_APPROXIMATIONS = {activations.GELUTanh: "tanh", activations.GELUActivation: "none"}
GELU = known(nn.GELU, *_APPROXIMATIONS)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, width] with contiguous rows, as our ops take it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def norm(
    module: nn.Module,
    x: torch.Tensor,
    kinds: Collection[type],
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The model's LayerNorm or RMSNorm of x; with ``residual``: norm of their sum, and the sum."""
    added = () if residual is None else (residual,)
    if is_itself(module, kinds):
        if isinstance(module, nn.LayerNorm):
            op, vectors, eps = layer_norm, (module.weight, module.bias), module.eps
        else:
            op, vectors, eps = rms_norm, (module.weight,), module.variance_epsilon
        if fits(x, *vectors, *added) and (residual is None or residual.shape == x.shape):
            if residual is None:
                return op(rows(x), *vectors, eps).view(x.shape)
            y, total = op(rows(x), *vectors, eps, residual=rows(residual))
            return y.view(x.shape), total.view(x.shape)
    if residual is None:
        return module(x)
    total = residual + x
    return module(total), total


def rms_norm_forward(_: ModuleType, original: Forward) -> Forward:
    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # read once: an attribute of nn.Module is slow
        if not fits(hidden_states, weight):
            return original(self, hidden_states)
        y = rms_norm(rows(hidden_states), weight, self.variance_epsilon)
        return y.view(hidden_states.shape)

    return forward


def layer(
    first: str,
    attention: str,
    second: str,
    *,
    norms: Collection[str] = (),
    by_name: bool = True,
    returns_tuple: bool = False,
) -> Maker:
    """Norm, attention, norm, MLP under these names; the second norm adds the residual itself.

    Args:
        norms: Class names of the norms in the modeling module, by release. Empty: nn.LayerNorm.
        by_name: Pass attention its input by keyword, as the original does; hooks can tell.
        returns_tuple: Return a tuple, as layers of transformers 4 do.
    """

    def make(modeling: ModuleType, original: Forward) -> Forward:
        found = [getattr(modeling, name) for name in norms if hasattr(modeling, name)]
        kinds = known(*found) or LAYER_NORM
        argument = list(inspect.signature(original).parameters)[2]  # after self, hidden_states

        def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(args) > 1:
                return original(self, hidden_states, *args, **kwargs)
            if args:
                kwargs[argument] = args[0]
            x = norm(getattr(self, first), hidden_states, kinds)
            if by_name:
                attended = getattr(self, attention)(hidden_states=x, **kwargs)
            else:
                attended = getattr(self, attention)(x, **kwargs)
            weights = ()
            if isinstance(attended, tuple):
                attended, *weights = attended
            x, residual = norm(getattr(self, second), attended, kinds, hidden_states)
            x = residual + self.mlp(x)
            if not returns_tuple:
                return x
            return (x, *weights) if kwargs.get("output_attentions") else (x,)

        return forward

    return make


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def swiglu_forward(_: ModuleType, original: Forward) -> Forward:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not (is_itself(gate, LINEAR) and is_itself(up, LINEAR) and is_itself(self.act_fn, SILU)):
            return original(self, x)
        gate_weight, up_weight = gate.weight, up.weight
        if not fits(x, gate_weight, up_weight):
            return original(self, x)
        if torch.is_grad_enabled() and (x.requires_grad or gate_weight.requires_grad):
            # The matrix products below would raise a less clear error.
            raise RuntimeError(
                f"{type(self).__name__} must not require a gradient: keye_kernels is forward-only, "
                "call the model under torch.inference_mode() or torch.no_grad()"
            )
        flat, width = rows(x), gate.out_features
        if torch.compiler.is_compiling():  # torch.compile does not support `out` on half a row
            gate_up = torch.cat([gate(flat), up(flat)], dim=1)
        else:  # torch.cat would cost what the op saves
            gate_up = flat.new_empty(flat.shape[0], 2 * width)
            _linear(flat, gate_weight, gate.bias, out=gate_up[:, :width])
            _linear(flat, up_weight, up.bias, out=gate_up[:, width:])
        return self.down_proj(silu_mul(gate_up).view(*x.shape[:-1], width))

    return forward


def approximation(activation: nn.Module) -> str | None:
    """The ``approximate`` of our `gelu` for the model's activation, None if it is not GELU."""
    if type(activation) is nn.GELU:
        return activation.approximate
    return _APPROXIMATIONS.get(type(activation))


def linear_gelu(linear: nn.Module, activation: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """activation(linear(x)), with the bias added in the pass of the activation if possible."""
    if not is_itself(activation, GELU):
        return activation(linear(x))
    bias = None
    if is_itself(linear, LINEAR) and fits(x, weight := linear.weight):
        y, bias = F.linear(x, weight), linear.bias
    else:  # the call adds the bias itself
        y = linear(x)
        if not fits(y):
            return activation(y)
    return gelu(rows(y), approximate=approximation(activation), bias=bias).view(y.shape)


def gelu_mlp(first: str, activation: str, second: str) -> Maker:
    """Linear, activation, linear under these names."""

    def make(*_: Any) -> Forward:
        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            x = linear_gelu(getattr(self, first), getattr(self, activation), hidden_states)
            return getattr(self, second)(x)

        return forward

    return make
