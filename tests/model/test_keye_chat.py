"""A conversation: its history, what ends a turn, and what is saved of it."""

import base64
import gc
import io
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model import Chat, Keye
from keye_model.chat import Reply
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.processing import image_processor, slow_fast, video_processor
from keye_model.processing.rules import of, preview
from keye_model.processing.video_file import VideoFile

OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def keye(request, checkpoints):
    return Keye.from_pretrained(checkpoints[request.param])


class Scripted:
    """Stands for a `Keye`: says pieces, or raises, and remembers what it was asked."""

    def __init__(self, *answers, version="1.0"):
        self.answers, self.asked, self.streams = list(answers), [], []
        self.processor = SimpleNamespace(rules=of(version))

    def stream(self, messages, **options):
        self.asked.append((messages, options))
        pieces = self.answers.pop(0)
        if isinstance(pieces, BaseException):
            raise pieces
        self.streams.append(ScriptedStream(pieces))
        return self.streams[-1]


class ScriptedStream:
    def __init__(self, pieces):
        self._pieces, self.answer, self.closed = iter(pieces), None, False

    def __iter__(self):
        return self

    def __next__(self):
        piece = None if self.closed else next(self._pieces, None)
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            if not self.closed:
                self.answer = "an Answer"
            raise StopIteration
        return piece

    def close(self):
        self.closed = True


def asked(text, *items):
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def said(text):
    return {"role": "assistant", "content": text}


def test_turns_of_both_lines(keye, media):
    chat = keye.chat(system="Be brief.", **OPTIONS)
    first = chat.send("What is it?", images=[str(media["picture"])])
    second = chat.stream("And this?", videos=media["video"], max_new_tokens=3)
    pieces = list(second)
    history = [
        {"role": "system", "content": "Be brief."},
        asked("What is it?", {"type": "image", "image": str(media["picture"])}),
        said(chat.messages[2]["content"]),
        asked("And this?", {"type": "video", "video": media["video"]}),
        said("".join(pieces)),
    ]
    assert chat.messages == history
    assert keye.generate(history[:2], **OPTIONS).token_ids == first.token_ids
    again = keye.generate(history[:4], **{**OPTIONS, "max_new_tokens": 3})
    assert again.token_ids == second.answer.token_ids
    assert len(again.token_ids) == 3


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_second_turn_decodes_and_resizes_nothing(keye, media, monkeypatch, kind):
    done = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*arguments, **options):
            done[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    keye.processor.source_cache.clear()
    for owner, name in (
        (VideoFile, "read"), (VideoFile, "_scan_packets"), (Image.Image, "resize"),
        (Image, "open"), (preview, "interpolate"), (slow_fast, "resize_bilinear"),
        (video_processor, "patchify"), (image_processor, "patchify"),
    ):  # fmt: skip
        count(owner, name)
    source = media["picture" if kind == "image" else "video"]
    content = [{"type": kind, kind: str(source)}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    first = keye.generate(messages, **OPTIONS)
    assert done["patchify"] > 0
    for name in ("open", "resize") if kind == "image" else ("read", "_scan_packets"):
        assert done[name] > 0
    done.clear()
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
    warm = keye.generate(messages, **OPTIONS)
    assert done.total() == 0
    keye.processor.source_cache.clear()
    assert keye.generate(messages, **OPTIONS).token_ids == warm.token_ids
    assert done["patchify"] > 0


def test_a_turn_that_is_left_early_goes_on(keye):
    chat = keye.chat(**{**OPTIONS, "max_new_tokens": 20})
    pieces = []
    for piece in chat.stream("Hello"):
        pieces.append(piece)
        break
    assert chat.messages == [asked("Hello"), said(pieces[0])]
    answer = chat.send("Go on.")
    assert keye.generate(chat.messages[:3], **OPTIONS).token_ids == answer.token_ids[:4]


def test_an_answer_is_kept_as_it_was_written():
    """With its thinking: the chat template decides what the model sees of it."""
    chat = Chat(Scripted(["<think>so", "</think>", "<answer>yes</answer>"]))
    assert chat.send("Really?") == "an Answer"
    assert chat.messages[-1] == said("<think>so</think><answer>yes</answer>")


def test_options_of_the_chat_and_of_a_turn():
    keye = Scripted(["a"], ["b"], ["c"])
    chat = Chat(keye, thinking=True, max_new_tokens=5, seed=1)
    chat.send("1")
    chat.send("2", thinking=False, seed=2)
    list(chat.stream("3", progress=print))
    common = {"max_new_tokens": 5}
    assert [options for _, options in keye.asked] == [
        common | {"thinking": True, "seed": 1},
        common | {"thinking": False, "seed": 2},
        common | {"thinking": True, "seed": 1, "progress": print},
    ]
    with pytest.raises(TypeError, match="unknown keyword 'max_tokens'"):
        Chat(keye, max_tokens=5)


def test_sources_in_the_order_of_the_call():
    keye = Scripted(["a"])
    frames, tensor = ["0.png", "1.png"], torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    Chat(keye).send(
        "?",
        images=("a.png", {"image": "b.png", "max_pixels": 9}, {"image_url": {"url": "c.png"}}),
        videos=["d.mp4", frames, {"video": tensor, "fps": 1}],
    )
    [[messages, _]] = keye.asked
    assert messages == [
        asked(
            "?",
            {"type": "image", "image": "a.png"},
            {"type": "image", "image": "b.png", "max_pixels": 9},
            {"type": "image", "image_url": {"url": "c.png"}},
            {"type": "video", "video": "d.mp4"},
            {"type": "video", "video": frames},
            {"type": "video", "video": tensor, "fps": 1},
        )
    ]


@pytest.mark.parametrize("source", ["a.png", b"bytes", Image.new("RGB", (28, 28))])
def test_a_lone_source(source):
    keye = Scripted(["a"])
    chat = Chat(keye)
    chat.send("?", images=source)
    assert chat.messages[0] == asked("?", {"type": "image", "image": source})


def test_messages_are_a_copy():
    chat = Chat(Scripted(["a"], ["b"]), "S")
    chat.send("?", images=["a.png"])
    copy = chat.messages
    copy[1]["content"][0]["image"] = "other.png"
    copy[1]["content"].pop()
    copy[0]["content"] = copy[2]["role"] = None
    copy.clear()
    assert chat.messages == [
        {"role": "system", "content": "S"},
        asked("?", {"type": "image", "image": "a.png"}),
        said("a"),
    ]


@pytest.mark.parametrize("how", ["send", "stream"])
@pytest.mark.parametrize("answer", [ValueError("bad"), ["half", RuntimeError("bad")]])
def test_an_error_leaves_the_history_as_it_was(how, answer):
    keye = Scripted(["a"], answer, ["b"])
    chat = Chat(keye)
    chat.send("1")
    before = chat.messages
    with pytest.raises((ValueError, RuntimeError), match="bad"):
        "".join(chat.stream("2")) if how == "stream" else chat.send("2")
    assert chat.messages == before
    assert all(stream.closed for stream in keye.streams)
    chat.send("3")
    assert chat.messages == [asked("1"), said("a"), asked("3"), said("b")]


def test_an_error_of_both_lines(keye):
    chat = keye.chat(**OPTIONS)
    chat.send("Hello")
    before = chat.messages
    for wrong in ({"images": ["nowhere.png"]}, {"images": [{"image": "a.png", "fps": 1}]}):
        for ask in (chat.send, chat.stream):
            with pytest.raises((FileNotFoundError, ValueError)):
                ask("And this?", **wrong)
    with pytest.raises(ValueError, match="must be a string, got 5"):
        chat.send(5)
    assert chat.messages == before
    chat.send("Bye")
    assert len(chat.messages) == 4


def test_ctrl_c_in_send_forgets_and_in_a_stream_keeps_what_was_said():
    stopped = ["so ", "far", KeyboardInterrupt()]
    chat = Chat(Scripted(stopped, stopped, [KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        chat.send("1")
    assert chat.messages == []
    for text in ("2", "3"):
        with pytest.raises(KeyboardInterrupt):
            list(chat.stream(text))
    assert chat.messages == [asked("2"), said("so far")]


def test_a_closed_stream_joins_with_what_was_said():
    keye = Scripted(["a", "b", "c"], ["d"], ["e", "f"])
    chat = Chat(keye)
    stream = chat.stream("1")
    assert (next(stream), next(stream)) == ("a", "b")
    assert chat.messages == []
    stream.close()
    stream.close()
    assert chat.messages == [asked("1"), said("ab")]
    assert (stream.answer, next(stream, None)) == (None, None)
    assert keye.streams[0].closed
    chat.stream("2").close()  # nothing was said
    stream = chat.stream("3")
    next(stream)
    stream.forget()
    stream.close()
    assert chat.messages == [asked("1"), said("ab")]
    assert all(stream.closed for stream in keye.streams)


def test_a_dropped_stream_is_closed():
    keye = Scripted(["a", "b", "c"])
    chat = Chat(keye)
    for piece in chat.stream("1"):
        if piece == "b":
            break
    gc.collect()
    assert chat.messages == [asked("1"), said("ab")]
    assert keye.streams[0].closed


def test_the_next_turn_and_undo_close_an_open_stream():
    keye = Scripted(["a", "b"], ["c"], ["d", "e"], ["f"])
    chat = Chat(keye)
    first = chat.stream("1")
    next(first)
    chat.send("2")
    assert [message["content"] for message in keye.asked[1][0][1:2]] == ["a"]
    assert list(first) == []
    assert chat.messages == [asked("1"), said("a"), asked("2"), said("c")]
    third = chat.stream("3")
    next(third)
    assert chat.undo() == (asked("3"), said("d"))
    assert list(third) == []
    fourth = chat.stream("4")
    assert chat.undo() == (asked("2"), said("c"))  # nothing was said in the fourth
    assert list(fourth) == []


def test_an_empty_answer_is_an_answer():
    chat = Chat(Scripted([], []))
    assert list(chat.stream("1")) == []
    chat.send("2")
    assert chat.messages == [asked("1"), said(""), asked("2"), said("")]


def test_undo():
    chat = Chat(Scripted(["a"], ["b"]), "S")
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing to undo"):
            chat.undo()
    chat.send("1", images="a.png")
    chat.send("2")
    assert chat.undo() == (asked("2"), said("b"))
    assert chat.undo() == (asked("1", {"type": "image", "image": "a.png"}), said("a"))
    assert chat.messages == [{"role": "system", "content": "S"}]


def test_an_undone_question_is_answered_as_if_it_were_new(keye, media):
    chat = keye.chat(**OPTIONS)
    chat.send("What is it?", images=[str(media["picture"])])
    answer = chat.send("Why?")
    chat.undo()
    assert chat.send("Why?").token_ids == answer.token_ids


def test_reply_to_what_was_prepared(keye):
    chat = keye.chat(**OPTIONS)
    question = {"role": "user", "content": "Hello"}
    request = keye.processor.request([question])
    reply = chat.reply_to(question, request)
    assert isinstance(reply, Reply)
    text = "".join(reply)
    assert reply.answer.token_ids == keye.generate(request, **OPTIONS).token_ids
    assert chat.messages == [question, said(text)]


def photo(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (84, 112, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_saved_chat_goes_on_as_it_would_have(keye, media, tmp_path):
    """With each kind of source, and with options of items."""
    frames = [photo(seed=k) for k in range(4)]
    video = media["video"].read_bytes()
    chat = keye.chat("Be brief.", **OPTIONS)
    chat.send(
        "图片 1?",
        images=[
            media["picture"], media["picture"].as_uri(), {"image": photo(), "max_pixels": 6000},
            photo("RGBA"), photo("LA"), photo("P"), photo("CMYK"), encoded(photo()),
            np.array(photo()), np.array(photo("L")), torch.tensor(np.array(photo())),
            bytearray(encoded(photo())), io.BytesIO(encoded(photo())),
            {"image_url": {"url": str(media["picture"]), "detail": "high"}},
            {"base64": base64.b64encode(encoded(photo())).decode()},
        ],
    )  # fmt: skip
    chat.send(
        "Videos?",
        videos=[
            str(media["video"]), video, {"video": frames, "timestamps": np.arange(4.0)},
            [{"image": photo(), "max_pixels": 40000}, {"image": photo(), "max_pixels": 40000}],
            np.stack([np.array(frame) for frame in frames]), {"video": io.BytesIO(video), "fps": 1},
        ],
    )  # fmt: skip
    path = tmp_path / "a chat.json"
    chat.save(path)
    again = Chat.load(keye, path, **OPTIONS)
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert again.messages == plain
    requests = [
        keye.processor.request(m, add_generation_prompt=False) for m in (chat.messages, plain)
    ]
    assert torch.equal(requests[0].input_ids, requests[1].input_ids)
    assert torch.equal(requests[0].pixel_values, requests[1].pixel_values)
    assert torch.equal(requests[0].pixel_values_videos, requests[1].pixel_values_videos)
    assert requests[0].second_per_grid_ts == requests[1].second_per_grid_ts
    assert plain[1]["content"][0] == {"type": "image", "image": str(media["picture"])}
    assert plain[1]["content"][1]["image"] == media["picture"].as_uri()
    assert plain[1]["content"][2]["max_pixels"] == 6000
    assert "图片" in path.read_text(encoding="utf-8")
    assert again.send("Then?").token_ids == chat.send("Then?").token_ids
    again.save(path)
    assert Chat.load(keye, str(path)).messages == again.messages


def test_a_name_that_is_no_unicode(tmp_path):
    name, path = b"caf\xe9.png".decode("utf-8", "surrogateescape"), tmp_path / "chat.json"
    chat = Chat(Scripted(["a"]))
    chat.send("?", images=[name])
    chat.save(path)
    assert Chat.load(Scripted(), path).messages == chat.messages


def test_a_chat_without_turns(tmp_path):
    path = tmp_path / "chat.json"
    for system in (None, "S"):
        chat = Chat(Scripted(), system)
        chat.save(path)
        assert Chat.load(Scripted(), path).messages == chat.messages


def test_what_cannot_be_saved_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("mine")
    chat = Chat(Scripted(["a"]))
    chat.send("?", images=[object()])
    with pytest.raises(TypeError, match="image must be a path"):
        chat.save(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{}", "it must be a list of messages"),
        ('"hello"', "it must be a list of messages"),
        ("[1]", "user and assistant take turns"),
        ('[{"role": "user", "content": "a"}]', "user and assistant take turns"),
        ('[{"role": "assistant", "content": "a"}]', "user and assistant take turns"),
        ('[{"role": "user"}, {"role": "assistant", "content": "a"}]', "must be a string or a list"),
        ('[{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": ""}]',
         "must name its source"),
        ('[{"role": "user", "content": [{"image": "a", "zoom": 2}]}, '
         '{"role": "assistant", "content": ""}]', "unknown key 'zoom'"),
        ('[{"role": "system", "content": "a", "version": 2}]', "unknown key 'version'"),
        ("[" * 100_000, "."),
    ],
)  # fmt: skip
def test_a_file_that_is_no_chat(tmp_path, content, reason):
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"must name a conversation saved as JSON, .*{reason}"):
        Chat.load(Scripted(), path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "chat.json").write_bytes(encoded(photo()))
    with pytest.raises(ValueError, match="must name a conversation saved as JSON"):
        Chat.load(Scripted(), tmp_path / "chat.json")
    with pytest.raises(FileNotFoundError):
        Chat.load(Scripted(), tmp_path / "other.json")
    with pytest.raises(TypeError):
        Chat.load(Scripted(), tmp_path / "chat.json", system="a second one")
