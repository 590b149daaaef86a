"""Processors of both lines, and tiny videos whose frames say which one they are."""

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keye_model.processing.processor import KeyeProcessor
from tests.model.processing.messages import LINES, Films


@pytest.fixture(scope="session")
def processors(checkpoints):
    return {key: KeyeProcessor.from_pretrained(checkpoints[v.name]) for key, v in LINES.items()}


@pytest.fixture(params=LINES)
def line(request):
    return request.param


@pytest.fixture
def processor(processors, line):
    return processors[line]


@pytest.fixture
def preview(processors):
    return processors["preview"]


@pytest.fixture
def with_films(monkeypatch, processors):
    for processor in processors.values():
        monkeypatch.setattr(processor, "video_processor", Films())
    return processors


@pytest.fixture(scope="session")
def make_video():
    return _make_video


@pytest.fixture(scope="session")
def frame_codes():
    """The numbers of frames made by `make_video`, read back from their brightness."""

    def read(frames):
        codes = []
        for frame in frames:
            pixels = np.asarray(frame).astype(float)
            pixels = pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)
            half = pixels.shape[1] // 2
            low, high = pixels[:, : half - 4].mean(), pixels[:, half + 4 :].mean()
            codes.append(round(low / 16) + 16 * round(high / 16))
        return codes

    return read


def _make_video(
    num_frames=12,
    *,
    size=(48, 64),
    container="mp4",
    codec="libx264",
    rate=30,
    times=None,
    rotation=0,
    options=None,
    flags=None,
):
    """Encode frame k with brightness 16 * (k % 16) at the left and 16 * (k // 16) at the right.

    Args:
        size: Height and width.
        times: Milliseconds at which each frame is shown; None for a constant rate.
        options, flags: Of the codec and of the container.
    """
    clock = Fraction(1, 1000) if times else Fraction(1, rate)
    with tempfile.TemporaryDirectory() as folder:  # faststart reopens its file by name
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=container, options=flags or {}) as output:
            stream = output.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = clock
            if rotation:
                stream.set_display_rotation(rotation)
            for number in range(num_frames):
                pixels = np.empty((*size, 3), dtype=np.uint8)
                pixels[:, : size[1] // 2] = 16 * (number % 16)
                pixels[:, size[1] // 2 :] = 16 * (number // 16)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = times[number] if times else number
                frame.time_base = clock
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path.read_bytes()
