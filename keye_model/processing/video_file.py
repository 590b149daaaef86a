"""A video file: when each of its frames is shown, and any of its frames as bytes, by PyAV.

A file is read twice. The first pass walks its packets without decoding and notes when each frame is
shown, so lengths and times come from what is there, never from what a header says. The second
decodes, converts only the wanted frames to RGB, and keeps none of them.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from keye_model.processing.fetch import decode_data_url, describe, fetch, file_url_path

MAX_VIDEO_BYTES = 2 << 30  # of a URL, and of an open file that cannot seek
MAX_FRAME_PIXELS = 1 << 26  # 8192x8192; a header can claim any size
FETCH_TIMEOUT = 600.0  # seconds
_COVER = Disposition.attached_pic | Disposition.timed_thumbnails  # pictures, not films


class VideoFile:
    """One video file and the presentation times of its frames, in the order they are shown.

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
            source: A path, a ``file://``, ``https://`` or ``data:…;base64,`` URL, the bytes of a
                file, or an open binary file (read from its start).
            local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: Empty, not a video, no video stream, no frames, or frames too large.
            TypeError: Another kind of source.
            RuntimeError: A URL that could not be fetched, or offline.
        """
        self.name = f"video {describe(source)}"
        self._source = _local(source, self.name, local_files_only)
        self._by_order = False
        if not self._scan_packets():
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

        Raises:
            MissingFrames: The decoder gives no frame for a packet that was counted. Count again
                with `recount`, choose anew and read again.
        """
        wanted = [self._ids[index] for index in indices]
        size = None
        with self._open() as (container, stream):
            frames = self._by_ordinal if self._by_order else self._by_time
            for frame, repeats in frames(container, stream, wanted):
                self._check_size(frame.width, frame.height)
                size = size or (frame.width, frame.height)
                pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
                for _ in range(repeats):
                    yield pixels

    def recount(self) -> None:
        """Decode once from start to end and count the frames that really come out.

        Packets and frames can differ in damaged files and in cuts that open between key frames.

        Raises:
            ValueError: No frame could be decoded.
        """
        self._scan_frames()

    def _scan_packets(self) -> bool:
        """Take the times of the packets; False if they do not tell one frame from another."""
        with self._open() as (container, stream):
            shown: list[int | None] = []
            keys = []
            for packet in _until_broken(container.demux(stream)):
                # Discarded packets lie outside an edit list; a cut-off file ends in a corrupt one.
                if packet.size and not packet.is_discard and not packet.is_corrupt:
                    shown.append(packet.pts)
                    if packet.is_keyframe and packet.pts is not None:
                        keys.append(packet.pts)
            if not shown or None in shown or len(set(shown)) != len(shown):
                return False
            self._ids = sorted(shown)
            self._keys = sorted(keys)
            self._set_times(self._ids, stream)
            return True

    def _scan_frames(self) -> None:
        self._by_order = True
        with self._open() as (container, stream):
            shown = [frame.pts for frame in _decode(container, stream)]
            if not shown:
                raise ValueError(f"{self.name} must have frames that can be decoded, got none")
            self._ids = list(range(len(shown)))
            ascending = None not in shown and all(np.diff(shown) > 0)
            self._set_times(shown if ascending else None, stream)

    def _set_times(self, pts: list[int] | None, stream: Any) -> None:
        """Times and rate from presentation times in clock ticks, or from the stated rate alone."""
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        if pts is None and stated <= 0:
            raise ValueError(f"{self.name} must have presentation times or a frame rate, got none")
        count = len(self._ids)
        tick = float(stream.time_base) if pts else 0.0
        if pts is None:
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

    def _by_time(self, container: Any, stream: Any, wanted: list[int]) -> Iterator[tuple[Any, int]]:
        """Frames shown at ``wanted`` and how often each is; skips stretches that hold none."""
        frames = _decode(container, stream)
        last = -1
        for key, group in groupby(wanted, key=lambda pts: bisect_right(self._keys, pts) - 1):
            if key > last + 1:
                container.seek(self._keys[key], stream=stream)
                frames = _decode(container, stream)
            last = key
            for pts, same in groupby(group):
                frame = next((f for f in frames if f.pts is not None and f.pts >= pts), None)
                if frame is None or frame.pts != pts:
                    raise MissingFrames(self.name)
                yield frame, len(list(same))

    def _by_ordinal(
        self, container: Any, stream: Any, wanted: list[int]
    ) -> Iterator[tuple[Any, int]]:
        frames = enumerate(_decode(container, stream))
        for ordinal, same in groupby(wanted):
            frame = next((f for i, f in frames if i == ordinal), None)
            if frame is None:
                raise ValueError(
                    f"{self.name} must decode the same way each time, got fewer than {len(self)} "
                    "frames the second time"
                )
            yield frame, len(list(same))

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        if isinstance(self._source, bytes):
            file = io.BytesIO(self._source)
        elif isinstance(self._source, str):
            file = open(self._source, "rb")  # noqa: SIM115 (closed below, unlike a caller's file)
        else:
            file = self._source
            file.seek(0)
        try:
            # PyAV sees an open file and no name, and playlists may open nothing: the empty list of
            # protocols is spelled with a name that none of them has.
            with av.open(
                file, metadata_errors="replace", container_options={"protocol_whitelist": "none"}
            ) as container:
                films = [s for s in container.streams.video if not s.disposition & _COVER]
                if not films:
                    raise ValueError(f"{self.name} must have a video stream, got none")
                stream = films[0]
                if stream.codec_context is None:
                    raise ValueError(
                        f"{self.name} must use a known video codec, got an unknown one"
                    )
                codec = stream.codec_context
                self._check_size(codec.width, codec.height)
                self.coded_size = codec.height, codec.width
                stream.thread_type = "AUTO"
                yield container, stream
        except av.error.FFmpegError as error:
            raise ValueError(
                f"{self.name} must be a video file that FFmpeg can read: {error.strerror}"
            ) from error
        finally:
            if file is not self._source:
                file.close()

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"{self.name} must have at most {MAX_FRAME_PIXELS} pixels a frame, got "
                f"{width}x{height}"
            )


class MissingFrames(Exception):
    """A file has fewer frames than packets; its argument is the video's name."""


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in the order they are shown; packets that do not decode are passed over."""
    for packet in _until_broken(container.demux(stream)):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def _until_broken(packets: Iterator[Any]) -> Iterator[Any]:
    """Packets up to the end of the file or to the point where it stops making sense."""
    try:
        yield from packets
    except av.error.InvalidDataError:
        return


def _local(source: Any, name: str, local_files_only: bool) -> str | bytes | Any:
    """A path that exists, bytes, or an open file that can seek."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        scheme = text[:8].lower()
        if scheme.startswith("data:"):
            data = decode_data_url(text)
        elif scheme.startswith(("http://", "https://")):
            data = fetch(
                text,
                max_bytes=MAX_VIDEO_BYTES,
                timeout=FETCH_TIMEOUT,
                local_files_only=local_files_only,
            )
        else:
            return _existing(text, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, io.TextIOBase):
        raise TypeError(f"{name} must be opened in binary mode")
    elif not hasattr(source, "read"):
        raise TypeError(
            "video must be a path, URL, bytes, open file, list of frames, array or tensor, got "
            f"{describe(source)}"
        )
    elif source.seekable():
        return source
    else:
        data = source.read(MAX_VIDEO_BYTES + 1)
        if len(data) > MAX_VIDEO_BYTES:
            raise ValueError(f"{name} must hold at most {MAX_VIDEO_BYTES} bytes, got more")
    if not data:
        raise ValueError(f"{name} must not be empty, got zero bytes")
    return data


def _existing(text: str, name: str) -> str:
    is_url = text.lower().startswith("file://")
    path = file_url_path(text) if is_url else os.path.expanduser(text)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name} must be an existing file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name} must not be empty, got zero bytes")
    return path
