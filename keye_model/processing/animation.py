"""Animated WebP, by Pillow, which composes its frames: FFmpeg reads it from its newest releases on.

Animated GIF, PNG and AVIF are videos to FFmpeg.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# What Pillow raises on a broken file.
_BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Animation:
    """The frames of a WebP picture that can be read; one if it is a still one.

    Attributes:
        size: Height and width.
        milliseconds: When each frame is shown.
    """

    size: tuple[int, int]
    milliseconds: tuple[int, ...]

    @classmethod
    def find(cls, file: Any, name: str, check_size: Callable[[int, int], None]) -> Animation | None:
        """The frames of an open file; None if it is no WebP.

        Args:
            name: How errors call it.
            check_size: Called with width and height before a frame is decoded.

        Raises:
            ValueError: Pillow cannot read it.
        """
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WEBP":
            return None
        try:
            picture = Image.open(file, formats=("WEBP",))
        except _BROKEN as error:
            raise ValueError(f"{name} must be a whole WebP file, got a broken one") from error
        check_size(*picture.size)
        times, now = [], 0
        for frame in _frames(picture):
            times.append(now)
            duration = frame.info.get("duration", 0)
            now += duration if duration > 10 else 100  # as browsers do
        if not times:
            raise ValueError(f"{name} must have frames that can be decoded, got none")
        return cls(picture.size[::-1], tuple(times))

    def read(self, file: Any, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames at ascending places: [height, width, 3] uint8, over white where transparent."""
        for place, frame in enumerate(_frames(Image.open(file, formats=("WEBP",)))):
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
