"""Animated pictures that FFmpeg takes for still ones, by Pillow, which composes their frames."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_FORMATS = ("WEBP", "AVIF", "PNG", "GIF")
# What Pillow raises on broken files; each format has its own habits.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError)
_BROKEN += (struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Animation:
    """The frames of an animated picture that can be read.

    Attributes:
        size: Height and width.
        milliseconds: When each frame is shown.
    """

    size: tuple[int, int]
    milliseconds: tuple[int, ...]

    @classmethod
    def find(cls, file: Any, name: str, check_size: Callable[[int, int], None]) -> Animation | None:
        """The animation in an open file; None if there is none.

        Args:
            name: How errors call it.
            check_size: Called with width and height before a frame is decoded.

        Raises:
            ValueError: A WebP picture that is not whole.
        """
        head = file.read(12)
        file.seek(0)
        try:
            picture = Image.open(file, formats=_FORMATS)
        except _BROKEN as error:
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                raise ValueError(
                    f"{name} must be a whole WebP file that Pillow can read"
                ) from error
            return None
        if getattr(picture, "n_frames", 1) < 2:
            return None
        check_size(*picture.size)
        times, now = [], 0
        for frame in _frames(picture):
            times.append(now)
            duration = round(frame.info.get("duration", 0))
            now += duration if duration > 10 else 100  # as browsers do
        return cls(picture.size[::-1], tuple(times)) if len(times) > 1 else None

    def read(self, file: Any, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames at ascending places: [height, width, 3] uint8, over white where transparent."""
        frames = _frames(Image.open(file, formats=_FORMATS))
        for place, frame in enumerate(frames):
            if repeats := places.count(place):
                canvas = Image.new("RGBA", frame.size, "white")
                canvas.alpha_composite(frame.convert("RGBA"))
                pixels = np.array(canvas.convert("RGB"))
                for _ in range(repeats):
                    yield pixels
            if place == places[-1]:
                return


def _frames(picture: Image.Image) -> Iterator[Image.Image]:
    """The picture at each of its frames, up to one that does not decode."""
    for place in range(picture.n_frames):
        try:
            picture.seek(place)
            picture.load()
        except _BROKEN:
            return
        yield picture
