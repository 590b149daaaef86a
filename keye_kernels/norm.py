"""Normalisation over the last dim: RMSNorm and LayerNorm, each with an optional residual add."""

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, check_tensor
from keye_kernels._ops import define_op

Pair = tuple[torch.Tensor, torch.Tensor]


def _out_pair(out: torch.Tensor, residual_out: torch.Tensor | None) -> torch.Tensor | Pair:
    return out if residual_out is None else (out, residual_out)


def _rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    reference.rms_norm(x, weight, eps, residual=residual, out=_out_pair(out, residual_out))


def _layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    reference.layer_norm(x, weight, bias, eps, residual=residual, out=_out_pair(out, residual_out))


_rms_norm_op = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    reference=_rms_norm_reference,
)
_layer_norm_op = define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    reference=_layer_norm_reference,
)


def _destinations(
    x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | Pair | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check ``residual`` and ``out`` and give the tensors to write: (y, x + residual or None)."""
    if residual is None:
        if out is None:
            return torch.empty_like(x, memory_format=torch.contiguous_format), None
        check_tensor("out", out, x.shape, x.dtype, x.device)
        return out, None
    check_tensor("residual", residual, x.shape, x.dtype, x.device)
    if out is None:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        return y, torch.empty_like(y)
    if not isinstance(out, tuple) or len(out) != 2 or out[0] is out[1]:
        raise ValueError(
            "out must be a pair of two tensors (y, x + residual) when residual is given, "
            f"got {type(out).__name__}"
        )
    check_tensor("out[0]", out[0], x.shape, x.dtype, x.device)
    check_tensor("out[1]", out[1], x.shape, x.dtype, x.device)
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """Scale each row of ``x`` to unit root mean square, then by ``weight``.

    Args:
        x: [num_tokens, hidden_size], fp32 / fp16 / bf16. Rows may be strided.
        weight: [hidden_size], dtype of ``x``.
        eps: Added to the mean square, not to its root.
        residual: Like ``x``; when given, the norm is that of ``x + residual``, the sum rounded to
            the dtype of ``x`` first.
        out: Like ``x``; with ``residual`` a pair (y, sum). ``x`` and ``residual`` themselves are
            allowed.

    Returns:
        y like ``x``, contiguous; with ``residual`` the pair (y, x + residual). fp32 inside, rounded
        before the product with ``weight`` and again after it.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: Qwen3RMSNorm in transformers, which the text decoder of Keye-VL uses.
    """
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)
    y, residual_out = _destinations(x, residual, out)
    if x.shape[0] > 0:
        _rms_norm_op(x, weight, eps, residual, y, residual_out)
    return _out_pair(y, residual_out)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """Shift each row of ``x`` to mean 0, scale it to variance 1, then apply weight and bias.

    Args:
        x: [num_tokens, hidden_size], fp32 / fp16 / bf16. Rows may be strided.
        weight, bias: [hidden_size], dtype of ``x``.
        eps: Added to the (biased) variance.
        residual: Like ``x``; when given, the norm is that of ``x + residual``, the sum rounded to
            the dtype of ``x`` first.
        out: Like ``x``; with ``residual`` a pair (y, sum). ``x`` and ``residual`` themselves are
            allowed.

    Returns:
        y like ``x``, contiguous; with ``residual`` the pair (y, x + residual). fp32 inside, rounded
        once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: torch.nn.LayerNorm in the vision tower, modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)
    check_tensor("bias", bias, x.shape[1:], x.dtype, x.device)
    y, residual_out = _destinations(x, residual, out)
    if x.shape[0] > 0:
        _layer_norm_op(x, weight, bias, eps, residual, y, residual_out)
    return _out_pair(y, residual_out)
