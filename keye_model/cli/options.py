"""Options of the command line, and of `/image` and `/video` in a conversation."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

# Exceptions that a wrong request raises.
ERRORS = (ValueError, TypeError, OSError, RuntimeError, NotImplementedError)


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """Raises errors in the arguments, and in writing help, instead of ending the process."""

    def print_help(self, file: TextIO | None = None) -> None:
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): must ", r"\1 must ", message))


def number(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: an int or float for which ``holds`` is true."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


POSITIVE_INT = number(int, "a positive integer", lambda x: x > 0)
POSITIVE = number(float, "a positive number", lambda x: x > 0)


def add_pixels(parser: argparse._ActionsContainer, what: str) -> None:
    for name, rule in (("min", "least"), ("max", "most")):
        parser.add_argument(
            f"--{name}-pixels", type=POSITIVE_INT, metavar="N", help=f"{rule} pixels of {what}"
        )


def add_exif(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--exif", action="store_true", help="turn pictures as their EXIF data says")


def add_frames(parser: argparse._ActionsContainer) -> None:
    """Options of a video besides its pixels; without the first two it is sampled to fit."""
    parser.add_argument("--fps", type=POSITIVE, help="frames per second taken of a video (2)")
    parser.add_argument("--max-frames", type=POSITIVE_INT, metavar="N", help="most frames of it")
    parser.add_argument(
        "--total-pixels", type=POSITIVE_INT, metavar="N", help="most pixels of all its frames"
    )


def attachment_parser(kind: str) -> Parser:
    """Parser for the arguments of `/image` or `/video`."""
    parser = Parser(prog=f"/{kind}", add_help=False)
    parser.add_argument("source", metavar="PATH_OR_URL")
    add_pixels(parser, "it" if kind == "image" else "a frame")
    if kind == "image":
        add_exif(parser)
    else:
        add_frames(parser)
    return parser


_FLAGS = {
    "path_or_id": "--model",
    "max_new_tokens": "--max-new-tokens",
    "max_frames": "--max-frames",
    "nframes": "--max-frames",
    "fps": "--fps",
    "min_pixels": "--min-pixels",
    "max_pixels": "--max-pixels",
    "total_pixels": "--total-pixels",
    "video_total_pixels": "--total-pixels",
    "stop_strings": "--stop",
    "temperature": "--temperature",
    "device": "--device",
    "dtype": "--dtype",
    "backend": "--backend",
}
# A name as the library's errors use it: "fps must be …", "max_frames=8 fits", "(max_pixels, fps)".
_NAMED = re.compile(
    rf"(?<![\w./'\"-])(?:({'|'.join(_FLAGS)})(?= must |=\d)"
    r"|path_or_id|(fps|(?:min|max|total|video_total)_pixels|max_frames)(?=[,)]| or | may ))"
)


def with_flags(message: str) -> str:
    """Replace argument names in a library error by flags: ``max_frames`` by ``--max-frames``."""
    return _NAMED.sub(lambda found: _FLAGS[found[0]], message)
