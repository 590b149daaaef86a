"""From the video of a message item to patches, for both lines."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model.processing import video_loading
from keye_model.processing.film import Film
from keye_model.processing.image import fetch_image
from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.patches import Frame
from keye_model.processing.rules import PREVIEW, V1_5
from keye_model.processing.rules.preview import resize_bicubic
from keye_model.processing.slow_fast import frame_sizes, resize_bilinear
from keye_model.processing.video_file import VideoFile
from keye_model.processing.video_processor import KeyeVideoProcessor, frame_bytes
from keye_model.processing.video_sampling import frame_indices
from tests.model.processing.messages import unpatchify

# At these bounds the image processor leaves small frames as the helper made them.
SMALL = KeyeImageProcessor(min_pixels=4 * 784)


def sample_preview(item):
    found = PREVIEW.sample(Film(item))
    return found.frames, found.keywords["fps"]


def sample_1_5(item):
    found = V1_5.sample(Film(item))
    return found.frames, found.keywords


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _pixels(video):
    """Frames of equally large patches back as [t, 3, height, width]."""
    [grid] = video.grid_thw
    return unpatchify(video.pixels, grid)


def _bicubic_weights(size_in, size_out):
    """Antialiased bicubic (a = -0.5) as a dense [size_out, size_in] matrix in double."""

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    scale = size_in / size_out
    stretch = max(scale, 1.0)
    weights = np.zeros((size_out, size_in))
    for out in range(size_out):
        centre = (out + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        for tap in range(first, min(int(centre + 2 * stretch + 0.5), size_in)):
            weights[out, tap] = kernel((tap - centre + 0.5) / stretch)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(56, 84), (112, 56), (40, 70)], ids=["down", "both", "same"])
def test_resize_bicubic_equals_dense_matrices(size):
    """fp32, clamped, rounded half to even: exact but where double lands within 1e-3 of a half."""
    frame = _noise(3, 40, 70)
    found = resize_bicubic(torch.from_numpy(frame), *size).numpy()
    exact = _bicubic_weights(40, size[0]) @ frame.astype(float) @ _bicubic_weights(70, size[1]).T
    exact = exact.clip(0, 255)
    near_half = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
    assert found.dtype == np.uint8
    assert np.array_equal(found[~near_half], np.rint(exact)[~near_half])
    assert near_half.mean() < 0.01


def test_preview_video_of_a_file(make_video, frame_codes):
    """Two seconds at 30 fps: four frames of the 60, each 128 tokens or a little more."""
    data = make_video(60, size=(96, 160))
    video = KeyeVideoProcessor(SMALL).patches({"video": data})
    indices = [0, 20, 39, 59]  # linspace(0, 59, 4) rounded
    frames = [torch.from_numpy(f).permute(2, 0, 1) for f in VideoFile(data).read(indices)]
    expected = torch.stack([resize_bicubic(frame, 252, 420) for frame in frames])
    assert video.grid_thw == ((4, 18, 30),)
    assert torch.equal(_pixels(video), expected)
    assert frame_codes(_pixels(video)) == indices
    assert video.seconds_per_frame == pytest.approx(0.5)
    assert video.frames == (Frame(18, 30, None),) * 4


def test_preview_video_clip_and_rate(make_video, frame_codes):
    """Frames 15 to 45 at 4 fps: 31 / 30 * 4 = 4.13, so 4; published rate 4 / 31 * 30."""
    item = {"video": make_video(60), "video_start": 0.5, "video_end": 1.5, "fps": 4}
    frames, fps = sample_preview(item)
    assert frame_codes(frames) == [15, 25, 35, 45]
    assert fps == pytest.approx(4 / 31 * 30)


def test_preview_second_resize_enlarges_small_frames(make_video):
    """130 tokens or fewer are below the checkpoint's 102400 pixels: bicubic by Pillow once more."""
    data = make_video(4, size=(96, 160))
    small = _pixels(
        KeyeVideoProcessor(SMALL).patches(
            {"video": data, "resized_height": 140, "resized_width": 224}
        )
    )
    large = KeyeVideoProcessor().patches(
        {"video": data, "resized_height": 140, "resized_width": 224}
    )
    assert small.shape[2:] == (140, 224)
    assert large.grid_thw == ((4, 20, 30),)
    picture = Image.fromarray(small[3].permute(1, 2, 0).numpy()).resize((420, 280), Image.BICUBIC)
    assert np.array_equal(_pixels(large)[3].permute(1, 2, 0), np.array(picture))


def test_preview_list_of_frames():
    """Each frame goes the way of a picture; the last is repeated to an even number."""
    frames = [Image.fromarray(_noise(50 + k, 90, 3)[:50]) for k in range(3)]
    item = {"video": frames, "fps": 4, "max_pixels": 12 * 784}
    found, fps = sample_preview(item)
    expected = [fetch_image({"image": frame, "max_pixels": 12 * 784}, PREVIEW) for frame in frames]
    assert [one.permute(1, 2, 0).tolist() for one in found] == [
        np.array(one).tolist() for one in [*expected, expected[-1]]
    ]
    assert fps == 4
    assert KeyeVideoProcessor(SMALL).patches(item).seconds_per_frame == 0.25
    assert sample_preview({"video": frames})[1] == 2.0


@pytest.mark.parametrize("layout", ["array", "tensor", "channels last"])
def test_frames_in_one_tensor_equal_a_list(layout):
    frames = _noise(4, 56, 84, 3)
    stacked = torch.from_numpy(frames).permute(0, 3, 1, 2)
    video = {"array": frames, "tensor": stacked, "channels last": torch.from_numpy(frames)}[layout]
    processor = KeyeVideoProcessor(SMALL)
    listed = processor.patches({"video": [Image.fromarray(frame) for frame in frames]})
    assert torch.equal(processor.patches({"video": video}).pixels, listed.pixels)


def test_preview_timestamps_give_the_rate():
    item = {"video": list(_noise(3, 56, 56, 3)), "timestamps": [1.0, 1.5, 3.0]}
    assert sample_preview(item)[1] == pytest.approx(1.0)
    assert sample_preview({"video": item["video"][:1], "timestamps": [7]})[1] == 2.0


def test_one_frame_is_a_picture():
    """8B-Preview: a video of one frame has the patches of the same picture."""
    picture = _noise(70, 110, 3)
    images = KeyeImageProcessor()
    for frames in (picture[None], [Image.fromarray(picture)], torch.from_numpy(picture)[None]):
        video = KeyeVideoProcessor(images).patches_from_frames(frames)
        image = images.patches(picture)
        assert video.grid_thw == (image.grid_thw,)
        assert torch.equal(video.pixels, image.pixels)


def test_video_1_5_of_a_file(make_video, frame_codes):
    """Two seconds: four frames, told slow from fast, resized once from their original size."""
    data = make_video(60, size=(96, 160))
    frames, options = sample_1_5({"video": data})
    originals = list(frames)
    assert frame_codes(originals) == [0, 20, 39, 59]
    assert options["timestamps"].tolist() == [
        float(np.float32(index * (1 / 30))) for index in (0, 20, 39, 59)
    ]
    fast = options["frame_types"].tolist()
    assert fast[0] == 0
    assert 1 in fast
    sizes = frame_sizes(96, 160, fast.count(0), fast.count(1))
    assert {name: options[name] for name in sizes._fields} == sizes._asdict()

    video = KeyeVideoProcessor(version="1.5").patches({"video": data})
    assert [frame.fast for frame in video.frames] == [bool(kind) for kind in fast]
    assert [frame.timestamp for frame in video.frames] == options["timestamps"].tolist()
    start = 0
    for frame, original in zip(video.frames, originals, strict=True):
        size = sizes[2:] if frame.fast else sizes[:2]
        assert (14 * frame.rows, 14 * frame.columns) == size
        count = frame.rows * frame.columns
        cut = unpatchify(video.pixels[start : start + count], (1, frame.rows, frame.columns))[0]
        assert torch.equal(cut, resize_bilinear(original, *size))
        start += count
    assert start == len(video.pixels)


def test_video_1_5_real_times(make_video, frame_codes):
    """Variable rate, and a clip: frames sampled by index, times as shown, from the file's start."""
    times = [0, 100, 150, 400, 1000, 1500, 1600, 2400]
    item = {"video": make_video(8, times=times), "nframes": 3, "video_start": 0.12}
    frames, options = sample_1_5(item)
    assert frame_codes(frames) == [2, 4, 7]  # 4.5 rounds to 4
    assert options["timestamps"].tolist() == pytest.approx([0.15, 1.0, 2.4])


def test_video_1_5_short_clip_has_a_frame(make_video):
    """A fifth of a second: the published helper samples none and fails."""
    video = KeyeVideoProcessor(version="1.5").patches({"video": make_video(6)})
    assert [(frame.timestamp, frame.fast) for frame in video.frames] == [(0.0, False)]


def test_video_1_5_list_of_frames():
    frames = [Image.fromarray(frame) for frame in _noise(3, 96, 160, 3)]
    found, options = sample_1_5({"video": frames, "fps": 4})
    resized = fetch_image(
        {"image": frames[1], "min_pixels": 48 * 784, "max_pixels": 768 * 784}, V1_5
    )
    assert np.array_equal(found[1].permute(1, 2, 0), np.array(resized))
    assert options["timestamps"].tolist() == [0, 0.25, 0.5]
    assert "timestamps" not in sample_1_5({"video": frames})[1]
    given = sample_1_5({"video": frames, "timestamps": [3, 4, 9.5], "max_frames": 2})[1]
    assert given["timestamps"].tolist() == [3, 9.5]
    silent = KeyeVideoProcessor(version="1.5").patches({"video": frames})
    assert [frame.timestamp for frame in silent.frames] == [None] * 3


def test_video_1_5_large_clips_are_decoded_twice(make_video, monkeypatch):
    """Frames past the memory bound are not kept, and the result is the same."""
    item = {"video": make_video(30), "fps": 10}
    kept = KeyeVideoProcessor(version="1.5").patches(item)
    readings = []
    read = VideoFile.read
    monkeypatch.setattr(VideoFile, "read", lambda *args: readings.append(args) or read(*args))
    monkeypatch.setattr(video_loading, "KEEP_BYTES", 10 * 48 * 64 * 3 - 1)
    again = KeyeVideoProcessor(version="1.5").patches(item)
    assert len(readings) == 2
    assert torch.equal(kept.pixels, again.pixels)
    assert kept.frames == again.frames


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_video_that_opens_between_key_frames(make_video, frame_codes, version):
    """Sampling is done anew over the frames that can be decoded."""
    data = make_video(60, container="mpegts", options={"g": "20", "bf": "0", "sc_threshold": "0"})
    whole = VideoFile(data)
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    is_video = [int.from_bytes(p[1:3], "big") & 0x1FFF == 0x100 for p in packets]
    starts = [k for k, p in enumerate(packets) if is_video[k] and p[1] & 0x40]
    cut = b"".join(packets[: starts[0]] + packets[starts[5] :])
    sample = sample_preview if version == "1.0" else sample_1_5
    frames, _ = sample({"video": cut, "nframes": 4})
    assert len(whole) == 60
    assert frame_codes(frames) == [20, 33, 46, 59]


@pytest.mark.parametrize("sample", [sample_preview, sample_1_5])
def test_video_cut_short(make_video, frame_codes, sample):
    """The index of 60 frames stands in front and the data ends early: what is there is sampled."""
    whole = make_video(60, options={"g": "10", "bf": "0"}, flags={"movflags": "faststart"})
    start = whole.index(b"mdat")
    frames, _ = sample({"video": whole[: start + (len(whole) - start) // 2], "nframes": 10})
    codes = frame_codes(frames)
    assert 10 < codes[-1] < 50
    assert codes == frame_indices(0, codes[-1], 10)


def test_processor_call_preview():
    processor = KeyeVideoProcessor(SMALL)
    videos = [torch.from_numpy(_noise(2, 3, 56, 84)).float(), list(_noise(4, 56, 56, 3))]
    batch = processor(videos, fps=[1.0, 8.0])
    parts = [processor.patches_from_frames(video) for video in videos]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6], [4, 4, 4]]
    assert batch["second_per_grid_ts"].tolist() == [1.0, 0.125]
    raw = torch.cat([part.pixels for part in parts]).double()
    assert batch["pixel_values_videos"].dtype == torch.float32
    assert torch.allclose(batch["pixel_values_videos"].double(), raw / 127.5 - 1, atol=1e-6)
    assert processor(videos, fps=4)["second_per_grid_ts"].tolist() == [0.25, 0.25]
    alone = processor(videos[0])
    assert alone["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert alone["second_per_grid_ts"].tolist() == [0.5]


def test_processor_call_1_5():
    processor = KeyeVideoProcessor(version="1.5")
    frames = torch.from_numpy(_noise(3, 3, 90, 120))
    sizes = {"height": 84, "width": 112, "fast_height": 56, "fast_width": 84}
    options = {name: [size] for name, size in sizes.items()}
    options |= {"frame_types": [torch.tensor([0, 1, 1])], "timestamps": [None]}
    batch = processor([frames], **options)
    assert batch["video_grid_thw"].tolist() == [[1, 6, 8], [2, 4, 6]]
    assert batch["num_frames"].tolist() == [3]  # not the two rows of the grid
    bare = processor.patches_from_frames(frames)
    height, width = frame_sizes(90, 120, 3, 0)[:2]
    assert bare.grid_thw == ((3, height // 14, width // 14),)
    timed = processor.patches_from_frames(frames, timestamps=[0.0, 0.5, 1.5], **sizes)
    assert [frame.timestamp for frame in timed.frames] == [0.0, 0.5, 1.5]
    assert timed.seconds_per_frame == 0.75


def test_from_pretrained(tmp_path, checkpoints):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136}))
    processor = KeyeVideoProcessor.from_pretrained(tmp_path)
    assert (processor.version, processor.image_processor.min_pixels) == ("1.0", 3136)
    versions = [KeyeVideoProcessor.from_pretrained(path).version for path in checkpoints.values()]
    assert versions == ["1.0", "1.5"]
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        KeyeVideoProcessor.from_pretrained(tmp_path / "..")


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ({"video": []}, ValueError, "video must hold 1 to 4096 frames, got 0"),
        ({"video": [0] * 4097}, ValueError, "video must hold 1 to 4096 frames, got 4097"),
        ({"video": np.zeros((3, 56, 56))}, ValueError, r"video must have shape .* got \(3, 56, 56"),
        ({"video": np.zeros((1, 3, 56, 56))}, TypeError, "an image array must be uint8"),
        ({"video": [1, 2]}, TypeError, "image must be a path"),
        ({"video": ["/no/such.png"]}, FileNotFoundError, "got '/no/such.png'"),
        (
            {"video": "/no/such.mp4"},
            FileNotFoundError,
            "video must be an existing file, got '/no/such.mp4'",
        ),
        ({"video": _noise(2, 56, 56, 3), "timestamps": [0]}, ValueError, "one time for each of 2"),
        ({"video": _noise(2, 56, 56, 3), "timestamps": [1, 1]}, ValueError, "must be ascending"),
        ({"video": _noise(2, 56, 56, 3), "timestamps": [0, math.nan]}, ValueError, "ascending"),
        (
            {"video": _noise(2, 56, 56, 3), "timestamps": [0, 1], "fps": 2},
            ValueError,
            "fps and timestamps must not both be given",
        ),
        ({"video": "a.mp4", "timestamps": [0]}, ValueError, "timestamps must come with a list"),
        ({"type": "video"}, ValueError, r"a video item must have 'video', got \['type'\]"),
        ({"video": 7}, TypeError, "video must be a path, URL, bytes, open file, list of frames"),
    ],
)
@pytest.mark.parametrize("sample", [sample_preview, sample_1_5])
def test_bad_items(sample, item, error, message):
    with pytest.raises(error, match=message):
        sample(item)


def test_bad_items_name_the_file(make_video, tmp_path):
    path = tmp_path / "short.mp4"
    path.write_bytes(make_video(1))
    with pytest.raises(ValueError, match=r"short\.mp4': a clip must have at least 2 frames, got 1"):
        sample_preview({"video": path})
    path.write_bytes(make_video(5))
    with pytest.raises(ValueError, match=r"short\.mp4': nframes must be from 2 to 4 in a clip"):
        sample_preview({"video": path, "nframes": 6})
    with pytest.raises(ValueError, match=r"short\.mp4': video_start and video_end must enclose"):
        sample_1_5({"video": path, "video_start": 9})


def test_bad_list_of_unequal_frames():
    frames = [_noise(96, 160, 3), _noise(160, 96, 3)]
    with pytest.raises(ValueError, match="must be equally large after resizing"):
        sample_1_5({"video": frames})


@pytest.mark.parametrize(
    ("version", "options", "error", "message"),
    [
        ("1.0", {"height": 28}, TypeError, "for release 1.0 must be among fps, got height"),
        ("1.5", {"fps": 2.0}, TypeError, "for release 1.5 must be among fast_height.*, got fps"),
        ("1.0", {"fps": 0}, ValueError, "fps must be a positive number, got 0"),
        ("1.5", {"height": 28}, ValueError, "height must come with width, fast_height, fast_width"),
        (
            "1.5",
            {"height": 30, "width": 28, "fast_height": 28, "fast_width": 28},
            ValueError,
            "height must be a positive multiple of 28, got 30",
        ),
        ("1.5", {"frame_types": [0]}, ValueError, "frame_types must have one value for each of 2"),
        ("1.5", {"timestamps": [0]}, ValueError, "timestamps must have one value for each of 2"),
    ],
)
def test_bad_keywords(version, options, error, message):
    with pytest.raises(error, match=message):
        KeyeVideoProcessor(version=version).patches_from_frames(_noise(2, 56, 56, 3), **options)


def test_bad_frames():
    processor = KeyeVideoProcessor()
    with pytest.raises(ValueError, match="videos must have at least one frame, got none"):
        processor.patches_from_frames([])
    with pytest.raises(ValueError, match="must hold whole numbers from 0 to 255"):
        processor.patches_from_frames(torch.rand(2, 3, 56, 56))
    with pytest.raises(ValueError, match="must hold whole numbers from 0 to 255"):
        frame_bytes(torch.full((3, 56, 56), 256.0))
    with pytest.raises(ValueError, match="videos must hold at least one video, got none"):
        processor([])
    with pytest.raises(ValueError, match="fps must have one value for each of 1 videos, got 2"):
        processor(_noise(2, 56, 56, 3), fps=[1, 2])
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        processor(_noise(2, 56, 56, 3), return_tensors="np")


def test_bad_processor():
    with pytest.raises(ValueError, match=r"version must be '1\.0' or '1\.5', got '2\.0'"):
        KeyeVideoProcessor(version="2.0")
    with pytest.raises(NotImplementedError, match="must be 28 for videos, got 32"):
        KeyeVideoProcessor(KeyeImageProcessor(patch_size=16))


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_small_frames_are_seen_alike_however_they_come(version):
    """[2, 3, 11, 3]: two frames of 3 rows and 11 pixels each, whatever holds them."""
    film = _noise(2, 3, 11, 3)
    processor = KeyeVideoProcessor(version=version)
    pictures = [Image.fromarray(frame) for frame in film]
    expected = processor.patches_from_frames(pictures)
    for video in (film, torch.from_numpy(film), list(film), torch.from_numpy(film).float()):
        found = processor.patches_from_frames(video)
        assert (found.frames, found.grid_thw) == (expected.frames, expected.grid_thw)
        assert torch.equal(found.pixels, expected.pixels)
    expected = processor.patches({"type": "video", "video": pictures})
    for video in (film, torch.from_numpy(film), list(film)):
        assert torch.equal(
            processor.patches({"type": "video", "video": video}).pixels, expected.pixels
        )
