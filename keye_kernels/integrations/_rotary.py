"""Rotation by positions, in models whose modules pass cosines and sines to each other.

A rotary embedding with our forward returns positions instead. The modeling module's
`apply_rotary_pos_emb` functions then accept positions too; for callers that pass cosines they do
what they did before.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from keye_kernels import mrope_, rope_2d_
from keye_kernels.integrations._guard import fits, is_watched
from keye_kernels.integrations._layers import Forward, Maker


class Rotation(NamedTuple):
    """What our rotary embedding returns to a decoder's layers instead of sines.

    Instead of cosines it returns the positions, [3, batch_size * length] int64.
    """

    section: tuple[int, int, int]
    theta: float
    interleaved: bool


def vision_rotary_forward(_: ModuleType, original: Forward) -> Forward:
    """Return positions [num_tokens, 2] as cosines and as sines: towers only permute these."""

    def forward(
        self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if is_watched(self) or not fits(x):  # a hook expects cosines
            return original(self, x, position_ids)
        positions = position_ids.to(x.device, torch.int64)
        return positions, positions

    return forward


def decoder_rotary(*, interleaved: bool = False) -> Maker:
    def make(_: ModuleType, original: Forward) -> Forward:
        def forward(
            self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor
        ) -> tuple[torch.Tensor, Any]:
            if is_watched(self) or not fits(x):  # a hook expects cosines
                return original(self, x, position_ids)
            if position_ids.dim() == 2:
                position_ids = position_ids[None]
            positions = position_ids.to(x.device, torch.int64).expand(3, x.shape[0], -1)
            rotation = Rotation(mrope_section(self), rope_theta(self.config), interleaved)
            return positions.reshape(3, -1).contiguous(), rotation

        return forward

    return make


def mrope_section(rotary: nn.Module) -> tuple[int, int, int]:
    """Pairs per axis; a model with 1D positions has all its pairs on the first."""
    section = getattr(rotary, "mrope_section", None) or _rope(rotary.config).get("mrope_section")
    return tuple(section) if section else (rotary.inv_freq.shape[0], 0, 0)


def rope_theta(config: Any) -> float:
    theta = _rope(config).get("rope_theta")
    return config.rope_theta if theta is None else theta


def _rope(config: Any) -> dict[str, Any]:
    """The config's `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def rotate_vision(original: Forward) -> Forward:
    """`apply_rotary_pos_emb_vision` that accepts positions as well as cosines."""

    @functools.wraps(original)
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cos.is_floating_point():
            return original(q, k, cos, sin)
        rope_2d_(q, k, cos)
        return q, k

    return apply


def rotate_decoder(original: Forward) -> Forward:
    """`apply_rotary_pos_emb` that accepts positions and a `Rotation` as well as cosines."""

    @functools.wraps(original)
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(sin, Rotation):
            return original(q, k, cos, sin, *args, **kwargs)
        # q, k: [batch_size, heads, length, head_dim], transposed views of the projection's or the
        # norm's output, so reshape does not copy.
        packed = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k)]
        section, theta, interleaved = sin
        mrope_(*packed, cos, mrope_section=section, theta=theta, interleaved=interleaved)
        batch_size, length = q.shape[0], q.shape[2]
        return tuple(x.view(batch_size, length, *x.shape[1:]).transpose(1, 2) for x in packed)

    return apply
