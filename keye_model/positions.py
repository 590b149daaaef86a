"""Where every token stands: 3D rope positions, and which token each vision feature replaces.

All of it is host work on ids and grids. Text counts up on three equal axes; a vision block of
frames x rows x columns merged tokens starts where the text stands, spreads along the axes (time,
row, column), and the text goes on after its largest position. Rule and rounding are those of
`get_rope_index` in modeling_keye.py of Keye-VL-8B-Preview and of the transformers port of 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_model.config import KeyeConfig
from keye_model.inputs import Grid, PackedInputs, Request, host_grid


def rope_positions(
    input_ids: torch.Tensor,
    image_grid_thw: Grid,
    video_grid_thw: Grid,
    second_per_grid_ts: Sequence[float],
    config: KeyeConfig,
) -> tuple[torch.Tensor, int]:
    """The position of each token of one prompt, and of the first token generated after it.

    Args:
        input_ids: [num_tokens], int64, host; placeholders expanded.
        image_grid_thw, video_grid_thw: In patches, in reading order.
        second_per_grid_ts: One for each video row, or empty for 1.0; read by 8B-Preview only.
        config: Gives the placeholder ids, the merge size and the variant's rules.

    Returns:
        positions [3, num_tokens], int64, host: (t, h, w); and the next position, on all axes.

    Raises:
        ValueError: Placeholders and grids disagree.
    """
    placed = _place(input_ids.numpy(), image_grid_thw, video_grid_thw, second_per_grid_ts, config)
    return torch.from_numpy(placed.positions), placed.next_position


def pack(requests: Sequence[Request], config: KeyeConfig) -> PackedInputs:
    """Put requests one after another, each with its own positions.

    Raises:
        ValueError: There is no request, a request's placeholders and grids disagree, or pixels of
            different dtypes or patch sizes meet.
    """
    if not requests:
        raise ValueError("requests must hold at least one request, got none")
    placed = [
        _place(
            r.input_ids.numpy(), r.image_grid_thw, r.video_grid_thw, r.second_per_grid_ts, config
        )
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
        image_grid_thw, video_grid_thw: [num_rows, 3]; rows run on across the batch.
        second_per_grid_ts: [num_video_rows], seconds; None means 1.0.
        num_frames: [num_videos], frames of each video; only their sum is checked.
        attention_mask: [batch_size, padded_length], 0 at padding; None means no padding.

    Returns:
        position_ids [3, batch_size, padded_length], int64, 1 at padding; and rope_deltas
        [batch_size, 1], int64: next position minus padded_length. Both on input_ids' device.

    Raises:
        ValueError: A shape is wrong, or placeholders and grids disagree.
    """
    rows = split_batch(
        config,
        input_ids,
        host_grid("image_grid_thw", image_grid_thw),
        host_grid("video_grid_thw", video_grid_thw),
        second_per_grid_ts,
        num_frames,
        attention_mask,
    )
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
    image_grid_thw: Grid,
    video_grid_thw: Grid,
    second_per_grid_ts: torch.Tensor | Sequence | None = None,
    num_frames: torch.Tensor | Sequence | None = None,
    attention_mask: torch.Tensor | None = None,
) -> list[BatchRow]:
    """Take the padding off a batch and deal its grid rows out, in reading order.

    Arguments as in `get_rope_index`, grids already as host rows. Tensors on a GPU are copied to
    the host once.

    Raises:
        ValueError: A shape is wrong, or a batch row's placeholders do not end with a grid row.
    """
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
        is_image, is_video = _placeholders(row_ids.numpy(), config)
        image = images.take(int(is_image.sum()), i)
        video = videos.take(int(is_video.sum()), i)
        rows.append(
            BatchRow(row_ids, kept, image_grid_thw[image], video_grid_thw[video], seconds[video])
        )
    images.check_empty()
    videos.check_empty()
    return rows


def _host_list(values: torch.Tensor | Sequence | None) -> list:
    if values is None:
        return []
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


class _Deal:
    """Deals grid rows out to batch rows by their number of placeholders."""

    def __init__(self, kind: str, grid: Grid, merge_size: int) -> None:
        self.kind = kind
        counts = [t * (h // merge_size) * (w // merge_size) for t, h, w in grid]
        self.ends = np.cumsum([0, *counts])  # merged tokens before each row, and in all
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


@dataclass(frozen=True)
class _Placed:
    positions: np.ndarray  # [3, num_tokens]
    next_position: int
    image_index: np.ndarray  # [num_image_tokens]
    video_index: np.ndarray  # [num_video_tokens]


def _place(
    ids: np.ndarray, images: Grid, videos: Grid, seconds: Sequence[float], config: KeyeConfig
) -> _Placed:
    merge_size, variant = config.vision_config.spatial_merge_size, config.variant
    is_image, is_video = _placeholders(ids, config)
    image_index, video_index = np.flatnonzero(is_image), np.flatnonzero(is_video)

    if any(t != 1 for t, _, _ in images):
        raise ValueError(f"image_grid_thw must have one frame per image, got {images}")
    image_blocks, image_starts = _blocks("image", images, image_index, merge_size)
    # 1.5 puts text between frames, so each frame is a block of its own.
    video_blocks, video_starts = _blocks(
        "video", videos, video_index, merge_size, split_frames=not variant.timed_positions
    )
    step = np.zeros(len(image_blocks) + len(video_blocks), np.float32)
    if variant.timed_positions:
        step[len(image_blocks) :] = np.asarray(seconds or [1.0] * len(videos), np.float32)
        if not np.all(np.isfinite(step) & (step >= 0)):
            raise ValueError(
                f"second_per_grid_ts must be finite and not negative, got {tuple(seconds)}"
            )

    blocks = np.concatenate([image_blocks, video_blocks])  # [num_blocks, 3]
    starts = np.concatenate([image_starts, video_starts])
    order = np.argsort(starts)
    blocks, starts, step = blocks[order], starts[order], step[order]
    frames, rows, columns = blocks.T
    counts = blocks.prod(axis=1)
    tokens_per_second = np.float32(config.vision_config.tokens_per_second or 0)

    def elapsed(frame: np.ndarray, step: np.ndarray) -> np.ndarray:
        # fp32, multiplied in this order and truncated, as published: 2.02 fps gives 0 0 1 2 3.
        return (frame.astype(np.float32) * step * tokens_per_second).astype(np.int64)

    # Text advances by one; a block by its extent, all at once at its last token.
    advance = (~(is_image | is_video)).astype(np.int64)
    advance[starts + counts - 1] = np.maximum(
        elapsed(frames - 1, step) + 1, np.maximum(rows, columns)
    )
    after = np.cumsum(advance)
    before = after - advance
    positions = np.repeat(before[None], 3, axis=0)

    block = np.repeat(np.arange(len(blocks)), counts)  # block of each vision token, in text order
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    frame, cell = np.divmod(offset, (rows * columns)[block])
    row, column = np.divmod(cell, columns[block])
    token = starts[block] + offset
    positions[:, token] = before[starts][block] + np.stack(
        [elapsed(frame, step[block]), row, column]
    )
    return _Placed(positions, int(after[-1]), image_index, video_index)


def _placeholders(ids: np.ndarray, config: KeyeConfig) -> tuple[np.ndarray, np.ndarray]:
    is_video = ids == config.video_token_id
    if config.fast_video_token_id is not None:
        is_video |= ids == config.fast_video_token_id
    return ids == config.image_token_id, is_video


def _blocks(
    kind: str, grid: Grid, index: np.ndarray, merge_size: int, *, split_frames: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [num_blocks, 3] in merged tokens, one for each row (or frame), and first tokens."""
    if any(h % merge_size or w % merge_size for _, h, w in grid):
        raise ValueError(
            f"{kind}_grid_thw must have rows and columns that divide by {merge_size}, got {grid}"
        )
    blocks = np.array(grid, np.int64).reshape(-1, 3) // (1, merge_size, merge_size)
    if split_frames:
        blocks = np.repeat(blocks, blocks[:, 0], axis=0)
        blocks[:, 0] = 1
    counts = blocks.prod(axis=1)
    if counts.sum() != len(index):
        raise ValueError(
            f"input_ids must have as many {kind} placeholders as {kind}_grid_thw has merged "
            f"tokens, got {len(index)} placeholders and {counts.sum()} tokens"
        )
    ends = np.cumsum(counts)
    starts = index[ends - counts]
    broken = np.flatnonzero(index[ends - 1] - starts != counts - 1)
    if broken.size:
        raise ValueError(
            f"input_ids must hold the {counts[broken[0]]} placeholders of {kind} block {broken[0]} "
            "together, got other tokens among them"
        )
    return blocks, starts


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
