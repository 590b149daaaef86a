"""Where the bytes of a picture or a film are: what the source in a message names, found."""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from keye_model.processing.fetch import describe, fetch

_KINDS = {
    "image": "a path, URL, base64 string, bytes, open file, PIL image, array or tensor",
    "video": "a path, URL, bytes, open file, list of frames, array, tensor or base64 string",
}
# How files of pictures and films begin: by these a string is told to be base64 and no file's name.
_SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|P[1-7fFy]\s|8BPS|qoif|DDS |icns"
    rb"|\0\0[\x01\x02]\0|\xff\x4f\xff\x51|\xff\x0a|.{4}(ftyp|moov|mdat|free|skip|wide|jP  |JXL )"
    rb"|\x1a\x45\xdf\xa3|OggS|FLV|DKIF|\x30\x26\xb2\x75|\0\0\x01[\xb3\xba]|\0\0\0\x01|YUV4MPEG"
    rb"|\x47.{187}\x47",
    re.DOTALL,
)

# Where an item may name its source; the first two tell what it is, too.
SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}
INNER = ("url", "path", "base64")  # where a source that is a dict names it
_BASE64 = "data:application/octet-stream;base64"


def source_of(item: Mapping[str, Any]) -> Any:
    """What an image or video item points at; None for a bare placeholder."""
    names = dict.fromkeys((*SOURCES["image"], *SOURCES["video"]))
    name = next((name for name in names if item.get(name) is not None), None)
    source = None if name is None else item[name]
    coded = name == "base64"
    if isinstance(source, dict):  # {"url": …}
        name = next((inner for inner in INNER if source.get(inner) is not None), None)
        source = None if name is None else source[name]
        coded = coded or name == "base64"
    if not coded or not isinstance(source, (str, bytes)):
        return source
    text = source if isinstance(source, str) else source.decode("ascii", "replace")
    return text if text.lstrip()[:5].lower() == "data:" else f"{_BASE64},{text}"


def read_source(
    source: Any, kind: str, *, max_bytes: int, timeout: float, local_files_only: bool = False
) -> str | bytes | BinaryIO:
    """Find what ``source`` names.

    Args:
        source: A path; a string with a path, a ``file:`` or ``https:`` URL, a ``data:`` URL or bare
            base64 (an existing file of that name goes first; white space around it does not
            count); bytes; or an open binary file, read from its start if it can seek.
        kind: "image" or "video", as errors call it.
        max_bytes, timeout, local_files_only: Bounds of what a URL brings (`fetch`); the first also
            of an open file that cannot seek.

    Returns:
        The path of a regular file, bytes, or the open file itself if it can seek. None is empty.

    Raises:
        FileNotFoundError: No such file, or no regular one: a directory, a pipe, a device.
        PermissionError: A file that this process may not read.
        ValueError: Empty, a broken URL, or more than ``max_bytes``.
        TypeError: Another kind of source, or a file opened as text.
        RuntimeError: A URL that could not be fetched, or offline.
    """
    limits = {"max_bytes": max_bytes, "timeout": timeout, "local_files_only": local_files_only}
    if isinstance(source, (bytes, bytearray, memoryview)):
        found: str | bytes | BinaryIO = bytes(source)
        empty = not found
    elif isinstance(source, (str, os.PathLike)):
        found = _named(source, kind, limits)
        empty = not (os.path.getsize(found) if isinstance(found, str) else found)
    elif hasattr(source, "read"):
        found, empty = _opened(source, kind, max_bytes)
    else:
        raise TypeError(f"{kind} must be {_KINDS[kind]}, got {describe(source)}")
    if empty:
        raise ValueError(f"{kind} must not be empty, got zero bytes from {describe(source)}")
    return found


def decode_data_url(url: str) -> bytes:
    """The bytes in a ``data:`` URL, base64 or percent-encoded. Its media type does not count.

    Raises:
        ValueError: No comma, or broken base64.
    """
    header, comma, body = url.partition(",")
    body = body.partition("#")[0] or body
    *_, last = parameters = [part.strip().lower() for part in header.split(";")]
    try:
        if not comma:
            raise ValueError("it has no comma")
        if parameters[0] == "data:base64":
            raise ValueError("'base64' must stand behind a semicolon")
        if last == "base64" and len(parameters) > 1:
            return decode_base64(body)
        if "base64" in parameters:
            raise ValueError("';base64' must stand last before the comma")
        return unquote_to_bytes(re.sub(r"[\t\r\n]", "", body))
    except ValueError as error:
        raise ValueError(
            f"a data URL must be 'data:<type>;base64,<data>', got {describe(url)}: {error}"
        ) from error


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in either alphabet: padded or not, in lines or not, also percent-encoded.

    Raises:
        ValueError: It is no base64; says why.
    """
    text = "".join((unquote(text) if "%" in text else text).split())
    text = text.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    if other := re.search(r"[^A-Za-z0-9+/]", text):
        raise ValueError(f"base64 has no character {other[0]!r}")
    if len(text) % 4 == 1:
        raise ValueError(f"base64 cannot have {len(text)} characters")
    return base64.b64decode(text + "=" * (-len(text) % 4))


def _named(source: str | os.PathLike, kind: str, limits: dict[str, Any]) -> str | bytes:
    """The path of an existing file, or the bytes that a string names or holds."""
    text = os.fsdecode(source)
    trimmed = text.strip()
    try:
        text.encode("utf-8", "surrogateescape")  # as paths that are no Unicode come
    except UnicodeEncodeError:
        trimmed = ""  # half a character names nothing
    if not trimmed:
        raise ValueError(f"{kind} must be {_KINDS[kind]}, got {text!r}")
    names = (text, os.path.expanduser(text))
    scheme = ""
    if isinstance(source, str):
        scheme = re.match(r"([a-z][a-z0-9+.-]*:)?", trimmed, re.IGNORECASE)[0].lower()
        if scheme in ("http:", "https:"):
            return fetch(trimmed, **limits)
        if scheme == "data:":
            return decode_data_url(trimmed)
        names += (trimmed, os.path.expanduser(trimmed))
        if scheme == "file:":
            names = _file_url_paths(trimmed)
    problem: Exception = FileNotFoundError("no such file")
    for name in dict.fromkeys(names):
        try:
            return _regular(name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problem = error
    if "://" in trimmed and scheme not in ("", "file:"):
        return fetch(trimmed, **limits)  # which says what it takes
    reason = getattr(problem, "strerror", None) or str(problem)
    if isinstance(source, str) and not scheme:
        try:
            data = decode_base64(trimmed)
        except ValueError as error:
            reason += f"; {error}"
        else:
            if _SIGNATURE.match(data):
                return data
            reason += "; as base64, no known picture or film"
    elif scheme == "file:" and not names[0].startswith("/"):
        reason += "; a path in a file URL begins with a third slash"
    wrong = PermissionError if isinstance(problem, PermissionError) else FileNotFoundError
    raise wrong(f"{kind} must be an existing file, got {describe(source)}: {reason}")


def _regular(name: str) -> str:
    """``name`` if it is a readable regular file; reading a pipe or device could block.

    Raises:
        OSError, ValueError: It is not; says why.
    """
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        raise OSError("a directory")
    if not stat.S_ISREG(mode):
        raise OSError("a pipe or a device; read it and give its bytes")
    if not os.access(name, os.R_OK):
        raise PermissionError("permission denied")
    return name


def _file_url_paths(url: str) -> tuple[str, ...]:
    """What a ``file:`` URL may mean: the path as it is written, or percent-decoded."""
    written = re.sub(r"^file:(//(localhost(?=/))?)?", "", url, flags=re.IGNORECASE)
    bare = re.sub(r"[?#].*", "", written, flags=re.DOTALL)
    decoded = [os.fsdecode(unquote_to_bytes(os.fsencode(path))) for path in (written, bare)]
    return (written, *decoded)


def _opened(file: Any, kind: str, max_bytes: int) -> tuple[bytes | BinaryIO, bool]:
    """An open file, or all of it if it cannot seek; and whether it is empty."""
    try:
        if not isinstance(file.read(0), bytes):
            raise TypeError(f"{kind} file must be opened in binary mode, got {describe(file)}")
        if hasattr(file, "seekable") and file.seekable():
            return file, file.seek(0, io.SEEK_END) == 0
        data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # closed, or opened for writing
        raise ValueError(
            f"{kind} must be a readable file, got {describe(file)}: {error}"
        ) from error
    if len(data) > max_bytes:
        raise ValueError(f"{kind} must hold at most {max_bytes} bytes, got more")
    return data, not data
