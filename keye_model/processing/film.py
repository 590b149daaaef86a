"""A video item, opened: what its file or list of frames says before a frame is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from keye_model.processing.fetch import describe
from keye_model.processing.video_file import MissingFrames, VideoFile
from keye_model.processing.video_sampling import (
    MAX_FRAMES,
    clip_range,
    frame_indices,
    video_options,
)

T = TypeVar("T")
_HOW_MANY_FRAMES = {"fps", "nframes", "min_frames", "max_frames"}


class Film:
    """One video item, opened.

    Attributes:
        item: The message item.
        options: Its keys that steer sampling (`video_options`).
        file: None if the item holds a list, array or tensor of frames.
        frames: Of a list, each what `load_image` takes or an image item; None for a file.
        times: Of a list, the time of each frame in seconds if the item has ``timestamps``.
        name: How errors call the video.
        elastic: Whether fewer frames may be sampled to fit a prompt: true for a file whose item
            does not say how many to take.
    """

    def __init__(self, item: Mapping[str, Any], *, local_files_only: bool = False) -> None:
        """Open the item. Of a file, only the times of its frames are read.

        Args:
            item: ``video``: what `VideoFile` reads; or a list of frames; or a uint8 array or tensor
                [frames, 3, height, width] or [frames, height, width, 3]. For the other keys see
                `rules.preview.sample` and `rules.v1_5.sample`.
            local_files_only: Refuse https URLs, of frames too.

        Raises:
            FileNotFoundError, ValueError, TypeError, RuntimeError: As `VideoFile`, or a key is out
                of range.
        """
        self.item = item
        self.local_files_only = local_files_only
        self.options = video_options(item)
        self.frames, self.times = _listed(item)
        self.file = None
        if self.frames is None:
            self.file = VideoFile(item["video"], local_files_only=local_files_only)
        self.name = self.file.name if self.file else f"video {describe(item['video'])}"
        self.elastic = bool(self.file) and not _HOW_MANY_FRAMES & set(self.options)

    def clip(self, count: Callable[[int, float, Mapping[str, Any]], int]) -> Clip:
        """Which of the file's frames are sampled; ``count`` is the line's `frame_count`.

        Raises:
            ValueError: As `clip_range` and ``count``.
        """
        file = self.file
        first, last = clip_range(file.times, file.rate, file.constant_rate, self.options)
        return Clip(file, first, last, count(last - first + 1, file.rate, self.options))

    def sampled(self, sample: Callable[[], T]) -> T:
        """Call ``sample``, a second time if the file proves to have fewer frames than packets.

        Raises:
            ValueError: As ``sample``; the message names the file.
        """
        try:
            try:
                return sample()
            except MissingFrames:
                self.file.recount()
                return sample()
        except ValueError as error:
            if self.name in str(error):
                raise
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Clip:
    """Frames of a file: ``count`` spread evenly from ``first`` to ``last``."""

    file: VideoFile
    first: int
    last: int
    count: int

    @property
    def indices(self) -> list[int]:
        return frame_indices(self.first, self.last, self.count)

    @property
    def times(self) -> list[float]:
        """Seconds from the first frame of the file."""
        return [float(self.file.times[index]) for index in self.indices]

    @property
    def fps(self) -> float:
        """Rate of the sampled frames, frames over the clip's length."""
        return self.count / (self.last - self.first + 1) * self.file.rate


def _listed(item: Mapping[str, Any]) -> tuple[list[Any] | None, list[float] | None]:
    """The frames of a list, array or tensor and their times; None if the video is a file."""
    video, times = item.get("video"), item.get("timestamps")
    if video is None:
        raise ValueError(f"a video item must have 'video', got {sorted(item)}")
    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim != 4:
            raise ValueError(
                "video must have shape [frames, 3, height, width] or [frames, height, width, 3], "
                f"got {tuple(video.shape)}"
            )
    elif not isinstance(video, (list, tuple)):
        if times is not None:
            raise ValueError("timestamps must come with a list of frames, got them with a file")
        return None, None
    if not 1 <= len(video) <= MAX_FRAMES:
        raise ValueError(f"video must hold 1 to {MAX_FRAMES} frames, got {len(video)}")
    if times is None:
        return list(video), None
    times = [float(time) for time in times]
    if item.get("fps") is not None:
        raise ValueError("fps and timestamps must not both be given for a list of frames")
    if len(times) != len(video):
        raise ValueError(
            f"timestamps must have one time for each of {len(video)} frames, got {len(times)}"
        )
    if not all(np.isfinite(times)) or any(np.diff(times) <= 0):
        raise ValueError(f"timestamps must be ascending numbers of seconds, got {times}")
    return list(video), times
