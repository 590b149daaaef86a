"""Every barrier and wait of every kernel is needed, and the tests would notice that it is missing.

Each is left out in turn. Under some schedule the result must then be wrong: what has not been
written is NaN, what was overwritten too early is another key's.
"""

from collections.abc import Callable

import pytest
import torch

import keye_kernels as kk
from tests.kernels.paged import Cache

pytestmark = pytest.mark.usefixtures("native", "num_sms")

Case = Callable[[], torch.Tensor]


def _paged_decode_attention() -> Case:
    cache = Cache([150, 200], 16, 4, 64, torch.bfloat16, "cpu")
    q = torch.randn(2, 64, 64).bfloat16()
    tensors = (q, cache.k, cache.v, cache.table, cache.lengths)
    return lambda: kk.paged_decode_attention(*tensors, max_seqlen_k=200)


def _linear() -> Case:
    x, weight = torch.randn(9, 2304).bfloat16(), torch.randn(72, 2304).bfloat16()
    norm_weight = torch.rand(2304).bfloat16()
    return lambda: kk.linear(x, weight, norm_weight=norm_weight, eps=1e-6)


# By source file of the kernel; multiprocessors to count on.
CASES = {
    "linear.cuh": (_linear, 4),
    "paged_decode_attention.cuh": (_paged_decode_attention, 12),
}
SHARED = "last_block.cuh"  # its barriers must be needed in each case


def _wrong(native, compute: Case, expected: torch.Tensor, place: str) -> bool:
    for schedule in native.schedules(100, without=place):  # a few are enough for most
        with schedule:
            try:
                if not torch.equal(compute(), expected):
                    return True
            except RuntimeError:  # a deadlock
                return True
    return False


@pytest.mark.parametrize(
    ("source", "num_sms"), [(name, sms) for name, (_, sms) in CASES.items()], indirect=["num_sms"]
)
def test_each_barrier_is_needed(native, source):
    compute = CASES[source][0]()
    expected = compute()
    assert expected.isfinite().all()
    for schedule in native.schedules():
        with schedule:
            assert torch.equal(compute(), expected)
    places = sorted(p for p in native.places() if p.partition(":")[0] in (source, SHARED))
    assert any(place.startswith(source) for place in places)
    for place in places:
        assert _wrong(native, compute, expected, place), f"{place} is not needed, or not tested"


def test_all_kernels_with_barriers_are_here(native):
    for build, _ in CASES.values():
        build()()
    assert {place.partition(":")[0] for place in native.places()} <= {*CASES, SHARED}
