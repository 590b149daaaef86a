"""Definitions of the rotary position embeddings."""

from functools import lru_cache

import torch

from keye_kernels.reference._blocks import blocks


def rotate(x: torch.Tensor, angles: torch.Tensor, out: torch.Tensor) -> None:
    """Turn pairs (j, j + head_dim / 2) of x [num_tokens, heads, head_dim] into ``out``.

    angles: [num_tokens, head_dim / 2] fp32. fp32 inside, rounded once. ``out`` may be ``x``.
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    half = angles.shape[1]
    for rows in blocks(x):
        low, high = x[rows].float().chunk(2, dim=-1)
        turned_low = (low * cos[rows]).addcmul_(high, sin[rows], value=-1)
        turned_high = (high * cos[rows]).addcmul_(low, sin[rows])
        out[rows, :, :half] = turned_low
        out[rows, :, half:] = turned_high


@lru_cache(maxsize=16)
def inverse_frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-2k / dim) for k < dim / 2, fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def rope_2d_(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, theta: float = 10000.0
) -> None:
    """First half of the pairs by row, second half by column."""
    frequencies = inverse_frequencies(q.shape[-1] // 2, theta, q.device)
    angles = (positions.float()[:, :, None] * frequencies).flatten(1)
    rotate(q, angles, out=q)
    rotate(k, angles, out=k)


@lru_cache(maxsize=16)
def _axis_of_pairs(
    mrope_section: tuple[int, ...], interleaved: bool, device: torch.device
) -> torch.Tensor:
    """Which of t, h, w (0, 1, 2) turns each pair, int64."""
    num_pairs = sum(mrope_section)
    if interleaved:
        axis = [j % 3 if j < 3 * mrope_section[j % 3] else 0 for j in range(num_pairs)]
    else:
        axis = [a for a, size in enumerate(mrope_section) for _ in range(size)]
    return torch.tensor(axis, device=device)


def mrope_angles(
    positions: torch.Tensor, mrope_section: list[int], theta: float, interleaved: bool
) -> torch.Tensor:
    """Angles [num_tokens, head_dim / 2] of positions [3, num_tokens]."""
    axis = _axis_of_pairs(tuple(mrope_section), interleaved, positions.device)
    frequencies = inverse_frequencies(2 * axis.shape[0], theta, positions.device)
    return positions.T.index_select(1, axis) * frequencies


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    mrope_section: list[int],
    theta: float,
    interleaved: bool = False,
) -> None:
    """Each pair by the position on its own axis."""
    angles = mrope_angles(positions, mrope_section, theta, interleaved)
    rotate(q, angles, out=q)
    rotate(k, angles, out=k)
