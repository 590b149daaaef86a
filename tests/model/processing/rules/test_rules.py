"""How many frames by either line's rules, and that nothing else tells the lines apart."""

import ast
from pathlib import Path

import pytest

import keye_model
from keye_model.processing.rules import preview, v1_5


@pytest.mark.parametrize(
    ("total", "rate", "options", "line", "count"),
    [
        (300, 30.0, {}, preview, 20),
        (10, 30.0, {}, preview, 4),  # two thirds of a second: the least
        (100_000, 30.0, {}, preview, 768),
        (100, 30.0, {"nframes": 7}, preview, 8),  # 3.5 to even: 4 pairs
        (100, 30.0, {"nframes": 5}, preview, 4),  # 2.5 to even: 2 pairs
        (100_000, 30.0, {}, v1_5, 1365),
        (10, 30.0, {}, v1_5, 1),  # published: none
        (3, 0.7, {"fps": 0.7}, v1_5, 2),  # 3 / 0.7 * 0.7 is less than 3 in double
        (100, 30.0, {"nframes": 7}, v1_5, 7),
        (9000, 30.0, {"nframes": 4096}, v1_5, 4096),
    ],
)
def test_frame_count_known(total, rate, options, line, count):
    assert line.frame_count(total, rate, options) == count


@pytest.mark.parametrize(
    ("total", "options", "line", "message"),
    [
        (1, {}, preview, "a clip must have at least 2 frames, got 1"),
        (
            10,
            {"nframes": 1},
            preview,
            "nframes must be from 2 to 10 in a clip of 10 frames, got 1$",
        ),
        (
            11,
            {"nframes": 11},
            preview,
            "nframes must be from 2 to 10 in a clip of 11 frames, got 11",
        ),
        (10, {"nframes": 12}, v1_5, "nframes must be from 1 to 10 in a clip of 10 frames, got 12"),
        (10, {"max_frames": 1}, preview, "max_frames must be at least 2, got 1$"),
        (
            9000,
            {"nframes": 5000},
            preview,
            "give at most 4096 frames, got 5000: lower nframes, fps",
        ),
        (9000, {"nframes": 4097}, v1_5, "give at most 4096 frames, got 4097: lower nframes, fps"),
        (
            9000,
            {"min_frames": 5000, "max_frames": 6000},
            preview,
            "4096 frames, got 5000: .*max_fr",
        ),
    ],
)
def test_frame_count_errors(total, options, line, message):
    with pytest.raises(ValueError, match=message):
        line.frame_count(total, 30.0, options)


def test_no_other_file_compares_versions():
    folder = Path(keye_model.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and path.parent.name != "rules":
                values = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not values & {"1.0", "1.5"}, f"{path}:{node.lineno}"
