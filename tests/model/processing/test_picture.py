"""Pictures from every source, mode and array to 8-bit RGB, or to a clear refusal."""

import base64
import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.picture import array_pixels, load_image
from keye_model.processing.video_processor import frame_bytes


def _noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels():
    return _noise(9, 7)


@pytest.fixture
def file(tmp_path, pixels):
    path = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    "source",
    [
        lambda p: p,
        lambda p: str(p),
        lambda p: f"file://{p}",
        lambda p: p.as_uri(),  # the blank is %20
        lambda p: p.read_bytes(),
        lambda p: memoryview(p.read_bytes()),
        lambda p: io.BytesIO(p.read_bytes()),
        lambda p: "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode(),
        lambda p: base64.b64encode(p.read_bytes()).decode(),
        lambda p: Image.open(p),
        lambda p: np.array(Image.open(p)),
        lambda p: np.array(Image.open(p)).transpose(2, 0, 1),
        lambda p: torch.from_numpy(np.array(Image.open(p))),
        lambda p: torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1),
    ],
    ids=[
        *("path", "str", "file_url", "escaped_url", "bytes", "memoryview", "open_file"),
        *("data_url", "base64", "pil", "array", "array_chw", "tensor", "tensor_chw"),
    ],
)
def test_load_sources(file, pixels, source):
    image = load_image(source(file))
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), pixels)


@pytest.mark.parametrize("channels", [0, 1])
def test_load_grey_arrays(channels):
    grey = _noise(5, 6, channels)
    expected = grey.reshape(5, 6, 1).repeat(3, axis=2)
    assert np.array_equal(np.array(load_image(grey)), expected)


def test_load_alpha():
    rgba = _noise(4, 5, 4)
    alpha = rgba[..., 3:] / 255
    white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.array(load_image(rgba), float) - white).max() <= 1
    assert np.array_equal(np.array(load_image(rgba, alpha="drop")), rgba[..., :3])
    with pytest.raises(ValueError, match="alpha must be 'white' or 'drop', got 'keep'"):
        load_image(rgba, alpha="keep")


@pytest.mark.filterwarnings("error")
def test_load_transparent_palette_and_grey():
    """Over white for "white", the colours alone for "drop", and nothing said by Pillow."""
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = _encoded(palette, transparency=bytes([0, 255, 0]))  # one alpha for each colour
    grey = Image.frombytes("LA", (3, 1), bytes([9, 0, 8, 255, 7, 0]))
    keyed = _encoded(Image.fromarray(np.array([[9, 8, 9]], np.uint8)), transparency=9)
    for source, colours in (
        (data, [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
        (grey, [[9] * 3, [8] * 3, [7] * 3]),
        (keyed, [[9] * 3, [8] * 3, [9] * 3]),
    ):
        assert np.array(load_image(source, alpha="drop"))[0].tolist() == colours
        white = [[255] * 3, colours[1], [255] * 3]
        assert np.array(load_image(source))[0].tolist() == white


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "I;16B", "I"])
def test_load_16_bit_grey_by_its_high_byte(kind):
    levels = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    source = Image.fromarray(levels)
    if kind == "I;16B":
        source = Image.frombytes(kind, (5, 1), levels.astype(">u2").tobytes())
    elif kind == "I":  # how older releases of Pillow open such a PNG
        source = Image.fromarray(levels.astype(np.int32))
        source.format = "PNG"
    else:
        source = _encoded(source, kind)
    assert np.array(load_image(source))[0, :, 0].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_load_32_bit_samples(dtype, mode):
    picture = Image.fromarray(np.zeros((2, 2), dtype))
    with pytest.raises(ValueError, match=f"8 or 16 bits a sample, got mode '{mode}' .* 0 to 255"):
        load_image(picture)
    with pytest.raises(ValueError, match=f"got mode '{mode}' .* in [0-9]+ bytes"):
        load_image(_encoded(picture, "TIFF"))


def test_load_open_file_twice(file, pixels):
    with file.open("rb") as opened:
        for _ in range(2):
            assert np.array_equal(np.array(load_image(opened)), pixels)

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    assert load_image(Pipe(file.read_bytes())).size == (7, 9)


def test_load_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = tmp_path / "turned.jpg"
    Image.fromarray(_noise(20, 30)).save(path, exif=exif)
    assert load_image(path).size == (30, 20)


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing file, got '.*/nothing\.png'"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match="existing file, got 'test'"):
        load_image("test")  # four characters of valid base64


def test_load_empty_file(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(ValueError, match=r"zero bytes from '.*/empty\.jpg'"):
        load_image(path)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_load_truncated_file(tmp_path, kind):
    data = _encoded(Image.fromarray(_noise(40, 50)), kind)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"complete image file, got '.*/half'"):
        load_image(path)
    with pytest.raises(ValueError, match="image must be"):
        load_image(data[:12])


def test_load_truncated_picture_opened_by_the_caller():
    data = _encoded(Image.fromarray(_noise(40, 50)), "JPEG")
    with pytest.raises(ValueError, match="complete image file, got JpegImageFile object"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("source", [b"not a picture", "data:image/png;base64,aGVsbG8="])
def test_load_not_an_image(source):
    with pytest.raises(ValueError, match="image file that Pillow can read, got"):
        load_image(source)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<?xml version='1.0'?>", "an XML document"),
        (b"%PDF-1.7", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_load_what_people_take_for_a_picture(tmp_path, data, what):
    (tmp_path / "a.png").write_bytes(data)
    for source in (tmp_path / "a.png", data, io.BytesIO(data)):
        with pytest.raises(ValueError, match=f"image file that Pillow can read, got .*, {what}$"):
            load_image(source)


def test_load_cmyk_jpeg():
    """Photographers' JPEGs hold inverted inks, which Pillow turns back."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.array(load_image(_encoded(image, "JPEG", quality=100)))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 8


# Of 2000 pixels: Pillow raises at a limit below 1000 and only warns up to 2000.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [600, 1000])
def test_load_decompression_bomb(monkeypatch, limit):
    data = _encoded(Image.fromarray(_noise(40, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"at most {limit} pixels, got .*{len(data)} bytes"):
        load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(data).size == (50, 40)


def _row(source, alpha="white"):
    """The colours of a picture one pixel high."""
    return np.array(load_image(source, alpha=alpha))[0].tolist()


@pytest.mark.parametrize(
    "data",
    [
        b"P5 5 1 65535\n" + np.array([0, 255, 256, 40000, 65535], ">u2").tobytes(),
        b"P2 5 1 65535\n0 255 256 40000 65535\n",
        b"P2 5 1 1023\n0 3 4 625 1023\n",  # Pillow scales to 65535
    ],
    ids=["binary", "text", "10_bits"],
)
def test_load_16_bit_pgm(data):
    assert _row(data) == [[v] * 3 for v in (0, 0, 1, 156, 255)]


def _chunk(kind, data):
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def _png(width, depth, colours, row, key):
    """One row of a PNG with a transparent colour, as Pillow does not write it."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", key),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("depth", "colours", "row", "key", "expected"),
    [
        (16, 0, "1234 1235 0000 ffff", "1234", [0x12, 0x12, 0, 255]),
        (16, 0, "0000 0001 0100 ffff", "0000", [0, 0, 1, 255]),
        (8, 0, "12 13 00 ff", "0012", [0x12, 0x13, 0, 255]),
        (4, 0, "970f", "0009", [0x99, 0x77, 0, 255]),
        (2, 0, "93", "0002", [170, 85, 0, 255]),  # 2 1 0 3
        (1, 0, "9f", "0001", [255, 0, 0, 255]),
        (8, 2, "123456 123457 000000 ffffff", "0012 0034 0056", None),
        (16, 2, "123456789abc 123456799abc 000000000000 ffffffffffff", "1234 5678 9abc", None),
    ],
    ids=["16_bits", "black", "8_bits", "4_bits", "2_bits", "1_bit", "colour", "colour_16_bits"],
)  # fmt: skip
def test_load_png_with_a_transparent_colour(depth, colours, row, key, expected):
    data = _png(4, depth, colours, bytes.fromhex(row), bytes.fromhex(key))
    white, plain = _row(data), _row(data, "drop")
    if expected is None:
        high = [0x12, 0x56, 0x9A] if depth == 16 else [0x12, 0x34, 0x56]
        assert plain[0] == high
        assert plain[2:] == [[0] * 3, [255] * 3]
    else:
        assert plain == [[value] * 3 for value in expected]
    assert white[0] == [255] * 3
    # Of 16-bit colours Pillow keeps the high bytes, so one with the same is transparent, too.
    assert white[1] == ([255] * 3 if (depth, colours) == (16, 2) else plain[1])
    assert white[2] == plain[2]


def test_load_leaves_the_callers_picture_as_it_is():
    data = _png(2, 4, 0, b"\x97", b"\0\x09")
    image = Image.open(io.BytesIO(data))
    assert _row(image) == [[255] * 3, [0x77] * 3]
    assert (image.mode, image.info["transparency"]) == ("L", 9)


def _tiff(width, bits, photometric, data, sample_format=1):
    """One grey row of a TIFF, as Pillow does not write it."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = b"II*\0" + struct.pack("<I", 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "expected"),
    [
        (16, 1, "0000 ff00 0001 ffff", [0, 0, 1, 255]),
        (16, 0, "0000 ff00 0001 ffff", [255, 255, 254, 0]),  # 0 is white
        (12, 1, "00000f 010fff", [0, 0, 1, 255]),
        (8, 1, "00 01 fe ff", [0, 1, 254, 255]),
        (8, 0, "00 01 fe ff", [255, 254, 1, 0]),
    ],
)
def test_load_grey_tiff(bits, photometric, data, expected):
    assert _row(_tiff(4, bits, photometric, bytes.fromhex(data))) == [[v] * 3 for v in expected]


def test_load_signed_tiff():
    with pytest.raises(ValueError, match="8 or 16 bits a sample, got mode 'I'"):
        load_image(_tiff(2, 16, 1, bytes(4), sample_format=2))


@pytest.mark.parametrize(
    ("mode", "pixels", "white", "plain"),
    [
        ("1", "a0", [[255] * 3, [0] * 3, [255] * 3], None),
        ("LA", "28ff 2800 ffff", [[40] * 3, [255] * 3, [255] * 3], [[40] * 3, [40] * 3, [255] * 3]),
        ("La", "28ff 0000 4080", [[40] * 3, [255] * 3, [191] * 3], [[40] * 3, [0] * 3, [127] * 3]),
        ("RGBa", "102030ff 00000000 10203080",
         [[16, 32, 48], [255] * 3, [143, 159, 175]], [[16, 32, 48], [0] * 3, [31, 63, 95]]),
        ("RGBX", "10203000 10203080 102030ff", [[16, 32, 48]] * 3, None),
        ("CMYK", "00000000 00ffff00 000000ff", [[255] * 3, [255, 0, 0], [0] * 3], None),
        ("YCbCr", "ff8080 008080 4c55ff", [[255] * 3, [0] * 3, [254, 0, 0]], None),
        ("HSV", "00ffff 55ffff 00007f", [[255, 0, 0], [0, 255, 0], [127] * 3], None),
        ("I;16L", "ff00 0001 ffff", [[0] * 3, [1] * 3, [255] * 3], None),
        ("I;16B", "00ff 0100 ffff", [[0] * 3, [1] * 3, [255] * 3], None),
    ],
)  # fmt: skip
def test_load_modes(mode, pixels, white, plain):
    image = Image.frombytes(mode, (3, 1), bytes.fromhex(pixels))
    assert _row(image) == white
    assert _row(image, "drop") == (plain or white)


def test_load_lab():
    image = Image.frombytes("LAB", (2, 1), bytes.fromhex("ff0000 000000"))
    assert np.abs(np.array(_row(image)) - [[255] * 3, [0] * 3]).max() <= 1


def test_load_palettes():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert _row(image) == colours
    image.info["transparency"] = 1
    assert _row(image) == [colours[0], [255] * 3, colours[2]]
    assert _row(image, "drop") == colours
    both = image.copy()
    del both.info["transparency"]
    both = both.convert("PA")
    both.putalpha(Image.fromarray(np.array([[255, 255, 0]], np.uint8)))
    assert _row(both) == [*colours[:2], [255] * 3]
    assert _row(both, "drop") == colours


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_load_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (0, 255, 255)]
    data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames >= 2
    assert np.array(load_image(data)).max() == 0
    opened.seek(1)  # the caller's choice
    assert np.array(load_image(opened)).min() == 255


def test_load_post_script_is_not_run(monkeypatch):
    data = _encoded(Image.fromarray(_noise(4, 4)), "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with pytest.raises(NotImplementedError, match=r"must hold pixels, got PostScript in .* bytes"):
        load_image(data)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_load_picture_without_pixels(size):
    with pytest.raises(ValueError, match=f"must not be empty, got {size[0]}x{size[1]} from Image"):
        load_image(Image.new("RGB", size))


def test_load_closed_picture(file):
    image = Image.open(file)
    image.close()
    with pytest.raises(ValueError, match="complete image file, got PngImageFile object: "):
        load_image(image)


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_load_one_pixel(version):
    grey = np.full((1, 1), 77, np.uint8)
    cut = KeyeImageProcessor(version=version, min_pixels=784).patches(grey)
    assert cut.grid_thw == (1, 2, 2)
    assert cut.pixels.unique().tolist() == [77]


TALL = _noise(3, 11)  # [3, 11, 3]: 3 rows of 11 pixels, and not 3 channels


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (TALL, TALL),
        (torch.from_numpy(TALL), TALL),
        (_noise(3, 11, 4), _noise(3, 11, 4)[..., :3]),
        (_noise(4, 5, 1), _noise(4, 5, 1).repeat(3, 2)),
        (_noise(5, 3, 7, seed=1)[..., 0], _noise(5, 3, 7, seed=1)[..., :1].repeat(3, 2)),
        (_noise(1, 6, 8).transpose(0, 2, 1), _noise(1, 6, 8).transpose(2, 1, 0).repeat(3, 2)),
        (np.rot90(_noise(5, 6), 3), np.rot90(_noise(5, 6), 3)),
        (_noise(5, 6)[::-1, ::-2, ::-1], _noise(5, 6)[::-1, ::-2, ::-1]),
        (np.broadcast_to(np.uint8(9), (2, 2, 3)), np.full((2, 2, 3), 9)),
        (np.frombuffer(bytes(range(60)), np.uint8).reshape(4, 5, 3),
         np.arange(60).reshape(4, 5, 3)),
        (torch.from_numpy(_noise(8, 9))[::2, 1:7], _noise(8, 9)[::2, 1:7]),
        (torch.from_numpy(_noise(8, 9)).permute(2, 0, 1), _noise(8, 9)),
        (torch.from_numpy(_noise(8, 9)).permute(2, 0, 1).contiguous(), _noise(8, 9)),
        (torch.from_numpy(_noise(2, 2)).expand(2, 2, 3), _noise(2, 2)),
    ],
    ids=[
        *("rows", "rows_tensor", "four", "one", "two_dims", "one_first", "turned", "backwards"),
        *("broadcast", "read_only", "slice", "channels_last", "channels_first", "expanded"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_load_arrays(array, expected):
    """As a picture, and as a frame of a video."""
    assert np.array_equal(np.array(load_image(array, alpha="drop")), expected)
    assert np.array_equal(frame_bytes(array).permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    "array",
    [
        TALL.astype(np.float32),
        TALL.astype(">f4"),
        TALL.astype(np.float16)[::-1][::-1],
        torch.from_numpy(TALL).double(),
        torch.from_numpy(TALL).float().requires_grad_(),
        torch.from_numpy(TALL).bfloat16(),
    ],
    ids=["fp32", "big_endian", "fp16", "fp64", "requires_grad", "bf16"],
)
def test_frames_of_whole_floating_point_numbers(array):
    assert np.array_equal(frame_bytes(array).permute(1, 2, 0), TALL)


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_frames_of_other_floating_point_numbers(value, kind):
    frame = np.zeros((4, 4, 3), np.float32)
    frame[1, 2, 1] = value
    frame = frame if kind is np.float32 else torch.tensor(frame)
    with pytest.raises(ValueError, match="must hold whole numbers from 0 to 255"):
        frame_bytes(frame)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (torch.zeros(3, 4, 4), "float32"),
        (torch.zeros(3, 4, 4, requires_grad=True), "float32"),
        (np.zeros((4, 4), bool), "bool"),
        (torch.zeros(4, 4, dtype=torch.bool), "bool"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (torch.zeros(4, 4, 3, dtype=torch.int64), "int64"),
        (np.zeros((4, 4), np.uint16), "uint16"),
        (np.zeros((4, 4), ">u2"), ">u2"),
        (np.zeros((4, 4), np.int8), "int8"),
        (np.zeros((4, 4), object), "object"),
        (np.full((4, 4), "a"), "<U1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_load_arrays_must_be_bytes(array, dtype):
    with pytest.raises(TypeError, match=rf"must be uint8 \(0 to 255\), got {dtype}: scale it"):
        load_image(array)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"),
        torch.zeros(4, 4, dtype=torch.uint8).to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_load_tensors_without_values(tensor):
    with pytest.raises(ValueError, match="must be dense and hold values, got layout torch"):
        load_image(tensor)
    with pytest.raises(ValueError, match="must be dense and hold values, got layout torch"):
        frame_bytes(tensor)


@pytest.mark.parametrize(
    "shape", [(), (5,), (2, 2, 2), (1, 3, 4, 4), (0, 4, 3), (4, 0, 3), (3, 0, 5), (0, 0)], ids=str
)
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_load_array_shapes(shape, wrap):
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels, got \("):
        load_image(wrap(np.zeros(shape, np.uint8)))


def test_array_pixels_copies_nothing():
    pixels = torch.zeros(3, 5, 6, dtype=torch.uint8)
    array_pixels(pixels)[4, 5, 2] = 7
    assert pixels[2, 4, 5] == 7
    assert frame_bytes(pixels).data_ptr() == pixels.data_ptr()


@pytest.mark.parametrize("source", [None, 3, ["a.png"]], ids=str)
def test_load_other_kinds(source):
    with pytest.raises(TypeError, match="image must be a path, URL, base64 string"):
        load_image(source)


def test_load_text_file_object():
    with pytest.raises(TypeError, match="opened in binary mode"):
        load_image(io.StringIO("text"))


def test_load_long_sources_are_shortened():
    with pytest.raises(FileNotFoundError) as caught:
        load_image("/nowhere/" + "x" * 5000)
    assert len(str(caught.value)) < 200
