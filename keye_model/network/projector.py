"""The projector `mlp_AR`: turns each 2x2 square of patch features into one text-decoder token.

Source: Projector in modeling_keye.py of Keye-VL-8B-Preview (norm before the merge); the
transformers and vLLM ports of Keye-VL-1.5 (norm after it).
"""

from __future__ import annotations

import torch
from torch import nn

from keye_kernels import gelu, merge_patches
from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.request import Grid
from keye_model.network.vision import LayerNorm

_NORM_EPS = 1e-5  # nn.LayerNorm's default: the published code sets no other


class KeyeProjector(nn.Module):
    """LayerNorm and 2x2 merge in the variant's order, then a two-layer MLP with exact GELU."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.merge_size = vision.spatial_merge_size
        self.norm_first = config.variant.norm_first
        merged = vision.hidden_size * self.merge_size**2
        self.pre_norm = nn.LayerNorm(vision.hidden_size if self.norm_first else merged, _NORM_EPS)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, config.text_config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        grid_thw: Grid,
        *,
        residual: torch.Tensor | None = None,
        tower_norm: LayerNorm | None = None,
    ) -> torch.Tensor:
        """Project the tower's features; with `tower_norm`, apply the tower's last norm first.

        Args:
            x: [num_patches, vision hidden_size], features; with `tower_norm` the last branch.
            grid_thw: (frames, rows, columns) in patches.
            residual, tower_norm: The residual stream, shaped like x, and the tower's last norm,
                applied in the same pass with the same bits.

        Returns:
            [num_patches / 4, text hidden_size].
        """
        norm, patch_norm = self.pre_norm, None
        if tower_norm is not None:
            patch_norm = (tower_norm.weight, tower_norm.bias, tower_norm.eps)
        x = merge_patches(
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            grid_thw,
            residual=residual,
            patch_norm=patch_norm,
            merge_size=self.merge_size,
            norm_first=self.norm_first,
        )
        return self.linear_2(gelu(self.linear_1(x), approximate="none"))
