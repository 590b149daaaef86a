"""Pointwise ops between two GEMMs: gated SiLU and GELU with its bias."""

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, check_divides, check_tensor
from keye_kernels._ops import define_op

_silu_mul_op = define_op(
    "silu_mul(Tensor gate_up, Tensor(a!) out) -> ()",
    reference=reference.silu_mul,
)
_gelu_op = define_op(
    "gelu(Tensor x, str approximate, Tensor? bias, Tensor(a!) out) -> ()",
    reference=reference.gelu,
)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply ``silu(gate)`` by ``up``.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], fp32 / fp16 / bf16, gate in the first half of
            the last dim. Rows may be strided.
        out: [num_tokens, intermediate_size], dtype of ``gate_up``. May be the gate half itself.

    Returns:
        [num_tokens, intermediate_size], dtype of ``gate_up``. silu in fp32, rounded before the
        product and after it.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: Qwen3MLP in transformers.
    """
    check_tensor("gate_up", gate_up, (None, None), FLOAT_DTYPES)
    num_tokens, width = gate_up.shape
    check_divides("the last dim of gate_up", width, 2)
    if out is None:
        out = gate_up.new_empty(num_tokens, width // 2)
    else:
        check_tensor("out", out, (num_tokens, width // 2), gate_up.dtype, gate_up.device)
    if num_tokens > 0:
        _silu_mul_op(gate_up, out)
    return out


def gelu(
    x: torch.Tensor,
    *,
    approximate: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply GELU to ``x``, or to ``x + bias``.

    Args:
        x: [num_tokens, hidden_size], fp32 / fp16 / bf16, usually a GEMM's output before its bias.
            Rows may be strided.
        approximate: "tanh" (vision tower) or "none" (exact, by erf; projector).
        bias: [hidden_size], dtype of ``x``.
        out: Like ``x``. May be ``x`` itself.

    Returns:
        Like ``x``, contiguous. fp32 inside, the sum with ``bias`` included, rounded once at the
        store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or ``approximate`` is
            neither name.

    Source: the MLP of the vision tower and the projector, modeling_keye.py of Keye-VL-8B-Preview.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, x.shape[1:], x.dtype, x.device)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        check_tensor("out", out, x.shape, x.dtype, x.device)
    if x.shape[0] > 0:
        _gelu_op(x, approximate, bias, out)
    return out
