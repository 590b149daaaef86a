"""Raw uint8 patches to embeddings, against normalise + convolve + interpolate + add."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import plain


def eager(pixels, weight, bias, position_table, grid_thw, image_mean, image_std):
    """As the published processor and model code do it, one interpolation per image."""
    mean, std = (pixels.new_tensor(v, dtype=torch.float32) for v in (image_mean, image_std))
    pixels = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    x = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(1)
    side = math.isqrt(position_table.shape[0])
    table = position_table.view(1, side, side, -1).permute(0, 3, 1, 2)
    maps = []
    for t, h, w in grid_thw:
        at = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=False)
        maps.append(at.permute(0, 2, 3, 1).reshape(h * w, -1).repeat(t, 1))
    return x + torch.cat(maps)


@pytest.mark.parametrize("case", cases_of("patch_embed"), ids=str)
def bench_patch_embed(measure, case):
    measure(case, plain(eager))
