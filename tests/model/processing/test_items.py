"""Keys of message items: what is read is known, anything else is refused before it is loaded."""

import base64

import numpy as np
import pytest

from keye_model.processing.items import checked_item, kind_of
from keye_model.processing.rules import PREVIEW, V1_5, of
from keye_model.processing.video_processor import KeyeVideoProcessor
from tests.model.processing.messages import picture, user

FRAMES = [picture(), picture()]


@pytest.mark.parametrize(
    ("version", "kind", "item", "message"),
    [
        ("1.0", "video", {"video": "a", "max_frame": 4}, "key 'max_frame'; known: video, .*fps"),
        ("1.0", "video", {"video": "a", "nframe": 4}, "unknown key 'nframe'; known"),
        ("1.5", "video", {"video": "a", "FPS": 4}, "unknown key 'FPS'; known"),
        ("1.0", "image", {"image": "a", "`max_pixels`": 4}, "unknown key '`max_pixels`'; known"),
        ("1.5", "image", {"image": "a", "fps": 4}, "unknown key 'fps'; known: image, image_url"),
        ("1.0", "text", {"text": "a", "name": "b"}, "unknown key 'name'; known: text$"),
        ("1.5", "video", {"video": "a", "min_frames": 4}, "'min_frames', which belongs to .*-8B-P"),
        ("1.5", "video", {"video": "a", "total_pixels": 4}, "belongs to Keye-VL-8B-Preview; known"),
        ("1.0", "video", {"video": "a", "video_total_pixels": 4}, "belongs to Keye-VL-1.5; known"),
        ("1.0", "frames", {"video": FRAMES, "min_frame_similarity": 1}, "belongs to Keye-VL-1.5;"),
        ("1.0", "frames", {"video": FRAMES, "nframes": 2}, "which belongs to Keye-VL-1.5; known"),
        ("1.5", "frames", {"video": FRAMES, "video_end": 2}, "which is for a file; known: video"),
        ("1.0", "frames", {"video": np.zeros((2, 3, 28, 28)), "max_frames": 2}, "'max_frames'"),
        ("1.0", "video", {"video": "a", "timestamps": [0]}, "which is for a list of frames; known"),
        ("1.5", "video", {"video": "a", "resized_width": 56}, "which is for a list of frames|8B"),
        ("1.0", "image", {"image": {"url": "a", "max_pixels": 4}}, r"\['image'\] has unknown key"),
        ("1.0", "video", {"video_url": {"url": "a", "fps": 4}}, r"\['video_url'\] has unknown key"),
        ("1.0", "image", {"image": {"url": "a", "path": "b"}}, "its source once, got url and path"),
        ("1.5", "video", {"video": {"name": "a"}}, r"unknown key 'name'; known: url, path, base64"),
        ("1.0", "frames", {"video": [{"image": "a", "size": 4}]}, r"\['video'\]\[0\] .* 'size'"),
        ("1.0", "image", {"image": "a", "resized_width": 56}, "both resized_height and resized_w"),
        ("1.0", "video", {"video": "a", "resized_height": 56}, "or neither, got one"),
    ],
)
def test_bad_keys(version, kind, item, message):
    with pytest.raises(ValueError, match=rf"^here.*{message}"):
        checked_item(item, "video" if kind == "frames" else kind, "here", of(version))


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("key", ["{}", "{}_url", "url", "path", "base64"])
@pytest.mark.parametrize("nested", [False, True])
def test_where_a_source_may_stand(kind, key, nested):
    key = key.format(kind)
    found = checked_item(
        {"type": kind, key: {"url": "QUJD"} if nested else "QUJD", "max_pixels": 9},
        kind,
        "",
        PREVIEW,
    )
    source = "data:application/octet-stream;base64,QUJD" if key == "base64" else "QUJD"
    assert found == {"type": kind, kind: source, "max_pixels": 9}


@pytest.mark.parametrize("url", ["data:image/png;base64,QUJD", " DATA:;base64,QUJD"])
def test_base64_may_be_a_data_url(url):
    assert checked_item({"type": "image", "base64": url}, "image", "", PREVIEW)["image"] == url


def test_base64_may_be_bytes():
    item = checked_item({"type": "image", "base64": b"QUJD"}, "image", "", PREVIEW)
    assert item["image"] == "data:application/octet-stream;base64,QUJD"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "names", [("{}", "url"), ("url", "path"), ("{}_url", "base64"), ("{}", "{}_url")], ids=str
)
def test_a_source_is_named_once(kind, names):
    first, second = (name.format(kind) for name in names)
    with pytest.raises(ValueError, match=f"must name its source once, got {first} and {second}"):
        checked_item({"type": kind, first: "a", second: "a"}, kind, "here", PREVIEW)
    assert checked_item({"type": kind, first: "a", second: None}, kind, "", V1_5)[kind]


def test_frames_name_their_sources_as_pictures_do():
    frames = [{"type": "image", "path": "a"}, {"image": "b", "url": None}]
    assert checked_item({"video": frames}, "video", "", PREVIEW)["video"] == frames
    with pytest.raises(ValueError, match=r"\['video'\]\[0\] must name its source once, got image"):
        checked_item({"video": [{"image": "a", "url": "b"}]}, "video", "here", PREVIEW)


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"type": "input_text", "text": "a"}, "text"),
        ({"type": "output_text", "text": "a", "annotations": []}, "text"),
        ({"type": "input_image", "image_url": "a", "detail": "auto"}, "image"),
        ({"type": "image_url", "image_url": {"url": "a"}}, "image"),
        ({"type": "video_url", "video_url": {"url": "a"}}, "video"),
        ({"type": "image"}, "image"),
        ({"video": "a"}, "video"),
    ],
    ids=str,
)
def test_what_an_item_is(item, kind):
    assert kind_of(item, "here") == kind
    source = {kind: "a"} if item != {"type": "image"} else {}
    assert checked_item(item, kind, "here", PREVIEW) == {"type": kind} | source


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("a", TypeError, "here must be a dict, got str"),
        ({"image": "a", "text": "b"}, ValueError, "here must be .*, got image, text together"),
        ({"type": "video", "image": "a"}, ValueError, "here must be .*, got image, video together"),
        (
            {"type": "audio", "audio": "a"},
            ValueError,
            r"here\['type'\] must be text, .*'audio'",
        ),
        (
            {"type": "audio", "text": "a"},
            ValueError,
            r"here\['type'\] must be text, .*'audio'",
        ),
        ({"type": ["image"]}, ValueError, r"here\['type'\] must be text, .*, got \['image'\]"),
        ({"url": "a"}, ValueError, r"here must be .*, got the keys \['url'\]"),
        ({3: "a"}, ValueError, r"here must be .*, got the keys \['3'\]"),
    ],
)
def test_items_that_are_no_one_thing(item, error, message):
    with pytest.raises(error, match=message):
        kind_of(item, "here")


@pytest.mark.parametrize("key", ["url", "path", "base64", "image_url"])
def test_sources_are_read_wherever_they_stand(processor, tmp_path, key):
    path = tmp_path / "a.png"
    FRAMES[0].save(path)
    source = base64.b64encode(path.read_bytes()).decode() if key == "base64" else str(path)
    plain = processor.request(user({"type": "image", "image": str(path)}))
    request = processor.request(user({"type": "image", key: source}))
    assert request.input_ids.equal(plain.input_ids)
    assert request.pixel_values.equal(plain.pixel_values)
    [found], *_ = processor.process_vision_info(user({"type": "image", key: source}))
    [expected], *_ = processor.process_vision_info(user({"type": "image", "image": str(path)}))
    assert found == expected
    missing = "0000" if key == "base64" else "/no/such.png"
    error = ValueError if key == "base64" else FileNotFoundError
    with pytest.raises(error):
        processor.request(user({"type": "image", key: missing}))


@pytest.mark.parametrize("key", ["url", "path", "base64"])
def test_videos_are_read_wherever_they_stand(processor, make_video, tmp_path, key):
    path = tmp_path / "a.mp4"
    path.write_bytes(make_video(4))
    source = base64.b64encode(path.read_bytes()).decode() if key == "base64" else str(path)
    plain = processor.request(user({"type": "video", "video": str(path)}))
    request = processor.request(user({"type": "video", key: source}))
    assert request.pixel_values_videos.equal(plain.pixel_values_videos)


@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_habits_of_other_interfaces_are_passed_over(kind):
    item = {"type": f"{kind}_url", kind: "a", "detail": "high", "cache_control": {}, "size": None}
    assert checked_item(item, kind, "here", PREVIEW) == {"type": kind, kind: "a"}
    if kind != "text":
        nested = {f"{kind}_url": {"url": "a", "detail": "low"}}
        assert checked_item(nested, kind, "here", PREVIEW)["type"] == kind


def test_every_key_is_known_to_its_line():
    file = {"video": "a", "fps": 1, "max_frames": 4, "video_start": 0, "min_pixels": 1}
    preview = {"min_frames": 2, "total_pixels": 1, "resized_height": 28, "resized_width": 28}
    new = {"video_total_pixels": 1, "min_frame_similarity": 0.5}
    assert checked_item(file | preview, "video", "", PREVIEW) == file | preview | {"type": "video"}
    assert checked_item(file | new, "video", "", V1_5) == file | new | {"type": "video"}


def test_request_checks_before_it_loads(processor):
    messages = user({"type": "image", "image": "/no/such.png", "max_pixel": 4})
    with pytest.raises(ValueError, match=r"messages\[0\]\['content'\]\[0\] has .* 'max_pixel'; kn"):
        processor.request(messages)
    messages = user({"image": "/no/such.png"}, {"type": "video", "video": "a", "max_frame": 4})
    with pytest.raises(ValueError, match=r"messages\[0\]\['content'\]\[1\] has .* 'max_frame'; kn"):
        processor.request(messages)


def test_video_processor_checks_too(make_video):
    with pytest.raises(ValueError, match="a video item has unknown key 'max_frame'; known"):
        KeyeVideoProcessor().patches({"video": make_video(4), "max_frame": 4})


def test_video_url_item(processor, make_video, tmp_path):
    data, path = make_video(4), tmp_path / "clip.mp4"
    path.write_bytes(data)
    plain = processor.request(user({"type": "video", "video": data}))
    coded = base64.b64encode(data).decode()
    for source in (data, {"url": data}, {"path": str(path)}, {"base64": coded}):
        request = processor.request(user({"type": "video_url", "video_url": source}))
        assert request.input_ids.tolist() == plain.input_ids.tolist()
        assert request.pixel_values_videos.equal(plain.pixel_values_videos)
