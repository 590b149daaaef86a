"""linear against fp64, and against the ops that it fuses."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from tests.compare import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# One row, a few, all that the CUDA kernel takes, more; widths that no tile divides.
by_shape = pytest.mark.parametrize(
    ("rows", "width", "in_features"), [(1, 40, 72), (3, 264, 136), (16, 128, 512), (17, 48, 96)]
)


def operands(device, dtype, rows, width, in_features):
    x = torch.randn(rows, in_features, device=device).to(dtype)
    weight = torch.randn(width, in_features, device=device).div_(in_features**0.5).to(dtype)
    return x, weight


@by_dtype
@by_shape
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_matches_fp64(device, dtype, rows, width, in_features, with_bias):
    x, weight = operands(device, dtype, rows, width, in_features)
    bias = torch.randn(width, device=device).to(dtype) if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = kk.linear(x, weight, bias=bias)
    assert got.is_contiguous()
    assert_close(got, F.linear(x, weight, bias), exact)


@by_dtype
@by_shape
def test_norm_and_residual_are_rounded_like_the_ops_one_by_one(
    device, dtype, rows, width, in_features
):
    x, weight = operands(device, dtype, rows, width, in_features)
    norm_weight = torch.rand(in_features, device=device).to(dtype)
    residual = torch.randn(rows, width, device=device).to(dtype)
    normed = kk.reference.rms_norm(x, norm_weight, EPS)
    exact = F.linear(normed.double(), weight.double()) + residual.double()
    got = kk.linear(x, weight, norm_weight=norm_weight, eps=EPS, residual=residual)
    assert_close(got, F.linear(normed, weight) + residual, exact)


@by_dtype
@by_shape
def test_swiglu_is_silu_mul_of_the_product(device, dtype, rows, width, in_features):
    x, weight = operands(device, dtype, rows, width, in_features)
    norm_weight = torch.rand(in_features, device=device).to(dtype)
    normed = kk.reference.rms_norm(x, norm_weight, EPS)
    gate, up = F.linear(normed.double(), weight.double()).chunk(2, dim=1)
    plain = kk.reference.silu_mul(F.linear(normed, weight))
    got = kk.linear(x, weight, norm_weight=norm_weight, eps=EPS, swiglu=True)
    assert got.shape == (rows, width // 2)
    assert_close(got, plain, F.silu(gate) * up)


@by_dtype
def test_strided_rows_and_out(device, dtype, backend):
    x, weight = operands(device, dtype, 4, 24, 64)
    wide = torch.full((4, 3 * 64), float("nan"), device=device, dtype=dtype)
    wide[:, 64:128] = x
    rows = torch.full((4, 50), 7.0, device=device, dtype=dtype)
    out = rows[:, 8:32]
    assert kk.linear(wide[:, 64:128], weight, out=out) is out
    assert_same(out, kk.linear(x, weight), backend)
    assert (rows[:, :8] == 7).all()
    assert (rows[:, 32:] == 7).all()


def test_residual_may_be_out(device):
    x, weight = operands(device, torch.bfloat16, 2, 24, 64)
    residual = torch.randn(2, 24, device=device).bfloat16()
    expected = kk.linear(x, weight, residual=residual)
    assert torch.equal(kk.linear(x, weight, residual=residual, out=residual), expected)


def test_no_rows(device):
    assert kk.linear(torch.randn(0, 8, device=device), torch.randn(6, 8, device=device)).shape == (
        0,
        6,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 9)}, r"weight must have shape \(\*, 9\), got \(6, 8\)"),
        ({"weight": torch.randn(6, 8).half()}, "weight must have dtype torch.float32"),
        ({"bias": torch.randn(5)}, r"bias must have shape \(6,\), got \(5,\)"),
        ({"norm_weight": torch.randn(8)}, "eps must be given exactly when norm_weight is"),
        ({"eps": 1e-6}, "eps must be given exactly when norm_weight is"),
        (
            {"norm_weight": torch.randn(8), "eps": float("nan")},
            "eps must be a finite number, got nan",
        ),
        (
            {"norm_weight": torch.randn(7), "eps": EPS},
            r"norm_weight must have shape \(8,\), got \(7,\)",
        ),
        (
            {"weight": torch.randn(7, 8), "swiglu": True},
            "weight must have an even number of rows for swiglu, got 7",
        ),
        (
            {"swiglu": True, "residual": torch.randn(2, 3)},
            "residual must be None with swiglu, got a tensor",
        ),
        ({"residual": torch.randn(2, 5)}, r"residual must have shape \(2, 6\), got \(2, 5\)"),
        ({"out": torch.randn(3, 6)}, r"out must have shape \(2, 6\), got \(3, 6\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(6, 8)} | change
    with pytest.raises(ValueError, match=message):
        kk.linear(**arguments)
