"""Output of the commands: text without control characters on a terminal, notes, and progress."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TextIO

# Control characters: C0 except tab and line feed, DEL, C1; and characters that reorder text, which
# can make one file's name look like another's.
_CODES = {*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}
_SHOWN = {code: f"\\x{code:02x}" for code in _CODES}
_SHOWN |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}

INTERVAL = 1.0  # seconds until progress is shown, and between two updates


def prepare() -> None:
    """Make the standard streams safe to use.

    Characters that the output's encoding lacks are escaped. Invalid bytes in the input become
    surrogates, as in a file's name. Output to a closed standard error is discarded.

    Raises:
        OSError: Standard output is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=errors)
    if sys.stdout is None:
        raise OSError("standard output must be open, got it closed")


@contextlib.contextmanager
def interrupt_exits() -> Iterator[None]:
    """End the process at a Ctrl-C, for imports: a library may swallow a KeyboardInterrupt there."""
    if threading.current_thread() is not threading.main_thread():  # only that one handles signals
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str, stream: TextIO) -> str:
    """``text``, with its control characters escaped if ``stream`` is a terminal."""
    return text.replace("\r\n", "\n").translate(_SHOWN) if stream.isatty() else text


def say(text: str, end: str = "\n") -> None:
    """Write to standard output, at once."""
    print(printable(text, sys.stdout), end=end, flush=True)


def note(text: str) -> None:
    """Write a line to standard error, past any progress bar."""
    from tqdm import tqdm  # not for `keye --help`

    tqdm.write(printable(text, sys.stderr), file=sys.stderr)


def give_up_stdout() -> None:
    """Drop what a broken pipe or a full disk refused, so that the interpreter's exit is quiet."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """A progress line on a terminal, from the second second on; elsewhere nothing.

    Called as ``progress(stage, done, total)``. A thread draws the line, so it also appears in a
    stage of one long step.

    Args:
        stream: Standard error if None.
        interval: Seconds until the line appears, and between two updates.
    """

    def __init__(self, stream: TextIO | None = None, *, interval: float | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval = INTERVAL if interval is None else interval
        self._state: tuple[str, int, int] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._state = stage, done, total
        if self._thread is None and not self._closed.is_set() and self._stream.isatty():
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Clear the line and stop drawing."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        from tqdm import tqdm

        bar = None
        while not self._closed.wait(self._interval):
            stage, done, total = self._state
            if bar is None or bar.desc != stage:
                if bar is not None:
                    bar.close()
                unit = {"frames": "frame", "cases": "case"}.get(stage, "token")
                options = {"leave": False, "dynamic_ncols": True, "file": self._stream}
                bar = tqdm(total=total, initial=done, desc=stage, unit=unit, **options)
                if bar.ncols is not None and bar.ncols < 1:  # a terminal of unknown size
                    bar.ncols, bar.nrows, bar.dynamic_ncols = 79, 24, None
            bar.total, bar.n = total, done
            bar.refresh()
        if bar is not None:
            bar.close()
