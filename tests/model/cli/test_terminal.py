"""What reaches a terminal, and what a pipe."""

import io
import sys
import threading

import pytest

from keye_model.cli import terminal
from keye_model.cli.terminal import Progress, note, printable, say
from tests.model.pseudo_terminal import PATIENCE, Screen


@pytest.fixture
def screen():
    screen = Screen()
    yield screen
    screen.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red \x1b[31m", "red \\x1b[31m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\x0dwritten\\x08"),
        ("csi \x9b31m, del \x7f, nul \0", "csi \\x9b31m, del \\x7f, nul \\x00"),
        ("photo\u202egpj.exe \u2066", "photo\\u202egpj.exe \\u2066"),
        (
            "tab\tand\nlines\r\n图片 é 👩‍👩‍👧 \u200fعربي",
            "tab\tand\nlines\n图片 é 👩‍👩‍👧 \u200fعربي",
        ),
    ],
)
def test_a_terminal_gets_no_control_characters_and_a_pipe_the_text_itself(screen, text, shown):
    assert printable(text, screen.stream) == shown
    assert printable(text, io.StringIO()) == text


def test_say_and_note(screen, capsys, monkeypatch):
    say("\x1b[2J", end="")
    note("\x9b2J")
    assert capsys.readouterr() == ("\x1b[2J", "\x9b2J\n")
    monkeypatch.setattr(sys, "stdout", screen.stream)
    monkeypatch.setattr(sys, "stderr", screen.stream)
    say("\x1b[2J")
    note("\x9b2J")
    assert screen.text() == "\\x1b[2J\n\\x9b2J\n"


class Drawn:
    """A terminal's stream that can be waited for."""

    def __init__(self, is_terminal=True):
        self.text, self.happened, self._is_terminal = "", threading.Event(), is_terminal

    def isatty(self):
        return self._is_terminal

    def write(self, text):
        self.text += text
        if "4/10" in self.text:
            self.happened.set()

    def flush(self):
        pass


def test_progress_shows_a_long_step_while_it_lasts_and_clears_its_line():
    stream = Drawn()
    with Progress(stream, interval=0.001) as progress:
        progress("frames", 0, 8)
        progress("prefill", 4, 10)  # no call comes after this one, as in one long pass
        assert stream.happened.wait(PATIENCE)
    assert "prefill: " in stream.text
    assert stream.text.endswith("\r")
    assert not stream.text.rstrip("\r").rpartition("\r")[2].strip()
    progress("prefill", 5, 10)  # after its end nothing is drawn
    assert "5/10" not in stream.text


@pytest.mark.parametrize(
    ("is_terminal", "interval"), [(True, 3600), (False, 0.001)], ids=["short", "pipe"]
)
def test_progress_of_a_short_run_and_in_a_pipe_is_silent(is_terminal, interval):
    stream = Drawn(is_terminal)
    with Progress(stream, interval=interval) as progress:
        for done in range(100):
            progress("prefill", done, 100)
    assert stream.text == ""


def test_prepare_escapes_what_an_encoding_lacks(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.png"), "utf-8"))
    terminal.prepare()
    say("图片")
    assert out.buffer.getvalue() == b"\\u56fe\\u7247\n"
    assert sys.stdin.read().encode("utf-8", "surrogateescape") == b"caf\xe9.png"


def test_prepare_without_streams(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    terminal.prepare()
    note("nobody hears this")
    assert capsys.readouterr().out == ""  # print(file=None) would write there
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="standard output must be open, got it closed"):
        terminal.prepare()
