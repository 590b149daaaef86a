"""The video stream of a file, by PyAV: which one, its packets, and the frames they decode to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import av
from av.stream import Disposition

T = TypeVar("T")

# PyAV 17 and 18 raise on metadata that is not UTF-8 unless told otherwise, 19 never does.
_OLDER = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_COVER = Disposition.attached_pic | Disposition.timed_thumbnails  # pictures, not films
_PART = Disposition.still_image | Disposition.dependent  # of use if there is nothing else
_IMPAIRED = Disposition.hearing_impaired | Disposition.visual_impaired
# Codecs that tell for each frame whether another refers to it, and whose decoders heed `skip_frame`
# with no effect on the frames they decode. VP8, VP9 and AV1 carry more from frame to frame.
_TELLING = {"h264", "mpeg4", "mpeg2video", "mpeg1video"}
_MOST_REORDERED = 16  # frames that a decoder keeps, by H.264 and HEVC


class Damaged(Exception):
    """A packet does not decode, or a frame does not come out or is concealed."""


@contextmanager
def opened(file: Any, name: str) -> Iterator[Any]:
    """A PyAV container of an open binary file, which is left open; FFmpeg's errors as ValueError.

    Args:
        name: How errors call the video.
    """
    try:
        # PyAV sees an open file and no name, and playlists may open nothing: the empty list of
        # protocols is spelled with a name that none of them has.
        with av.open(file, container_options={"protocol_whitelist": "none"}, **_OLDER) as container:
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{name} must be a video file that FFmpeg can read: {error.strerror}"
        ) from error


def candidates(container: Any, name: str) -> list[Any]:
    """Streams that may be the film.

    Raises:
        ValueError: There are none, or none of a known codec.
    """
    films = [s for s in container.streams.video if not s.disposition & _COVER]
    if not films:
        raise ValueError(f"{name} must have a video stream, got none")
    known = [s for s in films if s.codec_context is not None]
    if not known:
        raise ValueError(f"{name} must use a known video codec, got an unknown one")
    return [s for s in known if not s.disposition & _PART] or known


def best(streams: Sequence[Any], num_packets: Sequence[int]) -> Any:
    """The film among streams of so many packets: that which players show.

    More than one frame, and no less than a tenth of the most, goes before the default track, that
    before larger frames, and those before more of them; of equal ones it is the first.
    """
    most = max(num_packets)

    def rank(place: int) -> tuple[int, ...]:
        stream, count = streams[place], num_packets[place]
        flags, codec = stream.disposition, stream.codec_context
        fit = bool(flags & Disposition.default) - bool(flags & _IMPAIRED)
        return min(count, 2) * (10 * count >= most), fit, codec.width * codec.height, count

    return streams[max(range(len(streams)), key=rank)]


def until_broken(packets: Iterator[Any]) -> Iterator[Any]:
    """Packets up to the end of the file or to the point where it stops making sense."""
    try:
        yield from packets
    except av.error.InvalidDataError:
        return


def can_skip(stream: Any) -> bool:
    """Whether `decode` can leave frames out."""
    codec = stream.codec_context
    if codec.name == "hevc":
        # A frame that none of its temporal layer refers to may still serve a higher layer. Bits 3
        # to 5 of this byte of an hvcC record count the layers.
        record = codec.extradata or b""
        return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
    return codec.name in _TELLING


def decode(
    container: Any,
    stream: Any,
    strict: bool = False,
    wanted: Collection[int] | None = None,
    from_key: bool = False,
) -> Iterator[Any]:
    """Frames in the order they are shown.

    Args:
        strict: Stop at damage. Else packets that do not decode are passed over, and one thread
            decodes: FFmpeg's threads conceal damage in another way each time.
        wanted: With ``strict``, other frames than those of these presentation times may be left
            out: the decoder skips those that no frame refers to.
        from_key: Pass over packets before a key frame; a seek may end there.

    Raises:
        Damaged: With ``strict``, a packet does not decode or a frame is concealed, before a frame
            is given that may refer to it.
    """
    codec = stream.codec_context
    if not codec.is_open:
        codec.thread_type, codec.thread_count = ("AUTO", 0) if strict else ("NONE", 1)
        codec.options = {"err_detect": "explode"} if strict else {}
    decoded = _decoded(container, stream, strict, wanted, from_key)
    if strict:
        yield from _sound(decoded)
    else:
        for _, frames in decoded:
            yield from frames


def _decoded(
    container: Any, stream: Any, strict: bool, wanted: Collection[int] | None, from_key: bool
) -> Iterator[tuple[Any, list[Any]]]:
    """Packets, each with the frames that come out with it."""
    first, second_field = None, False
    for packet in until_broken(container.demux(stream)):
        if first is None and packet.is_keyframe:
            first = packet.pts
        if from_key and first is None and packet.size:
            continue
        if wanted is not None:
            is_wanted = packet.pts in wanted
            # The second field of a frame may be a packet of its own.
            if is_wanted or second_field:
                stream.codec_context.skip_frame = "DEFAULT"
            elif None not in (first, packet.pts) and packet.pts < first:
                # Shown before the key frame: it may refer to frames before that.
                stream.codec_context.skip_frame = "BIDIR"
            else:
                stream.codec_context.skip_frame = "NONREF"
            second_field = is_wanted
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if strict:
                raise Damaged from error
            if not isinstance(error, av.error.InvalidDataError):
                raise
            continue
        yield packet, frames


def _sound(decoded: Iterator[tuple[Any, list[Any]]]) -> Iterator[Any]:
    """Frames, each held back until those that were decoded before it have come out undamaged."""
    held: deque[Any] = deque()
    newest, due = -math.inf, {}  # when the last to be shown of those decoded before is shown
    for packet, frames in decoded:
        if packet.pts is not None:
            due[packet.pts] = newest = max(newest, packet.pts)
        for frame in frames:
            if frame.is_corrupt:
                raise Damaged
            held.append(frame)
            now = math.inf if frame.pts is None else frame.pts
            while held and (len(held) > _MOST_REORDERED or due.get(held[0].pts, now) <= now):
                given = held.popleft()
                due = {
                    pts: end
                    for pts, end in due.items()
                    if given.pts is not None and pts > given.pts
                }
                yield given
    yield from held


def ahead(items: Generator[T]) -> Iterator[T]:
    """The items; a thread makes the next one while the caller uses the last."""
    end = object()
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = pool.submit(next, items, end)
                yield item
    finally:
        items.close()
