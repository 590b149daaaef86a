"""Normalisation over the last dim: RMSNorm and LayerNorm, each with an optional residual add."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from keye_kernels import _backends, reference
from keye_kernels._checks import FLOAT_DTYPES, check_eps, check_tensor
from keye_kernels._matrices import matrices
from keye_kernels._ops import define_op
from keye_kernels._rows import (
    add_rows,
    layer_norm_rows,
    load_rows,
    mean_square,
    power_of_2,
    store_rows,
)

Pair = tuple[torch.Tensor, torch.Tensor | None]  # y, x + residual


_rms_norm_op = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    reference=reference.rms_norm,
    tuples={"out": ("out", "residual_out")},
)
_layer_norm_op = define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual, "
    "Tensor(a!) out, Tensor(b!)? residual_out) -> ()",
    reference=reference.layer_norm,
    tuples={"out": ("out", "residual_out")},
)


class LaunchConfig(NamedTuple):
    """What a program holds: ``rows`` whole rows, in chunks of ``chunk`` columns."""

    rows: int
    chunk: int
    num_warps: int


def launch_config(width: int, dtype: torch.dtype) -> LaunchConfig:
    """Choose chunks of which each thread reads its part with one 16-byte access.

    They do not depend on the number of rows, so a row is summed in one order and gets the same bits
    alone, in a decode step and in a long prefill. A row up to 2048 wide belongs to one warp, which
    reduces it by shuffles alone; of rows that fit one chunk, each thread gets two. A wider row is a
    program with 16 elements per thread, to keep latency low when rows are few (width 4096 with
    residual: each of 16 warps issues 149 instructions, of 8 warps 197, of 4 warps 296). When rows
    are many, 8 warps issue a third more in total than 4, calculated to be under a quarter of what
    an H200 can issue while the row moves.
    """
    warp = 32 * 16 // dtype.itemsize  # elements of one access of a warp
    if width > 2048:
        num_warps = power_of_2(width // 512, 1, 16)
        return LaunchConfig(1, num_warps * warp, num_warps)
    chunk = min(warp, triton.next_power_of_2(width))
    return LaunchConfig(4 * warp // chunk * (2 if chunk >= width else 1), chunk, 4)


@triton.jit
def _inputs(
    x_ptr, residual_ptr, residual_out_ptr, stride_x, stride_residual, stride_residual_out,
    rows, num_tokens, HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows to normalise; with a residual their sum with it, which is written where wanted.

    Rows past the end read the last row, whatever it holds by then, so that loads need no mask; they
    are never stored.
    """
    at = tl.minimum(rows, num_tokens - 1)
    x = load_rows(x_ptr, at * stride_x, True, WIDTH, CHUNK)
    if HAS_RESIDUAL:
        x = add_rows(x, load_rows(residual_ptr, at * stride_residual, True, WIDTH, CHUNK))
        if residual_out_ptr is not None:
            offs_row = rows * stride_residual_out
            store_rows(residual_out_ptr, offs_row, rows < num_tokens, x, WIDTH, CHUNK)
    return x


# num_tokens changes with every request; no new kernel for each that is 1 or divides by 16.
@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, residual_out_ptr,
    stride_x, stride_residual, stride_out, stride_residual_out, num_tokens, eps,
    HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    x = _inputs(
        x_ptr, residual_ptr, residual_out_ptr, stride_x, stride_residual, stride_residual_out,
        rows, num_tokens, HAS_RESIDUAL, WIDTH, CHUNK,
    )  # fmt: skip
    weight = load_rows(weight_ptr, rows * 0, True, WIDTH, CHUNK)
    scale = tl.rsqrt(mean_square(x, WIDTH) + eps)
    y = ()
    for i in tl.static_range(len(x)):
        scaled = (x[i].to(tl.float32) * scale).to(x[i].dtype)
        y += (scaled.to(tl.float32) * weight[i].to(tl.float32),)
    store_rows(out_ptr, rows * stride_out, rows < num_tokens, y, WIDTH, CHUNK)


@triton.jit(do_not_specialize=["num_tokens"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, residual_out_ptr,
    stride_x, stride_residual, stride_out, stride_residual_out, num_tokens, eps,
    HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    x = _inputs(
        x_ptr, residual_ptr, residual_out_ptr, stride_x, stride_residual, stride_residual_out,
        rows, num_tokens, HAS_RESIDUAL, WIDTH, CHUNK,
    )  # fmt: skip
    weight = load_rows(weight_ptr, rows * 0, True, WIDTH, CHUNK)
    bias = load_rows(bias_ptr, rows * 0, True, WIDTH, CHUNK)
    y = layer_norm_rows(x, weight, bias, eps, True, 1, WIDTH, CHUNK)
    store_rows(out_ptr, rows * stride_out, rows < num_tokens, y, WIDTH, CHUNK)


def _launch(
    kernel: triton.JITFunction,
    x: torch.Tensor,
    vectors: tuple[torch.Tensor, ...],
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    config = launch_config(x.shape[-1], x.dtype)
    views = matrices(x, residual, out, residual_out)
    for x, residual, out, residual_out in views:
        num_tokens, width = x.shape
        kernel[(triton.cdiv(num_tokens, config.rows),)](
            x, *vectors, residual, out, residual_out,
            x.stride(0), 0 if residual is None else residual.stride(0),
            out.stride(0), 0 if residual_out is None else residual_out.stride(0), num_tokens, eps,
            HAS_RESIDUAL=residual is not None, WIDTH=width, ROWS=config.rows, CHUNK=config.chunk,
            num_warps=config.num_warps,
        )  # fmt: skip


def _rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    _launch(_rms_norm_kernel, x, (weight,), eps, residual, out, residual_out)


def _layer_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    _launch(_layer_norm_kernel, x, (weight, bias), eps, residual, out, residual_out)


def _rms_norm_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    """Normalise all rows in one call of F.rms_norm, which rounds once, after the weight."""
    if residual is not None:
        x = torch.add(x, residual, out=residual_out)
    out.copy_(F.rms_norm(x, x.shape[-1:], weight, eps))


_backends.register("rms_norm", "triton", _rms_norm_triton)
_backends.register("rms_norm", "fused", _rms_norm_fused, device_types=("cpu",))
_backends.register("layer_norm", "triton", _layer_norm_triton)


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
            "out must be a pair (y, x + residual) of two tensors, or of one and None, "
            f"when residual is given, got {type(out).__name__}"
        )
    check_tensor("out[0]", out[0], x.shape, x.dtype, x.device)
    if out[1] is not None:
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
        x: [..., hidden_size], fp32 / fp16 / bf16, any number of dims before the last. Any strides
            with a contiguous last dim; leading dims that are not evenly apart take a launch for
            each index of the shorter ones.
        weight: [hidden_size], dtype of ``x``.
        eps: Added to the mean square, not to its root.
        residual: Like ``x``; when given, the norm is that of ``x + residual``, the sum rounded to
            the dtype of ``x`` first.
        out: Like ``x``; with ``residual`` a pair (y, sum), where None for the sum leaves it
            unwritten. ``x`` and ``residual`` themselves are allowed.

    Returns:
        y like ``x``, contiguous; with ``residual`` the pair (y, x + residual). fp32 inside, rounded
        before the product with ``weight`` and again after it.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: Qwen3RMSNorm in transformers, which the text decoder of Keye-VL uses.
    """
    check_tensor("x", x, None, FLOAT_DTYPES)
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x.device)
    eps = check_eps("eps", eps)
    y, residual_out = _destinations(x, residual, out)
    if x.numel() > 0:
        _rms_norm_op(x, weight, eps, residual, y, residual_out)
    return y if residual is None else (y, residual_out)


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
        x: [..., hidden_size], fp32 / fp16 / bf16, any number of dims before the last. Any strides
            with a contiguous last dim; leading dims that are not evenly apart take a launch for
            each index of the shorter ones.
        weight, bias: [hidden_size], dtype of ``x``.
        eps: Added to the (biased) variance.
        residual: Like ``x``; when given, the norm is that of ``x + residual``, the sum rounded to
            the dtype of ``x`` first.
        out: Like ``x``; with ``residual`` a pair (y, sum), where None for the sum leaves it
            unwritten. ``x`` and ``residual`` themselves are allowed.

    Returns:
        y like ``x``, contiguous; with ``residual`` the pair (y, x + residual). fp32 inside, rounded
        once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: torch.nn.LayerNorm in the vision tower, modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor("x", x, None, FLOAT_DTYPES)
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x.device)
    eps = check_eps("eps", eps)
    check_tensor("bias", bias, x.shape[-1:], x.dtype, x.device)
    y, residual_out = _destinations(x, residual, out)
    if x.numel() > 0:
        _layer_norm_op(x, weight, bias, eps, residual, y, residual_out)
    return y if residual is None else (y, residual_out)
