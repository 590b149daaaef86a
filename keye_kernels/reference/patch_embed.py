"""Definition of the patch embedding."""

import torch

from keye_kernels._checks import Grid, grid_rows


def _resample(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Bilinear resampling of a square map [side * side, hidden] to [h * w, hidden], fp32."""
    side = int(table.shape[0] ** 0.5 + 0.5)
    table = table.view(side, side, -1)

    def taps(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = torch.arange(size, dtype=torch.float32, device=table.device)
        scale = torch.tensor(side / size, dtype=torch.float32, device=table.device)
        at = ((grid + 0.5) * scale - 0.5).clamp(min=0)
        low = at.floor().clamp(max=side - 1)
        return low.long(), (low + 1).clamp(max=side - 1).long(), at - low

    y0, y1, fy = taps(h)
    x0, x1, fx = taps(w)
    fy, fx = fy[:, None, None], fx[:, None]
    top, bottom = table[y0].float(), table[y1].float()  # [h, side, hidden]
    top = (1 - fx) * top[:, x0] + fx * top[:, x1]  # [h, w, hidden]
    bottom = (1 - fx) * bottom[:, x0] + fx * bottom[:, x1]
    return ((1 - fy) * top + fy * bottom).flatten(0, 1)


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position_table: torch.Tensor,
    grid_thw: Grid,
    *,
    image_mean: list[float],
    image_std: list[float],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight @ normalised pixels + bias + position, summed in fp32, rounded once."""
    if pixels.dtype == torch.uint8:
        # In fp32 this division gives the published processor's fp32(value * (1 / 255) in fp64)
        # for each of the 256 bytes. By a tensor: CUDA multiplies by the reciprocal of a number.
        scaled = pixels.float().div_(torch.full((), 255.0, device=pixels.device))
        mean = torch.tensor(image_mean, dtype=torch.float32, device=pixels.device)
        std = torch.tensor(image_std, dtype=torch.float32, device=pixels.device)
        pixels = scaled.sub_(mean[:, None, None]).div_(std[:, None, None])
    pixels = pixels.to(weight.dtype).float().flatten(1)
    y = torch.addmm(bias.float(), pixels, weight.float().flatten(1).T)
    maps: dict[tuple[int, int], torch.Tensor] = {}
    start = 0
    for t, h, w in grid_rows(grid_thw):
        if (h, w) not in maps:
            maps[h, w] = _resample(position_table, h, w)
        y[start : start + t * h * w].unflatten(0, (t, h * w)).add_(maps[h, w])
        start += t * h * w
    return y.to(weight.dtype) if out is None else out.copy_(y)
