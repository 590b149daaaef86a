"""Slow and fast frames: the decision against plain loops, the budgets against published numbers."""

import colorsys
import math

import numpy as np
import pytest
import torch

from keye_model.processing.slow_fast import (
    FrameSizes,
    _shrink,
    _slow_tokens,
    classify_frames,
    frame_similarity,
    frame_sizes,
    look_at,
    resize_bilinear,
    rgb_to_hsv,
)

# A frame whose comparison size is its own: 196x196 is 49 tokens, between 48 and 256.
SIDE = 196


def _flat(*colour):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE)


def _patches(colours):
    """A frame of 7x7 patches, each of one colour; the rest black."""
    frame = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    for number, colour in enumerate(colours):
        y, x = 28 * (number // 7), 28 * (number % 7)
        frame[:, y : y + 28, x : x + 28] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return frame


def _opencv_hsv(red, green, blue):
    """OpenCV's table form in Python integers; round() is half to even, as its tables are made."""
    value = max(red, green, blue)
    span = value - min(red, green, blue)
    if value == red:
        turn = green - blue
    elif value == green:
        turn = blue - red + 2 * span
    else:
        turn = red - green + 4 * span
    by_value = round((255 << 12) / value) if value else 0
    by_span = round((180 << 12) / (6 * span)) if span else 0
    hue = (turn * by_span + (1 << 11)) >> 12
    return hue + 180 * (hue < 0), (span * by_value + (1 << 11)) >> 12, value


@pytest.mark.parametrize(
    ("rgb", "hsv"),
    [
        ((255, 0, 0), (0, 255, 255)),
        ((255, 255, 0), (30, 255, 255)),
        ((0, 255, 0), (60, 255, 255)),
        ((0, 255, 255), (90, 255, 255)),
        ((0, 0, 255), (120, 255, 255)),
        ((255, 0, 255), (150, 255, 255)),
        ((255, 0, 1), (0, 255, 255)),  # just below red: -0.1 rounds to 0, not to 180
        ((255, 0, 20), (178, 255, 255)),
        ((128, 128, 128), (0, 0, 128)),
        ((0, 0, 0), (0, 0, 0)),
        ((200, 100, 50), (10, 191, 200)),
    ],
)
def test_rgb_to_hsv_known_colours(rgb, hsv):
    pixels = np.array(rgb, dtype=np.uint8)[:, None]
    assert rgb_to_hsv(pixels)[:, 0].tolist() == list(hsv)


def test_rgb_to_hsv_equals_integer_tables():
    """Each (value, span) once in some sector, and random colours; against colorsys within 1."""
    value, span = np.meshgrid(np.arange(256), np.arange(256))
    value, low = value[span <= value], (value - span)[span <= value]
    middle = np.random.default_rng(0).integers(low, value + 1)
    orders = np.random.default_rng(1).permuted(np.stack([value, low, middle]), axis=0)
    rgb = orders.astype(np.uint8)
    found = rgb_to_hsv(rgb).T.astype(int)
    colours = rgb.T.astype(int).tolist()
    assert found.tolist() == [list(_opencv_hsv(*colour)) for colour in colours]
    exact = np.array([colorsys.rgb_to_hsv(*(c / 255 for c in colour)) for colour in colours])
    apart = np.abs(found - exact * [180, 255, 255])
    apart[:, 0] = np.minimum(apart[:, 0], 180 - apart[:, 0])  # hue is a circle
    assert apart.max() <= 1


def _naive_similarity(a, b):
    """Published formula, one patch at a time, in double."""
    alike = []
    for y in range(0, a.shape[1], 28):
        for x in range(0, a.shape[2], 28):
            vectors = []
            for frame in (a, b):
                pixels = frame[:, y : y + 28, x : x + 28].reshape(3, -1).T.tolist()
                vectors.append([part for pixel in pixels for part in _opencv_hsv(*pixel)])
            norms = [math.hypot(*vector) + 1e-8 for vector in vectors]
            if min(norms) < 0.01 and max(norms) < 0.01:
                continue
            dot = sum(p / norms[0] * (q / norms[1]) for p, q in zip(*vectors, strict=True))
            alike.append(dot > 0.7)
    return sum(alike) / len(alike) if alike else math.nan


def test_frame_similarity_equals_loops():
    """Noise over patches of mixed colours, some black in one frame or both: a share inside 0..1."""
    generator = np.random.default_rng(3)
    frames = []
    for _ in range(2):
        colours = generator.integers(0, 236, (49, 3)) * (generator.random((49, 1)) > 0.3)
        noise = torch.from_numpy(generator.integers(0, 20, (3, SIDE, SIDE), dtype=np.uint8))
        frame = _patches(colours.tolist())
        frames.append(frame + noise * (frame.amax(0) > 0))
    found = frame_similarity(look_at(frames[0]), look_at(frames[1]))
    expected = _naive_similarity(*frames)
    assert 0 < expected < 1
    assert found == float(np.float32(expected))


@pytest.mark.parametrize("side", [SIDE, 448])
def test_every_patch_is_converted(side):
    """In blocks, of which 448 x 448 pixels fill two and begin a third."""
    for colour in ((255, 0, 0), (0, 0, 255), (200, 100, 50)):  # memory of one may serve the next
        frame = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, side, side)
        hsv = np.array(_opencv_hsv(*colour), dtype=np.float32)
        look = look_at(frame)
        assert (look.hsv == hsv[:, None, None]).all()
        assert look.norms == pytest.approx(np.full((side // 28) ** 2, math.hypot(*hsv) * 28))


def test_patches_are_alike_above_a_cosine_of_07():
    """White is (0, 0, 255) in HSV, green (h, 255, 255): 0.70014 at h = 51, 0.69987 at 52."""
    white = look_at(_flat(255, 255, 255))
    for red, hue, share in ((73, 51, 1.0), (72, 52, 0.0)):
        green = (red, 255, 0)
        assert _opencv_hsv(*green) == (hue, 255, 255)
        assert frame_similarity(white, look_at(_flat(*green))) == share


def test_classify_frames_compares_with_the_last_slow_frame():
    """A slow drift is fast step by step until it has gone too far from where it began."""
    white, blue = (255, 255, 255), (0, 0, 255)  # their cosine is 0.67: not alike
    frames = [_patches([blue] * done + [white] * (49 - done)) for done in (0, 3, 4, 5, 8, 10, 49)]
    # Different patches from the reference: 0, 3, 4, 5 of 49 (slow), then 3, 5 (slow), all (slow).
    assert classify_frames(frames) == [False, True, True, False, True, False, False]


def test_classify_frames_limit_is_fp32():
    """9 of 10 patches alike is 0.89999998 in fp32, less than 0.9: slow, as published."""
    red, black = (255, 0, 0), (0, 0, 0)
    frames = [_patches([red] * 10), _patches([red] * 9 + [black])]
    assert frame_similarity(look_at(frames[0]), look_at(frames[1])) == float(np.float32(0.9))
    assert classify_frames(frames) == [False, False]
    frames = [_patches([red] * 41), _patches([red] * 37 + [black] * 4)]  # 0.902
    assert classify_frames(frames) == [False, True]


def test_classify_frames_black():
    """Nothing to compare between black frames: fast. A picture after black is slow."""
    black, red = _flat(0, 0, 0), _flat(255, 0, 0)
    assert math.isnan(frame_similarity(look_at(black), look_at(black)))
    assert classify_frames([black, black, red, red, black]) == [False, True, False, True, False]


def test_classify_frames_shrinks_first():
    """Detail finer than the comparison size does not count; edges of the input need not fit 28."""
    stripes = torch.zeros(3, 600, 1000, dtype=torch.uint8)
    stripes[:, ::2] = 200
    assert classify_frames([stripes, stripes.roll(1, dims=1)]) == [False, True]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),  # 256 tokens
        ((448, 476), (420, 448)),
        ((1128, 1000), (448, 420)),  # sqrt(256 x 1.128) is 16.99, sqrt(257 x 1.128) is 17.03
        ((168, 224), (168, 224)),  # 48 tokens
        ((140, 140), (196, 196)),
        ((132, 171), (196, 224)),  # sqrt(48 x 171 / 132) is 7.89, sqrt(50 x 171 / 132) is 8.05
    ],
    ids=str,
)
def test_frames_are_compared_at_48_to_256_tokens(size, expected):
    assert _shrink(torch.zeros(3, *size, dtype=torch.uint8)).shape == (3, *expected)


def test_classify_frames_threshold():
    frames = [_patches([(255, 0, 0)] * 4), _patches([(255, 0, 0)] * 2)]  # half alike
    assert classify_frames(frames, 0.5) == [False, True]
    assert classify_frames(frames, 0.51) == [False, False]
    assert classify_frames([]) == []


@pytest.mark.parametrize(
    ("num_slow", "num_fast", "left", "slow", "fast", "total"),
    [
        (64, 0, 768, (560, 1008), (308, 532), 46_080),
        (16, 48, 768, (560, 1008), (308, 532), 21_552),
        (1, 63, 768, (560, 1008), (308, 532), 13_887),
        (128, 472, 244, (308, 560), (168, 280), 56_480),
        (300, 300, 169, (252, 476), (140, 252), 59_400),
        (600, 0, 110, (196, 364), (140, 252), 54_600),
        (1365, 0, 49, (140, 252), (140, 252), 61_425),
    ],
)
def test_frame_sizes_of_720p(num_slow, num_fast, left, slow, fast, total):
    """Outputs of keye-vl-utils 1.5.2."""
    assert _slow_tokens(num_slow, num_fast, 37632, 602112, 51380224) == left
    sizes = frame_sizes(720, 1280, num_slow, num_fast)
    assert sizes == FrameSizes(*slow, *fast)
    tokens = num_slow * slow[0] * slow[1] + num_fast * fast[0] * fast[1]
    assert tokens // 784 == total


@pytest.mark.parametrize("num_slow", [1, 40, 200, 700])
@pytest.mark.parametrize("num_fast", [0, 30, 600])
def test_slow_tokens_is_the_first_past_the_budget(num_slow, num_fast):
    budget = 20000 * 784
    expected = next(
        (
            m
            for m in range(48, 768)
            if 784 * (num_slow * m + num_fast * max(int(0.3 * m), 48)) > budget
        ),
        768,
    )
    assert _slow_tokens(num_slow, num_fast, 37632, 602112, budget) == expected


def test_the_least_of_a_fast_frame_is_whole_tokens():
    """100 000 pixels are 127.55 tokens, of which a fast frame has 127: 201 + 100 x 127 > 12900."""
    assert _slow_tokens(1, 100, 100_000, 602112, 12900 * 784) == 201


@pytest.mark.parametrize(
    ("size", "counts", "expected"),
    [
        ((672, 896), (1, 0), (672, 896)),  # 768 tokens
        ((10201, 10000), (1, 0), (756, 756)),  # sqrt(768 x 1.0201) is 27.99
        # 65 tokens and 1364 times 48 are 65537, the first sum past 65536.
        ((140, 364), (1, 1364), (140, 364)),  # 65 tokens
        ((168, 308), (1, 1364), (140, 280)),  # 66
    ],
    ids=str,
)
def test_frame_sizes_at_their_bounds(size, counts, expected):
    assert frame_sizes(*size, *counts)[:2] == expected


def _helper_size(height, width, low, high):
    """The helpers' resize rule as published, whose first test wins when the bounds cross."""
    tall, wide = (max(28, 28 * round(side / 28)) for side in (height, width))
    if tall * wide > high:
        scale = math.sqrt(height * width / high)
        tall, wide = (28 * math.floor(side / scale / 28) for side in (height, width))
    elif tall * wide < low:
        scale = math.sqrt(low / (height * width))
        tall, wide = (28 * math.ceil(side * scale / 28) for side in (height, width))
    return max(tall, 28), max(wide, 28)


@pytest.mark.parametrize(
    ("size", "options", "slow_tokens"),
    [
        ((720, 1280), {"min_pixels": 1}, 768),  # never below 48 tokens
        ((720, 1280), {"max_pixels": 200_000}, 256),  # 255.1 tokens, and the first count past it
        # At least 128 tokens, yet a fast frame may only have 73: it shrinks to them, as published.
        ((720, 1280), {"min_pixels": 128 * 784, "max_pixels": 256 * 784}, 256),
        # Small enough for the fast bound of 48 tokens, so the minimum rules and it grows past it.
        ((140, 224), {"min_pixels": 128 * 784}, 768),
        ((720, 1280), {"video_total_pixels": 50 * 784}, 48),
    ],
    ids=["min", "max", "crossed", "small", "budget"],
)
def test_frame_sizes_options(size, options, slow_tokens):
    least = max(options.get("min_pixels", 0), 48 * 784)
    slow = _helper_size(*size, least, slow_tokens * 784)
    fast_tokens = max(int(0.3 * (slow[0] * slow[1] / 784)), 48)
    fast = _helper_size(*size, least, fast_tokens * 784)
    assert frame_sizes(*size, 1, 1, options) == (*slow, *fast)


def test_resize_bilinear_layouts_agree():
    frame = torch.randint(0, 256, (3, 90, 130), dtype=torch.uint8)
    small = resize_bilinear(frame, 56, 84)
    interleaved = frame.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert small.shape == (3, 56, 84)
    assert small.dtype == torch.uint8
    assert torch.equal(small, resize_bilinear(interleaved, 56, 84))
    exact = torch.nn.functional.interpolate(
        frame[None].double(), (56, 84), mode="bilinear", antialias=True
    )[0]
    assert (small - exact).abs().max() <= 1.5  # 8-bit weights and a rounding between the passes
    assert resize_bilinear(frame, 90, 130) is frame


def test_frame_sizes_that_could_only_exhaust_the_memory():
    with pytest.raises(ValueError, match=r"must have at most 131072 tokens \(a whole context\)"):
        frame_sizes(720, 1280, 1, 0, {"min_pixels": 10**12})
    with pytest.raises(ValueError, match="a video must have at most 1048576 tokens"):
        frame_sizes(720, 1280, 600, 0, {"min_pixels": 2_000_000})
    # 48 tokens each, as long as the budget is less: 48 x 21845 = 1048560.
    frame_sizes(168, 224, 1845, 20000)
    with pytest.raises(ValueError, match=r"a video must .* got 1048608: lower min_pixels"):
        frame_sizes(168, 224, 1845, 20001)


def test_frame_sizes_extreme_ratio():
    with pytest.raises(ValueError, match="at most 200 times the shorter"):
        frame_sizes(10, 3000, 1, 0)
