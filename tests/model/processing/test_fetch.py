"""Downloads: https only, bounded, refused while offline. No test touches the network."""

import http.client
import io
import urllib.error
import urllib.request

import pytest

from keye_model.processing import fetch as fetch_module
from keye_model.processing.fetch import fetch
from keye_model.processing.image import load_image

URL = "https://example.org/picture.png"


class _Response(io.BytesIO):
    def __init__(self, body, headers):
        super().__init__(body)
        self.headers = headers


@pytest.fixture
def serve(monkeypatch):
    """Answer every request with a body, or raise an error."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def install(body=b"", headers=None, error=None):
        class Opener:
            def open(self, request, timeout):
                assert request.full_url == URL
                assert timeout == 5
                if error is not None:
                    raise error
                return _Response(body, headers or {})

        monkeypatch.setattr(fetch_module, "_opener", Opener)

    return install


def test_fetch_returns_the_body(serve):
    body = bytes(range(256)) * 1000  # several reads
    serve(body, {"Content-Length": str(len(body))})
    assert fetch(URL, max_bytes=len(body), timeout=5) == body


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "101"}], ids=["streamed", "declared"])
def test_fetch_caps_the_size(serve, headers):
    serve(b"x" * 101, headers)
    with pytest.raises(ValueError, match="must hold at most 100 bytes, got"):
        fetch(URL, max_bytes=100, timeout=5)


def test_fetch_notices_a_lost_tail(serve):
    serve(b"x" * 99, {"Content-Length": "100"})
    with pytest.raises(RuntimeError, match="must hold 100 bytes as it said, got 99"):
        fetch(URL, max_bytes=100, timeout=5)


def test_fetch_caps_the_time(serve, monkeypatch):
    serve(b"x" * 200_000)
    clock = iter([0.0, 1.0, 6.0])
    monkeypatch.setattr(fetch_module.time, "monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError, match="must arrive within 5 seconds"):
        fetch(URL, max_bytes=10**6, timeout=5)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.HTTPError(URL, 404, "Not Found", {}, None),
        urllib.error.URLError("no route"),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        http.client.BadStatusLine("?"),
    ],
    ids=["http", "url", "timeout", "reset", "protocol"],
)
def test_fetch_names_the_url_that_failed(serve, error):
    serve(error=error)
    with pytest.raises(RuntimeError, match=r"'https://example\.org/.*could not be fetched: "):
        fetch(URL, max_bytes=100, timeout=5)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "ftp://example.org/a", "file:///a"])
def test_fetch_takes_https_alone(url):
    with pytest.raises(
        ValueError, match=r"must start with https://, got .*use https:// or download"
    ):
        fetch(url, max_bytes=100, timeout=5)


def test_fetch_refuses_a_redirect_to_http():
    handler = fetch_module._HttpsRedirects()
    request = urllib.request.Request(URL)
    with pytest.raises(ValueError, match="must redirect to https only, got 'http://"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://example.org/")
    followed = handler.redirect_request(request, None, 302, "Found", {}, URL + "?2")
    assert followed.full_url == URL + "?2"


def test_opener_knows_https_alone(monkeypatch):
    for name in ("http_proxy", "https_proxy", "ftp_proxy"):
        monkeypatch.setenv(name, "http://localhost:1")
    assert set(fetch_module._opener().handle_open) == {"https"}


def test_fetch_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="must not be fetched while HF_HUB_OFFLINE is set"):
        fetch(URL, max_bytes=100, timeout=5)
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only is set"):
        load_image(URL, local_files_only=True)


def test_http_picture_is_refused():
    with pytest.raises(ValueError, match="URL must start with https://"):
        load_image("http://example.org/picture.png")
