"""Rotation by positions, in models that hand cosines and sines from one module to the next.

A rotary embedding with our forward hands positions down in their place. The function of the
modeling module that applies them gets a second way in, for these; who hands it cosines notices
nothing.
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
    """What a decoder's rotary embedding hands its layers in the place of sines.

    In the place of cosines go the positions, [3, batch_size * length] int64.
    """

    section: tuple[int, int, int]
    theta: float
    interleaved: bool


def vision_rotary_forward(_: ModuleType, original: Forward) -> Forward:
    """Positions [num_tokens, 2] twice: towers only permute both and pass them on."""

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
    """Pairs per axis. Where there is only one axis, all are its own."""
    section = getattr(rotary, "mrope_section", None) or _rope(rotary.config).get("mrope_section")
    return tuple(section) if section else (rotary.inv_freq.shape[0], 0, 0)


def rope_theta(config: Any) -> float:
    theta = _rope(config).get("rope_theta")
    return config.rope_theta if theta is None else theta


def _rope(config: Any) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, `rope_scaling` of 4."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def rotate_vision(original: Forward) -> Forward:
    """apply_rotary_pos_emb_vision, for cosines and for positions."""

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
    """apply_rotary_pos_emb, for cosines and for a `Rotation`."""

    @functools.wraps(original)
    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(sin, Rotation):
            return original(q, k, cos, sin, *args, **kwargs)
        # [batch_size, heads, length, head_dim], a transposed view of what the projection or the
        # norm gave: no copy.
        packed = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k)]
        section, theta, interleaved = sin
        mrope_(*packed, cos, mrope_section=section, theta=theta, interleaved=interleaved)
        batch_size, length = q.shape[0], q.shape[2]
        return tuple(x.view(batch_size, length, *x.shape[1:]).transpose(1, 2) for x in packed)

    return apply
