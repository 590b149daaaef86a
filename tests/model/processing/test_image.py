"""Both resize rules, patches, and pictures as the published helper loads and resizes them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_model.processing.image import (
    MIN_PIXELS,
    fetch_image,
    helper_size,
    normalize,
    patchify,
    processor_size,
)
from keye_model.processing.rules import PREVIEW, V1_5, of
from tests.model.processing.messages import unpatchify

# original, after the helper of 1.0.0, after the processor with min_pixels 102400, tokens of that,
# tokens with min_pixels 3136, tokens after the helper of 1.5.x alone
SIZES = [
    ((1080, 1920), (1092, 1932), (728, 1316), 1222, 1222, 2691),
    ((480, 640), (476, 644), (476, 644), 391, 391, 391),
    ((224, 224), (224, 224), (336, 336), 144, 64, 64),
    ((98, 98), (112, 112), (336, 336), 144, 16, 16),  # 98 / 28 = 3.5 rounds to even
    ((32, 32), (56, 56), (336, 336), 144, 4, 4),
    ((20, 100), (28, 112), (168, 644), 138, 4, 4),
    ((3000, 4000), (2996, 4004), (840, 1148), 1230, 1230, 15301),
    ((1500, 1000), (1512, 1008), (1204, 812), 1247, 1247, 1944),
    ((28, 5600), (28, 5600), (28, 5600), 200, 200, 200),  # the largest ratio
]
SIZE_IDS = ["x".join(map(str, row[0])) for row in SIZES]


def _noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _tokens(size):
    return size[0] * size[1] // 784


@pytest.mark.parametrize(("original", "helper", "final", "few", "many", "new"), SIZES, ids=SIZE_IDS)
def test_size_published_path(original, helper, final, few, many, new):
    first = helper_size(*original, min_pixels=MIN_PIXELS, max_pixels=PREVIEW.max_pixels)
    assert first == helper
    second = processor_size(*first, min_pixels=102400, max_pixels=1003520)
    assert (second, _tokens(second)) == (final, few)
    assert _tokens(processor_size(*first, min_pixels=3136, max_pixels=1003520)) == many
    alone = helper_size(*original, min_pixels=MIN_PIXELS, max_pixels=V1_5.max_pixels)
    assert _tokens(alone) == new


@pytest.mark.parametrize("row", SIZES, ids=SIZE_IDS)
@pytest.mark.parametrize("min_pixels", [102400, 3136])
def test_size_processor_without_helper(row, min_pixels):
    """Skipping the helper changes only the picture with a side below 28."""
    size = processor_size(*row[0], min_pixels=min_pixels, max_pixels=1003520)
    small = {102400: (168, 728), 3136: (28, 140)}[min_pixels]
    helped = processor_size(*row[1], min_pixels=min_pixels, max_pixels=1003520)
    assert size == (small if row[0] == (20, 100) else helped)


def test_size_small_side_is_not_enlarged_by_1_5():
    bounds = {"min_pixels": 3136, "max_pixels": 1003520}
    assert processor_size(20, 100, **bounds, enlarge_small=True) == (28, 140)
    assert processor_size(20, 100, **bounds, enlarge_small=False) == (28, 112)
    assert processor_size(100, 20, **bounds, enlarge_small=True) == (140, 28)


@pytest.mark.parametrize(("pixels", "expected"), [(42, 56), (70, 56), (98, 112)])
def test_size_ties_round_to_even(pixels, expected):
    assert helper_size(pixels, pixels, min_pixels=1, max_pixels=10**6)[0] == expected


@pytest.mark.parametrize(
    ("original", "version", "expected"),
    [
        ((56, 56), "1.0", (56, 56)),  # 4 tokens
        ((30, 31), "1.0", (56, 84)),  # sqrt(4 x 31 / 30) is 2.03
        ((3584, 3584), "1.0", (3584, 3584)),  # 16384 tokens
        ((101566, 100000), "1.0", (3584, 3556)),  # sqrt(16384 x 1.01566) is 128.998
        ((4480, 3584), "1.5", (4480, 3584)),  # 20480 tokens
        ((101248, 100000), "1.5", (4004, 3976)),  # sqrt(20480 x 1.01248) is 143.998
    ],
    ids=str,
)
def test_size_at_the_default_bounds(original, version, expected):
    bounds = {"min_pixels": MIN_PIXELS, "max_pixels": of(version).max_pixels}
    assert helper_size(*original, **bounds) == expected


@pytest.mark.parametrize("rule", [helper_size, processor_size])
def test_size_of_as_many_tokens_as_there_may_be(rule):
    bounds = {"min_pixels": 1, "max_pixels": 10**9}
    assert rule(7168, 14336, **bounds) == (7168, 14336)  # 131072 tokens
    with pytest.raises(ValueError, match=r"at most 131072 tokens .* got 131328"):
        rule(7168, 14364, **bounds)


@pytest.mark.parametrize("rule", [helper_size, processor_size])
@pytest.mark.parametrize("size", [(27, 5401), (5401, 27)])
def test_size_ratio(rule, size):
    with pytest.raises(ValueError, match=r"at most 200 times the shorter one, got \d+x\d+"):
        rule(*size, min_pixels=3136, max_pixels=1003520)


@pytest.mark.parametrize("rule", [helper_size, processor_size])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height must be a positive number, got 0"),
        ({"max_pixels": -1}, "max_pixels must be a positive number, got -1"),
        ({"min_pixels": "many"}, "min_pixels must be a positive number, got 'many'"),
        ({"min_pixels": math.inf}, "min_pixels must be a positive number, got inf"),
        ({"min_pixels": 1e12, "max_pixels": 1e13}, "at most 131072 tokens .* got 12755"),
    ],
)
def test_size_bad_values(rule, change, message):
    values = {"height": 50, "width": 50, "min_pixels": 3136, "max_pixels": 10**6, **change}
    with pytest.raises(ValueError, match=message):
        rule(**values)


def test_size_processor_refuses_to_lose_a_side():
    with pytest.raises(ValueError, match="max_pixels must leave both sides"):
        processor_size(28, 2800, min_pixels=1, max_pixels=784)
    assert helper_size(28, 2800, min_pixels=1, max_pixels=784) == (28, 280)  # clamped instead


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from(["1.0", "1.5"]))
def test_size_bounds_and_multiples(height, width, version):
    if max(height, width) > 200 * min(height, width):
        return
    bounds = {"min_pixels": MIN_PIXELS, "max_pixels": of(version).max_pixels}
    high, wide = helper_size(height, width, **bounds)
    assert high % 28 == wide % 28 == 0
    assert MIN_PIXELS <= high * wide <= of(version).max_pixels or min(high, wide) == 28
    if max(high, wide) <= 200 * min(high, wide):
        assert helper_size(high, wide, **bounds) == (high, wide)
    bounds = {"min_pixels": 102400, "max_pixels": 1003520}
    if min(height, width) >= 28:
        high, wide = processor_size(
            height, width, **bounds, enlarge_small=of(version).enlarge_small
        )
        assert high % 28 == wide % 28 == 0
        assert min(high, wide) >= 28
        assert high * wide <= 1003520


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 2, 4), (2, 6, 2)], ids=str)
def test_patches_round_trip(grid):
    t, h, w = grid
    frames = torch.randint(0, 256, (t, 3, 14 * h, 14 * w), dtype=torch.uint8)
    patches = patchify(frames, 14)
    assert patches.shape == (t * h * w, 3, 14, 14)
    assert patches.is_contiguous()
    assert torch.equal(unpatchify(patches, grid), frames)


def test_patches_raster_order():
    t, h, w, size = 2, 4, 6, 14
    frames = torch.arange(t * 3 * h * size * w * size).reshape(t, 3, h * size, w * size)
    patches = patchify(frames, size)
    for f, r, q, c, i, j in [(0, 0, 0, 0, 0, 0), (1, 3, 5, 2, 13, 13), (1, 2, 1, 1, 7, 3)]:
        expected = frames[f, c, size * r + i, size * q + j]
        assert patches[(f * h + r) * w + q, c, i, j] == expected


def test_patches_sides_must_divide():
    with pytest.raises(ValueError, match="sides that divide by 14, got"):
        patchify(torch.zeros(1, 3, 28, 30), 14)


def test_patches_table_is_exact():
    """All 256 bytes against the definition, in the two published spellings."""
    values = np.arange(256)
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    table = normalize(pixels, (0.5,) * 3, (0.5,) * 3)
    for level in (values / 255, values * (1 / 255)):
        expected = (level.astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        for channel in range(3):
            assert np.array_equal(table[channel, 0].numpy(), expected)
    # Corners of the transformers port's integration test of 1.5.
    for byte, value in [(120, -0.0588), (115, -0.0980), (91, -0.2863)]:
        assert table[0, 0, byte].item() == pytest.approx(value, abs=5e-5)


def test_patches_statistics_differ_by_channel():
    pixels = torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)
    out = normalize(pixels, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    assert out[:, :, 0, 0].tolist() == [[1.0, 1.0, 0.0]] * 2


def test_fetch_image_published_sizes_and_filter():
    image = Image.fromarray(_noise(98, 60))
    got = fetch_image({"image": image}, PREVIEW)
    assert np.array_equal(np.array(got), np.array(image.resize((56, 112), Image.BICUBIC)))


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"min_pixels": 40000}, (224, 224)),
        ({"max_pixels": 3136}, (56, 56)),
        ({"resized_height": 60, "resized_width": 90, "max_pixels": 784}, (56, 84)),
        ({"resized_height": 60}, (112, 112)),  # counts only with its partner
    ],
    ids=["min", "max", "resized", "half_resized"],
)
def test_fetch_image_item_keys(keys, size):
    image = fetch_image({"image": _noise(98, 98), **keys}, V1_5)
    assert (image.height, image.width) == size


@pytest.mark.parametrize("key", ["image", "image_url"])
def test_fetch_image_where_the_source_stands(key):
    pixels = _noise(56, 56)
    for source in (pixels, {"url": pixels}):
        image = fetch_image({"type": "image", key: source}, PREVIEW)
        assert np.array_equal(np.array(image), pixels)


@pytest.mark.parametrize(("version", "value"), [("1.0", 255), ("1.5", 7)])
def test_fetch_image_alpha_by_release(version, value):
    rgba = np.full((56, 56, 4), 7, np.uint8)
    rgba[..., 3] = 0
    assert np.array(fetch_image({"image": rgba}, of(version)))[0, 0].tolist() == [value] * 3


def test_fetch_image_ratio_names_the_source(tmp_path):
    path = tmp_path / "line.png"
    Image.fromarray(_noise(1, 201)).save(path)
    with pytest.raises(ValueError, match=r"image '.*/line\.png': .* 200 times .* got 1x201"):
        fetch_image({"image": str(path)}, PREVIEW)


def test_fetch_image_bounds_that_exclude_each_other():
    item = {"image": _noise(56, 56), "max_pixels": 784}
    assert fetch_image(item, PREVIEW).size == (28, 28)
    with pytest.raises(ValueError, match="min_pixels must be at most max_pixels, got 785 and 784"):
        fetch_image(item | {"min_pixels": 785}, PREVIEW)


def test_fetch_image_no_source():
    with pytest.raises(ValueError, match=r"must have 'image' or 'image_url', got \['type'\]"):
        fetch_image({"type": "image"}, PREVIEW)
