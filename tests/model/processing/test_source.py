"""What a source names: a path, a URL of any kind, base64, bytes, an open file, or a clear error."""

import base64
import io
import os
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from keye_model.processing import source as source_module
from keye_model.processing.source import decode_base64, decode_data_url, read_source

# 1 x 1 pixel, 43 bytes; begins with "R0lG", ends with padding, has both special characters below.
GIF = base64.b64decode("R0lGODlhAQABAIAAAP///wAAACH5BAEAAAAALAAAAAABAAEAAAICRAEAOw==")
DATA = bytes(range(256))  # its base64 has + and /


def read(source, kind="image", max_bytes=1000):
    return read_source(source, kind, max_bytes=max_bytes, timeout=5, local_files_only=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a 100% file#1?.gif"
    path.write_bytes(GIF)
    return path


@pytest.mark.parametrize(
    "spell",
    [
        lambda p: p,
        lambda p: str(p),
        lambda p: os.fsencode(str(p)).decode(),
        lambda p: f" \n{p}\t\n",
        lambda p: f"file://{p}",
        lambda p: f"FILE://{p}",
        lambda p: f" file://{p}\n",
        lambda p: f"file:{p}",
        lambda p: f"file://localhost{p}",
        lambda p: p.as_uri(),
        lambda p: p.as_uri() + "#part",
        lambda p: p.as_uri() + "?query",
        lambda p: p.as_uri().replace("file://", "file://localhost"),
    ],
    ids=[
        *(
            "path",
            "str",
            "copy",
            "white_space",
            "url",
            "upper_case",
            "url_white_space",
            "one_slash",
        ),
        *("localhost", "escaped", "fragment", "query", "escaped_localhost"),
    ],
)
def test_a_file_by_every_name(file, spell):
    assert read(spell(file)) == str(file)


def test_a_relative_path_and_the_home_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    for source in (file.name, f"~/{file.name}", Path("~") / file.name, f"  ~/{file.name} "):
        assert os.path.samefile(read(source), file)


@pytest.mark.parametrize("name", [" blanks around ", "R0lGODlhAQABAIAAAP", "a:b", "s3:", "~x", "é"])
def test_an_existing_file_goes_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    assert read(name) == name
    (tmp_path / name.strip()).write_bytes(b"other")
    assert read(name) == name


def test_a_file_name_that_is_no_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.gif")
    try:
        (tmp_path / name).write_bytes(GIF)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    for source in (tmp_path / name, f"{tmp_path}/{name}", f"file://{tmp_path}/caf%E9.gif"):
        assert read(source) == str(tmp_path / name)


def _lines(text):
    return "\r\n".join(text[i : i + 7] for i in range(0, len(text), 7))


SPELLINGS = {
    "plain": lambda text: text,
    "unpadded": lambda text: text.rstrip("="),
    "url_safe": lambda text: text.replace("+", "-").replace("/", "_"),
    "lines": _lines,
    "blanks": lambda text: f"  {text}\n",
    "escaped": lambda text: quote(text, safe=""),
    "escaped_lines": lambda text: quote(_lines(text)),
    "escaped_lower_case": lambda text: text.replace("+", "%2b").replace("=", "%3d"),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("size", [253, 254, 255])  # all paddings
def test_base64_in_every_spelling(spell, size):
    text = base64.b64encode(DATA[-size:]).decode()
    assert {"+", "/"} < set(text)
    assert decode_base64(spell(text)) == DATA[-size:]
    assert decode_data_url("data:image/png;base64," + spell(text)) == DATA[-size:]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_bare_base64(spell, kind):
    text = spell(base64.b64encode(GIF).decode())
    assert read(text, kind) == GIF


@pytest.mark.parametrize(
    "start",
    [
        "89504e470d0a1a0a", "ffd8ffe000104a46", "474946383961", "524946460000000057454250",
        "424d0000000000000000", "49492a0008", "4d4d002a00", "50350a", "00000100", "38425053",
        "0000000c6a502020", "0000001c66747970", "0000000866726565", "1a45dfa3", "4f676753",
        "464c5601", "000001ba", "0000000167", "3026b2758e66", "47" + 187 * "00" + "47",
    ],
)  # fmt: skip
def test_bare_base64_by_how_the_file_begins(start):
    data = bytes.fromhex(start) + bytes(20)
    assert read(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:image/gif;BASE64,R0lG", b"GIF"),
        ("DATA:image/gif;Base64,R0lG", b"GIF"),
        ("data:;base64,R0lG", b"GIF"),
        ("data:image/png;charset=utf-8;base64,R0lG", b"GIF"),
        ("data:text/html; base64 ,R0lG", b"GIF"),
        ("data:image/gif;base64,R0lG#part", b"GIF"),
        (" \n data:image/gif;base64, R0 lG \n", b"GIF"),
        ("data:,GIF", b"GIF"),
        ("data:,G%49F%00\n%ff+#part", b"GIF\0\xff+"),
        ("data:image/svg+xml,<svg/>", b"<svg/>"),
        ("data:image/gif,R0lG", b"R0lG"),
    ],
)
def test_data_urls(url, data):
    assert read(url) == data


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:", "it has no comma"),
        ("data:base64,R0lG", "'base64' must stand behind a semicolon"),
        ("data:image/png;base64", "it has no comma"),
        ("data:image/png;base64;charset=utf-8,R0lG", "';base64' must stand last before the comma"),
        ("data:image/png;base64,R0l!", "base64 has no character '!'"),
        ("data:image/png;base64,###", "base64 has no character '#'"),
        ("data:image/png;base64,R0lG=R0lG", "base64 has no character '='"),
        ("data:image/png;base64,R0lGx", "base64 cannot have 5 characters"),
        ("data:image/png;base64,%zz", "base64 has no character '%'"),
        ("data:image/png;base64,图片", "base64 has no character '图'"),
        ("data:video/jpeg;base64,R0lG,R0lG", "base64 has no character ','"),
    ],
)
def test_broken_data_urls(url, reason):
    with pytest.raises(ValueError, match=rf"a data URL must be 'data:<type>;base.*: {reason}$"):
        read(url)


def test_long_base64_is_shortened_in_errors():
    for text in ("data:image/png;base64," + "A" * 9000 + "!", "A" * 9000 + "!", "A" * 9000):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read(text)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/no/such.png", r"no such file; base64 has no character '\.'"),
        (Path("/no/such.png"), "no such file"),
        ("photo", "no such file; base64 cannot have 5 characters"),
        ("test", "no such file; as base64, no known picture or film"),
        ("a\0b.png", "(stat: )?embedded null"),
        (Path("a\0b.png"), "(stat: )?embedded null"),
        ("file:///a%00b.png", "(stat: )?embedded null"),
        (f"{'a' * 300}.png", "File name too long"),
        ("C:\\pictures\\a.png", "no such file"),
        ("file:///no/such%20file.png", "no such file"),
        ("file://server/share/a.png", "no such file; a path in a file URL begins with a third"),
        ("file://", "no such file; a path in a file URL begins with a third slash"),
        ("//host/a.png", "no such file; base64 has no character"),
        ("www.example.org/a.png", "no such file; base64 has no character"),
        (f"{__file__}/a.png", "Not a directory"),
        (tempfile.gettempdir(), "a directory"),
        (Path(tempfile.gettempdir()), "a directory"),
        (Path(tempfile.gettempdir()).as_uri(), "a directory"),
        (".", "a directory"),
        ("/dev/zero", "a pipe or a device; read it and give its bytes"),
        (Path("/dev/null"), "a pipe or a device"),
    ],
    ids=lambda value: ascii(str(value))[:40],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_no_such_file(source, reason, kind):
    with pytest.raises(FileNotFoundError, match=f"^{kind} must be an existing file, .*: {reason}"):
        read(source, kind)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"got '.*/pipe': a pipe or a device"):
        read(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(file, monkeypatch):
    monkeypatch.setattr(source_module.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"existing file, got .*\.gif': permission denied"):
        read(file)


@pytest.mark.parametrize("text", ["", "  ", "\n", "\ud800.png", "~\ud800", "file:///\ud800"])
def test_no_name(text):
    with pytest.raises(ValueError, match=r"image must be a path, URL, base64 string, .*, got '"):
        read(text)


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.example/a.png", "ftp://a.example/a", "s3://bucket/a.png", "gs://bucket/a.png"),
        *("hf://owner/name/a.png", "htps://a.example/a.png", "http:a.png", "https:/a.example/a"),
    ],
)
def test_urls_of_other_schemes(url):
    for text in (url, f"  {url}\n"):
        with pytest.raises(ValueError, match=f"URL must start with https://, got '{url}': "):
            read(text)


@pytest.mark.parametrize(
    "url", ["https://a.example/图.png", " https://a.example\n", "HTTPS://a.b/"]
)
def test_https_urls_are_fetched(url, monkeypatch):
    seen = []
    monkeypatch.setattr(source_module, "fetch", lambda url, **_: seen.append(url) or GIF)
    assert read(url) == GIF
    assert seen == [url.strip()]


def test_bytes_and_open_files(file):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    for data in (GIF, bytearray(GIF), memoryview(GIF), Pipe(GIF)):
        assert read(data) == GIF
    with file.open("rb") as opened:
        opened.read()
        assert read(opened) is opened
    with pytest.raises(ValueError, match="image must hold at most 42 bytes, got more"):
        read(Pipe(GIF), max_bytes=42)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_empty_sources(tmp_path, kind):
    (tmp_path / "empty").touch()
    for source in (b"", "data:,", "data:image/png;base64,", io.BytesIO(), tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"^{kind} must not be empty, got zero bytes from "):
            read(source, kind)


def test_open_files_that_cannot_be_read(file):
    with file.open("r") as text, pytest.raises(TypeError, match="opened in binary mode, got Text"):
        read(text)
    with (
        tempfile.NamedTemporaryFile("w+") as text,
        pytest.raises(TypeError, match="must be opened in binary mode, got _Temp"),
    ):
        read(text)
    with pytest.raises(ValueError, match=r"must be a readable file, got TextIO.*: I/O .* closed"):
        read(text.file)
    with file.open("ab") as out, pytest.raises(ValueError, match="must be a readable file, got Bu"):
        read(out)


@pytest.mark.parametrize(
    "source", [None, 3, ["a.png"], {"url": "a.png"}, object()], ids=lambda x: type(x).__name__
)
def test_other_kinds(source):
    with pytest.raises(TypeError, match="image must be a path, URL, base64 string"):
        read(source)
    with pytest.raises(TypeError, match="video must be a path, URL, bytes, open file, list of"):
        read(source, "video")
