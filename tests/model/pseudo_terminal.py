"""A terminal for tests: streams of this process on one, or a `keye` of its own on one."""

import contextlib
import os
import pty
import select
import sys
import threading
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
PATIENCE = 300  # seconds until a test gives up on a process that says nothing


class Screen:
    """A terminal's screen; ``stream`` is what a program writes to.

    A thread reads it, as terminals do: a program that writes 4 kB that nobody reads is stopped.
    """

    def __init__(self):
        self._screen, there = os.openpty()
        self.stream = open(there, "w", encoding="utf-8")  # noqa: SIM115 - closed below
        self._written, self._more = b"", threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def text(self):
        """All that was written so far."""
        marks = self._written.count(b"\0") + 1
        self.stream.write("\0")
        self.stream.flush()
        with self._more:
            assert self._more.wait_for(lambda: self._written.count(b"\0") == marks, PATIENCE)
        return self._written.replace(b"\0", b"").decode().replace("\r\n", "\n")

    def close(self):
        self.stream.close()
        self._reader.join()
        os.close(self._screen)

    def _read(self):
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while data := os.read(self._screen, 1 << 16):
                with self._more:
                    self._written += data
                    self._more.notify_all()


class Session:
    """`python -m keye_model` with a terminal as its standard streams."""

    def __init__(self, *arguments):
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            command = [sys.executable, "-m", "keye_model", *map(str, arguments)]
            os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": ROOT})
        self.seen, self._waited = "", 0

    def wait_for(self, text):
        """Read until ``text`` was written behind what was waited for before."""
        while (found := self.seen.find(text, self._waited)) < 0:
            assert self._read(), f"the process ended before {text!r}: {self.seen}"
        self._waited = found + len(text)

    def wait_for_prompt(self):
        """Read until the prompt was written and the process sleeps until something is typed.

        Python loses an interrupt that comes between the two, until the next one.
        """
        self.wait_for("> ")
        while Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()

    def type(self, text):
        os.write(self._terminal, text.encode())

    def status(self):
        """The exit status, once the process has ended."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def close(self):
        with contextlib.suppress(OSError, ChildProcessError):
            os.close(self._terminal)  # hangs it up
            os.waitpid(self._pid, 0)

    def _read(self):
        assert select.select([self._terminal], [], [], PATIENCE)[0], f"no word: {self.seen}"
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)
