"""Matrix products of a decode step, against cuBLAS alone and with the ops that surround it."""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import Provider, plain
from keye_kernels import rms_norm, silu_mul


def eager(x, weight, norm_weight=None, eps=None, residual=None, swiglu=False):
    if norm_weight is not None:
        x = F.rms_norm(x, norm_weight.shape, None, eps) * norm_weight
    y = F.linear(x, weight)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y if residual is None else y + residual


def one_by_one(x, weight, norm_weight=None, eps=None, residual=None, swiglu=False):
    """What a layer does where no kernel serves: our other ops, and cuBLAS."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    y = F.linear(x, weight)
    if swiglu:
        return silu_mul(y)
    return y if residual is None else y.add_(residual)


def product(x, weight, **_):
    return F.linear(x, weight)


@pytest.mark.parametrize("case", cases_of("linear"), ids=str)
def bench_linear(measure, case):
    peers = {
        "our other ops": Provider(one_by_one),
        "the product alone": Provider(product, differs=lambda _got, _want: ""),
    }
    measure(case, plain(eager) | peers)
