"""The CUDA kernel of linear, run by g++, with what lies between rows poisoned."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels._cuda import counters
from keye_kernels.linear import _LIMITS, _num_column_runs
from tests.compare import assert_close
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("native", "num_sms")

EPS = 1e-6

# One multiprocessor: a block has all columns of its rows. 132: up to 1024 columns or so.
runs = pytest.mark.parametrize("num_sms", [1, 132], ids=["one-run", "runs"], indirect=True)

CASES = {
    # rows of x, of the result, columns, dtype
    "one row": (1, 64, 256, torch.bfloat16),
    "less than a tile": (3, 40, 72, torch.float16),
    "less than a piece per warp": (8, 8, 8, torch.bfloat16),
    "two tiles of rows": (9, 72, 520, torch.bfloat16),
    "runs of unequal length": (16, 136, 2312, torch.float16),
    "long": (5, 200, 3080, torch.bfloat16),
}


def operands(rows, width, in_features, dtype):
    """x, weight and residual as every other row of tensors that are NaN elsewhere."""
    x, weight = torch.randn(rows, in_features), torch.randn(width, in_features)
    found = []
    for tensor in (x, weight / max(in_features, 1) ** 0.5, torch.randn(rows, width)):
        around = torch.full((2 * len(tensor) + 1, tensor.shape[1] + 16), float("nan")).to(dtype)
        found.append(around[1::2, 8:-8].copy_(tensor))
    return found


def product(x, weight, bias=None, dtype=torch.float64):
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@runs
@pytest.mark.parametrize("case", CASES)
def test_product_bias_and_residual(case):
    x, weight, residual = operands(*CASES[case])
    bias = torch.randn(len(weight)).to(x.dtype)
    exact = product(x, weight)
    assert_close(kk.linear(x, weight), F.linear(x, weight), exact)
    got = kk.linear(x, weight, bias=bias, residual=residual)
    plain = F.linear(x, weight, bias) + residual
    assert_close(got, plain, exact + bias.double() + residual.double())
    assert all((pool == 0).all() for pool in counters._slices.values())


@runs
@pytest.mark.parametrize("case", CASES)
def test_norm_and_swiglu(case):
    rows, width, in_features, dtype = CASES[case]
    x, weight, _ = operands(rows, 2 * width, in_features, dtype)
    norm_weight, bias = torch.rand(in_features).to(dtype), torch.randn(2 * width).to(dtype)
    normed = kk.reference.rms_norm(x, norm_weight, EPS)
    gate, up = product(normed, weight, bias).chunk(2, dim=1)
    plain = kk.reference.silu_mul(F.linear(normed, weight, bias))
    got = kk.linear(x, weight, bias=bias, norm_weight=norm_weight, eps=EPS, swiglu=True)
    assert_close(got, plain, F.silu(gate) * up)


def test_roundings_are_those_of_the_definition():
    """Weights that select columns: nothing is lost in sums, so each rounding shows.

    The order of the norm's sum, and the last bit of an exponential, may turn one in 10,000.
    """
    x, norm_weight = torch.randn(16, 64).bfloat16(), torch.rand(64).bfloat16()
    weight, residual = torch.eye(64).bfloat16(), torch.randn(16, 64).bfloat16()
    norm = {"norm_weight": norm_weight, "eps": EPS}
    bias = {"bias": residual[0]}
    for options in (norm, bias, bias | {"residual": residual}, bias | {"swiglu": True}):
        options = norm | options
        got = kk.linear(x, weight, **options)
        expected = kk.reference.linear(x, weight, **options)
        assert (got == expected).double().mean() > 0.998
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_sms", [132], indirect=True)
def test_schedules_give_the_same_bits(native):
    x, weight, _ = operands(9, 32, 2304, torch.bfloat16)
    norm = {"norm_weight": torch.rand(2304).bfloat16(), "eps": EPS}
    expected = kk.linear(x, weight, **norm)
    for schedule in native.schedules():
        with schedule:
            assert torch.equal(kk.linear(x, weight, **norm), expected)


@runs
def test_a_row_does_not_depend_on_its_neighbours():
    x, weight, residual = operands(8, 72, 2200, torch.float16)
    alone = kk.linear(x[2:3], weight, residual=residual[2:3])
    x[[0, 7]] = float("nan")
    got = kk.linear(x, weight, residual=residual)
    assert torch.equal(got[2:3], alone)
    assert got[[0, 7]].isnan().all()


@runs
def test_residual_may_be_out_and_out_may_be_strided():
    x, weight, residual = operands(4, 72, 2056, torch.bfloat16)
    around = residual._base.clone()
    expected = kk.linear(x, weight, residual=residual)
    assert kk.linear(x, weight, residual=residual, out=residual) is residual
    assert torch.equal(residual, expected)
    residual.copy_(around[1::2, 8:-8])
    assert torch.equal(residual._base.isnan(), around.isnan())


def test_offsets_past_2_to_the_31():
    x, weight, residual = operands(3, 40, 72, torch.bfloat16)
    expected = kk.linear(x, weight, residual=residual)
    far = [far_apart(t.shape, t.dtype, t.device).copy_(t) for t in (x, weight, residual)]
    out = far_apart(residual.shape, residual.dtype, residual.device)
    assert torch.equal(kk.linear(far[0], far[1], residual=far[2], out=out), expected)


def test_no_width():
    assert kk.linear(torch.ones(2, 8).half(), torch.ones(0, 8).half()).shape == (2, 0)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 8), torch.ones(8, 8), "dtype must be .*bfloat16 or .*float16, got"),
        (torch.ones(17, 8).half(), torch.ones(8, 8).half(), "x must have at most 16 rows, got 17"),
        (torch.ones(1, 12).half(), torch.ones(8, 12).half(), "in_features .* of 8, got 12"),
        (torch.ones(1, 8).half(), torch.ones(9, 8).half(), "result's width .* of 8, got 9"),
        (torch.ones(1, 8).half(), torch.ones(8, 12).half()[:, 4:], "rows of weight must begin at"),
    ],
    ids=["dtype", "rows", "in_features", "width", "alignment"],
)
def test_refusals(x, weight, message):
    with pytest.raises(NotImplementedError, match=message):
        kk.linear(x, weight)


def test_row_limit_is_that_of_the_extension(native):
    assert _LIMITS.max_rows == native.module.linear_max_rows


def test_num_column_runs():
    assert _num_column_runs(64, 4096, 132) == 4  # o
    assert _num_column_runs(96, 4096, 132) == 4  # q, k, v
    assert _num_column_runs(384, 4096, 132) == 1  # gate and up
    assert _num_column_runs(64, 12288, 132) == 6  # down
    assert _num_column_runs(2374, 4096, 132) == 1  # head
    assert _num_column_runs(1, 72, 132) == 1
