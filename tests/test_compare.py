"""The comparison itself must be able to fail."""

import pytest
import torch

from tests.compare import assert_close, assert_same

EXACT = torch.tensor([[1.0, -2.0], [float("inf"), 0.5]], dtype=torch.float64)


def test_equal_values_pass():
    assert_close(EXACT.float(), EXACT.float(), EXACT)


def test_twice_the_error_of_plain_passes_and_more_does_not():
    plain = EXACT.float() + torch.tensor([[1e-3, 0.0], [0.0, 0.0]])
    assert_close(EXACT.float() + torch.tensor([[0.0, 1.9e-3], [0.0, 0.0]]), plain, EXACT)
    with pytest.raises(AssertionError, match=r"worst at \(0, 1\)"):
        assert_close(EXACT.float() + torch.tensor([[0.0, 2.1e-3], [0.0, 0.0]]), plain, EXACT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_where_exact_is_finite_fails(bad):
    got = EXACT.float()
    got[1, 1] = bad
    with pytest.raises(AssertionError, match=r"worst at \(1, 1\)"):
        assert_close(got, EXACT.float(), EXACT)


def test_other_dtype_or_shape_fails():
    with pytest.raises(AssertionError, match="float16"):
        assert_close(EXACT.half(), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="Size"):
        assert_close(EXACT.float()[:1], EXACT.float(), EXACT)


def test_the_same_is_bits_of_a_kernel_and_within_rounding_of_the_reference():
    want = EXACT.float()
    near, far = want.clone(), want.clone()
    near[1, 1] += 2**-24
    far[1, 1] += 2**-10
    assert_same(want.clone(), want, "triton")
    assert_same(near, want, "reference")
    with pytest.raises(AssertionError):
        assert_same(near, want, "triton")
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 4"):
        assert_same(far, want, "reference")
