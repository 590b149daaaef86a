"""Pointwise ops between two GEMMs, against PyTorch, Liger and FlashInfer."""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import gpu_library, plain


def eager_silu_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def liger_silu_mul(module):
    """Older releases have no form for a packed gate_up; the one they have copies both halves."""
    fused = getattr(module, "LigerFusedGateUpSiLUMulFunction", None)
    if fused is not None:
        return lambda gate_up: fused.apply(gate_up)
    return lambda gate_up: module.LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def eager_gelu(x, approximate, bias):
    return F.gelu(x + bias, approximate=approximate)


@pytest.mark.parametrize("case", cases_of("silu_mul"), ids=str)
def bench_silu_mul(measure, case):
    peers = {
        "liger": gpu_library("liger_kernel.ops.swiglu", liger_silu_mul),
        "flashinfer": gpu_library(
            "flashinfer.activation", lambda m: lambda gate_up: m.silu_and_mul(gate_up)
        ),
    }
    measure(case, plain(eager_silu_mul) | peers)


@pytest.mark.parametrize("case", cases_of("gelu"), ids=str)
def bench_gelu(measure, case):
    measure(case, plain(eager_gelu))
