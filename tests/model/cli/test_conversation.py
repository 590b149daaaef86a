"""The conversation of `keye chat`."""

import io
import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from keye_model.cli import main
from keye_model.inputs.answer import Usage
from keye_model.keye import Keye
from keye_model.processing.fetch import describe
from keye_model.processing.processor import KeyeProcessor
from tests.model.pseudo_terminal import Session


@pytest.fixture
def talk(capsys, monkeypatch, preview_checkpoint):
    """Say lines to `keye chat` as a script does; its status, output, errors and requests."""

    def talk(*lines, options=(), outcomes=(), stdin=io.StringIO):
        asked, shown = [], iter(outcomes)
        real_request, real_stream = KeyeProcessor.request, Keye.stream

        def request(self, messages, **settings):
            found = real_request(self, messages, **settings)
            # Attachments are checked alone, in a message without a text.
            if messages[-1]["content"][-1]["type"] == "text":
                asked.append(messages)
            return found

        def stream(self, *arguments, **settings):
            outcome = next(shown, None)
            if outcome is None:
                return real_stream(self, *arguments, **settings)
            return Outcome(outcome)

        with monkeypatch.context() as patch:
            patch.setattr(KeyeProcessor, "request", request)
            patch.setattr(Keye, "stream", stream)
            patch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
            arguments = (
                "--model",
                preview_checkpoint,
                "--max-new-tokens",
                3,
                "--seed",
                0,
                *options,
            )
            status = main(["chat", *map(str, arguments)])
        return SimpleNamespace(status=status, asked=asked, **capsys.readouterr()._asdict())

    return talk


class Terminal(io.StringIO):
    """Lines of a person."""

    def isatty(self):
        return True


class Outcome:
    """A stream of pieces; an exception among them is raised."""

    def __init__(self, pieces):
        self._pieces, self.answer = iter(pieces), None

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self._pieces, None)
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            self.answer = SimpleNamespace(finish_reason="stop", usage=Usage(9, 0, 0, 2))
            raise StopIteration
        return piece

    def close(self):
        pass


def kinds(message):
    return [item["type"] for item in message["content"]]


def test_chat_keeps_the_conversation(talk, media):
    done = talk(f"/image {media['picture']}", "What is it?", "And now?", "/reset", "Look.", "/quit")
    assert done.status == 0
    assert [len(messages) for messages in done.asked] == [1, 3, 1]
    assert kinds(done.asked[0][0]) == ["image", "text"]
    assert kinds(done.asked[1][2]) == kinds(done.asked[2][0]) == ["text"]
    assert done.asked[1][1]["role"] == "assistant"
    assert done.out.startswith(done.asked[1][1]["content"])
    assert "attached, 24 tokens\n" in done.err
    assert done.err.count("[cut at 3 tokens; --max-new-tokens]\n") == 3


def test_attachments_tell_their_tokens_and_take_quotes_and_options(talk, media, tmp_path):
    picture, video = tmp_path / "my photo's.png", tmp_path / "my clip.mp4"
    picture.write_bytes(media["picture"].read_bytes())
    video.write_bytes(media["video"].read_bytes())
    done = talk(
        f'/image "{picture}"',
        f"/image {picture}",  # as it is, if it is a file
        f'/image "{picture}" --max-pixels 12000',
        f'/video "{video}" --fps 1 --max-frames 2',
        f"/video --max-pixels 4000 '{video}' --total-pixels 9000",
        "What do you see?",
    )
    assert done.status == 0
    *items, _ = done.asked[0][-1]["content"]
    assert items == [
        {"type": "image", "image": str(picture)},
        {"type": "image", "image": str(picture)},
        {"type": "image", "image": str(picture), "max_pixels": 12000},
        {"type": "video", "video": str(video), "fps": 1.0, "max_frames": 2},
        {"type": "video", "video": str(video), "max_pixels": 4000, "total_pixels": 9000},
    ]
    notes = [line for line in done.err.splitlines() if line.startswith("attached, ")]
    assert notes[:4] == [f"attached, {n} tokens" for n in (24, 24, 12, 280)]


def test_defaults_for_videos_and_first_attachments_stand_on_the_command_line(talk, media):
    options = ("--max-frames", 4, "--system", "Be brief.", "--image", media["picture"])
    options += ("--video", media["video"])
    done = talk("One.", f"/video {media['video']}", f"/video {media['video']} --max-frames 2",
                "Two.", options=options)  # fmt: skip
    first, second = done.asked
    assert first[0] == {"role": "system", "content": "Be brief."}
    assert kinds(first[1]) == ["image", "video", "text"]
    assert first[1]["content"][1]["max_frames"] == 4
    assert [item.get("max_frames") for item in second[-1]["content"]] == [4, 2, None]
    assert "attached, 24 tokens\nattached, 560 tokens\n" in done.err


def test_a_bad_attachment_is_dropped(talk, media, tmp_path):
    (tmp_path / "no picture.png").write_text("hello")
    cut = tmp_path / "cut.png"
    cut.write_bytes(media["picture"].read_bytes()[:200])
    done = talk(
        "/image nowhere.png",
        f"/image {tmp_path / 'no picture.png'}",
        f"/image {cut}",
        f"/video {media['picture'].parent}",
        f"/video {cut}",
        "/image",
        "/image 'open",
        f"/image {media['picture']} {media['picture']}",
        f"/image {media['picture']} --fps 1",
        f"/video {media['video']} --fps 0",
        f"/image {media['picture']} --max-pixels 99999999",
        f"/video {media['video']} --fps 4 --min-pixels 600000",
        "Hello",
    )
    assert done.status == 1
    assert [kinds(messages[-1]) for messages in done.asked] == [["text"]]
    errors = [line for line in done.err.splitlines() if line.startswith("keye: error: ")]
    assert len(errors) == 12
    for error, part in zip(
        errors,
        ["'nowhere.png'", "no picture.png", "cut.png", str(media["picture"].parent), "cut.png",
         "PATH_OR_URL", "quotes must be closed, got 'open", "unrecognized arguments",
         "unrecognized arguments: --fps 1", "--fps must be a positive number, got '0'",
         "--max-pixels must be in [", "prompt must have at most"],
        strict=True,
    ):  # fmt: skip
        assert part in error


def test_an_attachment_that_breaks_later_is_dropped_and_the_others_wait(talk, media, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(media["picture"].read_bytes())
    real = KeyeProcessor.request

    def request(self, messages, **options):
        if messages[-1]["content"][-1] == {"type": "text", "text": "One."}:
            photo.unlink()
        return real(self, messages, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyeProcessor, "request", request)
        done = talk(f"/image {photo}", f"/image {media['picture']}", "One.", "Two.")
    assert done.status == 1
    assert [len(messages) for messages in done.asked] == [1]
    assert [item.get("image") for item in done.asked[0][0]["content"]] == [
        str(media["picture"]),
        None,
    ]
    assert f"{describe(str(photo))} is dropped" in done.err
    assert "attachments are kept for the next message; /undo drops the last one" in done.err
    assert "photo.png" in next(li for li in done.err.splitlines() if li.startswith("keye: error: "))


def test_a_failed_or_stopped_answer_leaves_the_conversation_sane(talk, media):
    done = talk(
        f"/image {media['picture']}", "one", "two", "three", "four",
        outcomes=[
            ["said", RuntimeError("out of memory")],
            [KeyboardInterrupt()],
            ["so ", "far", KeyboardInterrupt()],
            ["all"],
        ],
        stdin=Terminal,
    )  # fmt: skip
    # A failed turn, and one stopped before its first word, are forgotten, and the picture waits;
    # one stopped later is kept as far as it went.
    assert [(len(m), kinds(m[-1])) for m in done.asked] == [
        (1, ["image", "text"]),
        (1, ["image", "text"]),
        (1, ["image", "text"]),
        (3, ["text"]),
    ]
    assert done.asked[3][1] == {"role": "assistant", "content": "so far"}
    assert done.out == "said\nso far\nall\n"
    assert done.err.count("(stopped)") == 2
    assert "keye: error: out of memory" in done.err
    assert done.err.count("attachments are kept for the next message") == 2
    assert done.status == 0


@pytest.mark.parametrize("before", [[], ["so far"]])
def test_an_interrupt_ends_a_script(talk, before):
    done = talk("one", "two", outcomes=[[*before, KeyboardInterrupt()], ["never"]])
    assert (done.status, len(done.asked)) == (130, 1)
    assert done.out == "".join(f"{piece}\n" for piece in before)


def test_undo(talk, media):
    done = talk(
        "/undo", f"/image {media['picture']}", "/undo", f"/image {media['picture']}", "one", "two",
        "/undo", "three", "/undo", "/undo", "four", "/undo", "/undo", "five",
        outcomes=[[word] for word in "abcde"],
    )  # fmt: skip
    assert "keye: error: there is nothing to undo" in done.err
    assert [(len(m), kinds(m[-1])) for m in done.asked] == [
        (1, ["image", "text"]),
        (3, ["text"]),
        (3, ["text"]),
        (1, ["image", "text"]),  # the picture of the question that was undone waits again
        (1, ["text"]),
    ]


def test_save(talk, tmp_path):
    upright, turned = Image.new("RGB", (168, 112)), Image.Exif()
    turned[0x0112] = 6
    photo, file = tmp_path / "photo.jpg", tmp_path / "a talk.json"
    upright.save(photo, exif=turned)
    other = tmp_path / "other.json"
    other.write_text("mine")
    done = talk(
        f"/image {photo} --exif", "图片?", f"/save '{file}'", "Again", f"/save '{file}'",
        f"/save {other}", "/save", "/save a b",
        options=("--system", "Be brief."), outcomes=[["\x1b[31m"], ["yes"]],
    )  # fmt: skip
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(photo)},
                {"type": "text", "text": "图片?"},
            ],
        },
        {"role": "assistant", "content": "\x1b[31m"},
        {"role": "user", "content": [{"type": "text", "text": "Again"}]},
        {"role": "assistant", "content": "yes"},
    ]
    assert other.read_text() == "mine"
    assert f"saved 3 messages to {file}\n" in done.err
    assert ", which exists" in done.err
    assert done.err.count("/save must be followed by one file, got") == 2
    assert done.status == 1


@pytest.mark.parametrize("word", ["/quit", "/exit", "exit", "quit", " quit ", "/quit\t"])
def test_ways_to_leave(talk, word):
    done = talk(word, "Hello")
    assert (done.status, done.asked, done.out) == (0, [], "")


def test_help_and_unknown_commands(talk):
    done = talk("/help")
    assert (done.status, done.out) == (0, "")
    for command in ("/image", "/video", "/undo", "/reset", "/save", "/quit", "--max-frames"):
        assert command in done.err
    done = talk("/nonsense now", " /etc is what?", "", "   ", outcomes=[["a folder"]])
    assert "unknown command /nonsense; /help lists the commands" in done.err
    assert [m[-1]["content"][0]["text"] for m in done.asked] == ["/etc is what?"]
    assert done.status == 1


def test_lines_of_other_systems(talk, monkeypatch, preview_checkpoint, capsys):
    done = talk("\ufeffHello\r", "x" * 100_000, outcomes=[["a"], ["b"]])
    assert [m[-1]["content"][0]["text"] for m in done.asked] == ["Hello"]
    assert "prompt must have at most 4095 tokens" in done.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/quit\n"), "utf-8"))
    assert main(["chat", "--model", str(preview_checkpoint)]) == 1
    assert "keye: error: " in capsys.readouterr().err


def test_what_waits_and_what_was_said_count_for_what_fits(talk, media):
    video = f"/video {media['video']}"
    done = talk(*[video] * 3, "One.", video, "Two.", options=("--max-new-tokens", 2000),
                outcomes=[["a"], ["b"]])  # fmt: skip
    assert done.status == 0, done.err
    notes = re.sub(r"video '.*'", "video", done.err).splitlines()
    fitted = "video: 2 frames instead of 4, at most 140 tokens each, to fit a prompt of 377 tokens"
    assert notes == ["attached, 560 tokens"] * 3 + [fitted, "attached, 280 tokens"]


def test_attachments_of_a_mistaken_command_line_end_it(talk):
    done = talk("Hello", options=("--image", "nowhere.png"))
    assert (done.status, done.asked) == (1, [])


@pytest.fixture
def session(preview_checkpoint):
    session = Session("chat", "--model", preview_checkpoint, "--max-new-tokens", 3, "--greedy")
    yield session
    session.close()


def test_on_a_terminal(session, media):
    """Ctrl-C at the prompt asks once; lines are edited; Ctrl-D leaves."""
    session.wait_for("/help lists the commands")
    session.wait_for_prompt()
    session.type("half a line\x03")
    session.wait_for("Ctrl-C once more leaves, as do Ctrl-D and /quit")
    session.wait_for_prompt()
    session.type(f"/image {media['picture']}\n")
    session.wait_for("attached, 24 tokens")
    session.wait_for_prompt()
    session.type("\x03")  # a line came between: it asks again
    session.wait_for("Ctrl-C once more leaves")
    session.wait_for_prompt()
    session.type("What is it?\n")
    session.wait_for("[cut at 3 tokens; --max-new-tokens]")
    session.wait_for_prompt()
    session.type("\x04")
    assert session.status() == 0
    assert "Traceback" not in session.seen


def test_a_second_interrupt_leaves(session):
    session.wait_for_prompt()
    session.type("\x03")
    session.wait_for("Ctrl-C once more leaves")
    session.wait_for_prompt()
    session.type("\x03")
    assert session.status() == 128 + signal.SIGINT
    assert "Traceback" not in session.seen


def test_the_prompt_stays_out_of_a_file(monkeypatch, capsys, preview_checkpoint):
    monkeypatch.setattr(sys, "stdin", Terminal("/quit\n"))
    assert main(["chat", "--model", str(preview_checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("> ")
