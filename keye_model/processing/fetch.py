"""Bytes of a picture or a film named by a URL: https only, bounded in size and time."""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import time
import urllib.parse
import urllib.request
from typing import Any

_CHUNK = 1 << 16


def fetch(url: str, *, max_bytes: int, timeout: float, local_files_only: bool = False) -> bytes:
    """Download ``url`` into memory.

    Args:
        url: Starts with ``https://``; so must every redirect.
        max_bytes: Most bytes the body may have; reading stops at the first byte past it.
        timeout: Seconds for the whole download, and for each wait on the socket.
        local_files_only: Never touch the network. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        ValueError: Not https, redirected to something else, or larger than ``max_bytes``.
        RuntimeError: Offline, timed out, or the server failed.
    """
    name = describe(url)
    if not url.lower().startswith("https://"):
        raise ValueError(
            f"URL must start with https://, got {name}: http:// is refused by design, since what "
            "it brings can be changed on the way; use https:// or download the file first"
        )
    if local_files_only or _offline():
        reason = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise RuntimeError(f"URL {name} must not be fetched while {reason} is set")
    deadline = time.monotonic() + timeout
    request = urllib.request.Request(url, headers={"User-Agent": "keye-kernels"})
    try:
        with _opener().open(request, timeout=timeout) as response:
            declared = response.headers.get("Content-Length") or ""
            if declared.isdecimal() and int(declared) > max_bytes:
                raise ValueError(f"URL {name} must hold at most {max_bytes} bytes, got {declared}")
            body = _read(response, name, max_bytes, timeout, deadline)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError, as is a timeout
        raise RuntimeError(f"URL {name} could not be fetched: {error}") from error
    if declared.isdecimal() and len(body) != int(declared):
        raise RuntimeError(f"URL {name} must hold {declared} bytes as it said, got {len(body)}")
    return body


def describe(source: Any) -> str:
    """A short name of ``source`` for error messages: long strings are cut in the middle."""
    if isinstance(source, (str, os.PathLike)):
        text = repr(os.fspath(source))
        return text if len(text) <= 120 else f"{text[:80]}…{text[-20:]}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    return f"{type(source).__name__} object"


def decode_data_url(url: str) -> bytes:
    """The bytes in a ``data:<type>;base64,<data>`` URL.

    Raises:
        ValueError: Not base64.
    """
    header, comma, body = url.partition(",")
    data = decode_base64(body) if comma and header.endswith(";base64") else None
    if data is None:
        raise ValueError(f"a data URL must be 'data:<type>;base64,<data>', got {describe(url)}")
    return data


def decode_base64(text: str) -> bytes | None:
    """The bytes, or None if ``text`` without its white space is no base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def file_url_path(url: str) -> str:
    """The path in a ``file://`` URL, as written if such a file exists, else percent-decoded."""
    path = url[len("file://") :]
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def _read(response: Any, name: str, max_bytes: int, timeout: float, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):  # one socket read each, so a slow drip meets the clock
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"URL {name} must hold at most {max_bytes} bytes, got more")
        if time.monotonic() > deadline:
            raise RuntimeError(f"URL {name} must arrive within {timeout} seconds, got a part of it")
    return bytes(body)


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith("https://"):
            raise ValueError(
                f"URL {describe(req.full_url)} must redirect to https only, got {describe(newurl)}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows https alone: no http, ftp, file or data handlers to be redirected to."""
    opener = urllib.request.OpenerDirector()
    proxies = {key: url for key, url in urllib.request.getproxies().items() if key == "https"}
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HttpsRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
