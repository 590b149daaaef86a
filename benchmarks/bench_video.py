"""A sampled frame of a video: milliseconds from the file's packets to RGB bytes, and to patches.

The film is 720p H.264 at 30 frames a second with three B-frames between others, 2 frames a second
are taken, and a whole group of pictures lasts 250 frames, so that nothing is gained by seeking.
Cases take turns in one run; on a shared machine only their ratios mean something.
"""

import io
import statistics
import time
from fractions import Fraction
from unittest import mock

import av
import numpy as np
import pytest

from keye_model.processing import video_file
from keye_model.processing.video_file import VideoFile
from keye_model.processing.video_processor import KeyeVideoProcessor

SECONDS, RATE = 4, 30
ROUNDS = 3


@pytest.fixture(scope="module")
def film():
    """A noisy picture that pans, with a square moving across."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (100, 240, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        options = {"preset": "veryfast", "bf": "3", "g": "250", "b_strategy": "0"}
        stream = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(SECONDS * RATE):
            left = 2 * number
            part = scene[number // 8 : number // 8 + 720, left : left + 1280].copy()
            part[300:400, 4 * number : 4 * number + 100] = 255 - number % 256
            frame = av.VideoFrame.from_ndarray(part, format="rgb24")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _read(film):
    for _ in VideoFile(film).read(range(0, SECONDS * RATE, RATE // 2)):
        pass


def _patches(film):
    KeyeVideoProcessor().patches({"video": film})


def _plain(items):
    """`ahead` without its thread."""
    return items


WHOLE = mock.patch.object(video_file, "can_skip", return_value=False)
IN_TURN = mock.patch.object(video_file, "ahead", _plain)


@pytest.mark.parametrize(
    ("run", "without", "name"),
    [
        (_read, WHOLE, "every frame decoded"),
        (_patches, WHOLE, "every frame decoded"),
        (_patches, IN_TURN, "no frame decoded ahead"),
    ],
    ids=["read", "patches", "patches_in_turn"],
)
def test_video_720p(benchmark, film, run, without, name):
    seconds = {True: [], False: []}
    for _ in range(ROUNDS if benchmark.enabled else 1):
        with without:
            start = time.perf_counter()
            run(film)
            seconds[False].append(time.perf_counter() - start)
        start = time.perf_counter()
        run(film)
        seconds[True].append(time.perf_counter() - start)
    benchmark.pedantic(run, (film,), rounds=1)
    count = 2 * SECONDS
    ours, other = (1e3 * statistics.median(seconds[key]) / count for key in (True, False))
    ratios = [b / a for a, b in zip(seconds[True], seconds[False], strict=True)]
    benchmark.extra_info.update(ms_per_frame=round(ours, 2), ratio=round(other / ours, 2))
    print(
        f"\n{run.__name__[1:]}: {ours:.1f} ms per sampled 720p frame; {name}: {other:.1f} ms, "
        f"{other / ours:.2f}x ({min(ratios):.2f} to {max(ratios):.2f} in single turns)"
    )
