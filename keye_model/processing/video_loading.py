"""The chosen frames of a video, decoded or loaded: [3, height, width] uint8 each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from keye_model.inputs.request import Progress
from keye_model.processing.film import Clip, Film
from keye_model.processing.image import fetch_image

if TYPE_CHECKING:
    from keye_model.processing.rules.base import Rules

KEEP_BYTES = 512 << 20  # a clip whose sampled frames are larger is decoded twice instead of kept

T = TypeVar("T")


class ClipFrames:
    """Frames of a clip in their original size: kept by the first reading if they fit.

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
        read = self._clip.file.read(self._clip.indices)
        for pixels in counted(read, len(self), self._progress):
            if pixels.nbytes * len(self) > KEEP_BYTES:
                kept = None
            frame = channels_first(pixels)
            self.size = tuple(pixels.shape[:2])
            if kept is not None:
                kept.append(frame)
            yield frame
        self._kept = kept


def listed_pictures(
    film: Film, places: Sequence[int], rules: Rules, progress: Progress | None, **bounds: int
) -> Iterator[torch.Tensor]:
    """Frames of a list, each loaded and resized like an image of the same item.

    Args:
        bounds: ``min_pixels`` and ``max_pixels`` if neither the item nor the frame has them.
    """
    own = {k: v for k, v in film.item.items() if k not in ("type", "video") and v is not None}
    for place in counted(places, len(places), progress):
        frame = film.frames[place]
        settings = bounds | own | (frame if isinstance(frame, dict) else {"image": frame})
        picture = fetch_image(settings, rules, local_files_only=film.local_files_only)
        yield channels_first(np.array(picture))


def counted(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The items, and ``progress`` told after each has been used."""
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress("frames", done, total)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    """[height, width, 3] → [3, height, width], same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
