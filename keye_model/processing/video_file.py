"""A video file: when each of its frames is shown, and any of its frames as bytes.

A file is read twice. The first pass walks its packets without decoding and notes when each frame is
shown, so lengths and times come from what is there, never from what a header says. The second
decodes, converts only the wanted frames to RGB, and keeps none of them.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from keye_model.processing.animation import Animation
from keye_model.processing.fetch import describe
from keye_model.processing.source import read_source
from keye_model.processing.video_stream import (
    Damaged,
    ahead,
    best,
    can_skip,
    candidates,
    decode,
    opened,
    until_broken,
)

MAX_VIDEO_BYTES = 2 << 30  # of a URL, and of an open file that cannot seek
MAX_FRAME_PIXELS = 1 << 26  # 8192x8192; a header can claim any size
FETCH_TIMEOUT = 600.0  # seconds


class VideoFile:
    """One video file and the presentation times of its frames, in the order they are shown.

    Of several video streams it is the one that players show (`best`). Animated WebP is read by
    Pillow, over white where it is transparent.

    Frames are turned as the file's display matrix asks (quarter turns; mirroring is not applied),
    as a player shows them, but pixels that are not square are not stretched, as in the published
    helpers. Later frames of another size are scaled to the first one's.

    Attributes:
        name: How errors call this video.
        coded_size: Height and width as the header states them, before turning; 0 if it does not.
        times: [num_frames], seconds, the first frame at 0. Where they follow a constant rate up to
            the rounding of the file's clock they are exactly ``index * (1 / rate)``, as published.
        rate: Frames per second: the file's stated average where it agrees with the times of the
            frames, else their own average.
        constant_rate: Whether ``times`` are ``index * (1 / rate)``.
    """

    def __init__(self, source: Any, *, local_files_only: bool = False) -> None:
        """Read the times of all frames; nothing is decoded yet.

        Args:
            source: What `read_source` finds: a path, a ``file:``, ``https:`` or ``data:`` URL, a
                bare base64 string, the bytes of a file, or an open binary file.
            local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.

        Raises:
            FileNotFoundError: The path does not exist, or is no regular file.
            ValueError: Empty, not a video, no video stream, no frames, or frames too large.
            TypeError: Another kind of source.
            PermissionError, RuntimeError: As `read_source`.
        """
        self.name = f"video {describe(source)}"
        self._source = read_source(
            source,
            "video",
            max_bytes=MAX_VIDEO_BYTES,
            timeout=FETCH_TIMEOUT,
            local_files_only=local_files_only,
        )
        self._by_order = self._damaged = False
        with self._file() as file:
            self._animation = Animation.find(file, self.name, self._check_size)
        if self._animation is not None:
            self._ids = list(range(len(self._animation.milliseconds)))
            self.coded_size = self._animation.size
            self._set_times(self._animation.milliseconds, 0.0, 0.001)
        elif not self._scan_packets():
            self._scan_frames()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of its frames before turning, of the first one if no header says so."""
        if 0 in self.coded_size:
            try:
                first = next(self.read([0]))
            except MissingFrames:
                self.recount()
                first = next(self.read([0]))
            self.coded_size = first.shape[:2]
        return self.coded_size

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode the frames at ``indices`` (ascending), one at a time: [height, width, 3] uint8.

        A thread decodes the next frame while the caller has the last one.

        Raises:
            MissingFrames: The decoder gives no frame for a packet that was counted. Count again
                with `recount`, choose anew and read again.
        """
        return ahead(self._read([self._ids[index] for index in indices]))

    def recount(self) -> None:
        """Decode once from start to end and count the frames that really come out.

        Packets and frames can differ in damaged files and in cuts that open between key frames.

        Raises:
            ValueError: No frame could be decoded.
        """
        self._scan_frames()

    def _read(self, wanted: list[int]) -> Generator[np.ndarray, None, None]:
        if self._animation is not None:
            with self._file() as file:
                yield from self._animation.read(file, wanted)
            return
        done, size = 0, None
        for strict, seeking in ((True, True), (False, True), (False, False))[self._damaged :]:
            place = 0
            try:
                with self._open() as (container, stream):
                    convert = VideoReformatter()
                    for frame, repeats in self._frames(container, stream, wanted, strict, seeking):
                        self._check_size(frame.width, frame.height)
                        size = size or (frame.width, frame.height)
                        place += repeats
                        if place <= done:  # given out before damage was found
                            continue
                        pixels = convert.reformat(frame, *size, "rgb24").to_ndarray()
                        turns = round(frame.rotation / 90) % 4
                        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
                        for _ in range(repeats):
                            yield pixels
                        done = place
                return
            except Damaged:
                # From the start again: what conceals damage are the frames decoded before it.
                self._damaged = True
        raise MissingFrames(self.name)

    def _scan_packets(self) -> bool:
        """Choose the stream and take the times of its packets; False if they do not tell all."""
        with self._file() as file, opened(file, self.name) as container:
            films = candidates(container, self.name)
            packets: dict[int, list[tuple[int | None, bool]]] = {film.index: [] for film in films}
            for packet in until_broken(container.demux(films)):
                # Discarded packets lie outside an edit list; a cut-off file ends in a corrupt one.
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    packets[packet.stream_index].append((packet.pts, packet.is_keyframe))
            film = best(films, [len(packets[film.index]) for film in films])
            self._index = film.index
            codec = film.codec_context
            self._check_size(codec.width, codec.height)
            self.coded_size = codec.height, codec.width
            shown = [pts for pts, _ in packets[film.index]]
            if not shown or None in shown or len(set(shown)) != len(shown):
                return False
            self._ids = sorted(shown)
            self._keys = sorted(pts for pts, is_key in packets[film.index] if is_key)
            self._set_times(self._ids, _stated_rate(film), float(film.time_base))
            return True

    def _scan_frames(self) -> None:
        self._by_order = True
        with self._open() as (container, stream):
            try:
                shown = [frame.pts for frame in decode(container, stream, not self._damaged)]
            except Damaged:
                self._damaged = True
                return self._scan_frames()
            if not shown:
                raise ValueError(f"{self.name} must have frames that can be decoded, got none")
            self._ids = list(range(len(shown)))
            ascending = None not in shown and all(np.diff(shown) > 0)
            self._set_times(
                shown if ascending else None, _stated_rate(stream), float(stream.time_base)
            )

    def _set_times(self, pts: Sequence[int] | None, stated: float, tick: float) -> None:
        """Times and rate from presentation times in ticks, or from the stated rate alone."""
        if pts is None and stated <= 0:
            raise ValueError(f"{self.name} must have presentation times or a frame rate, got none")
        count = len(self._ids)
        if pts is None:
            tick = 0.0
            times = np.arange(count) / stated
        else:
            times = np.array([p - pts[0] for p in pts], dtype=np.float64) * tick
        # The last frame is taken to last as long as the others do on average.
        duration = times[-1] * count / (count - 1) if count > 1 else 0.0
        self.rate = stated
        if count > 1 and (stated <= 0 or abs(count / stated - duration) > 1 / stated + tick):
            self.rate = count / duration
        self.rate = self.rate if self.rate > 0 else 1.0  # one frame without a rate: any will do
        regular = np.arange(count) * (1 / self.rate)
        self.constant_rate = bool(np.all(np.abs(times - regular) <= tick + 1e-6))
        self.times = regular if self.constant_rate else times

    def _frames(
        self, container: Any, stream: Any, wanted: list[int], strict: bool, seeking: bool
    ) -> Iterator[tuple[Any, int]]:
        """Wanted frames and how often each is.

        Args:
            wanted: Presentation times, or places in order if frames have none.
            strict: Stop at damage, and skip single frames where that changes no other.
            seeking: Skip stretches that hold no wanted frame.

        Raises:
            Damaged: A wanted frame does not come out, or with ``strict`` a packet does not decode.
        """
        if self._by_order:
            yield from self._by_ordinal(container, stream, wanted, strict)
            return
        times = set(wanted) if strict and can_skip(stream) else None

        def frames_from(key: int) -> Iterator[Any]:
            try:
                container.seek(self._keys[key], stream=stream)
            except av.error.FFmpegError:
                return frames  # not all formats can; it is further on in any case
            return decode(container, stream, strict, times, strict)

        frames = decode(container, stream, strict, times, strict)
        last = -1
        for pts, same in groupby(wanted):
            key = bisect_right(self._keys, pts) - 1
            sought = seeking and key > last + 1
            if sought:
                frames = frames_from(key)
            frame = _shown_at(frames, pts)
            back = key
            while frame is None and sought and back > 0:
                # A transport stream may be found behind its key frame, or a decoder need more.
                back = max(back - max(key - back, 1), 0)
                frames = frames_from(back)
                frame = _shown_at(frames, pts)
            if frame is None:
                raise Damaged
            last = key
            yield frame, len(list(same))

    def _by_ordinal(
        self, container: Any, stream: Any, wanted: list[int], strict: bool
    ) -> Iterator[tuple[Any, int]]:
        frames = enumerate(decode(container, stream, strict))
        for ordinal, same in groupby(wanted):
            frame = next((f for i, f in frames if i == ordinal), None)
            if frame is None:
                raise ValueError(
                    f"{self.name} must decode the same way each time, got fewer than {len(self)} "
                    "frames the second time"
                )
            yield frame, len(list(same))

    @contextmanager
    def _file(self) -> Iterator[Any]:
        """The source as an open binary file, at its start."""
        if isinstance(self._source, bytes):
            yield io.BytesIO(self._source)
        elif isinstance(self._source, str):
            with open(self._source, "rb") as file:
                yield file
        else:
            self._source.seek(0)
            yield self._source

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with self._file() as file, opened(file, self.name) as container:
            stream = container.streams[self._index]
            yield container, stream

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"{self.name} must have at most {MAX_FRAME_PIXELS} pixels a frame, got "
                f"{width}x{height}"
            )


class MissingFrames(Exception):
    """A file has fewer frames than packets; its argument is the video's name."""


def _shown_at(frames: Iterator[Any], pts: int) -> Any | None:
    """The frame of a presentation time among those to come; None if it is not there."""
    frame = next((f for f in frames if f.pts is not None and f.pts >= pts), None)
    return frame if frame is not None and frame.pts == pts else None


def _stated_rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)
