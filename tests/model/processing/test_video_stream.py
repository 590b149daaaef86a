"""Which stream of a file is the film, and frames that are decoded without their neighbours."""

import io
import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye_model.processing import video_file
from keye_model.processing.video_file import VideoFile
from keye_model.processing.video_stream import (
    Damaged,
    ahead,
    best,
    can_skip,
    decode,
    opened,
)

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[*HealthCheck])
NUM_FRAMES = 48


def encoded(codec, container, options, *, times=None, num_frames=NUM_FRAMES):
    """A textured scene that pans, so that every frame needs its neighbours."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (14, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, 30)
        for number in range(num_frames):
            top, left = int(20 + 20 * np.sin(number / 3)), 3 * number
            part = np.ascontiguousarray(scene[top : top + 64, left : left + 96])
            frame = av.VideoFrame.from_ndarray(part, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


VARIABLE = list(np.cumsum([20 + 37 * (k % 3) for k in range(NUM_FRAMES)]))
FILMS = {
    "b-frames": ("libx264", "mp4", {"bf": "3", "g": "12"}),
    "long": ("libx264", "mp4", {"bf": "3", "g": "250"}),
    "pyramid": ("libx264", "matroska", {"x264-params": "bframes=7:b-pyramid=normal:keyint=30"}),
    "open": ("libx264", "mp4", {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}),
    "transport": ("libx264", "mpegts", {"bf": "3", "g": "12"}),
    "interlaced": ("libx264", "mp4", {"x264-params": "interlaced=1:bframes=3:keyint=20"}),
    "refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:bframes=3:keyint=20"}),
    "intra": ("libx264", "mp4", {"g": "1"}),
    "mpeg4": ("mpeg4", "mp4", {"bf": "2", "g": "12"}),
    "mpeg2": ("mpeg2video", "mpegts", {"bf": "2", "g": "12"}),
    "mpeg1": ("mpeg1video", "mpeg", {"bf": "2", "g": "12"}),
    "hevc": ("libx265", "mp4", {"x265-params": "bframes=4:keyint=20:log-level=none"}),
    "layers": ("libx265", "mp4", {"x265-params": "keyint=20:temporal-layers=3:log-level=none"}),
    "vp8": ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "vp9": ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "av1": ("libsvtav1", "mp4", {"preset": "12"}),
}
SKIPPED = ("b-frames", "long", "pyramid", "open", "transport", "interlaced", "mpeg4", "hevc")


@pytest.fixture(scope="module")
def films():
    """File and all frames by `decode`, by name; each is made when it is first asked for."""
    made = {}

    def film(name):
        if name not in made:
            times = VARIABLE if name == "variable" else None
            data = encoded(*FILMS["b-frames" if times else name], times=times)
            with opened(io.BytesIO(data), "film") as container:
                frames = decode(container, container.streams.video[0])
                every = sorted((f.pts, f.to_ndarray(format="rgb24")) for f in _ordered(frames))
            made[name] = data, [pixels for _, pixels in every]
        return made[name]

    return film


def _ordered(frames):
    found = {frame.pts: frame for frame in frames}
    return [found[pts] for pts in sorted(found)]


@pytest.mark.parametrize("name", [*FILMS, "variable"])
@FEW
@given(wanted=st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=6))
def test_frames_are_those_of_a_whole_decode(films, name, wanted):
    data, every = films(name)
    video = VideoFile(data)
    assert len(video) == len(every) == NUM_FRAMES
    found = list(video.read(sorted(wanted)))
    for index, pixels in zip(sorted(wanted), found, strict=True):
        assert np.array_equal(pixels, every[index]), index


@pytest.mark.parametrize("name", SKIPPED)
def test_frames_that_no_other_needs_are_not_decoded(films, name):
    with opened(io.BytesIO(films(name)[0]), "film") as container:
        stream = container.streams.video[0]
        assert can_skip(stream)
        first = next(iter(container.demux(stream))).pts
    with opened(io.BytesIO(films(name)[0]), "film") as container:
        stream = container.streams.video[0]
        assert len(list(decode(container, stream, True, {first}))) < 0.9 * NUM_FRAMES


@pytest.mark.parametrize("name", ["layers", "vp8", "vp9", "av1"])
def test_codecs_of_which_it_is_not_known_are_decoded_whole(films, name):
    """A frame that its own temporal layer does not need may serve a higher one."""
    with opened(io.BytesIO(films(name)[0]), "film") as container:
        assert not can_skip(container.streams.video[0])


@pytest.fixture
def skipped():
    """Decode packets of these times, a key frame among them; what was skipped when each came."""

    def run(times, key, wanted, *after_seek):
        seen = {}
        codec = SimpleNamespace(is_open=False, skip_frame=None)

        def packet(pts):
            def decoded():
                seen[pts] = codec.skip_frame
                return []

            return SimpleNamespace(pts=pts, size=1, is_keyframe=pts == key, decode=decoded)

        stream = SimpleNamespace(codec_context=codec)
        container = SimpleNamespace(demux=lambda _: map(packet, times))
        assert list(decode(container, stream, True, {wanted}, *after_seek)) == []
        return seen

    return run


def test_the_packet_behind_a_wanted_one_is_decoded(skipped):
    """It may be the second field of the same frame."""
    seen = {0: "NONREF", 3: "DEFAULT", None: "DEFAULT", 1: "NONREF", 2: "NONREF"}
    assert skipped([0, 3, None, 1, 2], 0, 3) == seen


def test_frames_shown_before_the_key_frame_of_a_seek_are_not_decoded(skipped):
    """They may refer to frames before it, which would look like damage."""
    seen = {10: "NONREF", 8: "BIDIR", 7: "BIDIR", 13: "DEFAULT", 11: "DEFAULT"}
    assert skipped([5, 10, 8, 7, 13, 11], 10, 13, True) == seen


@pytest.mark.parametrize("error", ["InvalidDataError", "PatchWelcomeError", "OSError"])
def test_whatever_a_strict_decoder_says_ends_the_skipping(error):
    def fail():
        raise getattr(av.error, error)(1, "of the decoder")

    packet = SimpleNamespace(pts=0, size=1, is_keyframe=True, decode=fail)
    stream = SimpleNamespace(codec_context=SimpleNamespace(is_open=False))
    container = SimpleNamespace(demux=lambda _: iter([packet]))
    with pytest.raises(Damaged):
        list(decode(container, stream, True, {0}))
    assert stream.codec_context.options == {"err_detect": "explode"}


@pytest.fixture
def damaged(films):
    """A film of mpeg4, whose concealment is the same each time, with one packet overwritten."""
    data = bytearray(films("mpeg4")[0])
    with opened(io.BytesIO(bytes(data)), "film") as container:
        packets = container.demux(container.streams.video[0])
        _, (start, size), *_ = [(p.pos, p.size) for p in packets if p.is_keyframe]
    data[start + size // 3 : start + size] = bytes(size - size // 3)
    return bytes(data)


def test_damaged_files_are_decoded_whole(damaged, monkeypatch):
    indices = list(range(1, NUM_FRAMES, 5))
    found = list(VideoFile(damaged).read(indices))
    with opened(io.BytesIO(damaged), "film") as container, pytest.raises(Damaged):
        list(decode(container, container.streams.video[0], True, set()))
    monkeypatch.setattr(video_file, "can_skip", lambda _: False)
    whole = list(VideoFile(damaged).read(indices))
    assert len(found) == len(whole) == len(indices)
    assert all(map(np.array_equal, found, whole))


@pytest.fixture
def broken_key(films):
    """An open-GOP film whose second key frame is zeros: the frames before it conceal that."""
    data = bytearray(films("open")[0])
    with opened(io.BytesIO(bytes(data)), "film") as container:
        packets = container.demux(container.streams.video[0])
        _, (start, size), *_ = [(p.pos, p.size) for p in packets if p.is_keyframe]
    data[start + size // 4 : start + size] = bytes(size - size // 4)
    return bytes(data)


def _on_one_thread(data):
    """All frames of a film with what FFmpeg makes of damage, in the order they are shown."""
    with opened(io.BytesIO(data), "film") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        found = {}
        for packet in container.demux(stream):
            for frame in packet.decode():
                found[frame.pts] = frame.to_ndarray(format="rgb24")
    return [found[pts] for pts in sorted(found)]


@pytest.mark.parametrize("skipping", [True, False])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_damaged_frames_are_those_of_a_whole_decode(broken_key, monkeypatch, skipping, step):
    """Threads are told to end at damage, and then one thread decodes from the start again."""
    if not skipping:
        monkeypatch.setattr(video_file, "can_skip", lambda _: False)
    modes = []

    def watched(container, stream, *args):
        for frame in decode(container, stream, *args):
            modes.append((str(stream.codec_context.thread_type), stream.codec_context.thread_count))
            yield frame

    monkeypatch.setattr(video_file, "decode", watched)
    video, every = VideoFile(broken_key), _on_one_thread(broken_key)
    indices = list(range(0, NUM_FRAMES, step))
    for _ in range(2):
        for index, frame in zip(indices, video.read(indices), strict=True):
            assert np.array_equal(frame, every[index]), index
    assert "ThreadType.NONE" in modes[-1][0]
    assert modes[-1][1] == 1
    modes.clear()
    assert np.array_equal(next(video.read([0])), every[0])
    assert {count for _, count in modes} == {1}  # it stays so for this file


def test_reading_starts_again_at_damage(films, monkeypatch):
    """With the same seeks, so that the same frames come before what is concealed."""
    data, every = films("b-frames")
    video, calls = VideoFile(data), []
    whole = video._frames

    def until_damage(container, stream, wanted, strict, seeking):
        calls.append((wanted, strict, seeking))
        for number, found in enumerate(whole(container, stream, wanted, strict, seeking)):
            if strict and number == 2:
                raise Damaged
            yield found

    monkeypatch.setattr(video, "_frames", until_damage)
    indices = [0, 5, 5, 20, 40]
    for index, frame in zip(indices, video.read(indices), strict=True):
        assert np.array_equal(frame, every[index]), index
    wanted = [video._ids[index] for index in indices]
    assert calls == [(wanted, True, True), (wanted, False, True)]


@pytest.mark.parametrize("name", ["b-frames", "open", "transport", "hevc", "mpeg2", "vp9"])
def test_sound_films_are_read_by_threads_to_the_end(films, monkeypatch, name):
    """No seek and no skipping looks like damage."""
    strict = []

    def watched(container, stream, *args):
        strict.append(args[0])
        return decode(container, stream, *args)

    monkeypatch.setattr(video_file, "decode", watched)
    for indices in ([0, 7, 30, 31], [NUM_FRAMES - 1], range(NUM_FRAMES)):
        list(VideoFile(films(name)[0]).read(indices))
    assert strict
    assert all(strict)


def _reordered(corrupt=()):
    """Frames 0, 4, 1, 2, 3 in the order of decoding, as they come out of a decoder."""
    frames = [SimpleNamespace(pts=pts, is_corrupt=pts in corrupt) for pts in range(5)]
    given = {0: [], 4: frames[:1], 1: [], 2: frames[1:2], 3: frames[2:3], None: frames[3:]}

    def packet(pts):
        return SimpleNamespace(
            pts=pts, size=pts is not None, is_keyframe=pts == 0, decode=lambda: given[pts]
        )

    stream = SimpleNamespace(codec_context=SimpleNamespace(is_open=False))
    return SimpleNamespace(demux=lambda _: map(packet, given)), stream


def test_no_frame_is_given_before_those_it_may_refer_to_are_known_to_be_sound():
    assert [frame.pts for frame in decode(*_reordered(), True)] == [0, 1, 2, 3, 4]
    frames = decode(*_reordered(corrupt={4}), True)
    assert next(frames).pts == 0
    with pytest.raises(Damaged):  # 1 to 3 may refer to 4
        next(frames)
    assert len(list(decode(*_reordered(corrupt={4})))) == 5


def test_few_frames_are_held_back():
    """A time that is far off, as of a damaged packet, does not gather the rest of the film."""
    made = []

    def packet(number):
        pts = 10**9 if number == 1 else number
        frame = SimpleNamespace(pts=number, is_corrupt=False)
        decoded = lambda: made.append(number) or [frame]  # noqa: E731
        return SimpleNamespace(pts=pts, size=1, is_keyframe=number == 0, decode=decoded)

    stream = SimpleNamespace(codec_context=SimpleNamespace(is_open=False))
    container = SimpleNamespace(demux=lambda _: map(packet, range(100)))
    for frame in decode(container, stream, True):
        assert len(made) - frame.pts <= 18
    assert len(made) == 100


def test_a_file_that_cannot_seek_is_read_on(films):
    data, every = films("b-frames")
    video = VideoFile(data)

    class Unseekable:
        def __init__(self, container):
            self.demux = container.demux

        def seek(self, *_, **__):
            raise av.error.PermissionError(1, "Operation not permitted")

    with opened(io.BytesIO(data), "film") as container:
        stream = container.streams.video[0]
        wanted = [video._ids[40]]
        [(frame, _)] = video._frames(Unseekable(container), stream, wanted, True, True)
        assert np.array_equal(frame.to_ndarray(format="rgb24"), every[40])


def _stream(disposition=0, width=64, height=48):
    codec = SimpleNamespace(width=width, height=height)
    return SimpleNamespace(disposition=Disposition(disposition), codec_context=codec)


@pytest.mark.parametrize(
    ("streams", "packets", "expected"),
    [
        ([_stream(1), _stream()], [1, 90], 1),  # a still picture, though the default
        ([_stream(), _stream(1)], [90, 60], 1),  # the default track
        ([_stream(1), _stream(1, 640, 480)], [90, 60], 1),  # a preview before the film
        ([_stream(1), _stream(1)], [60, 90], 1),
        ([_stream(1), _stream(1)], [90, 90], 0),  # the first of equals
        ([_stream(Disposition.visual_impaired, 640, 480), _stream()], [90, 90], 1),
        ([_stream(), _stream()], [0, 5], 1),
        ([_stream(0, 640, 480), _stream()], [2, 30], 1),  # a picture or two, however large
        ([_stream(1), _stream()], [5, 600], 1),
        ([_stream(0, 640, 480), _stream()], [60, 600], 0),  # a film of fewer frames a second
        ([_stream(1)], [0], 0),
    ],
)
def test_best_stream(streams, packets, expected):
    assert best(streams, packets) is streams[expected]


def _two_tracks(
    first_frames, second_frames, *, container="matroska", flags=(None, None), first="mjpeg"
):
    """Two video tracks; frames of the first are black, those of the second white."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        tracks = []
        for codec, flag in zip((first, "libx264"), flags, strict=True):
            track = output.add_stream(codec, rate=10, options={"strict": "-1"})
            track.width, track.height = 64, 48
            track.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if flag is not None:
                track.disposition = flag
            tracks.append(track)
        for track, count, level in zip(
            tracks, (first_frames, second_frames), (0, 255), strict=True
        ):
            for number in range(count):
                pixels = np.full((48, 64, 3), level, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                output.mux(track.encode(frame))
            output.mux(track.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize("stills", [1, 2])
def test_a_still_first_track_is_not_the_film(container, stills):
    flags = (Disposition.default, Disposition(0))
    video = VideoFile(_two_tracks(stills, 30, container=container, flags=flags))
    assert len(video) == 30
    assert next(video.read([7])).min() > 200


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_track_is_the_film(default):
    flags = tuple(Disposition.default if k == default else Disposition(0) for k in (0, 1))
    video = VideoFile(_two_tracks(12, 12, flags=flags, first="libx264"))
    assert (next(video.read([7])).min() > 200) == (default == 1)


@pytest.mark.parametrize("flag", [Disposition.still_image, Disposition.dependent])
def test_parts_of_a_film_are_not_it(flag):
    streams = [_stream(flag), _stream()]
    container = SimpleNamespace(streams=SimpleNamespace(video=streams))
    assert video_file.candidates(container, "film") == streams[1:]
    container.streams.video = streams[:1]  # better than nothing
    assert video_file.candidates(container, "film") == streams[:1]


@pytest.mark.parametrize("where", ["title", "handler_name"])
def test_metadata_that_is_no_text_does_no_harm(where):
    """PyAV up to 18 decodes it strictly unless told not to; 19 knows no such choice."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        (output if where == "title" else stream).metadata[where] = "Zurueck"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = file.getvalue()
    assert b"Zurueck" in data
    assert len(VideoFile(data.replace(b"Zurueck", b"Zur\xfcck\xff"))) == 4


def test_an_unknown_codec_is_named():
    stream = SimpleNamespace(disposition=Disposition(0), codec_context=None)
    container = SimpleNamespace(streams=SimpleNamespace(video=[stream]))
    with pytest.raises(ValueError, match="film must use a known video codec, got an unknown one"):
        video_file.candidates(container, "film")


def test_the_next_item_is_made_while_the_last_is_used():
    begun = threading.Event()

    def items():
        yield 1
        begun.set()
        yield 2

    found = ahead(items())
    assert next(found) == 1
    assert begun.wait(60)
    assert list(found) == [2]


def test_errors_of_the_thread_reach_the_caller():
    def items():
        yield 1
        raise KeyError("lost")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(KeyError, match="lost"):
        next(found)


def test_closing_ends_the_thread_and_what_it_reads():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread())

    before = set(threading.enumerate())
    found = ahead(items())
    assert next(found) == 0
    found.close()
    assert len(closed) == 1
    assert set(threading.enumerate()) == before
