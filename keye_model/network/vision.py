"""The vision tower: one feature for each patch of any number of images and videos.

SigLIP's encoder at native resolution: a bilinearly sampled position table at the entry, 2D RoPE in
every layer, attention within segments. Source: modeling_keye.py of Keye-VL-8B-Preview on its
flash-attention path; for 1.5's segments, the transformers Keye-VL-1.5 port.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from keye_kernels import (
    AttentionSchedule,
    attention_schedule,
    gelu,
    layer_norm,
    patch_embed,
    rope_2d_,
    varlen_attention,
)
from keye_model.checkpoint.config import KeyeConfig, KeyeVisionConfig
from keye_model.inputs.request import Grid, host_grid
from keye_model.network.upload import upload


@dataclass(frozen=True)
class VisionLayout:
    """Positions and segments of the patches of one tower call, made once on the host.

    Attributes:
        positions: [num_patches, 2], int64, device: (row, column) of each patch in its own frame.
        cu_seqlens: [num_segments + 1], int32, device: where each attention segment starts.
        max_seqlen: Patches of the longest segment.
        schedule: Tiles of the segments, for attention in all layers. None: the kernels find them.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    schedule: AttentionSchedule | None


class KeyeVisionModel(nn.Module):
    """Patch embedding, pre-norm blocks, final norm."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.config = vision
        self.joint_video_attention = config.variant.joint_video_attention
        # These two only hold parameters: one op reads both.
        self.patch_embedding = nn.Conv2d(
            vision.num_channels, vision.hidden_size, vision.patch_size, vision.patch_size
        )
        self.position_embedding = nn.Embedding(vision.position_grid**2, vision.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_hidden_layers))
        self.post_layernorm = LayerNorm(vision.hidden_size, vision.layer_norm_eps)

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Encode patches; images and videos may be mixed, each row is encoded as if alone.

        Args:
            pixel_values: [num_patches, 3, patch_size, patch_size], uint8 (raw bytes) or float
                (already normalised), on the model's device; patches in raster order.
            grid_thw: [num_rows, 3], (frames, rows, columns) in patches.

        Returns:
            [num_patches, hidden_size], in the model's dtype, after the final norm.

        Raises:
            ValueError: The grid does not add up to the patches, or a shape is wrong.
        """
        return self.norm(*self.encode(pixel_values, host_grid("grid_thw", grid_thw)))

    def encode(self, pixel_values: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all layers; returns the last branch and the residual stream.

        Both are [num_patches, hidden_size]; the final norm adds them. The projector takes the pair,
        since it applies that norm in its own pass over the patches.
        """
        x = self.embed(pixel_values, grid)
        num_heads = self.config.num_attention_heads
        layout = vision_layout(grid, self.joint_video_attention, num_heads, x.device)
        return self.run_layers(x, layout)

    def embed(
        self, pixel_values: torch.Tensor, grid: Grid, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The input of the first layer; it and `out` are [num_patches, hidden_size]."""
        return patch_embed(
            pixel_values,
            self.patch_embedding.weight,
            self.patch_embedding.bias,
            self.position_embedding.weight,
            grid,
            image_mean=self.config.image_mean,
            image_std=self.config.image_std,
            out=out,
        )

    def run_layers(
        self, x: torch.Tensor, layout: VisionLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers over [num_patches, hidden_size]; returns the last branch and its residual."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, layout)
        return x, residual

    def norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The final norm of what `encode` returns."""
        norm, y = self.post_layernorm, torch.empty_like(x)
        layer_norm(x, norm.weight, norm.bias, norm.eps, residual=residual, out=(y, None))
        return y


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream.

    Takes and returns (branch, residual): the next norm adds them in its own pass.
    """

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, layout: VisionLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.layer_norm1(x, residual)
        x = self.self_attn(x, layout)
        x, residual = self.layer_norm2(x, residual)
        return self.mlp(x), residual


class VisionAttention(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.theta = config.rope_theta
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        """x: [num_patches, hidden_size]. Returns a tensor like x."""
        qkv = self.qkv_proj(x).view(-1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(1)
        rope_2d_(q, k, layout.positions, theta=self.theta)
        cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
        x = varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, schedule=layout.schedule
        )
        return self.out_proj(x.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class LayerNorm(nn.Module):
    """LayerNorm that first adds the branch to the residual stream, if there is one yet."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [num_tokens, hidden_size]. Returns (norm of the sum, the sum)."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps), x
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


def segments_of(grid: Grid, joint_video_attention: bool) -> tuple[np.ndarray, np.ndarray]:
    """Patch positions [num_patches, 2] and segment lengths [num_segments] of `grid`, int64."""
    frames, rows, columns = np.array(grid, np.int64).reshape(-1, 3).T
    frame_size = rows * columns
    lengths = frames * frame_size if joint_video_attention else np.repeat(frame_size, frames)

    row_size = frames * frame_size
    first = np.repeat(np.cumsum(row_size) - row_size, row_size)
    patch = (np.arange(row_size.sum()) - first) % np.repeat(frame_size, row_size)
    return np.stack(np.divmod(patch, np.repeat(columns, row_size)), axis=1), lengths


def vision_layout(
    grid: Grid, joint_video_attention: bool, num_heads: int, device: torch.device
) -> VisionLayout:
    """Positions and segments of the patches of `grid`, one copy each to `device`."""
    positions, lengths = segments_of(grid, joint_video_attention)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return VisionLayout(
        upload(torch.from_numpy(positions), device),
        upload(torch.from_numpy(cu_seqlens), device),
        int(lengths.max(initial=0)),
        attention_schedule(lengths, num_heads=num_heads, device=device),
    )
