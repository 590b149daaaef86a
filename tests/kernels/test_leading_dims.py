"""rms_norm, layer_norm, silu_mul and gelu with any number of leading dims, however they lie."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels._matrices import matrices
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend")

WIDTH = 24


def wide(*shape):
    return torch.randn(shape)


# What callers hold; how many launches it takes beside a contiguous result.
VIEWS = {
    "one row": (lambda: wide(WIDTH), 1),
    "batch": (lambda: wide(2, 3, 5, WIDTH), 1),
    "third of qkv": (lambda: wide(2, 3, 3 * WIDTH)[:, :, WIDTH : 2 * WIDTH], 1),
    "heads of qkv": (lambda: wide(4, 3, 2, WIDTH)[:, 1], 2),
    "sequence first": (lambda: wide(5, 3, WIDTH).transpose(0, 1), 3),
    "padded": (lambda: wide(3, 7, WIDTH)[:, :5], 3),
    "last token": (lambda: wide(3, 7, WIDTH)[:, -1:], 1),
    "every other": (lambda: wide(6, 4, WIDTH)[::2], 3),
    "heads first": (lambda: wide(2, 5, 3, WIDTH).permute(0, 2, 1, 3), 6),
    "expanded": (lambda: wide(1, 1, WIDTH).expand(3, 4, WIDTH), 1),
    "dims of one": (lambda: wide(1, 5, 1, WIDTH), 1),
    "backwards": (lambda: wide(2, 3, 4, WIDTH).permute(2, 1, 0, 3), 6),
}

by_view = pytest.mark.parametrize("view", VIEWS)


def calls(weight, bias):
    """By op: the call, with what it returns as a tuple, and the width of each result."""

    def with_residual(op, *vectors):
        return lambda x, **out: op(x, *vectors, 1e-6, residual=x, **out)

    return {
        "rms_norm": (lambda x, **out: (kk.rms_norm(x, weight, 1e-6, **out),), 1),
        "layer_norm": (lambda x, **out: (kk.layer_norm(x, weight, bias, 1e-6, **out),), 1),
        "rms_norm residual": (with_residual(kk.rms_norm, weight), 1),
        "layer_norm residual": (with_residual(kk.layer_norm, weight, bias), 1),
        "silu_mul": (lambda x, **out: (kk.silu_mul(x, **out),), 2),
        "gelu": (lambda x, **out: (kk.gelu(x, approximate="tanh", bias=bias, **out),), 1),
    }


OPS = list(calls(None, None))
by_op = pytest.mark.parametrize("op", OPS)


@by_op
@by_view
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_a_matrix(view, op, dtype, device):
    x = VIEWS[view][0]().to(device)
    x = x.to(dtype) if x.is_contiguous() else torch.empty_like(x, dtype=dtype).copy_(x)
    strides = x.stride()
    weight, bias = torch.randn(2, WIDTH, device=device).to(dtype)
    call, part = calls(weight, bias)[op]
    results = call(x)
    for got, want in zip(results, call(x.reshape(-1, WIDTH)), strict=True):
        assert got.shape == (*x.shape[:-1], WIDTH // part)
        assert got.is_contiguous()
        # vector and scalar code of a CPU may round exp and erf apart
        torch.testing.assert_close(got, want.view(got.shape), rtol=1e-6, atol=1e-6)
    assert x.stride() == strides


@by_op
@by_view
def test_out_has_strides_of_its_own(view, op, device):
    x = VIEWS[view][0]().to(device)
    weight, bias = torch.randn(2, WIDTH, device=device)
    call, part = calls(weight, bias)[op]
    expected = call(x)
    shape = (*x.shape[:-1], WIDTH // part)
    # Another order of the leading dims, with room between the rows.
    order = [*reversed(range(len(shape) - 1)), len(shape) - 1]
    targets = [
        torch.full([shape[i] for i in order], 7.0, device=device).repeat_interleave(2, dim=-1)
        for _ in expected
    ]
    outs = tuple(t[..., : shape[-1]].permute(order) for t in targets)
    assert all(out.shape == shape for out in outs)
    got = call(x, out=outs if len(outs) > 1 else outs[0])
    for result, out, want, target in zip(got, outs, expected, targets, strict=True):
        assert result is out
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
        assert (target[..., shape[-1] :] == 7).all()


@by_view
def test_as_many_launches_as_needed(view):
    x, count = VIEWS[view][0](), VIEWS[view][1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    views = list(matrices(x, None, out))
    assert len(views) == count
    for rows, none, result in views:
        assert none is None
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        result.copy_(rows)
    assert torch.equal(out, x)


@by_op
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0,), (2, 3, 0)], ids=str)
def test_nothing_to_do(op, shape, device):
    x = torch.empty(shape, device=device)
    weight = bias = torch.randn(shape[-1], device=device)
    call, part = calls(weight, bias)[op]
    assert all(y.shape == (*shape[:-1], shape[-1] // part) for y in call(x))


@by_op
def test_in_place(op, device):
    x = torch.randn(3, 7, WIDTH, device=device)[:, :5]
    weight, bias = torch.randn(2, WIDTH, device=device)
    call, part = calls(weight, bias)[op]
    expected = call(x)
    other = torch.empty_like(x)
    outs = (x[..., : WIDTH // part], other)[: len(expected)]
    got = call(x, out=outs if len(outs) > 1 else outs[0])
    for result, want in zip(got, expected, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-6, atol=1e-6)


def test_offsets_past_2_to_the_31(device):
    x = far_apart((3, 2, 16), torch.bfloat16, device)
    x.normal_()
    out = far_apart((3, 2, 16), torch.bfloat16, device)
    assert torch.equal(kk.gelu(x, approximate="tanh", out=out), kk.gelu(x + 0, approximate="tanh"))


def test_errors(device):
    x, weight = torch.randn(2, 3, 8, device=device), torch.randn(8, device=device)
    for call in (
        lambda x: kk.rms_norm(x, weight, 1e-6),
        lambda x: kk.layer_norm(x, weight, weight, 1e-6),
        lambda x: kk.gelu(x, approximate="none"),
    ):
        with pytest.raises(ValueError, match=r"x must have at least 1 dim, got shape \(\)"):
            call(x[0, 0, 0])
        with pytest.raises(ValueError, match=r"x must be contiguous in its last dim, got strides"):
            call(x.transpose(1, 2)[:, :, :8].expand(2, 8, 3))
    with pytest.raises(ValueError, match=r"gate_up must have at least 1 dim, got shape \(\)"):
        kk.silu_mul(x[0, 0, 0])
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), got \(8,\)"):
        kk.rms_norm(x[..., :3], weight, 1e-6)
    message = r"residual must have shape \(2, 3, 8\), got \(6, 8\)"
    with pytest.raises(ValueError, match=message):
        kk.rms_norm(x, weight, 1e-6, residual=x.view(6, 8))
    with pytest.raises(ValueError, match=r"out must have shape \(2, 3, 4\), got \(6, 4\)"):
        kk.silu_mul(x, out=x.view(6, 8)[:, :4])
    for eps in (-1e-6, float("nan"), float("inf"), "1e-6", None, True, 10**400):
        with pytest.raises(ValueError, match=r"eps must be (a finite number|at least 0), got"):
            kk.rms_norm(x, weight, eps)
        with pytest.raises(ValueError, match=r"eps must be (a finite number|at least 0), got"):
            kk.layer_norm(x, weight, weight, eps)
    with pytest.raises(ValueError, match=r"eps must be .*, got a tensor of shape \(\)"):
        kk.rms_norm(x, weight, torch.tensor(1e-6))
