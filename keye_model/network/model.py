"""The model without its output head: vision tower, projector and text decoder, joined by packing.

Everything runs on one packed sequence: no padding, no loop over images, and after the first kernel
no value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs import packing
from keye_model.inputs.request import PackedInputs, check_ids, host_grid, num_patches
from keye_model.network.cache import CacheLayout, PagedCache
from keye_model.network.features import MAX_PATCHES_PER_CALL, vision_features
from keye_model.network.projector import KeyeProjector
from keye_model.network.text import KeyeTextModel
from keye_model.network.upload import upload
from keye_model.network.vision import KeyeVisionModel

GridLike = torch.Tensor | Sequence[Sequence[int]]


class KeyeModel(nn.Module):
    """Vision tower, projector and text decoder, under the names of the published code."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = KeyeVisionModel(config)
        self.mlp_AR = KeyeProjector(config)
        self.language_model = KeyeTextModel(config.text_config)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: PagedCache, layout: CacheLayout
    ) -> torch.Tensor:
        """Decode packed embeddings, [num_tokens, hidden_size] in and out; see `KeyeTextModel`."""
        return self.language_model(hidden, positions, cache, layout)

    def embed(
        self,
        packed: PackedInputs,
        max_patches_per_call: int = MAX_PATCHES_PER_CALL,
    ) -> torch.Tensor:
        """Embed packed requests, with vision features instead of their placeholders.

        Args:
            packed: From `pack`; its tensors may lie on the host.
            max_patches_per_call: `max_patches` of `vision_features`.

        Returns:
            [num_tokens, hidden_size], in the model's dtype, on its device.

        Raises:
            ValueError: An id is outside the vocabulary, or max_patches_per_call is not positive.
        """
        check_ids(packed.input_ids, self.config)
        hidden = self.language_model.embed_tokens(upload(packed.input_ids, self.device))
        for pixels, grid, index in (
            (packed.pixel_values, packed.image_grid_thw, packed.image_index),
            (packed.pixel_values_videos, packed.video_grid_thw, packed.video_index),
        ):
            index, first = upload(index, self.device), 0
            for features in vision_features(
                self.visual, self.mlp_AR, pixels, grid, max_patches=max_patches_per_call
            ):
                last = first + features.shape[0]
                hidden.index_copy_(0, index[first:last], features)
                first = last
        return hidden

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: GridLike
    ) -> torch.Tensor:
        """Features of images, one for each placeholder token.

        Args:
            pixel_values: [num_patches, 3, patch_size, patch_size], uint8 (raw bytes) or float
                (already normalised), on any device.
            image_grid_thw: [num_images, 3], in patches. A GPU tensor is copied to the host once.

        Returns:
            [num_patches / 4, text hidden_size], in the model's dtype.

        Raises:
            ValueError: The grid is malformed or does not add up to the patches.
        """
        return self._features("image_grid_thw", pixel_values, image_grid_thw)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: GridLike
    ) -> torch.Tensor:
        """Features of videos; as `get_image_features`."""
        return self._features("video_grid_thw", pixel_values_videos, video_grid_thw)

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        image_grid_thw: GridLike | None = None,
        video_grid_thw: GridLike | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        num_frames: torch.Tensor | Sequence[int] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """3D positions of a padded batch; see `keye_model.inputs.packing.get_rope_index`."""
        grids = (image_grid_thw, video_grid_thw, second_per_grid_ts, num_frames)
        return packing.get_rope_index(self.config, input_ids, *grids, attention_mask)

    def _features(self, name: str, pixels: torch.Tensor, grid_thw: GridLike) -> torch.Tensor:
        grid = host_grid(name, grid_thw)
        total = num_patches(grid)
        if total == 0 or pixels.shape[0] != total:
            raise ValueError(
                f"{name} must add up to the {pixels.shape[0]} patches given, got {total}"
            )
        return torch.cat(list(vision_features(self.visual, self.mlp_AR, pixels, grid)))
