"""silu_mul and gelu against explicit fp64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from tests.compare import assert_close, assert_same
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, odd, the MLP width of the tower (4304 = 33 * 128 + 80).
SHAPES = [(1, 1), (3, 77), (3, 4304)]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_kind = pytest.mark.parametrize("approximate", ["tanh", "none"])


def exact_gelu(x, approximate, bias=0.0):
    u = x.double() + bias
    if approximate == "none":
        return 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@by_dtype
@by_shape
def test_silu_mul_matches_fp64(shape, dtype, device):
    gate_up = torch.randn(shape[0], 2 * shape[1], device=device).mul_(4).to(dtype)
    gate, up = gate_up.split(shape[1], dim=1)
    exact = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
    assert_close(kk.silu_mul(gate_up), F.silu(gate) * up, exact)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_silu_mul_rounds_before_the_product(dtype, device):
    gate_up = torch.randn(64, 512, device=device).to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    silu = gate.double() / (1 + torch.exp(-gate.double()))
    got = kk.silu_mul(gate_up)
    assert (got == silu.to(dtype) * up).double().mean() > 0.999
    assert (got == (silu * up.double()).to(dtype)).double().mean() < 0.9


@by_dtype
@by_shape
@by_kind
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_gelu_matches_fp64(shape, dtype, approximate, with_bias, device):
    x = torch.randn(shape, device=device).mul_(3).to(dtype)
    bias = torch.randn(shape[1], device=device).to(dtype) if with_bias else None
    total = x if bias is None else x + bias
    exact = exact_gelu(x, approximate, 0.0 if bias is None else bias.double())
    got = kk.gelu(x, approximate=approximate, bias=bias)
    assert got.is_contiguous()
    assert_close(got, F.gelu(total, approximate=approximate), exact)


@by_kind
def test_gelu_rounds_once(approximate, device):
    x, bias = torch.randn(64, 512, device=device).bfloat16(), torch.randn(512, device=device)
    bias = bias.bfloat16()
    once = exact_gelu(x, approximate, bias.double()).to(torch.bfloat16)
    twice = F.gelu(x + bias, approximate=approximate)
    got = kk.gelu(x, approximate=approximate, bias=bias)
    assert (got == once).double().mean() > 0.99
    assert (got == twice).double().mean() < 0.9


@by_kind
def test_large_values(approximate, device):
    x = torch.tensor([[-1e30, -70.0, 0.0, 70.0, 1e30]], device=device)
    expected = torch.tensor([[0.0, 0.0, 0.0, 70.0, 1e30]], device=device)
    assert torch.equal(kk.gelu(x, approximate=approximate), expected)
    gate_up = torch.tensor([[-1e4, 0.0, 1e4, 2.0, 1.0, 3.0]], device=device)
    assert kk.silu_mul(gate_up).tolist() == [[0.0, 0.0, 3e4]]


def test_strided_rows(device, backend):
    wide = torch.randn(9, 300, device=device).bfloat16()
    x = wide[:, 20:148]
    assert_same(kk.silu_mul(x), kk.silu_mul(x.contiguous()), backend)
    bias = wide[0, :128]
    for b in (None, bias):
        strided = kk.gelu(x, approximate="tanh", bias=b)
        assert_same(strided, kk.gelu(x.contiguous(), approximate="tanh", bias=b), backend)


def test_rows_past_2_to_the_31_elements(device, backend):
    x = far_apart((3, 72), torch.bfloat16, device).normal_()
    out = far_apart((3, 72), torch.bfloat16, device)
    got = kk.gelu(x, approximate="tanh", out=out)
    assert_same(got, kk.gelu(x.contiguous(), approximate="tanh"), backend)
    got = kk.silu_mul(x, out=out[:, :36])
    assert_same(got, kk.silu_mul(x.contiguous()), backend)


def test_out_and_aliasing(backend, device):
    num_tokens = 70 if backend == "reference" else 3  # 70: several of the reference's blocks
    x = torch.randn(num_tokens, 4096, device=device).bfloat16()
    bias = x[0].clone()
    expected = kk.gelu(x, approximate="tanh", bias=bias)
    in_place = x.clone()
    assert kk.gelu(in_place, approximate="tanh", bias=bias, out=in_place) is in_place
    assert torch.equal(in_place, expected)

    expected = kk.silu_mul(x)
    gate_up = x.clone()
    gate = gate_up[:, :2048]
    assert kk.silu_mul(gate_up, out=gate) is gate
    assert torch.equal(gate, expected)
    assert torch.equal(gate_up[:, 2048:], x[:, 2048:])


def test_no_tokens(device):
    x = torch.empty(0, 8, device=device)
    assert kk.silu_mul(x).shape == (0, 4)
    assert kk.gelu(x, approximate="none").shape == (0, 8)


def test_errors(device):
    x = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match=r"last dim of gate_up must be a .* multiple of 2, got 7"):
        kk.silu_mul(x[:, :7])
    with pytest.raises(ValueError, match=r"out must have shape \(4, 4\), got \(4, 8\)"):
        kk.silu_mul(x, out=x)
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'sigmoid'"):
        kk.gelu(x, approximate="sigmoid")
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(4,\)"):
        kk.gelu(x, approximate="none", bias=x[:, 0].contiguous())
    with pytest.raises(ValueError, match=r"out must have dtype torch.float32, got torch.float16"):
        kk.gelu(x, approximate="none", out=x.half())
