"""process_vision_info: the published return values, and the same patches by either way."""

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.video_processor import KeyeVideoProcessor
from keye_model.processing.vision_info import process_vision_info


def _picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _turn(*items):
    return [{"role": "user", "content": [*items, {"type": "text", "text": "What is this?"}]}]


@pytest.fixture
def film(make_video, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(make_video(60, size=(96, 160)))
    return {"type": "video", "video": str(path), "fps": 3.0}


def test_preview_forms(film):
    images, videos, keywords = process_vision_info(_turn(film), return_video_kwargs=True)
    assert images is None
    [video] = videos
    assert video.dtype == torch.float32
    assert video.shape == (6, 3, 252, 420)
    assert torch.equal(video, video.round())
    assert keywords == {"fps": [6 / 60 * 30.0]}
    again = process_vision_info(_turn(film))
    assert len(again) == 2
    assert torch.equal(again[1][0], video)


def test_1_5_forms(film):
    images, videos, keywords = process_vision_info(_turn(film), version="1.5")
    assert images is None
    [video] = videos
    assert video.dtype == torch.uint8
    assert video.shape == (6, 3, 96, 160)  # the original size
    names = ["height", "width", "fast_height", "fast_width", "frame_types", "timestamps"]
    assert list(keywords) == names
    assert all(len(values) == 1 for values in keywords.values())
    assert keywords["timestamps"][0].dtype == torch.float32
    assert keywords["frame_types"][0].dtype == torch.int32


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_order_over_conversations(film, version):
    """Pictures and videos apart, each in reading order; a text-only turn is passed over."""
    pictures = [_picture(seed) for seed in range(3)]
    frames = {"type": "video", "video": [_picture(7), _picture(8)]}
    conversations = [
        _turn({"type": "image", "image": pictures[0]}, film, {"image_url": pictures[1]}),
        [{"role": "system", "content": "Be brief."}],
        _turn(frames, {"type": "image_url", "image_url": {"url": pictures[2]}}),
    ]
    images, videos, *_ = process_vision_info(conversations, version=version)
    expected = [picture.resize((84, 56)) for picture in pictures]
    assert [np.array(image).tolist() for image in images] == [
        np.array(image).tolist() for image in expected
    ]
    assert [len(video) for video in videos] == [6, 2]
    assert isinstance(videos[1], list) == (version == "1.0")


def test_1_5_timestamps_keep_their_place(film):
    """A list of frames without times leaves None, so the film's times stay the film's."""
    frames = {"type": "video", "video": [_picture(7), _picture(8)]}
    _, videos, keywords = process_vision_info(_turn(frames, film), version="1.5")
    assert keywords["timestamps"][0] is None
    assert len(keywords["timestamps"][1]) == len(videos[1])
    batch = KeyeVideoProcessor(version="1.5")(videos, **keywords)
    assert len(batch["num_frames"]) == 2


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_equals_the_processor_alone(film, version):
    """A film and a list of frames, by process_vision_info or by the processor alone."""
    processor = KeyeVideoProcessor(KeyeImageProcessor(version=version), version=version)
    items = [film, {"type": "video", "video": [_picture(k) for k in range(3)], "fps": 4}]
    _, videos, keywords = process_vision_info(_turn(*items), True, version=version)
    batch = processor(videos, **keywords)
    alone = [processor.patches(item) for item in items]
    pixels = processor.normalize(torch.cat([video.pixels for video in alone]))
    assert torch.equal(batch["pixel_values_videos"], pixels)
    assert batch["video_grid_thw"].tolist() == [
        list(row) for video in alone for row in video.grid_thw
    ]
    if version == "1.0":
        seconds = torch.tensor([video.seconds_per_frame for video in alone])
        assert torch.equal(batch["second_per_grid_ts"], seconds)


def test_processor_knows_its_line(film, processor):
    version = processor.config.variant.video_version
    found = processor.process_vision_info(_turn(film), return_video_kwargs=True)
    expected = process_vision_info(_turn(film), True, version=version)
    assert torch.equal(found[1][0], expected[1][0])
    assert list(found[2]) == list(expected[2])
    assert len(processor.process_vision_info(_turn(film))) == (2 if version == "1.0" else 3)


def test_offline(film):
    messages = _turn(film, {"image": "https://example.org/a.png"})
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only is set"):
        process_vision_info(messages, local_files_only=True)


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_nothing_to_see(version):
    images, videos, *rest = process_vision_info(
        [{"role": "user", "content": "Hello"}], True, version=version
    )
    assert (images, videos) == (None, None)
    assert rest == [{"fps": []} if version == "1.0" else {}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message, got"),
        ("hello", "messages must be a list of at least one message, got 'hello'"),
        (_turn({"type": "image"}), r"\['content'\]\[0\] must name an 'image', .* got \['type'\]"),
        (_turn({"type": "video", "video": None}), "must name an 'image', 'image_url', 'video' or"),
        (
            _turn({"image": "a.png", "video": "a.mp4"}),
            "must be one of .*, got image, video together",
        ),
        (
            _turn({"image": "/no/such.png"}, {"type": "video", "video": "a.mp4", "FPS": 1}),
            r"messages\[0\]\['content'\]\[1\] has unknown key 'FPS'; known: video, ",
        ),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        process_vision_info(messages)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (["hello"], TypeError, "one list of dicts or a list of such lists, got a str in it"),
        ([[], {"role": "user"}], TypeError, "a list of such lists, got a dict in it"),
        ([_turn(), ["hello"]], TypeError, r"messages\[0\] must be a dict, got str"),
        (
            [{"role": "user", "content": "Hi", "images": ["a.png"]}],
            ValueError,
            r"messages\[0\] has unknown key 'images': pictures and videos belong into its content",
        ),
        (
            [{"role": "user", "content": "Hi"}, {"role": "user", "content": "a", "video": "b"}],
            ValueError,
            r"messages\[1\] has unknown key 'video'",
        ),
        (
            [{"role": "user", "contents": "Hi"}],
            TypeError,
            r"\['content'\] must be .*, got NoneType",
        ),
        (
            [{"role": "user", "content": {"type": "image", "image": "a.png"}}],
            TypeError,
            r"\['content'\] must be a string or a list of items, got dict",
        ),
        (_turn({"type": "picture", "url": "a.png"}), ValueError, r"\['type'\] must be text, image"),
        (
            _turn({"img": "a.png"}),
            ValueError,
            r"text, image or video, got the keys \['img'\]",
        ),
        (_turn("a.png"), TypeError, r"\['content'\]\[0\] must be a dict, got str"),
        (
            _turn({"type": "image", "image": "a.png", "url": "b.png"}),
            ValueError,
            r"\['content'\]\[0\] must name its source once, got image and url",
        ),
    ],
)
def test_what_would_not_be_seen(messages, error, message):
    with pytest.raises(error, match=message):
        process_vision_info(messages)


def test_what_else_a_message_may_have():
    """As in keye-vl-utils: only what is shown is read."""
    calls = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        {"role": "tool", "content": "4", "tool_call_id": "a", "name": "f"},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    assert process_vision_info(messages) == (None, None)


def test_bad_version():
    with pytest.raises(ValueError, match=r"version must be '1\.0' or '1\.5', got '1\.5\.2'"):
        process_vision_info(_turn(), version="1.5.2")
