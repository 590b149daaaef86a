"""rms_norm and layer_norm against explicit fp64 formulas."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.norm import LaunchConfig, launch_config
from tests.compare import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element, odd sizes, the tower's and the decoder's hidden size.
SHAPES = [(1, 1), (3, 77), (2, 1152), (2, 4096)]
# The last program not full: heads, tower, decoder, a cut chunk.
MANY = [(17, 128), (6, 1152), (3, 4096), (2, 2100)]
EPS = 1e-6

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_op = pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])


def make(op, shape, dtype, device):
    x = torch.randn(shape, device=device).mul_(3).add_(1).to(dtype)
    params = [torch.randn(shape[1:], device=device).to(dtype) for _ in range(2)]
    return x, params[: 1 if op == "rms_norm" else 2]


def exact(op, x, params, eps=EPS):
    x, params = x.double(), [p.double() for p in params]
    if op == "rms_norm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * params[0]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * params[0] + params[1]


def plain(op, x, params, eps=EPS):
    if op == "layer_norm":
        return F.layer_norm(x, x.shape[1:], *params, eps)
    u = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return u.to(x.dtype) * params[0]


@by_op
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_matches_fp64(op, shape, dtype, device):
    x, params = make(op, shape, dtype, device)
    got = getattr(kk, op)(x, *params, EPS)
    assert got.is_contiguous()
    assert_close(got, plain(op, x, params), exact(op, x, params))


@by_op
@by_dtype
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_rows(op, shape, dtype, backend, device):
    num_rows, width = shape
    if device.type == "cuda":
        num_rows += 300
    elif backend == "reference":
        num_rows += 2**17 // width  # two of its blocks
    x, params = make(op, (num_rows, width), dtype, device)
    residual = torch.randn_like(x)
    y, total = getattr(kk, op)(x, *params, EPS, residual=residual)
    assert torch.equal(total, x + residual)
    assert_close(y, plain(op, total, params), exact(op, total, params))


@by_op
def test_rows_know_nothing_of_each_other(op, device, backend):
    x, params = make(op, (3, 1152), torch.bfloat16, device)
    run = getattr(kk, op)
    together = run(x, *params, EPS)
    assert torch.equal(together, run(x, *params, EPS))
    x[0], x[2] = float("nan"), 1e30
    assert torch.equal(run(x, *params, EPS)[1], together[1])
    assert_same(run(x[1:2], *params, EPS)[0], together[1], backend)


@by_op
@pytest.mark.parametrize("width", [1152, 4096])
def test_a_row_is_the_same_among_any_number_of_rows(op, width, device, backend):
    x, params = make(op, (140, width), torch.float32, device)  # more than an H100 has processors
    run = getattr(kk, op)
    together = run(x, *params, EPS)
    for rows in (slice(1), slice(139, 140), slice(37, 42)):
        assert_same(run(x[rows], *params, EPS), together[rows], backend)


@by_op
def test_offsets_past_2_to_the_31(op, device, backend, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, params = make(op, (3, 64), torch.bfloat16, device)
    run = getattr(kk, op)
    y, total = run(x, *params, EPS, residual=x)
    # Only the pages that are touched take memory on a CPU.
    memory = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device)
    far, far_out = (memory[start:].as_strided((3, 64), (2**30, 1)) for start in (0, 64))
    far.copy_(x)
    run(far, *params, EPS, residual=far, out=(far_out, far))
    assert_same(far_out, y, backend)
    assert torch.equal(far, total)


def test_launch_configuration():
    assert launch_config(4096, torch.bfloat16) == LaunchConfig(1, 2048, 8)
    assert launch_config(4096, torch.float32) == LaunchConfig(1, 1024, 8)
    assert launch_config(1152, torch.bfloat16) == LaunchConfig(4, 256, 4)
    assert launch_config(1152, torch.float32) == LaunchConfig(4, 128, 4)
    assert launch_config(128, torch.bfloat16) == LaunchConfig(16, 128, 4)
    assert launch_config(2100, torch.bfloat16) == LaunchConfig(1, 1024, 4)
    assert launch_config(1, torch.float32) == LaunchConfig(1024, 1, 4)
    assert launch_config(2**17, torch.bfloat16) == LaunchConfig(1, 4096, 16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rms_norm_rounds_before_the_weight(dtype, device):
    x, (weight,) = make("rms_norm", (16, 2048), dtype, device)
    u = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    got = kk.rms_norm(x, weight, EPS)
    twice = (got == u.to(dtype) * weight).double().mean()
    once = (got == (u * weight.double()).to(dtype)).double().mean()
    assert twice > 0.999
    assert once < 0.9


@by_op
def test_eps_counts(op, device):
    x, params = make(op, (4, 64), torch.float32, device)
    x *= 1e-3
    got = getattr(kk, op)(x, *params, 1e-5)
    assert_close(got, plain(op, x, params, 1e-5), exact(op, x, params, 1e-5))


@by_op
@by_dtype
def test_residual_adds_first(op, dtype, device):
    x, params = make(op, (7, 96), dtype, device)
    residual = torch.randn_like(x)
    y, total = getattr(kk, op)(x, *params, EPS, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, getattr(kk, op)(x + residual, *params, EPS))


@by_op
def test_the_sum_need_not_be_written(op, device):
    x, params = make(op, (5, 64), torch.bfloat16, device)
    x2, residual = x.clone(), torch.randn_like(x)
    residual2, run = residual.clone(), getattr(kk, op)
    y = torch.empty_like(x)
    assert run(x2, *params, EPS, residual=residual2, out=(y, None)) == (y, None)
    assert torch.equal(y, run(x, *params, EPS, residual=residual)[0])
    assert torch.equal(x2, x)
    assert torch.equal(residual2, residual)


@by_op
@pytest.mark.parametrize("start", [8, 7], ids=["aligned", "unaligned"])
def test_strided_rows(op, start, device, backend):
    wide = torch.full((6, 201), float("nan"), device=device, dtype=torch.bfloat16)
    values, params = make(op, (12, 60), torch.bfloat16, device)
    x, residual = wide[:, start : start + 60], wide[:, 100:160]
    x.copy_(values[:6])
    residual.copy_(values[6:])
    run = getattr(kk, op)
    assert_same(run(x, *params, EPS), run(x.contiguous(), *params, EPS), backend)
    strided = run(x, *params, EPS, residual=residual)
    packed = run(x.contiguous(), *params, EPS, residual=residual.contiguous())
    for a, b in zip(strided, packed, strict=True):
        assert_same(a, b, backend)


@by_op
def test_out_is_written_and_nothing_round_it(op, device):
    x, params = make(op, (5, 64), torch.float32, device)
    wide = torch.full((5, 80), 7.0, device=device)
    got = getattr(kk, op)(x, *params, EPS, out=wide[:, 8:72])
    assert got.data_ptr() == wide[:, 8:72].data_ptr()
    assert torch.equal(got, getattr(kk, op)(x, *params, EPS))
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 72:] == 7).all()


@by_op
def test_in_place(op, backend, device):
    num_rows = 300 if backend == "reference" else 3  # 300: several of the reference's blocks
    x, params = make(op, (num_rows, 640), torch.bfloat16, device)
    residual = torch.randn_like(x)
    run = getattr(kk, op)
    y, total = run(x, *params, EPS, residual=residual)
    x2, residual2 = x.clone(), residual.clone()
    run(x2, *params, EPS, residual=residual2, out=(x2, residual2))
    assert torch.equal(x2, y)
    assert torch.equal(residual2, total)
    x2, residual2 = x.clone(), residual.clone()
    run(x2, *params, EPS, residual=residual2, out=(residual2, x2))
    assert torch.equal(residual2, y)
    assert torch.equal(x2, total)
    x3 = x.clone()
    assert run(x3, *params, EPS, out=x3) is x3
    assert torch.equal(x3, run(x, *params, EPS))


@by_op
def test_no_tokens(op, device):
    x, params = make(op, (0, 64), torch.float16, device)
    assert getattr(kk, op)(x, *params, EPS).shape == (0, 64)
    y, total = getattr(kk, op)(x, *params, EPS, residual=x)
    assert y.shape == total.shape == (0, 64)


@by_op
def test_large_values_and_bad_rows_stay_in_their_row(op, device):
    x, params = make(op, (4, 64), torch.float16, device)
    x[1] = torch.linspace(-60000, 60000, 64, device=device)  # squares overflow fp16
    x[2, 5] = float("-inf")
    got = getattr(kk, op)(x, *params, EPS)
    rows = [0, 1, 3]
    assert_close(got[rows], plain(op, x, params)[rows], exact(op, x, params)[rows])
    assert got[2].isnan().any()


@by_op
def test_errors(op, device):
    x, params = make(op, (4, 64), torch.float32, device)
    run = getattr(kk, op)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        run([1.0], *params, EPS)
    with pytest.raises(ValueError, match=r"x must have at least 1 dim, got shape \(\)"):
        run(x[0, 0], *params, EPS)
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\), got \(63,\)"):
        run(x, params[0][:63], *params[1:], EPS)
    with pytest.raises(ValueError, match=r"x must have dtype torch.float32 or .*, got torch.int64"):
        run(x.long(), *params, EPS)
    with pytest.raises(ValueError, match=r"weight must have dtype torch.float32, got .*float16"):
        run(x, params[0].half(), *params[1:], EPS)
    with pytest.raises(ValueError, match=rf"weight must be on device {x.device}, got meta"):
        run(x, params[0].to("meta"), *params[1:], EPS)
    with pytest.raises(ValueError, match=r"x must be contiguous in its last dim, got strides \(1"):
        run(x[:, :4].T, *(p[:4] for p in params), EPS)
    with pytest.raises(ValueError, match=r"residual must have shape \(4, 64\), got \(3, 64\)"):
        run(x, *params, EPS, residual=x[:3])
    with pytest.raises(ValueError, match=r"out must have shape \(4, 64\), got \(4, 32\)"):
        run(x, *params, EPS, out=x[:, :32])
    for out in (x, (x, x), (None, None)):
        with pytest.raises(ValueError, match=r"out must be a pair \(y, x \+ residual\) of two ten"):
            run(x, *params, EPS, residual=x, out=out)
    with pytest.raises(ValueError, match=r"out\[1\] must have dtype torch.float32"):
        run(x, *params, EPS, residual=x, out=(x.clone(), x.half()))


def test_layer_norm_checks_its_bias(device):
    x, params = make("layer_norm", (4, 64), torch.float32, device)
    with pytest.raises(ValueError, match=r"bias must have shape \(64,\), got \(1,\)"):
        kk.layer_norm(x, params[0], params[1][:1], EPS)


def test_gradients_are_refused(device):
    x, (weight,) = make("rms_norm", (4, 64), torch.float32, device)
    parameter = torch.nn.Parameter(weight)
    with pytest.raises(RuntimeError, match=r"weight must not require a gradient: .* forward-only"):
        kk.rms_norm(x, parameter, EPS)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(kk.rms_norm(x, parameter, EPS), kk.rms_norm(x, weight, EPS))
