"""Sampled frames → patches: the checkpoint's video processor, for both lines.

8B-Preview ("1.0", keye-vl-utils 1.0.0 and image_processing_keye.py) gives all frames of a video one
size, resized a second time under the image processor's bounds. 1.5 ("1.5", keye-vl-utils 1.5.x and
the transformers port) gives slow and fast frames a size each and writes times into the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.request import Progress
from keye_model.processing.batch import BatchFeature
from keye_model.processing.budget import TokenBudget
from keye_model.processing.film import Film, frames_1_5, seconds_between
from keye_model.processing.image import normalize, patchify, processor_size
from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.items import checked_item
from keye_model.processing.patches import Frame, VideoPatches
from keye_model.processing.picture import array_pixels, load_image
from keye_model.processing.slow_fast import FrameSizes, frame_sizes, resize_bilinear
from keye_model.processing.video_loading import sample_1_5, sample_preview
from keye_model.processing.video_sampling import DEFAULT_FPS, FACTOR

VIDEO_KEYWORDS = {"1.0": {"fps"}, "1.5": {*FrameSizes._fields, "timestamps", "frame_types"}}


class KeyeVideoProcessor:
    """Turns videos into patches.

    Attributes:
        image_processor: Whose patch size, pixel statistics and, for 8B-Preview, bounds and filter
            apply to frames too; changes to it hold from the next video on.
        version: "1.0" (8B-Preview) or "1.5": the line whose rules apply.
        local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.
    """

    def __init__(
        self,
        image_processor: KeyeImageProcessor | None = None,
        *,
        version: str = "1.0",
        local_files_only: bool = False,
    ) -> None:
        if version not in VIDEO_KEYWORDS:
            raise ValueError(f"version must be '1.0' or '1.5', got {version!r}")
        self.image_processor = image_processor or KeyeImageProcessor(version=version)
        if self.image_processor.factor != FACTOR:
            raise NotImplementedError(
                f"patch_size times merge_size must be {FACTOR} for videos, got "
                f"{self.image_processor.factor}"
            )
        self.version = version
        self.local_files_only = local_files_only

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike | Checkpoint, *, local_files_only: bool = False
    ) -> KeyeVideoProcessor:
        """Read `preprocessor_config.json`, and the line from `config.json` if it is there.

        Raises:
            FileNotFoundError: No such checkpoint, or it lacks `preprocessor_config.json`.
            ValueError: A value of a file is out of range, or the model is another one.
        """
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        version = None
        if checkpoint.json("config.json", required=False) is not None:
            version = KeyeConfig.from_pretrained(checkpoint).variant.video_version
        images = KeyeImageProcessor.from_pretrained(checkpoint, version=version)
        return cls(images, version=images.version, local_files_only=images.local_files_only)

    def patches(self, item: Mapping[str, Any]) -> VideoPatches:
        """`patches_of_items` of one item."""
        return self.patches_of_items([item])[0]

    def patches_of_items(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        budget: TokenBudget | None = None,
        count_tokens: Callable[[Sequence[Frame]], int] | None = None,
        fit_videos: Callable[[str], None] | None = None,
        progress: Progress | None = None,
        shapes_only: bool = False,
    ) -> list[VideoPatches]:
        """Sample, resize and cut up the videos of a prompt's message items.

        The same as `process_vision_info` followed by `patches_from_frames`.

        Args:
            items: Each ``{"type": "video", "video": source, ...}``; see `sample_preview` and
                `sample_1_5` for the sources and keys of each line. All are opened before the first
                frame is decoded.
            budget: What the prompt has left; the videos are counted. One that does not fit is
                refused before its frames are decoded (8B-Preview, a file) or resized (1.5).
            count_tokens: Tokens of a video of such frames; by default those of the pixels alone.
            fit_videos, progress, shapes_only: As in `KeyeProcessor.request`.

        Raises:
            FileNotFoundError, ValueError, TypeError, RuntimeError: As `VideoFile`, or a key is out
                of range.
        """
        budget = budget or TokenBudget()
        count_tokens = count_tokens or self._pixel_tokens
        films = [
            Film(
                checked_item(item, "video", "a video item", self.version),
                self.version,
                patch_size=self.image_processor.patch_size,
                resized=self._preview_size,
                count_tokens=count_tokens,
                local_files_only=self.local_files_only,
            )
            for item in items
        ]
        done: dict[int, VideoPatches] = {}
        # Those of a fixed length come first; what they leave is shared among the others.
        fitted = [fit_videos is not None and film.elastic for film in films]
        waiting = sorted(range(len(films)), key=fitted.__getitem__)
        for at, place in enumerate(waiting):
            film, room = films[place], None
            if fitted[place]:
                room = budget.share([films[other].tokens for other in waiting[at:]])
            if shapes_only and film.file is not None:
                frames, seconds = film.frames(room)
                video = VideoPatches(self._empty(frames, "meta"), frames, seconds)
            else:
                video = self._sampled(film, budget, room, progress)
            budget.take(count_tokens(video.frames), film.name)
            if room is not None and (change := film.change(video.frames)):
                fit_videos(f"{change}, to fit a prompt of {budget.limit:,} tokens")
            done[place] = video
        return [done[place] for place in range(len(films))]

    def _sampled(
        self, film: Film, budget: TokenBudget, room: int | None, progress: Progress | None
    ) -> VideoPatches:
        """The video decoded; ``room`` as in `Film.frames`."""
        given = {
            "video": film.file,
            "choose": partial(film.choose, budget, room),
            "progress": progress,
            "local_files_only": self.local_files_only,
        }
        if self.version == "1.0":
            return self._preview_patches(*sample_preview(film.item, **given))
        frames, options = sample_1_5(film.item, **given)
        if room is not None:
            fast = [bool(kind) for kind in options["frame_types"]]
            sizes = film.sizes(frames.size, fast, options["timestamps"].tolist(), room)
            options |= sizes._asdict()
        kinds = self._kinds_1_5(len(frames), **options)
        budget.check(
            film.count_tokens(kinds),
            f"{film.name} with {len(frames)} frames",
            "a lower video_total_pixels or max_frames may fit",
        )
        return self._patches_1_5(frames, **options)

    def patches_from_frames(self, frames: Any, **options: Any) -> VideoPatches:
        """Resize and cut up frames that `process_vision_info` sampled, ours or the published one.

        Args:
            frames: [frames, 3, height, width], uint8 or whole numbers 0 to 255 in floating point;
                or a sequence of pictures, each what `load_image` takes.
            options: What `process_vision_info` returned beside them for this video. "1.0": ``fps``
                (2.0 if absent, as published). "1.5": ``height``, ``width``, ``fast_height``,
                ``fast_width`` (absent: by `frame_sizes`), ``timestamps``, ``frame_types`` (absent:
                no times, all slow).

        Raises:
            TypeError: An option of the other line.
            ValueError: No frames, other values, or as many times or types as there are no frames.
        """
        self._check_keywords(options)
        if len(frames) == 0:
            raise ValueError("videos must have at least one frame, got none")
        if self.version == "1.0":
            return self._preview_patches(frames, float(options.get("fps", DEFAULT_FPS)))
        return self._patches_1_5([frame_bytes(frame) for frame in frames], **options)

    def patches_of_each(self, videos: Any, **options: Any) -> list[VideoPatches]:
        """`patches_from_frames` of one video or of each in a list; of None, an empty list.

        Args:
            options: As there; one value for all videos, or a list with one for each.

        Raises:
            ValueError: A list of another length; else as there.
        """
        self._check_keywords(options)
        videos = [] if videos is None else videos
        several = isinstance(videos, (list, tuple)) and all(map(_is_video, videos))
        videos = list(videos) if several else [videos]
        shares = _shares(options, len(videos))
        return [
            self.patches_from_frames(video, **share)
            for video, share in zip(videos, shares, strict=True)
        ]

    def __call__(self, videos: Any, return_tensors: str = "pt", **options: Any) -> BatchFeature:
        """Patches of one sampled video or a list of them, as the model's forward takes them.

        Args:
            videos: Frames of one video, or a list of videos, each as in `patches_from_frames`.
            options: As in `patches_of_each`.

        Returns:
            pixel_values_videos: [num_patches, 3, patch, patch], fp32, normalised.
            video_grid_thw: [num_rows, 3], int64, in patches.
            second_per_grid_ts: "1.0": [num_videos], fp32, seconds between frames.
            num_frames: "1.5": [num_videos], int64, frames of each video.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        cut = self.patches_of_each(videos, **options)
        if not cut:
            raise ValueError("videos must hold at least one video, got none")
        rows = [row for video in cut for row in video.grid_thw]
        batch = BatchFeature(
            pixel_values_videos=self.normalize(torch.cat([video.pixels for video in cut])),
            video_grid_thw=torch.tensor(rows),
        )
        if self.version == "1.0":
            seconds = [video.seconds_per_frame for video in cut]
            batch["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
        else:
            batch["num_frames"] = torch.tensor([len(video.frames) for video in cut])
        return batch

    preprocess = __call__

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw bytes [N, 3, patch, patch] → fp32, by the image processor's mean and std."""
        return normalize(pixels, self.image_processor.image_mean, self.image_processor.image_std)

    def _check_keywords(self, options: Mapping[str, Any]) -> None:
        if unknown := sorted(set(options) - VIDEO_KEYWORDS[self.version]):
            raise TypeError(
                f"video keywords for release {self.version} must be among "
                f"{', '.join(sorted(VIDEO_KEYWORDS[self.version]))}, got {', '.join(unknown)}"
            )

    def _preview_patches(self, frames: Sequence[Any], fps: float) -> VideoPatches:
        """All frames to the size that the image processor's rule gives the first."""
        if not fps > 0:
            raise ValueError(f"fps must be a positive number, got {fps}")
        images = self.image_processor
        size = self._preview_size(*frame_bytes(frames[0]).shape[1:])
        rows, columns = (side // images.patch_size for side in size)
        kinds = (Frame(rows, columns, None),) * len(frames)
        resized = (_resize_pillow(frame_bytes(frame), *size, images.resample) for frame in frames)
        return VideoPatches(self._cut(resized, kinds), kinds, 1 / fps)

    def _preview_size(self, height: int, width: int) -> tuple[int, int]:
        images = self.image_processor
        return processor_size(
            height,
            width,
            factor=images.factor,
            min_pixels=images.min_pixels,
            max_pixels=images.max_pixels,
            version="1.0",
        )

    def _patches_1_5(
        self,
        frames: Collection[torch.Tensor],
        *,
        timestamps: Sequence[float] | torch.Tensor | None = None,
        frame_types: Sequence[int] | torch.Tensor | None = None,
        **sizes: int,
    ) -> VideoPatches:
        """Slow frames to one size, fast ones to another, with no second resize."""
        if not sizes:
            fast = [] if frame_types is None else [bool(kind) for kind in frame_types]
            size = next(iter(frames)).shape[1:]
            num_fast = fast.count(True)
            sizes = frame_sizes(*size, len(frames) - num_fast, num_fast)._asdict()
        kinds = self._kinds_1_5(len(frames), timestamps, frame_types, **sizes)
        patch = self.image_processor.patch_size
        resized = (
            resize_bilinear(frame, kind.rows * patch, kind.columns * patch)
            for frame, kind in zip(frames, kinds, strict=True)
        )
        seconds = seconds_between([kind.timestamp for kind in kinds])
        return VideoPatches(self._cut(resized, kinds), kinds, seconds)

    def _kinds_1_5(
        self,
        count: int,
        timestamps: Sequence[float] | torch.Tensor | None = None,
        frame_types: Sequence[int] | torch.Tensor | None = None,
        **sizes: int,
    ) -> tuple[Frame, ...]:
        fast = [False] * count if frame_types is None else [bool(kind) for kind in frame_types]
        times = [None] * count if timestamps is None else [float(time) for time in timestamps]
        for name, values in (("frame_types", fast), ("timestamps", times)):
            if len(values) != count:
                raise ValueError(
                    f"{name} must have one value for each of {count} frames, got {len(values)}"
                )
        return frames_1_5(_checked_sizes(sizes), fast, times, self.image_processor.patch_size)

    def _cut(self, frames: Iterable[torch.Tensor], kinds: Sequence[Frame]) -> torch.Tensor:
        """Patches of resized frames in one tensor, filled as the frames come."""
        pixels = self._empty(kinds)
        counts = [kind.rows * kind.columns for kind in kinds]
        for out, frame in zip(pixels.split(counts), frames, strict=True):
            out.copy_(patchify(frame[None], self.image_processor.patch_size))
        return pixels

    def _empty(self, kinds: Sequence[Frame], device: str = "cpu") -> torch.Tensor:
        """Room for the patches of frames."""
        count = sum(kind.rows * kind.columns for kind in kinds)
        patch = self.image_processor.patch_size
        return torch.empty((count, 3, patch, patch), dtype=torch.uint8, device=device)

    def _pixel_tokens(self, frames: Sequence[Frame]) -> int:
        patches = sum(frame.rows * frame.columns for frame in frames)
        return patches // self.image_processor.merge_size**2


def frame_bytes(frame: Any) -> torch.Tensor:
    """One frame as [3, height, width] uint8.

    Args:
        frame: What `load_image` takes, or a floating-point tensor or array of whole numbers 0 to
            255, as keye-vl-utils 1.0.0 returns them.
    """
    if isinstance(frame, np.ndarray) and np.issubdtype(frame.dtype, np.floating):
        frame = torch.from_numpy(frame.astype(np.float64))
    if isinstance(frame, torch.Tensor) and frame.is_floating_point() and not frame.is_meta:
        whole = frame.detach().clamp(0, 255).round()
        if not torch.equal(whole, frame):
            raise ValueError("floating-point frames must hold whole numbers from 0 to 255")
        frame = whole.to(torch.uint8)
    if isinstance(frame, (np.ndarray, torch.Tensor)):
        pixels = array_pixels(frame)
        if pixels.shape[2] == 3:
            usable = pixels.flags.writeable and min(pixels.strides) >= 0  # what PyTorch can wrap
            return torch.from_numpy(pixels if usable else pixels.copy()).permute(2, 0, 1)
    picture = load_image(frame, alpha="drop")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _resize_pillow(frame: torch.Tensor, height: int, width: int, resample: int) -> torch.Tensor:
    if frame.shape[1:] == (height, width):
        return frame
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    resized = np.array(picture.resize((width, height), resample=resample))
    return torch.from_numpy(resized).permute(2, 0, 1)


def _checked_sizes(sizes: Mapping[str, int]) -> FrameSizes:
    missing = [name for name in FrameSizes._fields if name not in sizes]
    if missing:
        raise ValueError(f"{', '.join(sorted(sizes))} must come with {', '.join(missing)}")
    found = FrameSizes(**{name: int(size) for name, size in sizes.items()})
    for name, size in found._asdict().items():
        if size < FACTOR or size % FACTOR:
            raise ValueError(f"{name} must be a positive multiple of {FACTOR}, got {size}")
    return found


def _is_video(value: Any) -> bool:
    """Whether an entry of a list is a video of its own rather than one frame."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4


def _shares(options: Mapping[str, Any], num_videos: int) -> list[dict[str, Any]]:
    """Each video's keywords, from lists with one value for each or one value for all."""
    shares: list[dict[str, Any]] = [{} for _ in range(num_videos)]
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value] * num_videos
        if len(values) != num_videos:
            raise ValueError(
                f"{name} must have one value for each of {num_videos} videos, got {len(values)}"
            )
        for share, one in zip(shares, values, strict=True):
            if one is not None:
                share[name] = one
    return shares
