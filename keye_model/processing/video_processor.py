"""The checkpoint's video processor: message items → films → sampled frames → patches.

What differs between the lines is in `rules`, whose object the processor asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.request import Progress
from keye_model.processing.batch import BatchFeature
from keye_model.processing.budget import Fit, TokenBudget
from keye_model.processing.fetch import describe
from keye_model.processing.film import Film
from keye_model.processing.image import normalize, patchify
from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.items import checked_item
from keye_model.processing.patches import Frame, Sample, VideoPatches
from keye_model.processing.picture import array_pixels, load_image
from keye_model.processing.rules import of
from keye_model.processing.rules.base import Rules
from keye_model.processing.source_cache import SourceCache
from keye_model.processing.video_sampling import FACTOR, TOKEN_PIXELS


@dataclass(frozen=True)
class _Processed:
    """What a video became in a prompt.

    Attributes:
        patches: On the meta device if it was not decoded.
        smaller: As in `Sample`.
        tokens: Marks and times included.
        published: Its frames by the published rules if it may be made to fit, else None.
        room: As in `Fit`.
    """

    patches: VideoPatches
    smaller: bool
    tokens: int
    published: tuple[Frame, ...] | None
    room: int | None


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
        of(version)  # raises for an unknown one
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

    @property
    def rules(self) -> Rules:
        """The rules of the line that ``version`` names."""
        return of(self.version)

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
        sources: SourceCache | None = None,
    ) -> list[VideoPatches]:
        """Sample, resize and cut up the videos of a prompt's message items.

        The same as `process_vision_info` followed by `patches_from_frames`.

        Args:
            items: Each ``{"type": "video", "video": source, ...}``; see `Film` for the sources,
                `rules.preview.sample` and `rules.v1_5.sample` for the keys of each line. All are
                opened before the first frame is decoded.
            budget: What the prompt has left; the videos are counted. One that does not fit is
                refused before its frames are decoded (8B-Preview, a file) or resized (1.5).
            count_tokens: Tokens of a video of such frames; by default those of the pixels alone.
            fit_videos, progress, shapes_only: As in `KeyeProcessor.request`.
            sources: Where videos are kept, and found again unopened.

        Raises:
            FileNotFoundError, ValueError, TypeError, RuntimeError: As `VideoFile`, or a key is out
                of range.
        """
        budget = budget or TokenBudget()
        count_tokens = count_tokens or self._pixel_tokens
        checked = [checked_item(item, "video", "a video item", self.rules) for item in items]
        if sources is None or shapes_only:
            sources = SourceCache(0)
        settings = self.version, vars(self.image_processor), fit_videos is not None
        settings += (os.environ.get("VIDEO_MAX_PIXELS"),)
        keys = [sources.key(item, settings) for item in checked]
        kept: list[_Processed | None] = [sources.get(key) for key in keys]
        films = [
            self._film(item) if one is None else None
            for item, one in zip(checked, kept, strict=True)
        ]
        # Frames by the published rules of the films that may be made to fit.
        published: dict[int, tuple[Frame, ...]] = {}
        for place, (film, one) in enumerate(zip(films, kept, strict=True)):
            if one is not None and one.published is not None:
                published[place] = one.published
            elif film is not None and fit_videos is not None and film.elastic:
                published[place] = self._layout(self.rules.sample(film, decode=False))[0]
        needs = {place: count_tokens(frames) for place, frames in published.items()}

        done: dict[int, VideoPatches] = {}
        # Films of a fixed length come first; the others share what is left.
        waiting = sorted(range(len(films)), key=published.__contains__)
        for at, place in enumerate(waiting):
            room = None
            if place in published:
                room = budget.share([needs[other] for other in waiting[at:]])
            fit = Fit(budget, self._layout, count_tokens, room)
            name = f"video {describe(checked[place]['video'])}"
            one, film = sources.get(keys[place]), films[place]
            if one is not None and one.room != room:
                film = film or self._film(checked[place])
                one = one if self._unchanged(one, film, fit) else None
            if one is not None and budget.fits(one.tokens):
                budget.take(one.tokens, name)
            else:
                film = film or self._film(checked[place])
                one = self._sampled(film, fit, progress, not shapes_only, published.get(place))
                sources.put(keys[place], one, one.patches.pixels)
            done[place], frames = one.patches, one.patches.frames
            if room is not None and (one.smaller or len(frames) < len(published[place])):
                change = self._change(name, frames, len(published[place]))
                fit_videos(f"{change}, to fit a prompt of {budget.limit:,} tokens")
        return [done[place] for place in range(len(films))]

    def _film(self, item: Mapping[str, Any]) -> Film:
        return Film(item, local_files_only=self.local_files_only)

    def _sampled(
        self,
        film: Film,
        fit: Fit,
        progress: Progress | None,
        decode: bool,
        published: tuple[Frame, ...] | None,
    ) -> _Processed:
        sample = self.rules.sample(film, fit, decode=decode, progress=progress)
        frames, seconds = self._layout(sample)
        tokens = fit.count_tokens(frames)
        fit.budget.take(tokens, f"{film.name} with {sample.count} frames", self.rules.advice)
        patches = VideoPatches(self._cut(sample.frames, frames), frames, seconds)
        return _Processed(patches, sample.smaller, tokens, published, fit.room)

    def _unchanged(self, one: _Processed, film: Film, fit: Fit) -> bool:
        """Whether a film becomes the same in another room: in a smaller one it does while that
        holds its frames, which are the largest that fit, and as many are sampled.
        """
        if fit.room is None or one.room is None or not one.tokens <= fit.room < one.room:
            return False
        return self.rules.sample(film, fit, decode=False).count == len(one.patches.frames)

    def _change(self, name: str, frames: Sequence[Frame], published: int) -> str:
        """One line on a film that was fitted; the published rules take ``published`` frames."""
        most = max(frame.rows * frame.columns for frame in frames)
        most = most * self.image_processor.patch_size**2 // TOKEN_PIXELS
        instead = f" instead of {published}" if len(frames) < published else ""
        return f"{name}: {len(frames)} frames{instead}, at most {most} tokens each"

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
        size = frame_bytes(frames[0]).shape[1:]
        kinds, seconds = self._layout(Sample(frames, len(frames), size, options))
        return VideoPatches(self._cut(map(frame_bytes, frames), kinds), kinds, seconds)

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
        batch.update(self.rules.batch(cut))
        return batch

    preprocess = __call__

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw bytes [N, 3, patch, patch] → fp32, by the image processor's mean and std."""
        return normalize(pixels, self.image_processor.image_mean, self.image_processor.image_std)

    def _check_keywords(self, options: Mapping[str, Any]) -> None:
        if unknown := sorted(set(options) - self.rules.video_keywords):
            raise TypeError(
                f"video keywords for release {self.version} must be among "
                f"{', '.join(sorted(self.rules.video_keywords))}, got {', '.join(unknown)}"
            )

    def _layout(self, sample: Sample) -> tuple[tuple[Frame, ...], float]:
        """What sampled frames become, and the seconds between two of them."""
        images = self.image_processor
        return self.rules.layout(sample, images.patch_size, images.output_size)

    def _cut(self, frames: Iterable[torch.Tensor] | None, kinds: Sequence[Frame]) -> torch.Tensor:
        """Patches in one tensor, filled as the frames come; on the meta device without frames."""
        counts = [kind.rows * kind.columns for kind in kinds]
        patch, resample = self.image_processor.patch_size, self.image_processor.resample
        device = "meta" if frames is None else "cpu"
        pixels = torch.empty((sum(counts), 3, patch, patch), dtype=torch.uint8, device=device)
        if frames is not None:
            for out, frame, kind in zip(pixels.split(counts), frames, kinds, strict=True):
                size = kind.rows * patch, kind.columns * patch
                resized = self.rules.resize(frame, *size, resample)
                out.copy_(patchify(resized[None], patch))
        return pixels

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
