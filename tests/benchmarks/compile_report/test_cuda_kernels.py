"""The CUDA kernels as nvcc builds them: the gate, and that it can fail."""

import pytest

from benchmarks.compile_report import cuda_kernels
from keye_kernels import _backends


def test_nvcc_makes_what_the_kernels_count_on():
    """Built anew where sources changed. Spilled registers and warnings are errors of the build."""
    if cuda_kernels.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    library = cuda_kernels.build()
    kernels = cuda_kernels.read(library, ["80", "90a"])
    assert {kernel["kernel"].partition("_kernel")[0] for kernel in kernels} == {
        op for op, found in _backends._registry.items() if "cuda" in found
    }
    assert cuda_kernels.faults(kernels) == []
    for kernel in kernels:
        assert ("HMMA" in kernel["mma"]) == ("qk_norm" not in kernel["kernel"]), kernel


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": {"STL": 1}}, "bytes of stack"),
        ({"loads": {"64": 3}}, "no loads of 16 bytes"),
        ({"stores": {}}, "no stores of 16 bytes"),
        ({"loads": {"128": 1, "16": 2}}, "2 loads of 1 or 2 bytes"),
        ({"shared": 101377}, "101377 bytes of shared memory"),
        ({"registers": 129}, "129 registers, more than 128"),
    ],
    ids=["stack", "local", "loads", "stores", "narrow", "shared", "registers"],
)
def test_each_fault_is_found(changes, fault):
    good = {"kernel": "qk_norm_mrope_store_kernel<bf16, 128>", "arch": "90a", "registers": 100}
    good |= {
        "stack": 0,
        "shared": 0,
        "local": {},
        "loads": {"128": 1},
        "stores": {"128": 1},
        "mma": {},
    }
    assert cuda_kernels.faults([good]) == []
    found = cuda_kernels.faults([good | changes])
    assert len(found) == 1
    assert fault in found[0]
    assert fault in cuda_kernels.report([good | changes])
