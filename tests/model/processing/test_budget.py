"""Prompts that are too long: refused early, with what would fit."""

import re

import pytest

from keye_model.processing.budget import TokenBudget
from keye_model.processing.patches import Frame
from keye_model.processing.rules import v1_5
from keye_model.processing.video_file import VideoFile
from tests.model.processing.messages import film_of, image, text_item, user


@pytest.fixture
def film(make_video, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(make_video(60, size=(96, 160), rate=5))
    return {"type": "video", "video": str(path)}


def test_limit_is_the_length_of_the_prompt(processor, film):
    for messages in (user(text_item("Hello")), user(image(), text_item("Why?")), user(film)):
        length = len(processor.request(messages).input_ids)
        limited = processor.request(messages, max_tokens=length)
        assert len(limited.input_ids) == length
        with pytest.raises(ValueError, match=f"at most {length - 1} tokens, got "):
            processor.request(messages, max_tokens=length - 1)


def test_a_budget_of_one_token():
    TokenBudget(1).take(1, "text")
    with pytest.raises(ValueError, match="prompt must have at most 1 tokens, got 2 of text"):
        TokenBudget(1).take(2, "text")
    for limit in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"a positive integer or None, got {limit}"):
            TokenBudget(limit)


@pytest.mark.parametrize(
    ("limit", "advice"),
    [(235, "nframes=22 fits"), (199, "nframes=18 fits"), (100, "nframes=8 fits"),
     (39, "nframes=2 fits"), (29, "a lower max_pixels may fit")],
)  # fmt: skip
def test_the_most_frames_that_fit(limit, advice):
    """Of ten tokens a frame and ten more."""
    budget = TokenBudget(limit)
    with pytest.raises(ValueError, match=f"got 250 of a film with 24 frames; {advice}$"):
        budget.check_frames(24, lambda count: 10 * count + 10, "a film", "nframes")


def test_text_and_images(preview):
    with pytest.raises(ValueError, match=r"at most 3 tokens, got \d+ of text$"):
        preview.request(user(text_item("Hello")), max_tokens=3)
    pictures = user(image(), {"type": "image", "image": "/no/such.png"})
    with pytest.raises(ValueError, match=r"tokens, got \d+ and 6 more of image Image object$"):
        preview.request(pictures, max_tokens=36)  # before the next one is looked for


def test_times_of_frames_count(with_films):
    processor = with_films["1.5"]
    messages = user({"type": "video", "video": film_of(*[Frame(2, 2, 0.1 * k) for k in range(9)])})
    length = len(processor.request(messages).input_ids)
    with pytest.raises(ValueError, match="more of the times of its videos' frames"):
        processor.request(messages, max_tokens=length - 1)


@pytest.mark.parametrize("key", ["max_frames", "nframes"])
def test_preview_video_is_refused_before_it_is_decoded(preview, film, monkeypatch, key):
    film |= {"nframes": 24} if key == "nframes" else {}
    assert preview.request(user(film)).video_grid_thw[0][0] == 24
    with monkeypatch.context() as patch:
        patch.setattr(VideoFile, "read", lambda *_: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"more of video '.*film\.mp4' with 24 f") as caught:
            preview.request(user(film), max_tokens=1500)
    [advice] = re.findall(rf"; {key}=(\d+) fits$", str(caught.value))
    count = int(advice)
    request = preview.request(user({**film, key: count}), max_tokens=1500)
    assert request.video_grid_thw[0][0] == count
    with pytest.raises(ValueError, match=f"{key}={count} fits"):
        preview.request(user({**film, key: count + 2}), max_tokens=1500)


def test_preview_video_of_which_nothing_fits(preview, film):
    with pytest.raises(ValueError, match="with 24 frames; a lower max_pixels may fit"):
        preview.request(user(film), max_tokens=150)


def test_1_5_video_is_refused_before_it_is_resized(processors, film, monkeypatch):
    monkeypatch.setattr(v1_5, "resize_bilinear", lambda *_: pytest.fail("resized"))
    with pytest.raises(ValueError, match=r"film\.mp4' with 24 frames; a lower video_total_pixels"):
        processors["1.5"].request(user(film), max_tokens=500)


@pytest.mark.parametrize("limit", [0, 1.5, True], ids=str)
def test_bad_limit(limit):
    with pytest.raises(ValueError, match="max_tokens must be a positive integer or None, got"):
        TokenBudget(limit)
