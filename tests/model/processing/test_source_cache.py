"""What is kept of sources that were processed, and when it is found again."""

import base64
import copy
import io
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model import KeyeProcessor
from keye_model.processing import picture as picture_module
from keye_model.processing import request_processor, video_processor
from keye_model.processing.source_cache import File, SourceCache
from keye_model.processing.video_file import VideoFile
from keye_model.processing.video_processor import KeyeVideoProcessor
from tests.model.processing.messages import LINES, picture, text_item, user


@pytest.fixture
def processor(checkpoints, line):
    """One with an empty cache."""
    return KeyeProcessor.from_pretrained(checkpoints[LINES[line].name])


@pytest.fixture
def work(monkeypatch):
    """Counts the pictures and videos that are processed."""
    counts = {"pictures": 0, "films": 0}

    def count(module, name, what):
        real = getattr(module, name)

        def counted(*arguments, **options):
            counts[what] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(request_processor, "fetch_image", "pictures")
    count(video_processor, "Film", "films")
    return counts


def png(**options):
    file = io.BytesIO()
    picture(**options).save(file, "PNG")
    return file.getvalue()


def same(one, other):
    """Whether two requests hold the same."""
    pixels = (
        (one.pixel_values, other.pixel_values),
        (
            one.pixel_values_videos,
            other.pixel_values_videos,
        ),
    )
    return (
        torch.equal(one.input_ids, other.input_ids)
        and (one.image_grid_thw, one.video_grid_thw) == (other.image_grid_thw, other.video_grid_thw)
        and one.second_per_grid_ts == other.second_per_grid_ts
        and all(a is b is None or torch.equal(a, b) for a, b in pixels)
    )


@pytest.fixture
def files(tmp_path, make_video):
    photo, film = tmp_path / "photo.png", tmp_path / "film.mp4"
    photo.write_bytes(png())
    film.write_bytes(make_video(8, rate=4))
    return {"image": photo, "video": film}


def data_url(data):
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "form",
    [
        str, os.fspath, lambda path: path, lambda path: path.as_uri(),
        lambda path: os.path.relpath(path), lambda path: path.read_bytes(),
        lambda path: data_url(path.read_bytes()),
        lambda path: base64.b64encode(path.read_bytes()).decode(),
        lambda path: {"base64": base64.b64encode(path.read_bytes()).decode()},
    ],
    ids=["str", "fspath", "path", "file-url", "relative", "bytes", "data-url", "base64", "dict"],
)  # fmt: skip
def test_a_source_is_processed_once(processor, files, work, kind, form):
    messages = user({"type": kind, kind: form(files[kind])}, text_item("Hello"))
    cold = processor.request(messages)
    once = dict(work)
    assert sum(once.values()) == 1
    warm = processor.request([*messages, {"role": "assistant", "content": "Hm."}, *messages])
    assert work == once
    again = processor.request(messages)
    assert same(cold, again)
    assert warm.image_grid_thw == cold.image_grid_thw * 2
    processor.source_cache.max_bytes = 0
    assert same(cold, processor.request(messages))
    assert sum(work.values()) == 2


@pytest.mark.parametrize("kind", ["image", "video"])
def test_urls_are_known_by_their_text(processor, files, monkeypatch, kind):
    fetched = []

    def read(source, *_, **__):
        fetched.append(source)
        return files[kind].read_bytes()

    monkeypatch.setattr("keye_model.processing.picture.read_source", read)
    monkeypatch.setattr("keye_model.processing.video_file.read_source", read)
    for url in ("https://a/b", " https://a/b\n", "HTTPS://a/b", "https://a/b", "https://a/c"):
        processor.request(user({"type": kind, kind: url}))
    assert [url.strip() for url in fetched] == ["https://a/b", "HTTPS://a/b", "https://a/c"]


def test_a_list_of_frames(processor, tmp_path, work):
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for k, path in enumerate(paths):
        path.write_bytes(png(height=112, width=168, seed=k))
    video = {"type": "video", "video": [str(path) for path in paths], "timestamps": [0, 1, 2, 3]}
    cold = processor.request(user(video))
    assert same(cold, processor.request(user(video)))
    assert work["films"] == 1
    variants = [
        {"timestamps": [0.0, 1.5, 3.0, 4.5]},
        {"video": [str(path) for path in paths[::-1]]},
        {"video": [{"image": str(path), "max_pixels": 50176} for path in paths]},
        {"video": [{"image": str(path), "max_pixels": 40000} for path in paths]},
        {"video": [*map(str, paths[:3]), paths[3].read_bytes()]},
    ]
    for variant in variants:
        processor.request(user(video | variant))
    assert work["films"] == 6
    paths[2].write_bytes(png(height=112, width=168, seed=9))
    assert not same(cold, processor.request(user(video)))


@pytest.mark.parametrize(
    "source",
    [picture, lambda: np.array(picture()), lambda: torch.tensor(np.array(picture())),
     lambda: bytearray(png()), lambda: memoryview(png()), lambda: io.BytesIO(png())],
    ids=["pil", "array", "tensor", "bytearray", "memoryview", "file"],
)  # fmt: skip
def test_what_may_change_or_costs_much_to_hash_is_not_kept(processor, work, source):
    messages = user({"type": "image", "image": source()})
    assert same(processor.request(messages), processor.request(messages))
    assert work["pictures"] == 2
    frames = [source()] * 2
    for _ in range(2):
        processor.request(user({"type": "video", "video": frames}))
    assert work["films"] == 2
    assert processor.source_cache.num_bytes == 0


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_that_changed_is_read_again(processor, files, make_video, work, kind):
    def replace(data, times=None):
        new = files[kind].with_name("new")
        new.write_bytes(data)
        if times is not None:
            os.utime(new, ns=times)
        os.replace(new, files[kind])

    path, messages = files[kind], user({"type": kind, kind: str(files[kind])})
    first = path.read_bytes()
    other = png(seed=1) if kind == "image" else make_video(6, rate=4)
    cold = processor.request(messages)
    path.write_bytes(other + b"\0")  # another size
    changed = processor.request(messages)
    assert not same(cold, changed)
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))  # the same size, another time
    processor.request(messages)
    assert sum(work.values()) == 3
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    replace(path.read_bytes(), times)  # another file of the same size and time
    processor.request(messages)
    assert sum(work.values()) == 4
    replace(first)
    assert same(cold, processor.request(messages))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        processor.request(messages)


def test_a_link_that_is_turned_is_followed(processor, tmp_path, files):
    link, other = tmp_path / "link.png", tmp_path / "other.png"
    other.write_bytes(png(seed=1))
    link.symlink_to(files["image"])
    first = processor.request(user({"type": "image", "image": str(link)}))
    link.unlink()
    link.symlink_to(other)
    assert not same(first, processor.request(user({"type": "image", "image": str(link)})))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_replaced_while_it_is_read_is_not_kept(
    processor, files, make_video, monkeypatch, kind
):
    path, messages = files[kind], user({"type": kind, kind: str(files[kind])})
    other = png(seed=1) if kind == "image" else make_video(6, rate=4)
    real_image, real_video = picture_module._decoded, KeyeVideoProcessor._cut

    def after(real):
        def replaced(*arguments):
            found = real(*arguments)
            new = path.with_name("new")
            new.write_bytes(other)
            os.replace(new, path)
            return found

        return replaced

    with monkeypatch.context() as patch:
        patch.setattr(picture_module, "_decoded", after(real_image))
        patch.setattr(KeyeVideoProcessor, "_cut", after(real_video))
        first = processor.request(messages)
    assert processor.source_cache.num_bytes == 0
    assert not same(first, processor.request(messages))


def test_options_and_settings_are_part_of_the_key(processor, files, work):
    def ask(**options):
        processor.request(user({"type": "image", "image": str(files["image"]), **options}))
        return work["pictures"]

    assert [ask(), ask(), ask(max_pixels=4000), ask(max_pixels=4000), ask(max_pixels=5000)] == [
        1, 1, 2, 2, 3
    ]  # fmt: skip
    assert ask(resized_height=28, resized_width=56) == 4
    processor.image_processor.max_pixels = processor.image_processor.max_pixels // 2
    assert [ask(), ask()] == [5, 5]
    processor.image_processor.resample = Image.Resampling.NEAREST
    assert [ask(), ask()] == [6, 6]


def test_options_and_settings_of_a_video(processor, files, work, monkeypatch):
    def ask(**options):
        processor.request(user({"type": "video", "video": str(files["video"]), **options}))
        return work["films"]

    assert [ask(), ask(), ask(fps=1), ask(fps=1), ask(fps=1.5), ask(max_frames=4)] == [
        1, 1, 2, 2, 3, 4
    ]  # fmt: skip
    processor.video_processor.image_processor.resample = Image.Resampling.NEAREST
    assert [ask(), ask()] == [5, 5]
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "9000000")  # 8B-Preview reads it
    assert [ask(), ask()] == [6, 6]


def test_a_wrong_value_is_refused_though_its_equal_was_kept(processor, files):
    for value, wrong in ((1, True), (2.0, "2.0")):
        item = {"type": "video", "video": str(files["video"]), "fps": value}
        processor.request(user(item))
        with pytest.raises((ValueError, TypeError)):
            processor.request(user(item | {"fps": wrong}))


def test_errors_are_not_kept(processor, tmp_path, work):
    path = tmp_path / "photo.png"
    for data in (b"no picture", png()[:100]):
        path.write_bytes(data)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"photo\.png"):
                processor.request(user({"type": "image", "image": str(path)}))
    assert work["pictures"] == 4
    path.write_bytes(png())
    processor.request(user({"type": "image", "image": str(path)}))


def test_what_does_not_fit_is_refused_with_the_same_words(processor, files):
    for kind in ("image", "video"):
        messages = user({"type": kind, kind: str(files[kind])}, text_item("Hello"))
        words = []
        for kept in (False, True):
            if kept:
                processor.request(messages)
            with pytest.raises(ValueError, match="prompt must have at most") as caught:
                processor.request(messages, max_tokens=20)
            words.append(str(caught.value))
        assert words[0] == words[1]


def test_shapes_alone_are_not_kept(processor, files, work):
    messages = user({"type": "video", "video": str(files["video"])})
    for _ in range(2):
        request = processor.request(messages, shapes_only=True)
        assert request.pixel_values_videos.is_meta
    assert processor.source_cache.num_bytes == 0
    processor.request(messages)
    assert processor.request(messages, shapes_only=True).pixel_values_videos.is_meta
    assert work["films"] == 4


@pytest.fixture
def long_film(make_video, tmp_path):
    path = tmp_path / "long.mp4"
    path.write_bytes(make_video(60, size=(96, 160), rate=5))
    return {"type": "video", "video": str(path)}


def test_fitted_videos_are_as_without_the_cache(checkpoints, line, long_film, files):
    """At every limit from all that the video needs downwards, asked in both directions."""
    name = checkpoints[LINES[line].name]
    with_cache, without = KeyeProcessor.from_pretrained(name), KeyeProcessor.from_pretrained(name)
    without.source_cache.max_bytes = 0
    other = {"type": "video", "video": str(files["video"])}
    messages = user(long_film, text_item("Hello"), other)
    full = len(without.request(messages).input_ids)
    limits = [full + 500, full, *range(full - 1, full - 400, -57), full // 2, full // 3]
    for limit in [*limits, *limits[::-1]]:
        notes = [], []
        found = [
            processor.request(messages, max_tokens=limit, fit_videos=note.append)
            for processor, note in zip((with_cache, without), notes, strict=True)
        ]
        assert same(*found), limit
        assert notes[0] == notes[1]


def test_a_growing_conversation_finds_its_fitted_video(processor, long_film, work, monkeypatch):
    """A room that shrinks by less than a frame, or by what the video left, changes nothing."""
    messages = user(long_film)
    full = len(processor.request(messages).input_ids)
    work["films"] = 0
    first = processor.request(messages, max_tokens=2 * full, fit_videos=print)
    assert work["films"] == 1
    for limit in (2 * full - 100, 2 * full - 200, 2 * full - 300):
        assert same(first, processor.request(messages, max_tokens=limit, fit_videos=print))
    assert work["films"] == 1
    notes = []
    fitted = processor.request(messages, max_tokens=full * 2 // 3, fit_videos=notes.append)
    with monkeypatch.context() as patch:
        patch.setattr(VideoFile, "read", lambda *_: pytest.fail("decoded"))
        for less in range(1, 10):
            limit = full * 2 // 3 - less
            again = processor.request(messages, max_tokens=limit, fit_videos=notes.append)
            assert same(fitted, again)
    assert {note.partition(", to fit")[0] for note in notes} == {notes[0].partition(", to fit")[0]}
    assert len(notes) == 10


def test_the_least_recently_used_are_dropped():
    cache = SourceCache(300)
    pixels = torch.zeros(100, dtype=torch.uint8)
    keys = [cache.key({"type": "image", "image": bytes([k])}, "") for k in range(5)]
    for key in keys[:3]:
        cache.put(key, key, pixels.clone())
    assert cache.get(keys[0]) == keys[0]
    cache.put(keys[3], keys[3], pixels.clone())
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True, False]
    cache.put(keys[4], keys[4], torch.zeros(301, dtype=torch.uint8))  # larger than all room
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True, False]
    cache.put(keys[0], "new", torch.zeros(50, dtype=torch.uint8))
    assert (cache.get(keys[0]), cache.num_bytes) == ("new", 250)
    cache.max_bytes = 100
    assert [cache.get(key) for key in keys] == ["new", None, None, None, None]
    cache.clear()
    assert (cache.get(keys[0]), cache.num_bytes) == (None, 0)
    cache.max_bytes = 0
    assert cache.key({"type": "image", "image": b"x"}, "") is None
    for value in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match=f"max_bytes must be .*, got {value}"):
            cache.max_bytes = value


def test_the_kinds_do_not_meet():
    cache, data = SourceCache(), b"one and the same"
    keys = [
        cache.key({"type": kind, kind: data, **options}, settings)
        for kind in ("image", "video")
        for options in ({}, {"max_pixels": 1}, {"max_pixels": 1.0}, {"max_pixels": True})
        for settings in ("a", "b")
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key({"type": "video", "video": data, "fps": torch.tensor(2.0)}, "") is None


def test_what_is_found_is_shared_and_never_written_to(processor, files):
    """By the processor itself; whoever writes to what it returned gets it processed again."""
    messages = user(*({"type": kind, kind: str(files[kind])} for kind in files))
    first = processor.request(messages)
    copies = first.pixel_values.clone(), first.pixel_values_videos.clone()
    again = processor.request(messages)
    assert again.pixel_values.data_ptr() == first.pixel_values.data_ptr()
    processor.image_processor.image_mean = (0.1, 0.2, 0.3)  # the model's pixels are normalised now
    processor.request(messages)
    processor.image_processor.image_mean = (0.5, 0.5, 0.5)
    processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(first.pixel_values, copies[0])
    assert torch.equal(first.pixel_values_videos, copies[1])
    first.pixel_values.zero_()
    first.pixel_values_videos.zero_()
    again = processor.request(messages)
    assert torch.equal(again.pixel_values, copies[0])
    assert torch.equal(again.pixel_values_videos, copies[1])


def test_inside_inference_mode(processor, files, work):
    messages = user(*({"type": kind, kind: str(files[kind])} for kind in files))
    with torch.inference_mode():
        first = processor.request(messages)
    assert same(first, processor.request(messages))
    assert work == {"pictures": 1, "films": 1}


def test_copies_begin_empty(processor, files):
    processor.request(user({"type": "image", "image": str(files["image"])}))
    assert processor.source_cache.num_bytes > 0
    processor.source_cache.max_bytes = 12345678
    for other in (
        copy.deepcopy(processor.source_cache),
        pickle.loads(pickle.dumps(processor.source_cache)),
    ):
        assert (other.num_bytes, other.max_bytes) == (0, 12345678)


def test_threads(processor, tmp_path):
    """Each gets what it asked for while others fill and clear a cache with room for two."""
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for k, path in enumerate(paths):
        path.write_bytes(png(seed=k))
    asked = [user({"type": "image", "image": str(path)}) for path in paths]
    expected = [processor.request(messages) for messages in asked]
    processor.source_cache.max_bytes = 2 * expected[0].pixel_values.nbytes
    wrong = []

    def ask(number):
        for step in range(20):
            k = (number + step) % len(asked)
            if not same(processor.request(asked[k]), expected[k]):
                wrong.append(k)
            if step == 10:
                processor.source_cache.clear()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert processor.source_cache.num_bytes <= processor.source_cache.max_bytes


def test_a_file_is_told_by_where_and_when(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert File.at("a") == File.at(str(path))
    assert File.at("a").path == str(path)


def test_digests_are_kept_with_the_patches(processor, files, monkeypatch):
    messages = user(*({"type": kind, kind: str(files[kind])} for kind in files))
    first = processor.request(messages)
    monkeypatch.setattr(
        "keye_model.processing.patches.patch_digest", lambda _: pytest.fail("hashed")
    )
    monkeypatch.setattr("keye_model.inputs.request.patch_digest", lambda _: pytest.fail("hashed"))
    assert processor.request(messages).digests() == first.digests()
    monkeypatch.undo()
    processor.source_cache.max_bytes = 0
    cold = processor.request(messages)
    assert (cold.image_digests, cold.video_digests) == (None, None)
    assert cold.digests() == first.digests()
    processor.image_processor.image_mean = (0.1, 0.2, 0.3)
    assert processor.request(messages).digests() != first.digests()
