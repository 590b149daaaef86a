"""Residual, two LayerNorms and 2x2 gather, against the same in PyTorch and as two of our ops."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import Provider, plain
from keye_kernels import layer_norm, merge_patches


def _gather(x, grid_thw):
    tokens, start = [], 0
    for t, h, w in grid_thw:
        part = x[start : start + t * h * w].view(t, h // 2, 2, w // 2, 2, -1)
        tokens.append(part.transpose(2, 3).reshape(t * h * w // 4, -1))
        start += t * h * w
    return torch.cat(tokens)


def eager(x, weight, bias, eps, grid_thw, norm_first, residual=None, patch_norm=None):
    if residual is not None:
        x = x + residual
    if patch_norm is not None:
        x = F.layer_norm(x, patch_norm[0].shape, *patch_norm)
    if norm_first:
        return _gather(F.layer_norm(x, weight.shape, weight, bias, eps), grid_thw)
    return F.layer_norm(_gather(x, grid_thw), weight.shape, weight, bias, eps)


def two_ops(x, weight, bias, eps, grid_thw, norm_first, residual, patch_norm):
    y, _ = layer_norm(x, *patch_norm, residual=residual)
    return merge_patches(y, weight, bias, eps, grid_thw, norm_first=norm_first)


@pytest.mark.parametrize("case", cases_of("merge_patches"), ids=str)
def bench_merge_patches(measure, case):
    peers = plain(eager)
    if "patch_norm" in case.arguments(torch.device("meta")):
        peers["two of our ops"] = Provider(two_ops)
    measure(case, peers)
