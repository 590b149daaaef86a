"""Norms with the residual add in front, against the same in PyTorch, Liger and FlashInfer."""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import gpu_library, plain


def eager_rms_norm(x, weight, eps, residual):
    total = x + residual
    return F.rms_norm(total, weight.shape, None, eps) * weight, total


def eager_layer_norm(x, weight, bias, eps, residual):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def liger_rms_norm(module):
    apply = module.LigerFusedAddRMSNormFunction.apply
    return lambda x, weight, eps, residual: apply(x, residual, weight, eps)


def liger_layer_norm(module):
    apply = module.LigerLayerNormFunction.apply

    def run(x, weight, bias, eps, residual):
        total = x + residual
        return apply(total, weight, bias, eps), total

    return run


def flashinfer_rms_norm(module):
    def run(x, weight, eps, residual):
        module.fused_add_rmsnorm(x, residual, weight, eps)  # both in place
        return x, residual

    return run


@pytest.mark.parametrize("case", cases_of("rms_norm"), ids=str)
def bench_rms_norm(measure, case):
    peers = {
        "liger": gpu_library("liger_kernel.ops.fused_add_rms_norm", liger_rms_norm),
        "flashinfer": gpu_library("flashinfer.norm", flashinfer_rms_norm),
    }
    measure(case, plain(eager_rms_norm) | peers)


@pytest.mark.parametrize("case", cases_of("layer_norm"), ids=str)
def bench_layer_norm(measure, case):
    liger = gpu_library("liger_kernel.ops.layer_norm", liger_layer_norm)
    measure(case, plain(eager_layer_norm) | {"add, then liger": liger})
