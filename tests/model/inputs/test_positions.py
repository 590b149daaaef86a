"""3D positions: worked tables of the published rule, an independent walk, and every mismatch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_model.checkpoint.config import PREVIEW, V1_5, KeyeConfig
from keye_model.inputs.packing import get_rope_index, pack
from keye_model.inputs.positions import rope_positions
from keye_model.inputs.request import Request
from tests.model import tiny

PREVIEW_CONFIG = KeyeConfig.from_dict(tiny.raw_config(PREVIEW))
V1_5_CONFIG = KeyeConfig.from_dict(tiny.raw_config(V1_5, fast_video_token_id=94))
T, VS, VE, I, V, F = 5, tiny.VISION_START, tiny.VISION_END, tiny.IMAGE, tiny.VIDEO, tiny.FRAME  # noqa: E741


def digits(text: str) -> list[list[int]]:
    return [[int(number) for number in line.split()] for line in text.strip().splitlines()]


def place(ids, images=(), videos=(), seconds=(), config=PREVIEW_CONFIG):
    positions, next_position = rope_positions(torch.tensor(ids), images, videos, seconds, config)
    return positions.tolist(), next_position


def test_table_a_image():
    positions, next_position = place([T, T, VS, I, I, I, I, VE, T], ((1, 4, 4),))
    assert positions == digits("""
        0 1 2 3 3 3 3 5 6
        0 1 2 3 3 4 4 5 6
        0 1 2 3 4 3 4 5 6""")
    assert next_position == 7


def test_table_b_video_at_2_fps():
    positions, next_position = place([T, T, VS, *[V] * 8, VE, T], (), ((2, 4, 4),), (0.5,))
    assert positions == digits("""
        0 1 2 3 3 3 3 4 4 4 4 5 6
        0 1 2 3 3 4 4 3 3 4 4 5 6
        0 1 2 3 4 3 4 3 4 3 4 5 6""")
    assert next_position - 13 == -6


def test_table_b_video_at_1_fps_is_the_default():
    ids = [T, T, VS, *[V] * 8, VE, T]
    positions, next_position = place(ids, (), ((2, 4, 4),), (1.0,))
    assert positions[0] == digits("0 1 2 3 3 3 3 5 5 5 5 6 7")[0]
    assert next_position - 13 == -5
    assert place(ids, (), ((2, 4, 4),)) == (positions, next_position)
    longer = [V] * 99, (), ((99, 2, 2),)
    assert place(*longer) == place(*longer, (1.0,))


def test_table_c_two_timestamped_frames():
    ids = [T, T, VS, F, 10, 13, 10, *[V] * 4, F, 10, 13, 15, *[V] * 4, VE, T]
    expected = digits("""
        0 1 2 3 4 5 6 7 7 7 7 9 10 11 12 13 13 13 13 15 16
        0 1 2 3 4 5 6 7 7 8 8 9 10 11 12 13 13 14 14 15 16
        0 1 2 3 4 5 6 7 8 7 8 9 10 11 12 13 14 13 14 15 16""")
    for rows in (((2, 4, 4),), ((1, 4, 4), (1, 4, 4))):
        assert place(ids, (), rows, config=V1_5_CONFIG) == (expected, 17)


def test_table_d_wide_image():
    positions, next_position = place([VS, *[I] * 12, VE, T], ((1, 4, 12),))
    assert positions == digits("""
        0 1 1 1 1 1 1 1 1 1 1 1 1 7 8
        0 1 1 1 1 1 1 2 2 2 2 2 2 7 8
        0 1 2 3 4 5 6 1 2 3 4 5 6 7 8""")
    assert next_position - 15 == -6


TABLE_E_ROWS = ([T, T, VS, I, I, I, I, VE, T], [1, 2, 3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_table_e_padded_batch(side):
    image, text = TABLE_E_ROWS
    pad = [0] * 6
    ids = torch.tensor([image, pad + text if side == "left" else text + pad])
    mask = torch.tensor([[1] * 9, [0] * 6 + [1] * 3 if side == "left" else [1] * 3 + [0] * 6])
    positions, deltas = get_rope_index(PREVIEW_CONFIG, ids, torch.tensor([[1, 4, 4]]), None,
                                       attention_mask=mask)  # fmt: skip
    assert positions.shape == (3, 2, 9)
    assert positions[:, 0].tolist() == place(image, ((1, 4, 4),))[0]
    row = [1] * 6 + [0, 1, 2] if side == "left" else [0, 1, 2] + [1] * 6
    assert positions[:, 1].tolist() == [row] * 3
    assert deltas.tolist() == [[-2], [-6]]
    # A decoded token at padded index 9 stands at 9 + delta.
    assert [9 + int(delta) for delta in deltas] == [7, 3]


def test_table_f_mixed():
    request = tiny.g1()
    positions, next_position = place(
        request.input_ids.tolist(), request.image_grid_thw, request.video_grid_thw, (0.5,)
    )
    assert positions == digits("""
        0 1 2 3 3 3 3 5 6 7 8 8 8 8 8 8 8 8 8 8 8 8 12 13 14 14 14 14 15 15 15 15 16 17 18
        0 1 2 3 3 4 4 5 6 7 8 8 8 8 9 9 9 9 10 10 10 10 12 13 14 14 15 15 14 14 15 15 16 17 18
        0 1 2 3 4 3 4 5 6 7 8 9 10 11 8 9 10 11 8 9 10 11 12 13 14 15 14 15 14 15 14 15 16 17 18""")
    assert next_position - 35 == -16


def test_g4_positions():
    request = tiny.g4()
    positions, next_position = place(
        request.input_ids.tolist(), request.image_grid_thw, request.video_grid_thw,
        config=V1_5_CONFIG,
    )  # fmt: skip
    assert positions == digits("""
        0 1 2 2 2 2 4 5 6 7 8 9 10 10 10 10 12 13 14 15 16 17 18 19 20 21 22 23 23 23 23 25 26 27
        0 1 2 2 3 3 4 5 6 7 8 9 10 10 11 11 12 13 14 15 16 17 18 19 20 21 22 23 23 24 24 25 26 27
        0 1 2 3 2 3 4 5 6 7 8 9 10 11 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 23 24 25 26 27
        """)
    assert next_position - 34 == -6


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (2, [0, 1, 2, 3, 4]),
        (1, [0, 2, 4, 6, 8]),
        (2.02, [0, 0, 1, 2, 3]),
        (3, [0, 0, 1, 2, 2]),
        (0.7, [0, 2, 5, 8, 11]),
    ],
)
def test_temporal_positions_follow_the_frame_rate(fps, expected):
    positions, _ = place([V] * 5, (), ((5, 2, 2),), (1 / fps,))
    assert positions[0] == expected


def test_temporal_positions_multiply_from_left_to_right():
    """In fp32 5 x 0.04 x 5 is below 1, but 5 x 5 x 0.04 is 1, and 25 x (0.04 x 5) is below 5."""
    vision = dataclasses.replace(PREVIEW_CONFIG.vision_config, tokens_per_second=5)
    config = dataclasses.replace(PREVIEW_CONFIG, vision_config=vision)
    (times, _, _), next_position = place([V] * 36, (), ((36, 2, 2),), (1 / 25,), config)
    assert [times[frame] for frame in (4, 5, 10, 25, 35)] == [0, 0, 1, 5, 7]
    assert next_position == 8


def walk(ids, images, videos, seconds, config):
    """The published rule, token by token in Python integers and NumPy fp32 scalars."""
    preview = config.variant == PREVIEW
    queues = {
        "image": [(t, h // 2, w // 2, 0.0) for t, h, w in images],
        "video": [
            (t if preview else 1, h // 2, w // 2, s)
            for (t, h, w), s in zip(videos, seconds or [1.0] * len(videos), strict=True)
            for _ in range(1 if preview else t)
        ],
    }
    positions, n, at = [], 0, 0
    while at < len(ids):
        kind = {I: "image", V: "video", config.fast_video_token_id: "video"}.get(ids[at])
        if kind is None:
            positions.append((n, n, n))
            n, at = n + 1, at + 1
            continue
        t, h, w, s = queues[kind].pop(0)
        block = []
        for f in range(t):
            tau = int(np.float32(np.float32(f) * np.float32(s)) * np.float32(2))
            block += [(n + tau, n + r, n + q) for r in range(h) for q in range(w)]
        positions += block
        n, at = 1 + max(map(max, block)), at + len(block)
    return [list(axis) for axis in zip(*positions, strict=True)], n


@st.composite
def prompts(draw, config):
    """Ids, grids and seconds of a prompt with any order of text, images and videos."""
    size = st.integers(1, 3).map(lambda n: 2 * n)
    ids, images, videos, seconds = [], [], [], []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["text", "image", "video"]))
        if kind == "text":
            ids += [T] * draw(st.integers(1, 4))
            continue
        h, w = draw(size), draw(size)
        t = draw(st.integers(1, 4)) if kind == "video" else 1
        if kind == "image":
            images.append((1, h, w))
            ids += [VS, *[I] * (h * w // 4), VE]
        elif config.variant == PREVIEW:
            videos.append((t, h, w))
            seconds.append(draw(st.floats(0, 4, width=32)))
            ids += [VS, *[V] * (t * h * w // 4), VE]
        else:
            videos.append((t, h, w))
            seconds.append(1.0)
            for _ in range(t):
                token = draw(st.sampled_from([V, config.fast_video_token_id]))
                ids += [F, *[T] * draw(st.integers(0, 3)), *[token] * (h * w // 4)]
    return ids or [T], tuple(images), tuple(videos), tuple(seconds)


@pytest.mark.parametrize("config", [PREVIEW_CONFIG, V1_5_CONFIG], ids=["8B-Preview", "1.5"])
@settings(max_examples=60)
@given(data=st.data())
def test_positions_equal_a_walk_over_tokens(config, data):
    prompt = data.draw(prompts(config))
    assert place(*prompt, config) == walk(*prompt, config)


@pytest.mark.parametrize("config", [PREVIEW_CONFIG, V1_5_CONFIG], ids=["8B-Preview", "1.5"])
@settings(max_examples=30)
@given(data=st.data())
def test_padded_batch_equals_single_runs(config, data):
    rows = data.draw(st.lists(prompts(config), min_size=1, max_size=3))
    length = max(len(ids) for ids, *_ in rows) + data.draw(st.integers(0, 2))
    left = data.draw(st.booleans())
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length)
    for i, (row, *_) in enumerate(rows):
        kept = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, kept], mask[i, kept] = torch.tensor(row), 1
    images, videos, seconds = (sum((row[i] for row in rows), ()) for i in (1, 2, 3))
    positions, deltas = get_rope_index(config, ids, images, videos, seconds, None, mask)
    for i, row in enumerate(rows):
        expected, next_position = place(*row, config)
        assert positions[:, i, mask[i].bool()].tolist() == expected
        assert positions[:, i, ~mask[i].bool()].eq(1).all()
        assert int(deltas[i]) == next_position - length


def test_batch_without_mask_and_grids():
    positions, deltas = get_rope_index(PREVIEW_CONFIG, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert positions.tolist() == [[[0, 1, 2]] * 2] * 3
    assert deltas.tolist() == [[0], [0]]


def test_pack():
    requests = [tiny.g3(), tiny.g1(), tiny.g2()]
    packed = pack(requests, PREVIEW_CONFIG)
    assert packed.seqlens == (5, 35, 9)
    assert packed.next_positions == (5, 19, 7)
    assert torch.equal(packed.input_ids, torch.cat([r.input_ids for r in requests]))
    assert packed.image_index.tolist() == np.flatnonzero(packed.input_ids == I).tolist()
    assert packed.video_index.tolist() == np.flatnonzero(packed.input_ids == V).tolist()
    assert packed.image_grid_thw == ((1, 4, 4), (1, 6, 8), (1, 4, 4))
    assert packed.pixel_values.shape == (80, 3, 14, 14)
    assert (
        packed.positions[:, 5:40].tolist()
        == place(requests[1].input_ids.tolist(), ((1, 4, 4), (1, 6, 8)), ((2, 4, 4),), (0.5,))[0]
    )


@pytest.mark.parametrize(
    ("ids", "images", "videos", "seconds", "message"),
    [
        ([T, I, I, I], ((1, 4, 4),), (), (),
         "as many image placeholders as image_grid_thw .* got 3 placeholders and 4 tokens"),
        ([T, I], (), (), (), "as many image placeholders .* got 1 placeholders and 0 tokens"),
        ([T], (), ((1, 4, 4),), (),
         "as many video placeholders as video_grid_thw .* got 0 placeholders and 4 tokens"),
        ([I, I, T, I, I], ((1, 4, 4),), (), (),
         "hold the 4 placeholders of image block 0 together, got other tokens among"),
        ([I] * 6, ((1, 4, 5),), (), (), "image_grid_thw must have rows and columns that divide by"),
        ([I, I], ((2, 2, 2),), (), (), "image_grid_thw must have one frame per image, got"),
        ([V], (), ((1, 2, 2),), (math.nan,), "second_per_grid_ts must be finite and not negative"),
        ([V], (), ((1, 2, 2),), (-1.0,), r"second_per_grid_ts must be .* got \(-1.0,\)"),
    ],
    ids=["few", "no grid", "no placeholder", "gap", "odd grid", "frames", "nan", "negative"],
)  # fmt: skip
def test_prompt_errors(ids, images, videos, seconds, message):
    with pytest.raises(ValueError, match=message):
        place(ids, images, videos, seconds)


PADDED = torch.tensor([[T, I, I, I, I], [T, T, T, T, I]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids must be a \[batch_size, padded_length\]"),
        ({"input_ids": torch.ones(1, 2)}, "int64 tensor, got shape .* and torch.float32"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \(2, 5\), got"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "row 1 keeps none"),
        ({"image_grid_thw": [[1, 4, 4]]}, r"row 1 has 1 and the grid rows left over have \[\]"),
        ({"image_grid_thw": [[1, 4, 6]]}, r"row 0 has 4 and the grid rows left over have \[6\]"),
        ({"image_grid_thw": [[1, 4, 4]] + [[1, 2, 2]] * 2},
         "image_grid_thw must have 2 rows for the image placeholders in input_ids, got 3"),
        ({"image_grid_thw": [[1, 4]]}, "image_grid_thw must hold rows of three positive integers"),
        ({"second_per_grid_ts": [0.5]}, "one value for each of 0 rows of video_grid_thw, got 1"),
        ({"num_frames": [1, 2]}, r"num_frames must count the 0 frames of video_grid_thw, got \[1"),
    ],
)  # fmt: skip
def test_batch_errors(arguments, message):
    arguments = {"input_ids": PADDED, "image_grid_thw": [[1, 4, 4], [1, 2, 2]]} | arguments
    with pytest.raises(ValueError, match=message):
        get_rope_index(PREVIEW_CONFIG, **arguments)


def test_num_frames_counts_frames_not_rows():
    """Two videos, of three frames in two rows and of one, as processors of 1.5 return them."""
    ids = [T, *[V] * 4, T, *[V] * 4, T, V, T, *[V] * 4]
    batch = {"input_ids": torch.tensor([ids]), "video_grid_thw": [[2, 4, 4], [1, 2, 2], [1, 4, 4]]}
    expected, _ = get_rope_index(V1_5_CONFIG, **batch)
    for counted in ([3, 1], torch.tensor([3, 1])):
        positions, _ = get_rope_index(V1_5_CONFIG, **batch, num_frames=counted)
        assert torch.equal(positions, expected)
    with pytest.raises(ValueError, match=r"num_frames must count the 4 frames .*, got \[2, 1\]"):
        get_rope_index(V1_5_CONFIG, **batch, num_frames=[2, 1])


def test_pack_errors():
    image = tiny.g2()
    raw = dataclasses.replace(image, pixel_values=torch.zeros(16, 3, 14, 14, dtype=torch.uint8))
    small = dataclasses.replace(image, pixel_values=torch.zeros(16, 3, 7, 7))
    with pytest.raises(ValueError, match="requests must hold at least one request, got none"):
        pack([], PREVIEW_CONFIG)
    with pytest.raises(ValueError, match=r"one dtype, got \['torch.float32', 'torch.uint8'\]"):
        pack([image, raw], PREVIEW_CONFIG)
    with pytest.raises(ValueError, match="pixel_values must hold patches of 14 x 14, got shape"):
        pack([small], PREVIEW_CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([], dtype=torch.int64)}, "input_ids must be a non-empty"),
        ({"input_ids": torch.tensor([1.0])}, "int64 tensor, got shape .* and torch.float32"),
        ({"image_grid_thw": ((1, 4, 0),)}, "image_grid_thw must hold rows of three positive"),
        ({"image_grid_thw": ((1, 4, 6),)}, r"pixel_values must have shape \(24, 3, patch, patch\)"),
        ({"pixel_values": None}, "pixel_values must have shape .* got None"),
        ({"video_grid_thw": ((1, 2, 2),)}, r"pixel_values_videos must have shape \(4, 3, patch"),
        ({"second_per_grid_ts": (0.5,)}, "one value for each of 0 rows of video_grid_thw, got 1"),
    ],
)
def test_request_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.g2(), **changes)


def test_requests_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(torch.tensor([1])).input_ids = torch.tensor([2])
