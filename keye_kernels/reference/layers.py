"""Definitions of the norms, activations, patch embedding and patch merging."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from keye_kernels._checks import Grid

Pair = tuple[torch.Tensor, torch.Tensor]

_BLOCK_ELEMENTS = 2**17  # 512 KiB of fp32


def blocks(x: torch.Tensor) -> Iterator[slice]:
    """Rows of x in blocks whose temporaries stay in a CPU's cache.

    1024 rows of q, rotated in fp32 on 2 cores: 1.7 ms in blocks, 9.7 ms at once.
    """
    row_size = max(x.numel() // max(x.shape[0], 1), 1)
    step = max(x.shape[0], 1) if x.is_cuda else max(_BLOCK_ELEMENTS // row_size, 1)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def _row_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of the same leading dims in blocks as above, of all these dims where they are one."""
    if tensors[0].dim() == 1:
        yield tensors
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.flatten(0, -2) for tensor in tensors)
    for rows in blocks(tensors[0]):
        yield tuple(tensor[rows] for tensor in tensors)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """round(x * rsqrt(mean(x^2) + eps)) * weight."""
    if residual is not None:
        y, total = (None, torch.empty_like(x)) if out is None else out
        x = torch.add(x, residual, out=total)
        return rms_norm(x, weight, eps, out=y), total
    out = torch.empty_like(x) if out is None else out
    for x_rows, out_rows in _row_blocks(x, out):
        # Without a weight F.rms_norm computes in fp32 and rounds once.
        torch.mul(F.rms_norm(x_rows, x.shape[-1:], None, eps), weight, out=out_rows)
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """(x - mean) * rsqrt(variance + eps) * weight + bias, fp32 inside, rounded once."""
    if residual is not None:
        y, total = (None, torch.empty_like(x)) if out is None else out
        x = torch.add(x, residual, out=total)
        return layer_norm(x, weight, bias, eps, out=y), total
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if out is None else out.copy_(y)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """round(silu(gate)) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate) if out is None else out
    for gate_rows, up_rows, out_rows in _row_blocks(gate, up, out):
        torch.mul(F.silu(gate_rows), up_rows, out=out_rows)
    return out


def gelu(
    x: torch.Tensor,
    *,
    approximate: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gelu(x + bias), fp32 inside, rounded once."""
    out = torch.empty_like(x) if out is None else out
    for x_rows, out_rows in _row_blocks(x, out):
        total = x_rows if bias is None else x_rows.float() + bias.float()
        out_rows.copy_(F.gelu(total, approximate=approximate))
    return out


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
    for t, h, w in grid_thw:
        t, h, w = int(t), int(h), int(w)
        if (h, w) not in maps:
            maps[h, w] = _resample(position_table, h, w)
        y[start : start + t * h * w].unflatten(0, (t, h * w)).add_(maps[h, w])
        start += t * h * w
    return y.to(weight.dtype) if out is None else out.copy_(y)


def merge_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grid_thw: Grid,
    *,
    residual: torch.Tensor | None = None,
    patch_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    merge_size: int = 2,
    norm_first: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm per patch, then gather; or gather, then LayerNorm over the whole token.

    The residual add and the norm that may come before either round as ops of their own.
    """
    if residual is not None:
        x = x + residual
    if patch_norm is not None:
        x = layer_norm(x, *patch_norm)
    if norm_first:
        x = layer_norm(x, weight, bias, eps)
    tokens = []
    start = 0
    for t, h, w in grid_thw:
        t, h, w = int(t), int(h) // merge_size, int(w) // merge_size
        size = t * h * w * merge_size**2
        squares = x[start : start + size].view(t, h, merge_size, w, merge_size, -1).transpose(2, 3)
        tokens.append(squares.reshape(t * h * w, -1))
        start += size
    merged = torch.cat(tokens)
    if not norm_first:
        return layer_norm(merged, weight, bias, eps, out=out)
    return merged if out is None else out.copy_(merged)
