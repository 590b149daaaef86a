"""`Request` and `PackedInputs`, which the processor makes and the model reads, all on the host."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_model.checkpoint.config import KeyeConfig

GridTHW = tuple[int, int, int]  # frames, rows, columns of patches
Grid = tuple[GridTHW, ...]
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Request:
    """One prompt, placeholders already expanded, with the patches of its images and videos.

    The k-th image's patches belong to the k-th run of image placeholders, and so for videos.

    Attributes:
        input_ids: [num_tokens], int64, on the host.
        pixel_values: [num_image_patches, 3, patch, patch], uint8 (raw bytes) or float (already
            normalised); None if there is no image. Images in reading order, patches in raster
            order (frame, row, column).
        image_grid_thw: One (1, rows, columns) per image, in patches.
        pixel_values_videos, video_grid_thw: The same for videos. A video is one row (frames, rows,
            columns) for 8B-Preview, and one row for each run of equally large frames for 1.5.
        second_per_grid_ts: Seconds between frames, one for each video row. Read by 8B-Preview's
            temporal positions only; empty means 1.0, as in the published model code.
        image_digests: What tells the content of each image from others; None: `digests` computes it
            from the patches. Whoever keeps processed pixels can keep their digests with them.
        video_digests: The same for each video row.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: tuple[GridTHW, ...] = ()
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: tuple[GridTHW, ...] = ()
    second_per_grid_ts: tuple[float, ...] = ()
    image_digests: tuple[bytes, ...] | None = None
    video_digests: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        ids = self.input_ids
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(
                "input_ids must be a non-empty [num_tokens] int64 tensor, got shape "
                f"{tuple(ids.shape)} and {ids.dtype}"
            )
        _check_patches("pixel_values", self.pixel_values, "image_grid_thw", self.image_grid_thw)
        _check_patches(
            "pixel_values_videos", self.pixel_values_videos, "video_grid_thw", self.video_grid_thw
        )
        if self.second_per_grid_ts and len(self.second_per_grid_ts) != len(self.video_grid_thw):
            raise ValueError(
                f"second_per_grid_ts must have one value for each of {len(self.video_grid_thw)} "
                f"rows of video_grid_thw, got {len(self.second_per_grid_ts)}"
            )
        for name, grid_name in (
            ("image_digests", "image_grid_thw"), ("video_digests", "video_grid_thw")
        ):  # fmt: skip
            digests, rows = getattr(self, name), len(getattr(self, grid_name))
            if digests is not None and len(digests) != rows:
                raise ValueError(
                    f"{name} must have one value for each of {rows} rows of {grid_name}, got "
                    f"{len(digests)}"
                )

    def digests(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """The content of each image and of each video row, computed once if not given."""
        for name, pixels, grid in (
            ("image_digests", self.pixel_values, self.image_grid_thw),
            ("video_digests", self.pixel_values_videos, self.video_grid_thw),
        ):
            if getattr(self, name) is None:
                counts = [num_patches((row,)) for row in grid]
                rows = pixels.split(counts) if counts else ()
                object.__setattr__(self, name, tuple(map(patch_digest, rows)))
        return self.image_digests, self.video_digests


@dataclass(frozen=True)
class PackedInputs:
    """Several requests as one packed sequence: nothing padded, requests one after another.

    Attributes:
        input_ids: [num_tokens], int64, host.
        seqlens: Tokens of each request; they sum to num_tokens.
        positions: [3, num_tokens], int64, host: (t, h, w) of each token.
        next_positions: For each request, the position of its first generated token.
        pixel_values, image_grid_thw: All requests' images, in order.
        image_index: [num_image_tokens], int64, host: the token each image feature replaces.
        pixel_values_videos, video_grid_thw, video_index: The same for videos.
    """

    input_ids: torch.Tensor
    seqlens: tuple[int, ...]
    positions: torch.Tensor
    next_positions: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_grid_thw: tuple[GridTHW, ...]
    image_index: torch.Tensor
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: tuple[GridTHW, ...]
    video_index: torch.Tensor


def num_patches(grid: Grid) -> int:
    """Patches of all rows of a grid."""
    return sum(t * h * w for t, h, w in grid)


def check_ids(input_ids: torch.Tensor, config: KeyeConfig) -> None:
    """Raise a ValueError if an id, on the host, is outside the vocabulary."""
    least, most = int(input_ids.min()), int(input_ids.max())
    vocab_size = config.text_config.vocab_size
    if not 0 <= least <= most < vocab_size:
        raise ValueError(f"input_ids must be in [0, {vocab_size}), got {least} to {most}")


def patch_digest(patches: torch.Tensor) -> bytes:
    """SHA-256 of patches on the host. On a GPU reading them would stall it: one like no other."""
    if patches.device.type != "cpu":
        return os.urandom(32)
    digest = hashlib.sha256(str(patches.dtype).encode())
    digest.update(patches.detach().contiguous().view(torch.uint8).numpy())
    return digest.digest()


def _check_patches(
    name: str, pixels: torch.Tensor | None, grid_name: str, grid_thw: tuple[GridTHW, ...]
) -> None:
    for row in grid_thw:
        if len(row) != 3 or any(type(size) is not int or size < 1 for size in row):
            raise ValueError(
                f"{grid_name} must hold rows of three positive integers (t, h, w), got {row}"
            )
    expected = num_patches(grid_thw)
    if pixels is None and expected == 0:
        return
    shape = None if pixels is None else tuple(pixels.shape)
    if shape is None or len(shape) != 4 or shape[0] != expected or shape[1] != 3:
        raise ValueError(
            f"{name} must have shape ({expected}, 3, patch, patch) to match {grid_name}, "
            f"got {shape}"
        )


def host_grid(name: str, grid_thw: torch.Tensor | Sequence[Sequence[int]] | None) -> Grid:
    """Convert a grid argument in any accepted form to host rows; every grid is read here.

    Args:
        name: The argument's name, for the error.
        grid_thw: [num_rows, 3] integers, a tensor or nested sequences; None is no rows. A tensor
            on a GPU is copied to the host here, once, which waits for the work queued before it.

    Raises:
        ValueError: It is not rows of three positive integers.
    """
    if grid_thw is None:
        return ()
    rows = grid_thw.tolist() if isinstance(grid_thw, (torch.Tensor, np.ndarray)) else grid_thw
    try:
        grid = tuple((operator.index(t), operator.index(h), operator.index(w)) for t, h, w in rows)
    except (TypeError, ValueError):
        grid = None
    if grid is None or any(size < 1 for row in grid for size in row):
        raise ValueError(
            f"{name} must hold rows of three positive integers (t, h, w), got {grid_thw}"
        )
    return grid
