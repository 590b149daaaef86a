"""The repaired interpreter against PyTorch, bit for bit, and what it refuses."""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from testing import triton_interpreter
from testing.triton_interpreter import to_bf16, to_fp32
from tests.memory import far_apart

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, nothing is interpreted"
)

EDGES = [0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-40, float("inf"), -float("inf"), float("nan")]


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if KIND == "add":
        result = x + y
    elif KIND == "sub":
        result = x - y
    elif KIND == "mul":
        result = x * y
    elif KIND == "maximum":
        result = tl.maximum(x, y)
    elif KIND == "where":
        result = tl.where(x < y, x, y)
    elif KIND == "lt":
        result = (x < y).to(tl.int8)
    elif KIND == "ge":
        result = (x >= y).to(tl.int8)
    elif KIND == "eq":
        result = (x == y).to(tl.int8)
    else:
        result = x * 0.7 + 1  # constants in the type of x
    tl.store(out_ptr + offs, result)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + rows * BLOCK + cols), tl.load(y_ptr + rows * BLOCK + cols)
    tl.store(out_ptr + rows * BLOCK + cols, tl.dot(x, y))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, running_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + cols)
    row = tl.arange(0, BLOCK)
    tl.store(sum_ptr + row, tl.sum(x, axis=1))
    tl.store(max_ptr + row, tl.max(x, axis=1).to(max_ptr.dtype.element_ty))
    tl.store(running_ptr + rows * BLOCK + cols, tl.cumsum(x, axis=1))


@triton.jit
def _fma_kernel(x_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.fma(x, x, tl.load(z_ptr + offs)))


@triton.jit
def _scalar_condition_kernel(x_ptr, limit_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = (offs > 0) & (tl.load(limit_ptr) < 1)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=-1.0))


@triton.jit
def _strided_sum_kernel(x_ptr, out_ptr, n, STEP: tl.constexpr):
    total = 0.0
    for i in tl.range(0, n, STEP):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr, total)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


def operands(size=4096):
    """bf16 of every magnitude, edge cases against each other first."""
    scale = torch.exp2(torch.randint(-20, 20, (size,)).float())
    x, y = (torch.randn(size) * scale).bfloat16(), (torch.randn(size) * scale).bfloat16()
    edges = torch.tensor(EDGES)
    count = len(EDGES) ** 2
    x[:count] = edges.repeat_interleave(len(EDGES)).bfloat16()
    y[:count] = edges.repeat(len(EDGES)).bfloat16()
    y[count : count + 100] = x[count : count + 100]
    return x, y


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "where": lambda x, y: torch.where(x < y, x, y),
    "lt": lambda x, y: (x < y).to(torch.int8),
    "ge": lambda x, y: (x >= y).to(torch.int8),
    "eq": lambda x, y: (x == y).to(torch.int8),
    "constants": lambda x, y: x * torch.tensor(0.7).bfloat16() + 1,  # noqa: ARG005
}


@pytest.mark.parametrize("kind", BINARY)
def test_bf16_arithmetic(kind):
    x, y = operands()
    expected = BINARY[kind](x, y)
    out = torch.empty_like(expected)
    _binary_kernel[(1,)](x, y, out, KIND=kind, BLOCK=x.shape[0])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_condition_on_a_scalar_masks_a_block(limit):
    x, out = torch.arange(4.0), torch.empty(4)
    _scalar_condition_kernel[(1,)](x, torch.tensor(limit), out, BLOCK=4)
    assert out.tolist() == ([-1.0, 1.0, 2.0, 3.0] if limit < 1 else [-1.0] * 4)


def test_bf16_maximum():
    x, y = (torch.randn(256).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, KIND="maximum", BLOCK=256)
    assert torch.equal(out, torch.maximum(x, y))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.int32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_casts(source, target):
    if source == torch.int32:
        x = torch.randint(-(2**24), 2**24, (4096,), dtype=source)
    else:
        x = torch.randn(4096).mul(1000).to(source)
    if source == torch.float32:
        # Ties between two bfloat16, both ways; just beside a tie; the edges.
        x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 257.0, 259.0, 257.001])
        x[6:16] = torch.tensor(EDGES)
    out = torch.empty(4096, dtype=target)
    _cast_kernel[(1,)](x, out, BLOCK=4096)
    expected = x.to(target)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_every_bf16_survives_a_round_trip():
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert np.array_equal(to_fp32(bits), values.float().numpy(), equal_nan=True)
    number = ~np.isnan(to_fp32(bits))
    assert np.array_equal(to_bf16(to_fp32(bits))[number], bits[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype):
    """Integers, so that the sums are exact in any order."""
    x, y = (torch.randint(-9, 10, (32, 32)).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, out, BLOCK=32)
    assert torch.equal(out, x.float() @ y.float())


def test_dot_sums_in_an_order_that_depends_on_no_shape():
    """In BLAS it depends on the shape and the CPU, in different ways on different machines."""
    x, y, out = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, out, BLOCK=32)
    expected = torch.zeros(32, 32)
    for k in range(32):
        expected += x[:, k, None] * y[k]
    assert torch.equal(out, expected)


def test_bf16_reductions():
    x = torch.randint(-30, 30, (16, 16)).bfloat16()  # sums below 256 are exact
    sums, largest, running = torch.empty(16).bfloat16(), torch.empty(16).bfloat16(), x.clone()
    _reduce_kernel[(1,)](x, sums, largest, running, BLOCK=16)
    assert torch.equal(sums, x.float().sum(1).bfloat16())
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(running, x.float().cumsum(1).bfloat16())


def test_fma_rounds_once():
    x = 1 + torch.arange(256, dtype=torch.float32) * 2**-23
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, -x * x, out, BLOCK=256)
    exact = x.double() * x.double() - (x * x).double()
    assert torch.equal(out, exact.float())
    assert out.any()


def test_range_over_a_tensor():
    x, out = torch.arange(10.0), torch.empty(1)
    _strided_sum_kernel[(1,)](x, out, 10, STEP=3)
    assert out.item() == 0 + 3 + 6 + 9


@pytest.mark.parametrize("n", [64, 70], ids=["inside", "outside"])
def test_accesses_outside_of_every_tensor_are_refused(n):
    x, out = torch.randn(64), torch.empty(64)
    if n == 64:
        _copy_kernel[(3,)](x, out, n, BLOCK=32)
        assert torch.equal(out, x)
    else:
        with pytest.raises(Exception, match="_copy_kernel reads 6 elements outside of its tensors"):
            _copy_kernel[(3,)](x, out, n, BLOCK=32)
        with pytest.raises(Exception, match="_copy_kernel writes 6 elements outside"):
            _copy_kernel[(3,)](torch.randn(96), out, n, BLOCK=32)


def test_storages_are_not_copied():
    """4 GB of memory, of which little is touched."""
    row = far_apart((3, 64), torch.bfloat16, torch.device("cpu"))[2].normal_()
    assert row.storage_offset() > 2**31
    out = torch.empty(64).bfloat16()
    _copy_kernel[(2,)](row, out, 64, BLOCK=32)
    assert torch.equal(out, row)


def test_traffic_counts_what_is_asked_for():
    x, out = torch.randn(64).bfloat16(), torch.empty(64).bfloat16()
    with triton_interpreter.traffic() as moved:
        _copy_kernel[(3,)](x, out, 50, BLOCK=32)
    assert (moved.loaded, moved.stored) == (100, 100)
