"""Video files: every frame found, at its real time, whatever container and header say."""

import base64
import io
import wave
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from keye_model.processing import video_file
from keye_model.processing.video_file import MissingFrames, VideoFile

B_FRAMES = {"bf": "3", "g": "10"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"}


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "0"}),
        ("mp4", "libx264", B_FRAMES),
        ("matroska", "libx264", B_FRAMES),
        ("mpegts", "libx264", B_FRAMES),
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("avi", "mpeg4", {"bf": "0"}),
        ("avi", "mjpeg", {"strict": "-1"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "B" if value is B_FRAMES else "",
)
def test_video_file_reads_every_frame(make_video, frame_codes, container, codec, options):
    video = VideoFile(make_video(40, container=container, codec=codec, options=options))
    assert frame_codes(video.read(range(40))) == list(range(40))
    assert len(video) == 40
    assert video.rate == pytest.approx(30)
    assert video.constant_rate
    assert list(video.times) == [index * (1 / video.rate) for index in range(40)]


def test_video_file_without_times(make_video, frame_codes):
    """A bare H.264 stream has no times: frames are counted by decoding, at the stated rate."""
    video = VideoFile(make_video(20, container="h264", options=B_FRAMES))
    assert frame_codes(video.read([0, 7, 19])) == [0, 7, 19]
    assert len(video) == 20
    assert video.times[10] == pytest.approx(10 / video.rate)


@pytest.mark.parametrize("options", [B_FRAMES, OPEN_GOP], ids=["closed", "open"])
@pytest.mark.parametrize("indices", [[59], [3, 31, 32, 58], [0, 29, 30], [5, 5, 44]])
def test_video_file_sparse_reading_is_exact(make_video, options, indices):
    """Frames reached by seeking are bit for bit those of a straight decode."""
    video = VideoFile(make_video(60, options=options))
    every = list(video.read(range(60)))
    found = list(video.read(indices))
    assert len(found) == len(indices)
    assert all(np.array_equal(a, every[index]) for a, index in zip(found, indices, strict=True))


def test_video_file_variable_rate(make_video):
    times = [0, 100, 150, 400, 1000, 1500]
    video = VideoFile(make_video(6, times=times))
    assert not video.constant_rate
    assert video.times == pytest.approx([time / 1000 for time in times], abs=1e-6)
    assert video.rate == pytest.approx(5 / 1.5)  # five intervals; the last frame lasts the mean


def test_video_file_starts_at_zero(make_video):
    """Times count from the first frame, not from the clock of a recording."""
    video = VideoFile(make_video(4, container="matroska", times=[5000, 5100, 5200, 5300]))
    assert video.times == pytest.approx([0, 0.1, 0.2, 0.3])
    assert video.rate == pytest.approx(10)


def test_video_file_one_frame(make_video):
    video = VideoFile(make_video(1))
    assert len(video) == 1
    assert list(video.times) == [0]
    assert video.rate > 0


@pytest.mark.parametrize(("rotation", "quarters"), [(90, 1), (180, 2), (-90, 3)])
def test_video_file_applies_rotation(make_video, rotation, quarters):
    upright = next(VideoFile(make_video(3)).read([2]))
    turned = next(VideoFile(make_video(3, rotation=rotation)).read([2]))
    assert np.array_equal(turned, np.rot90(upright, quarters))


@pytest.mark.parametrize(
    ("matrix", "red_share", "blue_share"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)]
)
def test_video_file_follows_the_colour_matrix(matrix, red_share, blue_share):
    """BT.709 and BT.601 give other colours for the same bytes; the file says which it means."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = matrix
        frame = av.VideoFrame(64, 48, "yuv420p")
        for plane, level in zip(frame.planes, (100, 90, 200), strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    luma = (100 - 16) * 255 / 219
    red = luma + 2 * (1 - red_share) * (200 - 128) * 255 / 224
    blue = luma + 2 * (1 - blue_share) * (90 - 128) * 255 / 224
    green = (luma - red_share * red - blue_share * blue) / (1 - red_share - blue_share)
    found = next(VideoFile(file.getvalue()).read([0]))[24, 32]
    assert found == pytest.approx([red, green, blue], abs=2.5)  # the converter's fixed point


def test_video_file_later_frames_take_the_first_size(make_video, frame_codes):
    small = make_video(4, container="h264")
    large = make_video(4, container="h264", size=(96, 128))
    frames = list(VideoFile(small + large).read(range(8)))
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    assert frame_codes(frames) == [0, 1, 2, 3] * 2


def test_video_file_header_claims_more_frames(make_video, frame_codes):
    data = bytearray(make_video(10, container="avi", codec="mpeg4"))
    data[data.index(b"avih") + 24 : data.index(b"avih") + 28] = (5000).to_bytes(4, "little")
    data[data.index(b"strh") + 40 : data.index(b"strh") + 44] = (5000).to_bytes(4, "little")
    video = VideoFile(bytes(data))
    assert len(video) == 10
    assert video.rate == pytest.approx(30)
    assert frame_codes(video.read([0, 9])) == [0, 9]


def test_video_file_opens_between_key_frames(make_video, frame_codes):
    """Packets before the first key frame give no frames; counting again finds what does."""
    data = make_video(60, container="mpegts", options={"g": "20", "bf": "0", "sc_threshold": "0"})
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    starts = [  # packets that open a frame of the only stream
        number
        for number, packet in enumerate(packets)
        if packet[1] & 0x40 and int.from_bytes(packet[1:3], "big") & 0x1FFF == 0x100
    ]
    head = [
        packet for packet in packets[:3] if int.from_bytes(packet[1:3], "big") & 0x1FFF != 0x100
    ]
    video = VideoFile(b"".join(head + packets[starts[5] :]))
    with pytest.raises(MissingFrames):
        list(video.read([0]))
    video.recount()
    codes = frame_codes(video.read(range(len(video))))
    assert codes == list(range(20, 60))
    assert video.times[1] == pytest.approx(1 / 30)


def test_video_file_keeps_no_frames(make_video):
    video = VideoFile(make_video(50))
    alive, most = [], 0
    for frame in video.read(range(50)):
        alive = [one for one in alive if one() is not None] + [weakref.ref(frame)]
        most = max(most, sum(one() is not None for one in alive))
    assert most <= 2  # the one given out, and the one before until it is replaced


def test_video_file_sources(make_video, tmp_path):
    data = make_video(3)
    path = tmp_path / "a film.mp4"
    path.write_bytes(data)
    moved = io.BytesIO(data)
    moved.seek(100)

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    data_url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    sources = [str(path), path, f"file://{path}", path.as_uri(), data, moved, Pipe(data)]
    sources += [data_url, data_url.partition(",")[2], f" {path}\n"]
    for source in sources:
        assert len(list(VideoFile(source).read(range(3)))) == 3
    assert not moved.closed


def test_video_file_url(make_video, monkeypatch):
    seen = []

    def fetch(url, **limits):
        seen.append((url, limits["local_files_only"]))
        return make_video(3)

    monkeypatch.setattr("keye_model.processing.source.fetch", fetch)
    assert len(VideoFile("https://example.org/a.mp4")) == 3
    assert seen == [("https://example.org/a.mp4", False)]


def _audio_only():
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(8000)
        output.writeframes(bytes(1600))
    return file.getvalue()


def test_video_file_cover_picture_is_no_video(tmp_path):
    """A song with a cover has a video stream of one picture."""
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=44100)
        cover = output.add_stream("mjpeg", rate=1, options={"strict": "-1"})
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = np.zeros((2, 1024), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        samples.rate, samples.pts = 44100, 0
        output.mux(sound.encode(samples))
        output.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        output.mux(cover.encode(None))
        output.mux(sound.encode(None))
    with pytest.raises(ValueError, match="must have a video stream, got none"):
        VideoFile(tmp_path / "song.m4a")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "/no/such/film.mp4",
            FileNotFoundError,
            "video must be an existing file, got '/no/such/film.mp4'",
        ),
        (Path("/tmp"), FileNotFoundError, "must be an existing file"),
        (b"", ValueError, "video must not be empty, got zero bytes from 0 bytes"),
        (b"no film at all" * 99, ValueError, "video 1386 bytes must be a video file that FFmpeg"),
        (_audio_only(), ValueError, "must have a video stream, got none"),
        (
            b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hosts\n#EXT-X-ENDLIST\n",
            ValueError,
            "FFmpeg can read",
        ),
        (b"ffconcat version 1.0\nfile /etc/hosts\n", ValueError, "FFmpeg can read"),
        (7, TypeError, "video must be a path, URL, bytes, open file, list of frames.*int"),
        ("http://example.org/a.mp4", ValueError, "must start with https://"),
        ("data:video/mp4;base64,!", ValueError, "a data URL must be 'data:<type>;base64,<data>'"),
        ("data:video/mp4;base64,", ValueError, "must not be empty, got zero bytes"),
    ],
    ids=[
        *("missing", "folder", "empty", "junk", "audio", "playlist", "concat", "int", "http"),
        *("data_url", "empty_data_url"),
    ],
)
def test_video_file_bad_source(source, error, message):
    with pytest.raises(error, match=message):
        VideoFile(source)


def test_video_file_empty_file(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(ValueError, match=r"must not be empty, got zero bytes from '.*empty\.mp4'"):
        VideoFile(path)


def test_video_file_index_lost(make_video):
    data = make_video(30)
    with pytest.raises(ValueError, match="must be a video file that FFmpeg can read"):
        VideoFile(data[: len(data) // 2])


def test_video_file_without_frames(make_video):
    """A header and no data: nothing to sample, said plainly."""
    whole = make_video(30, flags={"movflags": "faststart"})
    with pytest.raises(ValueError, match="must have frames that can be decoded, got none"):
        VideoFile(whole[: whole.index(b"mdat") + 4])


def test_video_file_offline():
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only"):
        VideoFile("https://example.org/a.mp4", local_files_only=True)


def test_video_file_text_mode(make_video, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(make_video(2))
    with path.open(encoding="latin-1") as file, pytest.raises(TypeError, match="binary mode"):
        VideoFile(file)


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("MAX_FRAME_PIXELS", 1000, "at most 1000 pixels a frame, got 64x48"),
        ("MAX_VIDEO_BYTES", 1000, "must hold at most 1000 bytes, got more"),
    ],
)
def test_video_file_limits(make_video, monkeypatch, name, limit, message):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    monkeypatch.setattr(video_file, name, limit)
    with pytest.raises(ValueError, match=message):
        VideoFile(Pipe(make_video(2)))
