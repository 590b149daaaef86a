"""Rotation by complex numbers in fp64, and the usual form of it in the dtype of the input."""

import torch


def rotated(x, angles):
    """x [N, heads, d] as complex numbers of channels (j, j + d/2), turned by angles [N, d/2]."""
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def angles_2d(positions, head_dim, theta=10000.0):
    """fp64 angles [N, head_dim / 2], pair by pair."""
    quarter = head_dim // 4
    columns = [
        positions[:, j // quarter].double() * theta ** (-4 * (j % quarter) / head_dim)
        for j in range(head_dim // 2)
    ]
    return torch.stack(columns, dim=1)


def axes(section, interleaved=False):
    """Axis of each pair."""
    if not interleaved:
        return [0] * section[0] + [1] * section[1] + [2] * section[2]
    layout = [0] * sum(section)
    for axis in (1, 2):
        for n in range(section[axis]):
            layout[axis + 3 * n] = axis
    return layout


def angles_3d(positions, section, theta, interleaved=False):
    """fp64 angles [N, head_dim / 2], pair by pair."""
    columns = [
        positions[axis].double() * float(theta) ** (-j / sum(section))
        for j, axis in enumerate(axes(section, interleaved))
    ]
    return torch.stack(columns, dim=1)


def fp32_angles(positions, dim, theta):
    """Angles [..., dim / 2] as transformers computes them."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return positions.float()[..., None] * (1.0 / theta**exponents)


def half_rotation(x, positions, choice, theta):
    """The usual rotate-half form in the dtype of x, with cos and sin rounded to it first."""
    per_axis = fp32_angles(positions, x.shape[-1], theta)  # [3, N, head_dim / 2]
    angles = torch.stack([per_axis[axis, :, j] for j, axis in enumerate(choice)], dim=1)
    cos, sin = (f.to(x.dtype)[:, None].repeat(1, 1, 2) for f in (angles.cos(), angles.sin()))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
