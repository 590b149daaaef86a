"""Checks of arguments, before any work. Messages read `<argument> must <rule>, got <value>`.

Checks of tensors read only their metadata. Checks of a tensor's contents take them as a list; only
the reference, which has the contents on the host, calls those.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Grid = Sequence[Sequence[int]] | torch.Tensor


def _matches(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(sizes) != len(shape):
        return False
    for have, want in zip(sizes, shape):  # noqa: B905, SIM110 - runs about 40 times per layer
        if want is not None and have != want:
            return False
    return True


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None] | None,
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
    *,
    contiguous: bool = False,
) -> None:
    """Check type, shape, dtype, device, layout, and that no gradient is required.

    A size of None allows any size, a shape of None any shape of at least one dim. The last dim must
    be contiguous; with ``contiguous``, the whole tensor.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    sizes = tensor.shape
    if shape is None:
        if len(sizes) == 0:
            raise ValueError(f"{name} must have at least 1 dim, got shape ()")
    elif sizes != shape and not _matches(sizes, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        wanted += "," if len(shape) == 1 else ""
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(sizes)}")
    if tensor.dtype != dtype and (isinstance(dtype, torch.dtype) or tensor.dtype not in dtype):
        wanted = dtype if isinstance(dtype, torch.dtype) else " or ".join(map(str, dtype))
        raise ValueError(f"{name} must have dtype {wanted}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if sizes[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dim, got strides {tensor.stride()}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} must not require a gradient: keye_kernels is forward-only, "
            "call it under torch.inference_mode() or torch.no_grad(), got requires_grad=True"
        )


def check_divides(name: str, value: int, divisor: int) -> None:
    """Check that ``value`` is a positive multiple of ``divisor``."""
    if value <= 0 or value % divisor:
        raise ValueError(f"{name} must be a positive multiple of {divisor}, got {value}")


def check_length(name: str, value: int, *, least: int = 0) -> int:
    """Check that ``value`` is an int of at least ``least`` (0 or 1); returns NumPy ints as int."""
    is_int = isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)
    if not is_int or value < least:
        rule = "a positive" if least else "a non-negative"
        raise ValueError(f"{name} must be {rule} int, got {_shown(value)}")
    return int(value) if isinstance(value, np.integer) else value


def check_finite(name: str, value: float, *, above: float | None = None) -> float:
    """Check that ``value`` is a finite number, greater than ``above``; returns it as a float."""
    rule = "a finite number" if above is None else f"a finite number above {above:g}"
    if above is None:
        above = -math.inf
    number = _as_float(value)
    if number is None or not above < number < math.inf:
        raise ValueError(f"{name} must be {rule}, got {_shown(value)}")
    return number


def check_eps(name: str, value: float) -> float:
    """Check that ``value`` is a finite number of at least 0; returns it as a float."""
    number = check_finite(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return number


def _as_float(value: object) -> float | None:
    """A Python or NumPy real as a float, inf if it is too large; None for anything else."""
    if isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: object) -> str:
    """``repr``; a tensor only by its shape, since its values may be on a device."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"a tensor of shape {tuple(value.shape)}"


def flatten_grid(grid_thw: Grid, num_tokens: int, *, merge_size: int = 1) -> list[int]:
    """Check rows (t, h, w) against the number of patches and return them as one flat list."""
    if isinstance(grid_thw, torch.Tensor) and grid_thw.device.type != "cpu":
        raise ValueError(
            f"grid_thw must be a list or a CPU tensor, got a tensor on {grid_thw.device}"
        )
    if hasattr(grid_thw, "tolist"):  # a tensor or an array
        grid_thw = grid_thw.tolist()
    flat: list[int] = []
    total = 0
    for row in grid_thw:
        is_row = isinstance(row, Sequence) and len(row) == 3
        if not is_row or any(not isinstance(size, int) or size < 1 for size in row):
            raise ValueError(f"grid_thw must hold rows of positive ints (t, h, w), got {row}")
        t, h, w = row
        if h % merge_size or w % merge_size:
            raise ValueError(
                f"grid_thw must hold h and w that divide by merge_size {merge_size}, got {row}"
            )
        flat += (t, h, w)
        total += t * h * w
    if total != num_tokens:
        raise ValueError(f"grid_thw must add up to the {num_tokens} patches given, got {total}")
    return flat


def grid_rows(grid_thw: Grid | list[int]) -> list[list[int]]:
    """Rows (t, h, w) of a grid, or of the list that ``flatten_grid`` made of one."""
    return np.reshape(grid_thw, (-1, 3)).tolist()


def check_cu_seqlens(
    name: str, cu_seqlens: list[int], num_tokens: int, max_seqlen: int | None = None
) -> None:
    """Check the sequence starts, prefix sums of lengths, of a packed tensor of ``num_tokens``."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"{name} must start at 0 and end at {num_tokens} tokens, "
            f"got {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name} must not decrease, got {cu_seqlens}")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        max_name = name.replace("cu_seqlens", "max_seqlen")
        raise ValueError(f"{max_name} must be at least {max(lengths)}, got {max_seqlen}")


def check_range(name: str, values: list[int], low: int, high: int) -> None:
    """Check low <= value < high for each value."""
    if values and not (low <= min(values) and max(values) < high):
        worst = min(values) if min(values) < low else max(values)
        raise ValueError(f"{name} must hold values in [{low}, {high}), got {worst}")


def check_each(name: str, values: list[float], rule: str, holds: Callable[[float], bool]) -> None:
    """Check that each value ``holds``; ``rule`` says in the error what it must do."""
    for value in values:
        if not holds(value):
            raise ValueError(f"{name} must {rule}, got {value}")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Check that num_heads is a positive multiple of num_kv_heads."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a positive multiple of num_kv_heads {num_kv_heads}, got {num_heads}"
        )


def check_head_dim(head_dim: int) -> None:
    """Check the head sizes that every attention op accepts."""
    if head_dim < 8 or head_dim % 8 or head_dim > 256:
        raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {head_dim}")


def check_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None,
    out: torch.Tensor | None,
) -> tuple[float, int]:
    """Check what both ops on a paged cache take; returns the scale and the longest length."""
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    _, num_heads, head_dim = q.shape
    check_tensor("k_cache", k_cache, (None, None, None, head_dim), q.dtype, q.device)
    check_tensor("v_cache", v_cache, k_cache.shape, q.dtype, q.device)
    check_heads(num_heads, k_cache.shape[2])
    check_head_dim(head_dim)
    page_size = k_cache.shape[1]
    check_divides("page_size", page_size, 16)
    check_tensor("block_table", block_table, (None, None), torch.int32, q.device)
    batch_size, max_pages = block_table.shape
    check_tensor("cache_seqlens", cache_seqlens, (batch_size,), torch.int32, q.device)
    # More tokens than the table can name, or than fit into cache_seqlens, are none to read.
    longest = min(check_length("max_seqlen_k", max_seqlen_k), max_pages * page_size, 2**31 - 1)
    if out is not None:
        check_tensor("out", out, q.shape, q.dtype, q.device)
    scale = head_dim**-0.5
    if softmax_scale is not None:
        scale = check_finite("softmax_scale", softmax_scale, above=0.0)
    return scale, longest
