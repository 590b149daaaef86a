"""The compiler's output for the launches of the real shapes: the gate, and that it can fail."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.compile_report.report import compile_kernels, faults, report


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
    padding = {(k["arch"], k["op"]): k["padding"] for k in kernels if k["padding"] is not None}
    as_80_and_72 = pytest.approx((80 + 72) / (72 + 72))
    assert padding == {
        (80, "varlen_attention"): as_80_and_72,
        (80, "paged_prefill_attention"): 1,
        (100, "varlen_attention"): as_80_and_72,
        (100, "paged_prefill_attention"): 1,
    }


def test_lse_of_paged_attention_costs_no_spills(cache):
    code = """
import dataclasses, json
from functools import partial
from benchmarks.compile_report import compiled
from benchmarks.cases import all_cases
from benchmarks.shapes import REAL

def with_lse(arguments, device):
    return arguments(device) | {"return_lse": True}

wanted = {("paged_decode_attention", "batch 8, 16k"), ("paged_prefill_attention", "1k tokens")}
cases = [
    dataclasses.replace(case, arguments=partial(with_lse, case.arguments))
    for case in all_cases(REAL) if (case.op, case.name) in wanted
]
launches = compiled.launches_of(cases, 90)
print(json.dumps(list(compiled.compile_all([(launch, 90) for launch in launches]))))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    kernels = json.loads(done.stdout)
    assert len(kernels) == 3
    assert not faults(kernels), "\n".join(faults(kernels))


def test_what_tune_and_few_queries_take_compiles_well(cache):
    """Variants of attention on their GPUs, and prefill in pieces on all; barriers are fewer."""
    code = """
import dataclasses, json
from functools import partial
from unittest import mock
from benchmarks.compile_report import compiled
from benchmarks.cases import all_cases
from benchmarks.shapes import REAL
from keye_kernels import _backends
from keye_kernels.varlen_attention import VARIANTS

cases = {(case.op, case.name): case for case in all_cases(REAL)}
split = cases["paged_prefill_attention", "last 64 of 32768"]
jobs = [(launch, arch) for arch in (80, 90, 100) for launch in compiled.launches_of([split], arch)]
candidates = _backends._registry["varlen_attention"]
for name in ("triton", *VARIANTS):
    _backends._chosen.clear()
    with mock.patch.dict(candidates, triton=candidates[name]):
        for case in (case for case in cases.values() if case.op == "varlen_attention"):
            if case.name in ("1k patches", "5k patches"):
                case = dataclasses.replace(case, name=f"{name}, {case.name}")
                for arch in (90, 100):
                    jobs += [(launch, arch) for launch in compiled.launches_of([case], arch)]
print(json.dumps(list(compiled.compile_all(jobs))))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    kernels = json.loads(done.stdout)
    assert not faults(kernels), "\n".join(faults(kernels))
    names = [(kernel["arch"], kernel["kernel"]) for kernel in kernels]
    for arch in (80, 90, 100):
        assert {(arch, "_attention_kernel"), (arch, "_combine_kernel")} <= set(names)
    loops = {(k["arch"], k["cases"][0]["name"]): k["loop"] for k in kernels}
    for arch in (90, 100):
        for size in ("1k", "5k"):
            plain, early, polynomial = (
                loops[arch, f"{name}, {size} patches"]
                for name in ("triton", "triton_early", "triton_polynomial")
            )
            assert early["barriers"] < plain["barriers"]
            assert early["waits"] < plain["waits"]
            assert polynomial["exp2"] <= 0.8 * early["exp2"]


def test_attention_fits_into_the_least_shared_memory(cache):
    kernels = compile_kernels([120], ops=["paged_prefill_attention"], cache=cache)
    assert kernels
    assert not faults(kernels), "\n".join(faults(kernels))


def test_a_launch_is_noted_as_it_is_and_a_crash_is_contained(cache):
    """Rows at odd addresses need 2-byte accesses; a compiler that aborts is reported."""
    code = """
import json, os, torch
from benchmarks.compile_report import compiled
from benchmarks.cases import Case

def odd(device):
    x = torch.empty(300, 8193, dtype=torch.bfloat16, device=device)[:, 1:]
    return {"gate_up": x, "out": torch.empty(300, 4096, dtype=torch.bfloat16, device=device)}

launches = compiled.launches_of([Case("silu_mul", "odd", odd, 1)], 90)
found = list(compiled.compile_all([(launch, 90) for launch in launches]))
compiled._compile = lambda launch, arch: os.abort()
found += compiled.compile_all([(launch, 90) for launch in launches])
print(json.dumps(found))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    odd, crashed = json.loads(done.stdout)
    assert odd["cases"][0]["num_programs"] == 300 * 4
    assert odd["num_warps"] == 4
    assert odd["loads"] == {"16": 16}
    assert odd["stores"] == {"128": 1}
    assert [fault.rpartition(": ")[2] for fault in faults([odd])] == [
        "narrow loads 16 x 16",
        "no loads of 16 bytes",
    ]
    assert crashed["error"] == "the compiler died with code -6"


def kernel(**changes):
    """A kernel without fault, as the compile report describes it."""
    case = {"name": "1k", "num_programs": 8, "num_bytes": 64, "flops": 2e9}
    case |= {"load_width": 16, "store_width": 16}
    good = {
        "triton": "3.7.1", "arch": 90, "op": "gelu", "kernel": "_gelu_kernel", "cases": [case],
        "num_warps": 4, "num_stages": 3, "registers": 30, "stack": 0, "shared": 0,
        "warps_per_sm": 64, "loads": {"128": 2, "32": 1}, "stores": {"128": 1}, "mma": {"HMMA": 8},
        "padding": 1.06,
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack": 64}, "sm_90, _gelu_kernel (1k): 64 bytes of stack"),
        ({"shared": 232449, "warps_per_sm": 0}, "(1k): 232449 bytes of shared memory, too many"),
        ({"loads": {"128": 2, "16": 8}}, "narrow loads 8 x 16"),
        ({"stores": {"128": 2, "8": 1}}, "narrow stores 1 x 8"),
        ({"loads": {"64": 2}}, "gelu (1k): no loads of 16 bytes"),
        ({"stores": {}}, "gelu (1k): no stores of 16 bytes"),
        ({"mma": {}}, "gelu (1k): no tensor-core instruction"),
        ({"padding": 1.2}, "_gelu_kernel (1k): 1.200 of the useful FLOP in its loop"),
        ({"padding": 0.0}, "_gelu_kernel (1k): 0.000 of the useful FLOP in its loop"),
        ({"error": "the compiler died with code -6"}, "(1k): the compiler died with code -6"),
    ],
    ids=[
        "stack",
        "shared",
        "narrow-load",
        "narrow-store",
        "load",
        "store",
        "mma",
        "padded",
        "lost",
        "crash",
    ],
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
