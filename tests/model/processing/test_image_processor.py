"""The checkpoint's image processor."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from keye_model.processing.image import processor_size
from keye_model.processing.image_processor import KeyeImageProcessor
from tests.model.processing.messages import unpatchify


def _noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def directory(tmp_path):
    def write(**values):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize("resample", [Image.BICUBIC, Image.BILINEAR])
def test_image_processor_pipeline(resample):
    """Pillow's resize, then layout and normalisation written as plain index arithmetic."""
    pixels = _noise(50, 90)
    processor = KeyeImageProcessor(min_pixels=3136, resample=resample)
    batch = processor(pixels)
    height, width = processor_size(50, 90, min_pixels=3136, max_pixels=1003520)
    h, w = height // 14, width // 14
    resized = np.array(Image.fromarray(pixels).resize((width, height), resample))
    n, c, i, j = np.ogrid[: h * w, :3, :14, :14]
    raw = resized[14 * (n // w) + i, 14 * (n % w) + j, c]
    expected = ((raw / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    assert batch.image_grid_thw.tolist() == [[1, h, w]]
    assert batch.image_grid_thw.dtype == torch.int64
    assert batch.pixel_values.dtype == torch.float32
    assert np.array_equal(batch.pixel_values.numpy(), expected)
    assert np.array_equal(processor.patches(pixels).pixels.numpy(), raw)


def _cubic(x):
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _linear(x):
    return np.maximum(0.0, 1 - x)


def _filter(n_in, n_out, kernel, support):
    """[n_out, n_in]: weights of an antialiased resize along one axis."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    centers, taps = (np.arange(n_out)[:, None] + 0.5) * scale, np.arange(n_in)
    first = np.maximum((centers - support * width + 0.5).astype(int), 0)
    last = np.minimum((centers + support * width + 0.5).astype(int), n_in)
    weights = kernel(np.abs((taps - centers + 0.5) / width)) * (taps >= first) * (taps < last)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(300, 200), (60, 40), (100, 400)], ids=["shrink", "grow", "wide"])
@pytest.mark.parametrize(
    ("resample", "kernel", "support"),
    [(Image.BICUBIC, _cubic, 2), (Image.BILINEAR, _linear, 1)],
    ids=["bicubic", "bilinear"],
)
def test_image_processor_filter(size, resample, kernel, support):
    """Pillow's filter written out: two passes with bytes between them, to one level of 255.

    Which axis goes first is Pillow's choice, and differs between its releases.
    """
    pixels = _noise(*size)
    processor = KeyeImageProcessor(min_pixels=12544, max_pixels=25088, resample=resample)
    cut = processor.patches(pixels)
    resized = unpatchify(cut.pixels, cut.grid_thw)[0].permute(1, 2, 0).numpy().astype(int)
    down = _filter(size[0], resized.shape[0], kernel, support)
    across = _filter(size[1], resized.shape[1], kernel, support)

    def rows(image):
        return np.einsum("oi,ijc->ojc", down, image).round().clip(0, 255)

    def columns(image):
        return np.einsum("oj,ijc->ioc", across, image).round().clip(0, 255)

    orders = (rows(columns(pixels)), columns(rows(pixels)))
    assert min(np.abs(expected - resized).max() for expected in orders) <= 1


def test_image_processor_several_pictures_are_concatenated():
    processor = KeyeImageProcessor(min_pixels=3136)
    pictures = [_noise(56, 84), _noise(112, 56)]
    batch = processor.preprocess(pictures)
    alone = [processor(picture) for picture in pictures]
    assert batch.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 4]]
    assert torch.equal(batch.pixel_values, torch.cat([one.pixel_values for one in alone]))


def test_image_processor_defaults(directory):
    processor = KeyeImageProcessor.from_pretrained(directory())
    assert (processor.min_pixels, processor.max_pixels) == (102400, 1003520)
    assert (processor.patch_size, processor.merge_size, processor.resample) == (14, 2, 3)
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    assert processor.patches(_noise(224, 224)).grid_thw == (1, 24, 24)


@pytest.mark.parametrize(
    "values",
    [
        {"min_pixels": 3136, "max_pixels": 6272},
        {"size": {"shortest_edge": 3136, "longest_edge": 6272}},
    ],
    ids=["published", "converted"],
)
def test_image_processor_file_and_overrides(directory, values):
    path = directory(**values, resample=2, image_mean=[0.1, 0.2, 0.3])
    processor = KeyeImageProcessor.from_pretrained(path)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 6272)
    assert (processor.resample, processor.image_mean) == (2, [0.1, 0.2, 0.3])
    asked = KeyeImageProcessor.from_pretrained(path, min_pixels=784, max_pixels=784)
    assert asked.patches(_noise(56, 56)).grid_thw == (1, 2, 2)


def test_image_processor_attributes_hold_from_the_next_picture_on():
    processor = KeyeImageProcessor()
    processor.min_pixels = 3136
    assert processor.patches(_noise(56, 56)).grid_thw == (1, 4, 4)
    processor.max_pixels = 100
    with pytest.raises(ValueError, match="min_pixels must be at most max_pixels, got 3136"):
        processor.patches(_noise(56, 56))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_pixels": 0}, "min_pixels must be a positive integer, got 0"),
        ({"patch_size": 14.0}, "patch_size must be a positive integer, got 14.0"),
        ({"image_mean": [0.5]}, r"image_mean must hold three numbers, got \[0.5\]"),
        ({"image_mean": 0.5}, "image_mean must hold three numbers, got 0.5"),
        ({"image_mean": [True] * 3}, r"image_mean must hold three numbers, got \[True"),
        ({"image_std": [0.5, 0.5, math.nan]}, "image_std must hold three numbers, got .*nan"),
        ({"size": 5}, "size must be an object, got 5"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be positive"),
        ({"resample": 9}, "resample must be 0 to 5, got 9"),
    ],
)
def test_image_processor_bad_file(directory, values, message):
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
        KeyeImageProcessor.from_pretrained(directory(**values))


def test_image_processor_temporal_patches(directory):
    with pytest.raises(NotImplementedError, match="temporal_patch_size 1, got 2"):
        KeyeImageProcessor.from_pretrained(directory(temporal_patch_size=2))


def test_image_processor_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must contain preprocessor_config\.json"):
        KeyeImageProcessor.from_pretrained(tmp_path)


def test_image_processor_version_from_the_file(directory):
    read = KeyeImageProcessor.from_pretrained
    assert read(directory(processor_class="KeyeProcessor")).version == "1.0"
    assert read(directory(processor_class="KeyeVL1_5Processor")).version == "1.5"
    with pytest.raises(ValueError, match=r"version must be '1\.0' or '1\.5', got '2'"):
        read(directory(), version="2")


def test_image_processor_nothing_to_do():
    with pytest.raises(ValueError, match="images must hold at least one picture"):
        KeyeImageProcessor()([])
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        KeyeImageProcessor()(_noise(56, 56), return_tensors="np")
    with pytest.raises(ValueError, match=r"image ndarray object: .* got 1x300"):
        KeyeImageProcessor(version="1.5")(_noise(1, 300))
