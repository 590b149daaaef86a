"""From the video of a message item to its sampled frames, by the rules of either helper release."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from keye_model.inputs.request import Progress
from keye_model.processing import slow_fast
from keye_model.processing.image import fetch_image
from keye_model.processing.video_file import MissingFrames, VideoFile
from keye_model.processing.video_sampling import (
    DEFAULT_FPS,
    MAX_FRAMES,
    V1_5_MAX_PIXELS,
    V1_5_MIN_PIXELS,
    V1_5_TOTAL_PIXELS,
    clip_range,
    frame_count,
    frame_indices,
    preview_frame_size,
    video_options,
)

KEEP_BYTES = 512 << 20  # a clip whose sampled frames are larger is decoded twice instead of kept

T = TypeVar("T")


def sample_preview(
    item: Mapping[str, Any],
    *,
    local_files_only: bool = False,
    video: VideoFile | None = None,
    choose: Callable[[Clip], int] | None = None,
    progress: Progress | None = None,
) -> tuple[list[torch.Tensor] | list[Image.Image], float]:
    """Sample and resize the video of one message item by the rules of keye-vl-utils 1.0.0.

    Args:
        item: ``video``: what `VideoFile` reads; or a list of frames (each what `load_image`
            reads); or a uint8 array or tensor [frames, 3, height, width] or
            [frames, height, width, 3]. For a file: ``fps`` (2.0) or ``nframes``, ``min_frames``,
            ``max_frames``, ``video_start``, ``video_end`` (seconds), ``min_pixels``,
            ``max_pixels``, ``total_pixels``, ``resized_height`` with ``resized_width``. For
            frames: ``fps``, the rate they were taken at, or ``timestamps``, the time of each in
            seconds; and the keys of an image item, as each goes the way of an image.
        video: The item's file, if it was opened before.
        choose: Called before the first frame is decoded; returns how many to sample instead.
        progress: Called as ``progress("frames", done, total)`` after each frame.

    Returns:
        frames: Of a file: [3, height, width] uint8, all of one size. Of a list: PIL images, the
            last one repeated once if their number is odd.
        fps: Rate of the sampled frames, frames over the clip's length (also at a variable rate, as
            published), or the given or default one.
    """
    options = video_options(item)
    frames, times = listed_frames(item)
    if frames is not None:
        loaded = (_list_image(item, frame, "1.0", local_files_only) for frame in frames)
        images = list(_counted(loaded, len(frames), progress))
        images += images[-1:] * (len(images) % 2)
        fps = options.get("fps", DEFAULT_FPS)
        if times is not None and len(times) > 1:
            fps = (len(times) - 1) / (times[-1] - times[0])
        return images, fps

    def sample(video: VideoFile) -> tuple[list[torch.Tensor], float]:
        clip = Clip.of(video, options, "1.0", choose)
        resized: list[torch.Tensor] = []
        size = None
        for pixels in _counted(video.read(clip.indices), clip.count, progress):
            if size is None:
                size = preview_frame_size(*pixels.shape[:2], clip.count, options)
            resized.append(resize_bicubic(_chw(pixels), *size))
        return resized, clip.fps

    return _sampled(item["video"], video, sample, local_files_only)


def sample_1_5(
    item: Mapping[str, Any],
    *,
    local_files_only: bool = False,
    video: VideoFile | None = None,
    choose: Callable[[Clip], int] | None = None,
    progress: Progress | None = None,
) -> tuple[Collection[torch.Tensor], dict[str, Any]]:
    """Sample the video of one message item by the rules of keye-vl-utils 1.5.x.

    Args:
        item: As for `sample_preview`, with ``video_total_pixels`` for the token budget and
            ``min_frame_similarity`` (0.9), without ``min_frames`` and ``total_pixels``;
            ``resized_height`` with ``resized_width`` for frames alone, of which ``nframes`` or
            ``max_frames`` are taken. ``video_start``, ``video_end`` and ``nframes``, which the
            published helper does not serve, work as there.
        video, choose, progress: As for `sample_preview`.

    Returns:
        frames: [3, height, width] uint8 in their original size; may be iterated more than once.
        options: ``height``, ``width``, ``fast_height``, ``fast_width``; ``frame_types`` [frames]
            int32, 1 for fast; ``timestamps`` [frames] fp32, seconds from the first frame of the
            file (so not from ``video_start``), absent for a list of frames without times. At a
            variable rate they are the real presentation times.
    """
    options = video_options(item)
    frames, times = listed_frames(item)
    if frames is not None:
        rate = options.get("fps", DEFAULT_FPS)
        indices = frame_indices(0, len(frames) - 1, frame_count(len(frames), rate, options, "1.5"))
        loaded = (_list_image(item, frames[i], "1.5", local_files_only) for i in indices)
        images = list(_counted(loaded, len(indices), progress))
        if len({image.size for image in images}) > 1:
            raise ValueError("the frames of a video must be equally large after resizing")
        if times is None and "fps" in options:
            times = [(1 / rate) * index for index in range(len(frames))]
        chosen = [_chw(np.array(image)) for image in images]
        return chosen, _options_1_5(
            chosen, None if times is None else [times[i] for i in indices], options
        )

    def sample(video: VideoFile) -> tuple[Collection[torch.Tensor], dict[str, Any]]:
        clip = Clip.of(video, options, "1.5", choose)
        frames = _Frames(clip, progress)
        return frames, _options_1_5(frames, clip.times, options)

    return _sampled(item["video"], video, sample, local_files_only)


def resize_bicubic(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize [3, h, w] uint8 to [3, height, width] uint8, bicubic with antialiasing.

    Computed in fp32, clamped and rounded half to even, as torchvision's functional resize treats a
    uint8 tensor. PyTorch's own 8-bit path is faster and differs by more than rounding.
    """
    if frame.shape[1:] == (height, width):
        return frame
    size = (height, width)
    resized = interpolate(frame[None].float(), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)[0]


@dataclass(frozen=True)
class Clip:
    """What of a file is sampled: ``count`` frames spread evenly from ``first`` to ``last``."""

    video: VideoFile
    first: int
    last: int
    count: int

    @classmethod
    def of(
        cls,
        video: VideoFile,
        options: Mapping[str, Any],
        version: str,
        choose: Callable[[Clip], int] | None = None,
    ) -> Clip:
        """By the rules of a release, or as many frames as ``choose`` makes of those.

        Raises:
            ValueError: As `clip_range` and `frame_count`.
        """
        first, last = clip_range(video.times, video.rate, video.constant_rate, options)
        count = frame_count(last - first + 1, video.rate, options, version)
        clip = cls(video, first, last, count)
        return replace(clip, count=choose(clip)) if choose else clip

    @property
    def indices(self) -> list[int]:
        return frame_indices(self.first, self.last, self.count)

    @property
    def times(self) -> list[float]:
        """Seconds from the first frame of the file."""
        return [float(self.video.times[index]) for index in self.indices]

    @property
    def fps(self) -> float:
        """Rate of the sampled frames, frames over the clip's length."""
        return self.count / (self.last - self.first + 1) * self.video.rate


class _Frames:
    """Frames of a clip, [3, height, width] uint8: kept by the first reading if they fit.

    Attributes:
        size: Height and width, known once they were read.
    """

    def __init__(self, clip: Clip, progress: Progress | None) -> None:
        self._clip = clip
        self._progress = progress
        self._kept: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return self._clip.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[torch.Tensor] | None = []
        read = self._clip.video.read(self._clip.indices)
        for pixels in _counted(read, len(self), self._progress):
            if pixels.nbytes * len(self) > KEEP_BYTES:
                kept = None
            frame = _chw(pixels)
            self.size = tuple(pixels.shape[:2])
            if kept is not None:
                kept.append(frame)
            yield frame
        self._kept = kept


def _counted(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The items, and ``progress`` told after each has been used."""
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress("frames", done, total)


@contextmanager
def naming(video: VideoFile) -> Iterator[None]:
    """Errors of value inside name the video."""
    try:
        yield
    except ValueError as error:
        if video.name in str(error):
            raise
        raise ValueError(f"{video.name}: {error}") from error


def _sampled(
    source: Any, video: VideoFile | None, sample: Callable[[VideoFile], T], local_files_only: bool
) -> T:
    """Sample a video file, again by what really decodes if packets were not frames."""
    video = video or VideoFile(source, local_files_only=local_files_only)
    with naming(video):
        try:
            return sample(video)
        except MissingFrames:
            video.recount()
            return sample(video)


def _options_1_5(
    frames: Iterable[torch.Tensor], times: list[float] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Decide slow and fast and the size of each: what the 1.5 helper tells the processor."""
    size = None

    def noting_size() -> Iterator[torch.Tensor]:
        nonlocal size
        for frame in frames:
            size = tuple(frame.shape[1:])
            yield frame

    similarity = options.get("min_frame_similarity", slow_fast.MIN_FRAME_SIMILARITY)
    fast = slow_fast.classify_frames(noting_size(), similarity)
    sizes = slow_fast.frame_sizes(
        *size,
        fast.count(False),
        fast.count(True),
        min_pixels=options.get("min_pixels", V1_5_MIN_PIXELS),
        max_pixels=options.get("max_pixels", V1_5_MAX_PIXELS),
        total_pixels=options.get("video_total_pixels", V1_5_TOTAL_PIXELS),
    )
    found = sizes._asdict() | {"frame_types": torch.tensor(fast, dtype=torch.int32)}
    return found if times is None else found | {"timestamps": torch.tensor(times).float()}


def is_file(item: Mapping[str, Any]) -> bool:
    """Whether the video of an item is a file; raises as `listed_frames`."""
    return listed_frames(item)[0] is None


def listed_frames(item: Mapping[str, Any]) -> tuple[list[Any] | None, list[float] | None]:
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


def _list_image(
    item: Mapping[str, Any], frame: Any, version: str, local_files_only: bool
) -> Image.Image:
    """One frame of a list, loaded and resized like an image of the same item."""
    settings = {k: v for k, v in item.items() if k not in ("type", "video") and v is not None}
    if version == "1.5":
        settings = {"min_pixels": V1_5_MIN_PIXELS, "max_pixels": V1_5_MAX_PIXELS} | settings
    settings |= frame if isinstance(frame, dict) else {"image": frame}
    return fetch_image(settings, version=version, local_files_only=local_files_only)


def _chw(pixels: np.ndarray) -> torch.Tensor:
    """[height, width, 3] → [3, height, width], same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
