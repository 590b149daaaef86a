"""Bytes behind a URL: https only, bounded in size and in time."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import os
import re
import socket
import string
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import quote, unquote, urlsplit

_CHUNK = 1 << 16
_MAX_REDIRECTS = 10
_KEPT = "!#$%&'()*+,/:;=?@[]~"  # by percent-encoding: what has a meaning there, or is encoded


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    local_files_only: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """Download ``url`` into memory.

    Args:
        url: Starts with ``https://``; so must every redirect, of which 10 are followed. As in a
            browser, letters of any alphabet and blanks may stand in it, what is percent-encoded
            stays so, and ``user:password@`` is sent to that host alone.
        max_bytes: Most bytes the body may have, as it comes and after gzip or deflate is undone.
        timeout: Seconds for everything: connections, redirects and body. Only the look-up of the
            host's name has the system's own limit.
        local_files_only: Never touch the network. ``HF_HUB_OFFLINE=1`` does the same.
        clock: Seconds, ascending.

    Raises:
        ValueError: Not https, no URL, redirected to something else, or larger than ``max_bytes``.
        RuntimeError: Offline, timed out, or the server failed.
    """
    name = describe(url)
    if not url.lower().startswith("https://"):
        reason = "file:// and data: URLs are read, too; else download the file first"
        if url.lower().startswith("http:"):
            reason = (
                "http:// is refused by design, since what it brings can be changed on the way; "
                "use https:// or download the file first"
            )
        raise ValueError(f"URL must start with https://, got {name}: {reason}")
    if local_files_only or _offline():
        reason = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise RuntimeError(f"URL {name} must not be fetched while {reason} is set")
    deadline = clock() + timeout

    def remaining() -> float:
        if (seconds := deadline - clock()) <= 0:
            raise TimeoutError
        return seconds

    try:
        return _follow(url, name, max_bytes, remaining)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError, as is a timeout
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise RuntimeError(f"URL {name} must arrive within {timeout} seconds") from error
        raise RuntimeError(f"URL {name} could not be fetched: {error}") from error


def describe(source: Any) -> str:
    """A short name of ``source`` for error messages, cut in the middle and without passwords."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if isinstance(text, str):
            text = re.sub(r"^(\s*\w+://)[^/?#]*@", r"\1…@", text)
        text = repr(text)
        return text if len(text) <= 120 else f"{text[:80]}…{text[-20:]}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    return f"{type(source).__name__} object"


def request_of(url: str) -> urllib.request.Request:
    """What is asked of the server: the URL in ASCII, and the password in it as a header.

    Raises:
        ValueError: There is no host, or no port, that could be asked.
    """
    # We ask for the plain body; some servers compress what they keep compressed all the same.
    headers = {"User-Agent": "keye-kernels", "Accept-Encoding": "identity"}
    url = re.sub(r"[\t\r\n]", "", url)
    place, mark, rest = re.fullmatch(r"([^?#]*)([?#]?)(.*)", url, re.DOTALL).groups()
    try:
        url.encode()  # which half a character, as file names may hold, does not survive
        parts = urlsplit(place.replace("\\", "/") + mark + rest)
        host, port = _ascii_host(parts.hostname or ""), parts.port
        ascii_url = f"https://{host}" + (f":{port}" if port is not None else "")
        ascii_url += quote(parts.path, safe=_KEPT) or "/"
        ascii_url += f"?{quote(parts.query, safe=_KEPT)}" if parts.query else ""
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    except ValueError as error:  # UnicodeError is one
        raise ValueError(f"URL must be https://host/path, got {describe(url)}: {error}") from error
    return urllib.request.Request(ascii_url, headers=headers)


def _ascii_host(host: str) -> str:
    """A host name as the name service takes it, other alphabets in Punycode, as browsers do."""
    if ":" in host:
        return f"[{host}]"
    host = unicodedata.normalize("NFKC", unquote(host)).lower().replace("。", ".")
    labels = [
        label if label.isascii() else f"xn--{label.encode('punycode').decode()}"
        for label in host.removesuffix(".").split(".")
    ]
    if not all(re.fullmatch(r"[\w-]{1,63}", label, re.ASCII) for label in labels):
        raise ValueError(f"{host!r} is no host name")
    return ".".join(labels)


def _follow(url: str, name: str, max_bytes: int, remaining: Callable[[], float]) -> bytes:
    """The body at the end of the redirects."""
    opener = _opener(remaining)
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            with opener.open(request_of(url), timeout=remaining()) as response:
                return _body(response, name, max_bytes)
        except urllib.error.HTTPError as error:
            error.close()  # unread: a redirect's body has no bound
            place = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not place:
                raise
            # Headers are read as Latin-1, whatever their bytes mean.
            place = quote(place, encoding="latin-1", safe=string.punctuation)
            url = urllib.parse.urljoin(url, place)
            if not url.lower().startswith("https://"):
                raise ValueError(
                    f"URL {name} must redirect to https only, got {describe(url)}"
                ) from error
    raise RuntimeError(f"URL {name} must redirect at most {_MAX_REDIRECTS} times, got more")


def _body(response: Any, name: str, max_bytes: int) -> bytes:
    declared = response.headers.get("Content-Length") or ""
    declared = int(declared) if re.fullmatch("[0-9]{1,18}", declared) else None
    if declared is not None and declared > max_bytes:
        raise ValueError(f"URL {name} must hold at most {max_bytes} bytes, got {declared}")
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"URL {name} must hold at most {max_bytes} bytes, got more")
    if declared is not None and len(body) != declared:
        raise RuntimeError(f"URL {name} must hold {declared} bytes as it said, got {len(body)}")
    encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding != "identity":
        body = _decompressed(bytes(body), encoding, name, max_bytes)
    return bytes(body)


def _decompressed(body: bytes, encoding: str, name: str, max_bytes: int) -> bytes:
    try:
        if encoding in ("gzip", "x-gzip"):
            plain = gzip.GzipFile(fileobj=io.BytesIO(body)).read(max_bytes + 1)
        elif encoding == "deflate":  # zlib's form, or the bare one that some servers send
            bare = len(body) < 2 or body[0] & 15 != 8 or int.from_bytes(body[:2], "big") % 31
            inflate = zlib.decompressobj(-15 if bare else 15)
            plain = inflate.decompress(body, max_bytes + 1)
            if not inflate.eof and len(plain) <= max_bytes:
                raise EOFError("its end is missing")
        else:
            raise RuntimeError(
                f"URL {name} must come plain, or encoded with gzip or deflate, got "
                f"Content-Encoding {encoding!r}"
            )
    except (OSError, EOFError, zlib.error) as error:
        raise RuntimeError(f"URL {name} must be complete {encoding} data, got: {error}") from error
    if len(plain) > max_bytes:
        raise ValueError(
            f"URL {name} must hold at most {max_bytes} bytes, got more out of its {encoding}"
        )
    return plain


class _Reader(io.RawIOBase):
    """A socket's reader, each of whose reads may last only as long as the whole download may."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, remaining: Callable[[], float]):
        super().__init__()
        self._raw, self._sock, self._remaining = raw, sock, remaining

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._remaining())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, remaining: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock, remaining))


class _Connection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, remaining: Callable[[], float], **options: Any) -> None:
        super().__init__(host, **options)
        self.response_class = partial(_Response, remaining=remaining)
        self._create_connection = partial(_connect, remaining)


def _connect(remaining: Callable[[], float], address: tuple[str, int], *_: Any) -> socket.socket:
    """`socket.create_connection`, which would give every address of the host the whole time."""
    problem: OSError | None = None
    for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            return socket.create_connection(place[:2], remaining())
        except OSError as error:
            problem = error
    raise problem or OSError("the host has no address")


class _Handler(urllib.request.HTTPSHandler):
    def __init__(self, remaining: Callable[[], float]) -> None:
        super().__init__()
        self._remaining = remaining

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request, remaining=self._remaining)


def _opener(remaining: Callable[[], float]) -> urllib.request.OpenerDirector:
    """An opener that knows https alone, and follows nothing."""
    opener = urllib.request.OpenerDirector()
    proxies = {key: url for key, url in urllib.request.getproxies().items() if key == "https"}
    for handler in (
        urllib.request.ProxyHandler(proxies),
        _Handler(remaining),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
