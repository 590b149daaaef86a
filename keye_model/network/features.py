"""Vision features from pixels: tower and projector, on one part of the grid at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from keye_model.inputs.request import Grid, GridTHW, num_patches
from keye_model.network.projector import KeyeProjector
from keye_model.network.upload import upload
from keye_model.network.vision import KeyeVisionModel

# Bounds a tower call to about 2 GB of activations in bf16 at the published widths.
MAX_PATCHES_PER_CALL = 65536

# Like `KeyeVisionModel.encode`: (tower, pixels, grid) to the last branch and its residual stream.
Encode = Callable[[KeyeVisionModel, torch.Tensor, Grid], tuple[torch.Tensor, torch.Tensor]]


def vision_features(
    visual: KeyeVisionModel,
    projector: KeyeProjector,
    pixels: torch.Tensor | None,
    grid: Grid,
    *,
    max_patches: int = MAX_PATCHES_PER_CALL,
    encode: Encode = KeyeVisionModel.encode,
) -> Iterator[torch.Tensor]:
    """Features of consecutive parts of ``grid``; one part's pixels are on the device at a time.

    Args:
        visual, projector: Of the same model.
        pixels: [num_patches, 3, patch_size, patch_size], uint8 or normalised float, on any device;
            None for an empty grid.
        grid: (frames, rows, columns) in patches.
        max_patches: Most patches in a call of the tower. The grid is cut between attention segments
            only, so the result does not depend on it; a longer segment is one call.
        encode: Runs the tower up to its final norm.

    Yields:
        [num_tokens, text hidden_size], the next tokens of the grid.

    Raises:
        ValueError: max_patches is not positive.
    """
    if max_patches < 1:
        raise ValueError(f"max_patches_per_call must be positive, got {max_patches}")
    device, first = visual.post_layernorm.weight.device, 0
    for part in split_grid(grid, visual.joint_video_attention, max_patches):
        last = first + num_patches(part)
        patches = upload(pixels[first:last], device)
        branch, residual = encode(visual, patches, part)
        norm = visual.post_layernorm
        features = projector(branch, part, residual=residual, tower_norm=norm)
        del patches, branch, residual  # the next part needs their memory
        yield features
        first = last


def split_grid(grid: Grid, joint_video_attention: bool, max_patches: int) -> list[Grid]:
    """Cut `grid` into consecutive parts of at most `max_patches`, between segments only.

    A segment that is longer by itself, such as a whole video of 8B-Preview, is a part of its own.
    """
    parts: list[list[GridTHW]] = []
    room = 0
    for t, h, w in grid:
        unit = t if joint_video_attention else 1  # frames that must stay together
        while t:
            fitting = min(room // (unit * h * w) * unit, t)
            if fitting == 0:
                parts.append([])
                room = max(max_patches, unit * h * w)
                continue
            parts[-1].append((fitting, h, w))
            room -= fitting * h * w
            t -= fitting
    return [tuple(part) for part in parts]
