"""3D rope positions of a prompt's tokens, and which token each vision feature replaces.

All of it is host work on ids and grids. A text token has the same position on all three axes, one
more than the token before. A vision block of frames x rows x columns merged tokens starts at the
next position and spreads along the axes (time, row, column); text goes on after its largest one.
Rule and rounding are those of `get_rope_index` in modeling_keye.py of Keye-VL-8B-Preview and of the
transformers port of 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.request import Grid


@dataclass(frozen=True)
class Placed:
    """Positions of one prompt's tokens.

    Attributes:
        positions: [3, num_tokens], int64: (t, h, w).
        next_position: That of the first generated token, on all axes.
        image_index: [num_image_tokens], int64: the tokens that image features replace.
        video_index: [num_video_tokens], int64: the same for videos.
    """

    positions: np.ndarray
    next_position: int
    image_index: np.ndarray
    video_index: np.ndarray


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
    placed = place(input_ids.numpy(), image_grid_thw, video_grid_thw, second_per_grid_ts, config)
    return torch.from_numpy(placed.positions), placed.next_position


def place(
    ids: np.ndarray, images: Grid, videos: Grid, seconds: Sequence[float], config: KeyeConfig
) -> Placed:
    merge_size, variant = config.vision_config.spatial_merge_size, config.variant
    is_image, is_video = placeholders(ids, config)
    image_index, video_index = np.flatnonzero(is_image), np.flatnonzero(is_video)

    if any(t != 1 for t, _, _ in images):
        raise ValueError(f"image_grid_thw must have one frame per image, got {images}")
    image_blocks, image_starts = _blocks("image", images, image_index, merge_size)
    # 1.5 puts text between frames, so each frame is a block of its own.
    video_blocks, video_starts = _blocks(
        "video", videos, video_index, merge_size, split_frames=not variant.timed_positions
    )
    interval = np.zeros(len(image_blocks) + len(video_blocks), np.float32)
    if variant.timed_positions:
        interval[len(image_blocks) :] = np.asarray(seconds or [1.0] * len(videos), np.float32)
        if not np.all(np.isfinite(interval) & (interval >= 0)):
            raise ValueError(
                f"second_per_grid_ts must be finite and not negative, got {tuple(seconds)}"
            )

    blocks = np.concatenate([image_blocks, video_blocks])  # [num_blocks, 3]
    starts = np.concatenate([image_starts, video_starts])
    order = np.argsort(starts)
    blocks, starts, interval = blocks[order], starts[order], interval[order]
    frames, rows, columns = blocks.T
    counts = blocks.prod(axis=1)
    tokens_per_second = np.float32(config.vision_config.tokens_per_second or 0)

    def elapsed(frame: np.ndarray, interval: np.ndarray) -> np.ndarray:
        # fp32, multiplied in this order and truncated, as published: at 2.02 fps frames get 0 0 1 2
        # 3. The order matters with 5 tokens per second, but not with 2.
        return (frame.astype(np.float32) * interval * tokens_per_second).astype(np.int64)

    # A text token advances the position by one, a block's last token by the block's extent.
    advance = (~(is_image | is_video)).astype(np.int64)
    advance[starts + counts - 1] = np.maximum(
        elapsed(frames - 1, interval) + 1, np.maximum(rows, columns)
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
        [elapsed(frame, interval[block]), row, column]
    )
    return Placed(positions, int(after[-1]), image_index, video_index)


def placeholders(ids: np.ndarray, config: KeyeConfig) -> tuple[np.ndarray, np.ndarray]:
    is_video = ids == config.video_token_id
    if config.fast_video_token_id is not None:
        is_video |= ids == config.fast_video_token_id
    return ids == config.image_token_id, is_video


def _blocks(
    kind: str, grid: Grid, index: np.ndarray, merge_size: int, *, split_frames: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes in merged tokens of the blocks, one per grid row (or frame), and their first tokens."""
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
