"""Pointwise ops between two GEMMs: gated SiLU and GELU with its bias."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keye_kernels import _backends, reference
from keye_kernels._checks import FLOAT_DTYPES, check_divides, check_tensor
from keye_kernels._matrices import matrices
from keye_kernels._ops import define_op

_silu_mul_op = define_op(
    "silu_mul(Tensor gate_up, Tensor(a!) out) -> ()",
    reference=reference.silu_mul,
)
_gelu_op = define_op(
    "gelu(Tensor x, str approximate, Tensor? bias, Tensor(a!) out) -> ()",
    reference=reference.gelu,
)


class LaunchConfig(NamedTuple):
    """Rows and columns per program, and warps."""

    rows: int
    block: int
    num_warps: int


def launch_config(num_tokens: int, width: int, rows: int) -> LaunchConfig:
    """Choose the launch.

    A thread takes the same 8 columns of each row, one 16-byte access in 16-bit types. Small inputs
    take more and smaller programs.
    """
    many = num_tokens * width >= 2**20
    return LaunchConfig(rows, 1024, 4) if many else LaunchConfig(1, 256, 1)


@triton.jit
def _tile(num_tokens, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] (int64: row * stride passes 2^31), columns [1, BLOCK], mask."""
    num_blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    rows = (pid // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = pid % num_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, cols, (rows < num_tokens) & (cols < width)


@triton.jit(do_not_specialize=["num_tokens"])  # one variant for all lengths
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, stride_gate_up, stride_out, num_tokens, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _tile(num_tokens, width, ROWS, BLOCK)

    gate_ptrs = gate_up_ptr + rows * stride_gate_up + cols
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)  # [ROWS, BLOCK]
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0)  # [ROWS, BLOCK]
    gate_fp32 = gate.to(tl.float32)
    silu = (gate_fp32 / (1 + tl.exp(-gate_fp32))).to(gate.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + rows * stride_out + cols, y.to(gate.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])  # one variant for all lengths
def _gelu_kernel(
    x_ptr, bias_ptr, out_ptr, stride_x, stride_out, num_tokens, width,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, cols, mask = _tile(num_tokens, width, ROWS, BLOCK)

    x = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0)  # [ROWS, BLOCK]
    u = x.to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)  # [1, BLOCK]
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), which neither overflows nor cancels.
        z = 0.7978845608028654 * (u + 0.044715 * u * u * u)  # sqrt(2 / pi)
        y = u / (1 + tl.exp(-2 * z))
    else:
        y = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    tl.store(out_ptr + rows * stride_out + cols, y.to(x.dtype), mask=mask)


def _grid(num_tokens: int, width: int, rows: int, block: int) -> tuple[int]:
    return (triton.cdiv(num_tokens, rows) * triton.cdiv(width, block),)


def _silu_mul_triton(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    views = matrices(gate_up, out)
    for gate_up, out in views:
        num_tokens, width = out.shape
        rows, block, num_warps = launch_config(num_tokens, width, rows=1)
        _silu_mul_kernel[_grid(num_tokens, width, rows, block)](
            gate_up, out, gate_up.stride(0), out.stride(0), num_tokens, width,
            ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip


def _gelu_triton(
    x: torch.Tensor, approximate: str, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    views = matrices(x, out)
    for x, out in views:
        num_tokens, width = x.shape
        rows, block, num_warps = launch_config(num_tokens, width, rows=4)  # one load of the bias
        _gelu_kernel[_grid(num_tokens, width, rows, block)](
            x, bias, out, x.stride(0), out.stride(0), num_tokens, width,
            TANH=approximate == "tanh", ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip


_backends.register("silu_mul", "triton", _silu_mul_triton)
_backends.register("gelu", "triton", _gelu_triton)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply ``silu(gate)`` by ``up``.

    Args:
        gate_up: [..., 2 * intermediate_size], fp32 / fp16 / bf16, gate in the first half of the
            last dim, any number of dims before it. Strides as in ``rms_norm``.
        out: [..., intermediate_size], dtype of ``gate_up``. May be the gate half itself.

    Returns:
        [..., intermediate_size], dtype of ``gate_up``. silu in fp32, rounded before the
        product and after it.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: Qwen3MLP in transformers.
    """
    check_tensor("gate_up", gate_up, None, FLOAT_DTYPES)
    *leading, width = gate_up.shape
    if width > 0:
        check_divides("the last dim of gate_up", width, 2)
    shape = (*leading, width // 2)
    if out is None:
        out = gate_up.new_empty(shape)
    else:
        check_tensor("out", out, shape, gate_up.dtype, gate_up.device)
    if out.numel() > 0:
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
        x: [..., hidden_size], fp32 / fp16 / bf16, usually a GEMM's output before its bias, any
            number of dims before the last. Strides as in ``rms_norm``.
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
    check_tensor("x", x, None, FLOAT_DTYPES)
    if bias is not None:
        check_tensor("bias", bias, x.shape[-1:], x.dtype, x.device)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        check_tensor("out", out, x.shape, x.dtype, x.device)
    if x.numel() > 0:
        _gelu_op(x, approximate, bias, out)
    return out
