"""Tensors whose offsets pass 2^31 elements, without the memory for them on a CPU."""

import math
import mmap

import torch

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; named by Python from 3.13 on


def far_apart(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, row: int | None = None
) -> torch.Tensor:
    """Uninitialised tensor whose last row starts past 2^31 elements; each row is contiguous.

    It has three rows or more, so that the stride fits an int32 and only row * stride does not. On a
    CPU only pages that are touched take memory.

    Args:
        row: The first row that starts past 2^31, 2 or more. Default: the last.
    """
    row = shape[0] - 1 if row is None else row
    if row < 2:
        raise ValueError(f"row must be 2 or more, got {row} of shape {shape}")
    width = math.prod(shape[1:])
    stride = (2**31 // row + width + 63) // 64 * 64
    size = (shape[0] - 1) * stride + width
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
        flat = torch.frombuffer(memory, dtype=dtype)
    else:
        flat = torch.empty(size, dtype=dtype, device=device)
    inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    return flat.as_strided(shape, (stride, *inner))
