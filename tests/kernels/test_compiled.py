"""The compiler's output for the launches of the real shapes: the gate, and that it can fail."""

import pytest

from benchmarks.kernels import compile_kernels, faults, report


@pytest.fixture(scope="module")
def cache(pytestconfig):
    return str(pytestconfig.cache.mkdir("triton"))


def names(kernels):
    return {(kernel["arch"], kernel["op"]) for kernel in kernels}


def test_every_launch_compiles_well_for_hopper(cache):
    kernels = compile_kernels([90], cache=cache)
    assert kernels
    assert not faults(kernels), "\n".join(faults(kernels))


def test_one_launch_of_each_op_compiles_well_elsewhere(cache):
    kernels = compile_kernels([80, 100], first=True, cache=cache)
    assert {(80, "gelu"), (100, "gelu")} <= names(kernels)
    assert not faults(kernels), "\n".join(faults(kernels))


def kernel(**changes):
    """A kernel without fault, as the compile report describes it."""
    case = {"name": "1k", "num_programs": 8, "num_bytes": 64, "flops": 2e9}
    case |= {"load_width": 16, "store_width": 16}
    good = {
        "triton": "3.7.1", "arch": 90, "op": "gelu", "kernel": "_gelu_kernel", "cases": [case],
        "num_warps": 4, "num_stages": 3, "registers": 30, "stack": 0, "shared": 0,
        "warps_per_sm": 64, "loads": {"128": 2, "32": 1}, "stores": {"128": 1}, "mma": {"HMMA": 8},
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack": 64}, "sm_90, _gelu_kernel (1k): 64 bytes of stack"),
        ({"loads": {"128": 2, "16": 8}}, "narrow loads 8 x 16"),
        ({"stores": {"128": 2, "8": 1}}, "narrow stores 1 x 8"),
        ({"loads": {"64": 2}}, "gelu (1k): no loads of 16 bytes"),
        ({"stores": {}}, "gelu (1k): no stores of 16 bytes"),
        ({"mma": {}}, "gelu (1k): no tensor-core instruction"),
        ({"error": "the compiler died with code -6"}, "(1k): the compiler died with code -6"),
    ],
    ids=["stack", "narrow-load", "narrow-store", "load", "store", "mma", "crash"],
)
def test_each_fault_is_found(changes, fault):
    assert faults([kernel()]) == []
    found = faults([kernel(**changes)])
    assert len(found) == 1
    assert fault in found[0]
    assert fault in report([kernel(**changes)])


def test_parts_of_a_case_are_judged_together():
    combine = kernel(kernel="_combine_kernel", mma={}, loads={"32": 1}, stores={"32": 1})
    assert faults([kernel(), combine]) == []
    assert "no tensor cores" not in report([kernel(), combine])
    assert len(faults([combine])) == 3
