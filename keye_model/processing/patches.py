"""What images and videos become before they meet the prompt: uint8 patches and their grids."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from keye_model.inputs.request import GridTHW, num_patches, patch_digest

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class ImagePatches:
    """One image, resized and cut up.

    Attributes:
        pixels: [rows * columns, 3, patch, patch], uint8 RGB, raster order.
        grid_thw: (1, rows, columns), in patches.
    """

    pixels: torch.Tensor
    grid_thw: GridTHW

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """As `Request.image_digests`."""
        return (patch_digest(self.pixels),)


@dataclass(frozen=True)
class Sample:
    """The sampled frames of a video.

    Attributes:
        frames: Each [3, height, width] uint8; None if they were not decoded.
        count: Number of frames.
        size: Height and width of the first frame.
        keywords: What `process_vision_info` returns beside them.
        smaller: Whether the keywords ask for smaller frames than published, to fit a prompt.
    """

    frames: Collection[torch.Tensor] | None
    count: int
    size: Size
    keywords: dict[str, Any]
    smaller: bool = False


@dataclass(frozen=True)
class Frame:
    """One sampled frame's place in the prompt: its size in patches, its time, slow or fast."""

    rows: int
    columns: int
    timestamp: float | None  # seconds; None if the source has no times
    fast: bool = False


@dataclass(frozen=True)
class VideoPatches:
    """One video: sampled, resized and cut up, frames in temporal order.

    Attributes:
        pixels: [sum of rows * columns, 3, patch, patch], uint8 RGB, raster order in each frame.
        frames: One entry for each sampled frame.
        seconds_per_frame: Mean distance of sampled frames, 1 / sampled fps.
    """

    pixels: torch.Tensor
    frames: tuple[Frame, ...]
    seconds_per_frame: float

    @property
    def grid_thw(self) -> tuple[GridTHW, ...]:
        """Runs of equally large frames as rows (run, rows, columns)."""
        grid: list[GridTHW] = []
        for frame in self.frames:
            if grid and grid[-1][1:] == (frame.rows, frame.columns):
                grid[-1] = (grid[-1][0] + 1, frame.rows, frame.columns)
            else:
                grid.append((1, frame.rows, frame.columns))
        return tuple(grid)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """As `Request.video_digests`."""
        rows = self.pixels.split([num_patches((row,)) for row in self.grid_thw])
        return tuple(map(patch_digest, rows))
