"""Linear layers: a matrix product with the norm before it and what follows it.

Few rows are bound by reading the matrix: the CUDA kernel does all of it while it reads the matrix
once. For many rows, PyTorch's GEMM runs between our other ops.
"""

import torch
import torch.nn.functional as F

from keye_kernels import _backends, _cuda, _ext, reference
from keye_kernels._checks import FLOAT_DTYPES, check_eps, check_tensor
from keye_kernels._device import device_of
from keye_kernels._ops import define_op
from keye_kernels.activation import silu_mul
from keye_kernels.norm import rms_norm

_linear_op = define_op(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, float? eps, "
    "Tensor? residual, bool swiglu, Tensor(a!) out) -> ()",
    reference=reference.linear,
)


def _gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    out: torch.Tensor,
) -> None:
    """PyTorch's GEMM between our other ops; the residual is added in its epilogue."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if swiglu:
        silu_mul(F.linear(x, weight, bias), out=out)
    elif residual is None:
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)
    elif bias is not None:
        torch.add(F.linear(x, weight, bias), residual, out=out)
    else:
        if out.data_ptr() != residual.data_ptr():
            out.copy_(residual)
        out.addmm_(x, weight.T)


def _transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    out: torch.Tensor,
) -> None:
    """weight x^T, which some CPUs compute faster than x weight^T where x has few rows."""
    if norm_weight is not None:
        x = reference.rms_norm(x, norm_weight, eps)
    y = torch.mv(weight, x[0])[None] if x.shape[0] == 1 else torch.mm(weight, x.T).T
    if bias is not None:
        y = y + bias
    if swiglu:
        reference.silu_mul(y, out=out)
    elif residual is not None:
        torch.add(y, residual, out=out)
    else:
        out.copy_(y)


_backends.register("linear", "triton", _gemm)
_backends.register("linear", "gemm", _gemm, device_types=("cpu",))
_backends.register("linear", "transposed", _transposed, device_types=("cpu",))
_backends.register_class("linear", lambda x, weight, *_: ((), (x.shape[0], weight.numel())))


def _num_column_runs(tiles: int, in_features: int, num_sms: int) -> int:
    """Blocks that share a tile of 64 weight rows, each with a run of its columns.

    Reading at full rate takes latency x bandwidth in flight: on an H200 about 1 µs x 4.3 TB/s, 33
    KB for each of 132 multiprocessors. A block has 32 KB in flight, and a multiprocessor holds
    three blocks, so that one reads while another starts or ends. A run has 1024 columns or more,
    unless there are fewer: 128 KB, 4 µs of a multiprocessor's share of the bandwidth. Shorter runs
    would spend their time on starting and ending.

    On an H200, which holds 396 blocks, [4096, 4096] gets 256 blocks, [6144, 4096], [2 * 12288,
    4096] and [4096, 12288] get 384; the 2374 tiles of the head get one each.
    """
    return max(min(3 * num_sms // tiles, -(-in_features // 1024)), 1)


def _linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    out: torch.Tensor,
) -> None:
    num_rows, in_features = x.shape
    width = out.shape[1]
    tiles = -(-width // (32 if swiglu else 64))
    num_splits = _num_column_runs(tiles, in_features, device_of(x).num_sms)
    stream = _ext.stream_of(x)
    partial = counts = None
    if num_splits > 1:
        size = tiles * num_splits * num_rows * 64
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counts = _cuda.counters.get(x.device, stream, tiles)
    _ext.extension().linear(
        dtype=_ext.DTYPES[x.dtype], x=x.data_ptr(), weight=weight.data_ptr(),
        bias=_cuda.address(bias), norm_weight=_cuda.address(norm_weight),
        residual=_cuda.address(residual), out=out.data_ptr(), partial=_cuda.address(partial),
        counters=_cuda.address(counts), stride_x=x.stride(0), stride_weight=weight.stride(0),
        stride_residual=0 if residual is None else residual.stride(0), stride_out=out.stride(0),
        num_rows=num_rows, in_features=in_features, width=width, num_splits=num_splits,
        eps=eps or 0.0, swiglu=swiglu, overlap=_cuda.overlaps(x), stream=stream,
    )  # fmt: skip


_LIMITS = _cuda.CudaLimits(
    aligned=("x", "weight", "out", "bias", "norm_weight", "residual"),
    max_rows=16,
    multiples_of_8=(("x", "in_features"), ("out", "the result's width")),
)
_cuda.register("linear", _linear_cuda, _LIMITS)


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
    """x weight^T + bias, with the norm before it and SwiGLU or a residual add after it.

    Args:
        x: [num_tokens, in_features], fp32 / fp16 / bf16. Rows may be strided.
        weight: [out_features, in_features], dtype of ``x``, as torch.nn.Linear keeps it.
        bias: [out_features], dtype of ``x``.
        norm_weight: [in_features], dtype of ``x``: the rows are those of ``rms_norm(x,
            norm_weight, eps)``.
        eps: Of that norm; given exactly when ``norm_weight`` is.
        residual: Like the result; added to it.
        swiglu: The weight holds gate and up, [2 * width, in_features]: the result is
            ``silu_mul`` of the product, [num_tokens, width]. Not with ``residual``.
        out: Like the result. Must not overlap ``x``; may be ``residual``.

    Returns:
        [num_tokens, out_features], or half of that with ``swiglu``; dtype of ``x``, contiguous.
        Sums in fp32; rounded after the norm, after the product with its bias, and after what
        follows, as the ops one by one do. A GEMM may add the residual before it rounds.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or arguments exclude
            each other.

    Source: torch.nn.Linear between Qwen3RMSNorm, the gated MLP and the residual stream of
    modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor("x", x, (None, None), FLOAT_DTYPES)
    num_tokens, in_features = x.shape
    check_tensor("weight", weight, (None, in_features), x.dtype, x.device)
    width = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (width,), x.dtype, x.device)
    if (norm_weight is None) != (eps is None):
        raise ValueError(
            "eps must be given exactly when norm_weight is, "
            f"got eps {eps} and norm_weight {'missing' if norm_weight is None else 'given'}"
        )
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (in_features,), x.dtype, x.device)
        eps = check_eps("eps", eps)
    if swiglu:
        if width % 2:
            raise ValueError(f"weight must have an even number of rows for swiglu, got {width}")
        width //= 2
    if residual is not None:
        if swiglu:
            raise ValueError("residual must be None with swiglu, got a tensor")
        check_tensor("residual", residual, (num_tokens, width), x.dtype, x.device)
    if out is None:
        out = x.new_empty((num_tokens, width))
    else:
        check_tensor("out", out, (num_tokens, width), x.dtype, x.device)
    if out.numel() > 0:
        _linear_op(x, weight, bias, norm_weight, eps, residual, swiglu, out)
    return out
