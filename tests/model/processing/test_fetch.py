"""Downloads: https only, bounded, refused while offline. A server on 127.0.0.1 stands for all."""

import contextlib
import gzip
import itertools
import socket
import threading
import tracemalloc
import urllib.request
import zlib

import pytest

from keye_model.processing import fetch as fetch_module
from keye_model.processing.fetch import describe, fetch, request_of
from keye_model.processing.picture import load_image

URL = "https://example.org/picture.png"
LIMITS = {"max_bytes": 10**6, "timeout": 600}
BODY = bytes(range(256)) * 500


def answer(body=b"", *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1") + body


@pytest.fixture
def serve(monkeypatch):
    """Give one answer to each connection, the last one to all later ones; returns the requests.

    An answer is bytes, or an iterator of them. Connections are as they would be but for TLS.
    """
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    listener = socket.create_server(("127.0.0.1", 0))
    requests = []

    def connect(self):
        self.sock = socket.create_connection(listener.getsockname(), self.timeout)

    def run(answers):
        for number in itertools.count():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked = b""
                while not asked.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
                    asked += byte
                requests.append(asked.decode())
                said = answers[min(number, len(answers) - 1)]
                try:
                    for part in [said] if isinstance(said, bytes) else said:
                        connection.sendall(part)
                except OSError:  # the client has had enough
                    pass

    def install(*answers):
        monkeypatch.setattr(fetch_module._Connection, "connect", connect)
        threading.Thread(target=run, args=(answers,), daemon=True).start()
        return requests

    yield install
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a connection
    listener.close()


def test_fetch_returns_the_body(serve):
    requests = serve(answer(BODY, f"Content-Length: {len(BODY)}"))
    assert fetch(URL, max_bytes=len(BODY), timeout=600) == BODY
    assert requests[0].startswith("GET /picture.png HTTP/1.1\r\n")
    assert "\r\nHost: example.org\r\n" in requests[0]
    assert "\r\nAccept-Encoding: identity\r\n" in requests[0]


def test_fetch_chunked_body(serve):
    serve(answer(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))
    assert fetch(URL, **LIMITS) == b"abcde"


@pytest.mark.parametrize(
    ("headers", "got"), [([], "more"), (["Content-Length: 101"], "101")], ids=["open", "declared"]
)
def test_fetch_caps_the_size(serve, headers, got):
    serve(answer(b"x" * 101, *headers))
    with pytest.raises(ValueError, match=f"must hold at most 100 bytes, got {got}$"):
        fetch(URL, max_bytes=100, timeout=600)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "many"], ids=["huge", "negative", "word"])
def test_fetch_length_that_says_nothing(serve, length):
    serve(answer(b"abc", f"Content-Length: {length}"))
    assert fetch(URL, **LIMITS) == b"abc"


def test_fetch_notices_a_lost_tail(serve):
    serve(answer(b"x" * 99, "Content-Length: 100"))
    with pytest.raises(RuntimeError, match="must hold 100 bytes as it said, got 99"):
        fetch(URL, **LIMITS)


def _raw_deflate(data):
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(data) + deflate.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("X-GZip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:999]) + gzip.compress(BODY[999:])),
        ("deflate", zlib.compress(BODY)),
        ("deflate", _raw_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
    ids=["gzip", "x-gzip", "members", "deflate", "raw_deflate", "identity", "nothing"],
)
def test_fetch_undoes_what_was_compressed(serve, encoding, body):
    serve(answer(body, f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}"))
    assert fetch(URL, max_bytes=len(BODY), timeout=600) == BODY


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_fetch_caps_the_size_that_is_unpacked(serve, encoding, compress):
    bomb = compress(bytes(10**7))
    serve(answer(bomb, f"Content-Encoding: {encoding}"))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"most 1000000 bytes, got more out of its {encoding}$"):
        fetch(URL, **LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 10**6  # of 10**7: no more is unpacked than is allowed
    assert len(bomb) < 20000
    assert fetch(URL, max_bytes=10**7, timeout=600) == bytes(10**7)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_fetch_encodings_that_it_does_not_know(serve, encoding):
    serve(answer(b"abc", f"Content-Encoding: {encoding}"))
    with pytest.raises(
        RuntimeError, match=f"plain, or encoded with gzip or deflate, got Content-Enc.*'{encoding}'"
    ):
        fetch(URL, **LIMITS)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)[:-1]),
        ("gzip", b"no gzip"),
        ("gzip", b""),
        ("deflate", zlib.compress(BODY)[:-9]),
        ("deflate", b"no deflate"),
        ("deflate", b""),
    ],
    ids=["cut_gzip", "no_gzip", "empty_gzip", "cut_deflate", "no_deflate", "empty_deflate"],
)
def test_fetch_broken_compression(serve, encoding, body):
    serve(answer(body, f"Content-Encoding: {encoding}"))
    if encoding == "gzip" and not body:
        assert fetch(URL, **LIMITS) == b""
        return
    with pytest.raises(RuntimeError, match=f"must be complete {encoding} data, got: ."):
        fetch(URL, **LIMITS)


def _ticks():
    """A clock that a second passes at whenever it is read."""
    return itertools.count().__next__


@pytest.mark.parametrize(
    "said",
    [
        lambda: itertools.chain([answer()], itertools.repeat(b"x")),
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"x" * 9000)),
        lambda: answer(b"", f"Location: {URL}", "Content-Length: 0", status="302 Found"),
    ],
    ids=["body", "header", "redirects"],
)
def test_fetch_caps_the_time_of_everything(serve, said):
    """Every read of the socket meets the clock, whatever it reads."""
    serve(*(said() for _ in range(9)))
    with pytest.raises(RuntimeError, match=r"'https://example\.org/.*must arrive within 5 seconds"):
        fetch(URL, max_bytes=10**9, timeout=5, clock=_ticks())


def test_fetch_gives_what_is_left_of_the_time_to_the_next_address(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    places = [(None, None, None, "", (f"10.0.0.{i}", 443)) for i in range(9)]
    tried = []

    def create_connection(place, timeout):
        tried.append((place[0], timeout))
        raise OSError(f"no way to {place[0]}")

    monkeypatch.setattr(fetch_module.socket, "getaddrinfo", lambda *_, **__: places)
    monkeypatch.setattr(fetch_module.socket, "create_connection", create_connection)
    clock = itertools.count().__next__
    with pytest.raises(RuntimeError, match="must arrive within 5 seconds"):
        fetch(URL, max_bytes=9, timeout=5, clock=clock)
    assert tried == [("10.0.0.0", 3), ("10.0.0.1", 2), ("10.0.0.2", 1)]
    with pytest.raises(RuntimeError, match=r"could not be fetched: .*no way to 10\.0\.0\.8"):
        fetch(URL, max_bytes=9, timeout=50, clock=clock)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer(b"gone", status="404 Not Found"), "HTTP Error 404: Not Found"),
        (answer(b"", status="302 Found"), "HTTP Error 302"),
        (answer(b"", "Location: /a", status="304 Not Modified"), "HTTP Error 304"),
        (b"", "closed connection|reset"),
        (b"SSH-2.0\r\n\r\n", "SSH-2.0"),
        (answer(b"5\r\nabc", "Transfer-Encoding: chunked"), "IncompleteRead"),
    ],
    ids=["404", "redirect_to_nowhere", "not_modified", "closed", "protocol", "cut_chunk"],
)
def test_fetch_names_the_url_that_failed(serve, said, reason):
    serve(said)
    with pytest.raises(
        RuntimeError, match=rf"'https://example\.org/.*could not be fetched: .*({reason})"
    ):
        fetch(URL, **LIMITS)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_fetch_follows_redirects(serve, code):
    requests = serve(
        answer(b"moved", "Location: b%20c/\xe5\x9b\xbe.png#top", status=f"{code} There"),
        answer(b"", "Location: https://other.example/?q=\xc3\xa4", status=f"{code} There"),
        answer(BODY),
    )
    assert fetch("https://example.org/a/picture.png", **LIMITS) == BODY
    lines = [request.split(" HTTP")[0] for request in requests]
    assert lines == ["GET /a/picture.png", "GET /a/b%20c/%E5%9B%BE.png", "GET /?q=%C3%A4"]
    assert "Host: other.example\r\n" in requests[2]


@pytest.mark.parametrize(
    "place", ["http://example.org/", "file:///etc/passwd", "data:,a", "ftp://example.org/a"]
)
def test_fetch_refuses_a_redirect_to_anything_else(serve, place):
    serve(answer(b"", f"Location: {place}", status="302 Found"))
    with pytest.raises(ValueError, match=f"must redirect to https only, got '{place}'"):
        fetch(URL, **LIMITS)


def test_fetch_ends_a_circle_of_redirects(serve):
    requests = serve(answer(b"", "Location: /picture.png", status="302 Found"))
    with pytest.raises(RuntimeError, match="must redirect at most 10 times, got more"):
        fetch(URL, **LIMITS)
    assert len(requests) == 11


def test_fetch_sends_the_password_to_its_host_alone(serve):
    requests = serve(answer(b"", "Location: https://b.example/", status="302 Found"), answer(BODY))
    assert fetch("https://me:p%40ss@a.example/x", **LIMITS) == BODY
    assert "Authorization: Basic bWU6cEBzcw==\r\n" in requests[0]  # me:p@ss
    assert "Host: a.example\r\n" in requests[0]
    assert "Authorization" not in requests[1]


def test_fetch_never_prints_the_password():
    assert describe("https://me:p%40ss@a.example/x@y") == "'https://…@a.example/x@y'"
    assert describe("https://a.example/x@y") == "'https://a.example/x@y'"
    with pytest.raises(RuntimeError, match=r"^URL 'https://…@a\.example/' must not be fetched"):
        fetch("https://me:secret@a.example/", **LIMITS, local_files_only=True)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://host.example/图片.png", "https://host.example/%E5%9B%BE%E7%89%87.png"),
        ("https://host.example/a b.png?q=ä ö&r=1", "https://host.example/a%20b.png?q=%C3%A4%20%C3%B6&r=1"),
        ("https://host.example/%E5%9B%BE%2fa%20b.png?s=%2B+", "https://host.example/%E5%9B%BE%2fa%20b.png?s=%2B+"),
        ("https://host.example/100%.png", "https://host.example/100%.png"),
        ("https://host.example/a.png#top?x", "https://host.example/a.png"),
        ("https://host.example/a.png?b#c", "https://host.example/a.png?b"),
        ("https://host.example", "https://host.example/"),
        ("https://host.example?q=1", "https://host.example/?q=1"),
        ("HTTPS://HOST.Example:8443/A", "https://host.example:8443/A"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://例え.テスト/", "https://xn--r8jz45g.xn--zckzah/"),
        ("https://faß.example/", "https://xn--fa-hia.example/"),
        ("https://例え。\uff54\uff45st/", "https://xn--r8jz45g.test/"),
        ("https://i❤.example/", "https://xn--i-7iq.example/"),
        ("https://a_b.example./", "https://a_b.example/"),
        ("https://[2001:db8::1]:8443/a", "https://[2001:db8::1]:8443/a"),
        ("https://127.0.0.1/a", "https://127.0.0.1/a"),
        ("https://host.example\\a\\b.png?c=\\", "https://host.example/a/b.png?c=%5C"),
        ("https://host.example/a\n/b\t.png", "https://host.example/a/b.png"),
        ("https://host.example/<\"|^`{}>", "https://host.example/%3C%22%7C%5E%60%7B%7D%3E"),
    ],
)  # fmt: skip
def test_request_is_what_a_browser_would_ask(url, asked):
    assert request_of(url).full_url == asked


@pytest.mark.parametrize(
    "url",
    [
        "https://", "https:///a.png", "https://?a", "https://a..b/", "https://ho st.example/",
        f"https://{'a' * 64}.example/", "https://host.example:port/", "https://host.example:99999/",
        "https://[::1/a", "https://me@/a", "https://a\udc80b/", "https://a/\udc80", "https://ä\udc80:x@a/",
    ],
)  # fmt: skip
def test_request_without_a_host_or_port_that_can_be_asked(url):
    with pytest.raises(ValueError, match=r"^URL must be https://host/path, got '.*: ."):
        request_of(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org/a.png", "http:// is refused by design.*use https:// or download"),
        ("ftp://example.org/a", "file:// and data: URLs are read, too; else download"),
        ("s3://bucket/a.png", "download the file first"),
        ("hf://owner/name/a.png", "download the file first"),
        ("file:///a", "download the file first"),
    ],
)
def test_fetch_takes_https_alone(url, reason):
    with pytest.raises(ValueError, match=rf"must start with https://, got '{url}': .*{reason}"):
        fetch(url, **LIMITS)


def test_opener_knows_https_alone(monkeypatch):
    for name in ("http_proxy", "https_proxy", "ftp_proxy"):
        monkeypatch.setenv(name, "http://localhost:1")
    assert set(fetch_module._opener(lambda: 1.0).handle_open) == {"https"}


def test_fetch_speaks_tls():
    """What the other tests leave out: the connection is the library's own, which checks names."""
    assert "connect" not in vars(fetch_module._Connection)
    connection = fetch_module._Connection("example.org", remaining=lambda: 1.0)
    assert isinstance(connection, urllib.request.http.client.HTTPSConnection)
    assert connection._context.check_hostname


def test_fetch_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="must not be fetched while HF_HUB_OFFLINE is set"):
        fetch(URL, **LIMITS)
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only is set"):
        load_image(URL, local_files_only=True)


def test_http_picture_is_refused():
    with pytest.raises(ValueError, match="URL must start with https://"):
        load_image("http://example.org/picture.png")
