"""LayerNorm and 2x2 gather, against the same in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import plain


def _gather(x, grid_thw):
    tokens, start = [], 0
    for t, h, w in grid_thw:
        part = x[start : start + t * h * w].view(t, h // 2, 2, w // 2, 2, -1)
        tokens.append(part.transpose(2, 3).reshape(t * h * w // 4, -1))
        start += t * h * w
    return torch.cat(tokens)


def eager(x, weight, bias, eps, grid_thw, norm_first):
    if norm_first:
        return _gather(F.layer_norm(x, weight.shape, weight, bias, eps), grid_thw)
    return F.layer_norm(_gather(x, grid_thw), weight.shape, weight, bias, eps)


@pytest.mark.parametrize("case", cases_of("merge_patches"), ids=str)
def bench_merge_patches(measure, case):
    measure(case, plain(eager))
