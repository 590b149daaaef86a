"""From one placeholder for each picture and video to one for each merged token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer

from keye_model.processing.patches import Frame, ImagePatches, VideoPatches
from keye_model.processing.rules.base import Rules
from keye_model.processing.tokenizer import TokenIds, encode


@dataclass(frozen=True)
class Placeholders:
    """Tokenises prompts and expands their placeholders.

    Special tokens never merge with their neighbours, so expanding ids equals expanding the string
    and tokenising it afterwards, as the published processors do.
    """

    tokenizer: Tokenizer
    ids: TokenIds
    merge_size: int
    rules: Rules

    def expand(
        self,
        texts: Sequence[str],
        images: Sequence[ImagePatches],
        videos: Sequence[VideoPatches],
    ) -> list[list[int]]:
        """Ids of each prompt; pictures and videos are dealt out in order over all of them.

        Raises:
            ValueError: A prompt is empty, or placeholders and pictures or videos differ in number.
            TypeError: A prompt is no string.
        """
        rows = []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text must hold strings, got {type(text).__name__}")
            rows.append(encode(self.tokenizer, text))
            if not rows[-1]:
                raise ValueError("text must not be empty, got ''")
        for name, token, given in (
            ("images", self.ids.image, images),
            ("videos", self.ids.video, videos),
        ):
            found = sum(row.count(token) for row in rows)
            if found != len(given):
                raise ValueError(
                    f"text must hold one {self.tokenizer.id_to_token(token)} for each of "
                    f"{len(given)} {name}, got {found}"
                )
        next_image, next_video = iter(images), iter(videos)
        return [
            [new for token in row for new in self._expanded(token, next_image, next_video)]
            for row in rows
        ]

    def _expanded(
        self, token: int, images: Iterator[ImagePatches], videos: Iterator[VideoPatches]
    ) -> list[int]:
        if token == self.ids.image:
            _, rows, columns = next(images).grid_thw
            return [token] * self._num_tokens(rows, columns)
        if token == self.ids.video:
            return self._video(next(videos).frames)
        return [token]

    def count(self, frames: Sequence[Frame]) -> int:
        """Tokens of a video of these frames, marks and times included."""
        return len(self._video(frames))

    def _video(self, frames: Sequence[Frame]) -> list[int]:
        counts = [self._num_tokens(frame.rows, frame.columns) for frame in frames]
        to_ids = partial(encode, self.tokenizer)
        return self.rules.placeholders(frames, counts, self.ids, to_ids)

    def _num_tokens(self, rows: int, columns: int) -> int:
        return (rows // self.merge_size) * (columns // self.merge_size)
