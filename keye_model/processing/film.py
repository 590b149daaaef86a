"""A video of a prompt, opened: what it takes of the context, and what of it fits into less.

No frame is decoded for this. 8B-Preview's tokens follow from the file's header and its times. 1.5
makes a frame slow or fast by what it shows, so its tokens are counted for the costliest split.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from keye_model.processing.budget import TokenBudget
from keye_model.processing.fetch import describe
from keye_model.processing.patches import Frame
from keye_model.processing.slow_fast import MIN_FRAME_SIMILARITY, FrameSizes, frame_sizes
from keye_model.processing.video_file import VideoFile
from keye_model.processing.video_loading import Clip, is_file, naming
from keye_model.processing.video_sampling import (
    DEFAULT_FPS,
    TOKEN_PIXELS,
    V1_5_MAX_PIXELS,
    V1_5_MIN_PIXELS,
    V1_5_TOTAL_PIXELS,
    preview_frame_size,
    video_options,
)

Size = tuple[int, int]  # height and width
_HOW_MANY_FRAMES = {"fps", "nframes", "min_frames", "max_frames"}


class Film:
    """One video item, opened.

    Attributes:
        item: As `checked_item` returns it.
        name: How errors call it.
        file: None for a list of frames.
        elastic: Whether fewer frames may be sampled than the rules say: of a file of which the
            item does not say how many.
    """

    def __init__(
        self,
        item: Mapping[str, Any],
        version: str,
        *,
        patch_size: int,
        resized: Callable[[int, int], Size],
        count_tokens: Callable[[Sequence[Frame]], int],
        local_files_only: bool,
    ) -> None:
        """Open it.

        Args:
            resized: 8B-Preview's second resize: the processor's size for the helper's.
            count_tokens: Tokens of a video of such frames, marks and times included.

        Raises:
            FileNotFoundError, ValueError, TypeError, RuntimeError: As `VideoFile`, or a key is out
                of range.
        """
        self.item = item
        self.file = None
        if is_file(item):
            self.file = VideoFile(item["video"], local_files_only=local_files_only)
        self.name = self.file.name if self.file else f"video {describe(item['video'])}"
        self._options = video_options(item)
        self.elastic = bool(self.file) and not _HOW_MANY_FRAMES & set(self._options)
        self._version = version
        self._patch_size = patch_size
        self._resized = resized
        self.count_tokens = count_tokens
        self._smaller = False  # than video_total_pixels would have it

    @cached_property
    def tokens(self) -> int:
        """Tokens of the file by the published rules: exact for 8B-Preview, a bound for 1.5."""
        return self.count_tokens(self._published)

    @cached_property
    def _published(self) -> tuple[Frame, ...]:
        return self.frames()[0]

    def change(self, frames: Sequence[Frame]) -> str | None:
        """In what a fitted file's frames differ from the published rules' choice, if they do."""
        fewer = len(frames) < len(self._published)
        if not fewer and not self._smaller:
            return None
        most = max(frame.rows * frame.columns for frame in frames)
        most = most * self._patch_size**2 // TOKEN_PIXELS
        instead = f" instead of {len(self._published)}" if fewer else ""
        return f"{self.name}: {len(frames)} frames{instead}, at most {most} tokens each"

    def frames(self, room: int | None = None) -> tuple[tuple[Frame, ...], float]:
        """Frames a file will be sampled to and the seconds between two; none is decoded.

        A film that is to be turned by a quarter is seen as it lies in the file.

        Args:
            room: Tokens to fit it into, if that can be done; None leaves it as published.
        """
        with naming(self.file):
            clip = Clip.of(self.file, self._options, self._version)
            if room is not None:
                clip = replace(clip, count=self._most_frames(clip, room) or clip.count)
            if self._version == "1.0":
                height, width = self._preview_size(clip.count)
                frame = Frame(height // self._patch_size, width // self._patch_size, None)
                return (frame,) * clip.count, 1 / clip.fps
            fast = self._costliest(clip.count)
            sizes = self.sizes(self.file.frame_size, fast, clip.times, room)
            frames = frames_1_5(sizes, fast, clip.times, self._patch_size)
            return frames, seconds_between(clip.times)

    def choose(self, budget: TokenBudget, room: int | None, clip: Clip) -> int:
        """How many frames of a file to sample instead of the clip's own number.

        Args:
            room: As in `frames`.

        Raises:
            ValueError: They do not fit: the clip's, if that can be told (8B-Preview), or any.
        """
        if room is not None:
            count = self._most_frames(clip, room)
            if count is None:
                raise ValueError(
                    f"prompt must have at most {budget.limit} tokens, got {room} left for "
                    f"{self.name}, which hold none of its frames; a lower max_pixels may fit"
                )
            return count
        if self._version == "1.0" and budget.limit is not None:
            key = "nframes" if "nframes" in self._options else "max_frames"
            budget.check_frames(clip.count, self._preview_tokens, self.name, key)
        return clip.count

    def sizes(
        self, size: Size, fast: Sequence[bool], times: Sequence[float], room: int | None
    ) -> FrameSizes:
        """1.5: by the largest ``video_total_pixels`` that keeps the video within ``room``.

        Args:
            size: Of the original frames.
            room: As in `frames`; not met if even the smallest frames are too large.
        """
        counts = fast.count(False), fast.count(True)
        published = self._sizes(size, *counts)
        if room is None:
            return published
        frames = frames_1_5(published, fast, times, self._patch_size)
        marks = self.count_tokens(frames) - _tokens(published, *counts)

        def tokens(total: int) -> int:
            return marks + _tokens(self._sizes(size, *counts, total * TOKEN_PIXELS), *counts)

        most = int(self._options.get("video_total_pixels", V1_5_TOTAL_PIXELS) / TOKEN_PIXELS)
        total = bisect_right(range(1, most + 1), room, key=tokens)
        self._smaller = total < most
        return self._sizes(size, *counts, total * TOKEN_PIXELS) if self._smaller else published

    def _most_frames(self, clip: Clip, room: int) -> int | None:
        """How many of the clip's frames fit (1.5: at their smallest); None if none do."""
        if self._version == "1.0":
            counts = range(clip.count, 1, -2)
            return next((n for n in counts if self._preview_tokens(n) <= room), None)
        smallest = self._sizes(self.file.frame_size, 1, 1, 0)

        def tokens(count: int) -> int:
            """All slow or all but the first fast: at fixed sizes no other split has more."""
            times = replace(clip, count=count).times
            splits = ([False] * slow + [True] * (count - slow) for slow in self._slow(count))
            kinds = (frames_1_5(smallest, fast, times, self._patch_size) for fast in splits)
            return max(map(self.count_tokens, kinds))

        return bisect_right(range(1, clip.count + 1), room, key=tokens) or None

    def _preview_size(self, count: int) -> Size:
        return self._resized(*preview_frame_size(*self.file.frame_size, count, self._options))

    def _preview_tokens(self, count: int) -> int:
        height, width = self._preview_size(count)
        return count * height * width // TOKEN_PIXELS

    def _sizes(
        self, size: Size, num_slow: int, num_fast: int, total_pixels: float | None = None
    ) -> FrameSizes:
        given = self._options
        return frame_sizes(
            *size,
            num_slow,
            num_fast,
            min_pixels=given.get("min_pixels", V1_5_MIN_PIXELS),
            max_pixels=given.get("max_pixels", V1_5_MAX_PIXELS),
            total_pixels=given.get("video_total_pixels", V1_5_TOTAL_PIXELS)
            if total_pixels is None
            else total_pixels,
        )

    def _costliest(self, count: int) -> list[bool]:
        """1.5: which frames are fast where the video has most tokens."""

        def tokens(slow: int) -> int:
            split = slow, count - slow
            return _tokens(self._sizes(self.file.frame_size, *split), *split) + 2 * split[1]

        least, most = self._slow(count)
        slow = max(range(least, most + 1), key=tokens)
        return [False] * slow + [True] * (count - slow)

    def _slow(self, count: int) -> tuple[int, int]:
        """1.5: least and most slow frames. The first is slow, and none less alike than 0."""
        similarity = self._options.get("min_frame_similarity", MIN_FRAME_SIMILARITY)
        return 1, count if similarity > 0 else 1


def frames_1_5(
    sizes: FrameSizes, fast: Sequence[bool], times: Sequence[float | None], patch_size: int
) -> tuple[Frame, ...]:
    """Slow and fast frames of the two sizes, each with its time."""
    slow_size, fast_size = (sizes.height, sizes.width), (sizes.fast_height, sizes.fast_width)
    chosen = (fast_size if is_fast else slow_size for is_fast in fast)
    return tuple(
        Frame(height // patch_size, width // patch_size, time, is_fast)
        for (height, width), time, is_fast in zip(chosen, times, fast, strict=True)
    )


def seconds_between(times: Sequence[float | None]) -> float:
    """Mean distance of frames; that of the default rate if it is not known."""
    span = times[-1] - times[0] if None not in times else 0.0
    return span / (len(times) - 1) if span > 0 else 1 / DEFAULT_FPS


def _tokens(sizes: FrameSizes, num_slow: int, num_fast: int) -> int:
    """Without marks and times."""
    slow, fast = sizes.height * sizes.width, sizes.fast_height * sizes.fast_width
    return (num_slow * slow + num_fast * fast) // TOKEN_PIXELS
