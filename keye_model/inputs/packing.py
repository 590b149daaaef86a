"""Requests as one packed sequence, and padded batches as packed rows.

Everything here is host work: lengths, grids and positions are known before a kernel starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.positions import place, placeholders, rope_positions
from keye_model.inputs.request import Grid, PackedInputs, Request, host_grid, num_patches


def pack(requests: Sequence[Request], config: KeyeConfig) -> PackedInputs:
    """Put requests one after another, each with its own positions.

    Raises:
        ValueError: There is no request, a request's placeholders and grids disagree, or pixels of
            different dtypes or patch sizes meet.
    """
    if not requests:
        raise ValueError("requests must hold at least one request, got none")
    placed = [
        place(r.input_ids.numpy(), r.image_grid_thw, r.video_grid_thw, r.second_per_grid_ts, config)
        for r in requests
    ]
    seqlens = tuple(r.input_ids.numel() for r in requests)
    starts = np.cumsum((0, *seqlens[:-1]))
    images = [p.image_index + start for p, start in zip(placed, starts, strict=True)]
    videos = [p.video_index + start for p, start in zip(placed, starts, strict=True)]
    patch_size = config.vision_config.patch_size
    return PackedInputs(
        input_ids=torch.cat([r.input_ids for r in requests]),
        seqlens=seqlens,
        positions=torch.from_numpy(np.concatenate([p.positions for p in placed], axis=1)),
        next_positions=tuple(p.next_position for p in placed),
        pixel_values=_join("pixel_values", [r.pixel_values for r in requests], patch_size),
        image_grid_thw=sum((r.image_grid_thw for r in requests), ()),
        image_index=torch.from_numpy(np.concatenate(images)),
        pixel_values_videos=_join(
            "pixel_values_videos", [r.pixel_values_videos for r in requests], patch_size
        ),
        video_grid_thw=sum((r.video_grid_thw for r in requests), ()),
        video_index=torch.from_numpy(np.concatenate(videos)),
    )


def _join(name: str, pixels: Sequence[torch.Tensor | None], patch_size: int) -> torch.Tensor | None:
    found = [p for p in pixels if p is not None]
    if len({p.dtype for p in found}) > 1:
        raise ValueError(
            f"{name} of all requests must have one dtype, got "
            f"{sorted({str(p.dtype) for p in found})}"
        )
    for p in found:
        if p.shape[2:] != (patch_size, patch_size):
            raise ValueError(
                f"{name} must hold patches of {patch_size} x {patch_size}, got shape "
                f"{tuple(p.shape)}"
            )
    if len(found) == 1:
        return found[0]  # a long video is not copied
    return torch.cat(found) if found else None


def get_rope_index(
    config: KeyeConfig,
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | Sequence | None = None,
    video_grid_thw: torch.Tensor | Sequence | None = None,
    second_per_grid_ts: torch.Tensor | Sequence | None = None,
    num_frames: torch.Tensor | Sequence | None = None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a padded batch, in the published form.

    Args:
        config: As for `rope_positions`.
        input_ids: [batch_size, padded_length], int64.
        image_grid_thw, video_grid_thw: [num_rows, 3], of the whole batch in reading order.
        second_per_grid_ts: [num_video_rows], seconds; None means 1.0.
        num_frames: [num_videos], frames of each video; only their sum is checked.
        attention_mask: [batch_size, padded_length], 0 at padding; None means no padding.

    Returns:
        position_ids [3, batch_size, padded_length], int64, 1 at padding; and rope_deltas
        [batch_size, 1], int64: next position minus padded_length. Both on input_ids' device.

    Raises:
        ValueError: A shape is wrong, or placeholders and grids disagree.
    """
    grids = (image_grid_thw, video_grid_thw, second_per_grid_ts, num_frames)
    rows = split_batch(config, input_ids, *grids, attention_mask)
    position_ids = torch.ones((3, *input_ids.shape), dtype=torch.int64)
    deltas = []
    for i, row in enumerate(rows):
        positions, next_position = rope_positions(
            row.input_ids, row.image_grid_thw, row.video_grid_thw, row.second_per_grid_ts, config
        )
        position_ids[:, i, row.kept] = positions
        deltas.append([next_position - input_ids.shape[1]])
    return position_ids.to(input_ids.device), torch.tensor(deltas).to(input_ids.device)


@dataclass(frozen=True)
class BatchRow:
    """One row of a padded batch without its padding, and its share of the images and videos.

    Attributes:
        input_ids: [num_tokens], int64, host.
        kept: [num_tokens], int64, host: the columns of the padded row they came from.
        image_grid_thw, video_grid_thw, second_per_grid_ts: As in `Request`.
    """

    input_ids: torch.Tensor
    kept: torch.Tensor
    image_grid_thw: Grid
    video_grid_thw: Grid
    second_per_grid_ts: tuple[float, ...]


def split_batch(
    config: KeyeConfig,
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | Sequence | None = None,
    video_grid_thw: torch.Tensor | Sequence | None = None,
    second_per_grid_ts: torch.Tensor | Sequence | None = None,
    num_frames: torch.Tensor | Sequence | None = None,
    attention_mask: torch.Tensor | None = None,
) -> list[BatchRow]:
    """Remove the padding of a batch and assign its grid rows to batch rows, in reading order.

    Arguments as in `get_rope_index`. Tensors on a GPU are copied to the host once.

    Raises:
        ValueError: A shape is wrong, or a batch row's placeholders end within a grid row.
    """
    image_grid_thw = host_grid("image_grid_thw", image_grid_thw)
    video_grid_thw = host_grid("video_grid_thw", video_grid_thw)
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(
            "input_ids must be a [batch_size, padded_length] int64 tensor, got shape "
            f"{tuple(input_ids.shape)} and {input_ids.dtype}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    seconds = tuple(map(float, _host_list(second_per_grid_ts)))
    if seconds and len(seconds) != len(video_grid_thw):
        raise ValueError(
            f"second_per_grid_ts must have one value for each of {len(video_grid_thw)} rows of "
            f"video_grid_thw, got {len(seconds)}"
        )
    frames = sum(t for t, _, _ in video_grid_thw)
    if num_frames is not None and sum(_host_list(num_frames)) != frames:
        raise ValueError(
            f"num_frames must count the {frames} frames of video_grid_thw, got "
            f"{_host_list(num_frames)}"
        )
    ids = input_ids.cpu()
    keep = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
    images = _Deal("image", image_grid_thw, config.vision_config.spatial_merge_size)
    videos = _Deal("video", video_grid_thw, config.vision_config.spatial_merge_size)

    rows = []
    for i in range(ids.shape[0]):
        kept = keep[i].nonzero().flatten()
        if kept.numel() == 0:
            raise ValueError(f"attention_mask must keep a token in each row, row {i} keeps none")
        row_ids = ids[i, kept]
        is_image, is_video = placeholders(row_ids.numpy(), config)
        image = images.take(int(is_image.sum()), i)
        video = videos.take(int(is_video.sum()), i)
        rows.append(
            BatchRow(row_ids, kept, image_grid_thw[image], video_grid_thw[video], seconds[video])
        )
    images.check_empty()
    videos.check_empty()
    return rows


def requests_of(
    rows: Sequence[BatchRow], images: torch.Tensor | None, videos: torch.Tensor | None
) -> list[Request]:
    """Requests of `split_batch`'s rows, each with its share of the batch's patches.

    Args:
        images, videos: ``pixel_values`` and ``pixel_values_videos`` of the batch.

    Raises:
        ValueError: There are more patches than the grids count, or fewer.
    """
    requests, taken = [], [0, 0]

    def take(pixels: torch.Tensor | None, kind: int, grid: Grid) -> torch.Tensor | None:
        start = taken[kind]
        taken[kind] += num_patches(grid)
        return pixels[start : taken[kind]] if grid and pixels is not None else None

    for row in rows:
        requests.append(
            Request(
                row.input_ids,
                take(images, 0, row.image_grid_thw),
                row.image_grid_thw,
                take(videos, 1, row.video_grid_thw),
                row.video_grid_thw,
                row.second_per_grid_ts,
            )
        )
    for name, grid, pixels, used in (
        ("pixel_values", "image_grid_thw", images, taken[0]),
        ("pixel_values_videos", "video_grid_thw", videos, taken[1]),
    ):
        if pixels is not None and len(pixels) != used:
            raise ValueError(f"{name} must hold the {used} patches of {grid}, got {len(pixels)}")
    return requests


def _host_list(values: torch.Tensor | Sequence | None) -> list:
    if values is None:
        return []
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


class _Deal:
    """Assigns grid rows to batch rows by their number of placeholders."""

    def __init__(self, kind: str, grid: Grid, merge_size: int) -> None:
        self.kind = kind
        counts = [t * (h // merge_size) * (w // merge_size) for t, h, w in grid]
        self.ends = np.cumsum([0, *counts])  # merged tokens before each row, and in total
        self.row = 0

    def take(self, num_placeholders: int, batch_row: int) -> slice:
        first = self.row
        wanted = self.ends[first] + num_placeholders
        self.row = int(np.searchsorted(self.ends, wanted))
        if self.row == len(self.ends) or self.ends[self.row] != wanted:
            sizes = np.diff(self.ends[first:]).tolist()
            raise ValueError(
                f"input_ids must have as many {self.kind} placeholders as the rows of "
                f"{self.kind}_grid_thw have merged tokens, row {batch_row} has {num_placeholders} "
                f"and the grid rows left over have {sizes}"
            )
        return slice(first, self.row)

    def check_empty(self) -> None:
        if self.row != len(self.ends) - 1:
            raise ValueError(
                f"{self.kind}_grid_thw must have {self.row} rows for the {self.kind} placeholders "
                f"in input_ids, got {len(self.ends) - 1}"
            )
