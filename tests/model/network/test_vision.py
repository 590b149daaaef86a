"""The tower against transformers' PaddleOCR-VL tower, a descended implementation, and its rules."""

import dataclasses

import numpy as np
import pytest
import torch

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.network.features import split_grid
from keye_model.network.vision import vision_layout
from tests.model import tiny

GRIDS = {
    "one image": [[1, 4, 6]],
    "two images": [[1, 4, 4], [1, 2, 10]],
    "larger than the table": [[1, 30, 28]],
    "frames": [[3, 4, 4], [1, 2, 2], [2, 4, 4]],
}


def random_pixels(grid: list[list[int]]) -> torch.Tensor:
    return tiny.pixels("pixel_values", sum(t * h * w for t, h, w in grid))


@torch.inference_mode()
def encode(model: tiny.TinyKeye, pixels: torch.Tensor, grid: list) -> torch.Tensor:
    return model.model.visual(pixels.to(model.model.device), grid).cpu()


def paddle_tower(config):
    """transformers' tower with the tiny model's weights, or a skip."""
    paddle = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    vision = config.vision_config
    tower = paddle.PaddleOCRVisionModel(
        paddle.PaddleOCRVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            attn_implementation="eager",
        )
    )
    # Some releases (5.17) sample the position table with aligned corners here; Keye never does.
    tower.vision_model.embeddings.interpolation_align_corners = False
    tensors = tiny.state_dict(config).items()
    weights = {n.removeprefix("visual."): t for n, t in tensors if n.startswith("visual.")}
    tower.load_state_dict(weights, strict=True)
    return tower.eval()


@pytest.mark.parametrize(
    ("grid", "eps"),
    [*((grid, 1e-6) for grid in GRIDS.values()), (GRIDS["one image"], 1e-2)],
    ids=[*GRIDS, "eps=1e-2"],
)
def test_tower_equals_transformers_paddleocr(grid, eps):
    # Frames are separate there, as in 1.5; joint video attention is what the goldens check. The
    # large eps shows that every norm uses it: next to these activations 1e-6 is invisible.
    model = tiny.tiny_keye(V1_5, eps=eps)
    reference = paddle_tower(model.config)
    pixels = random_pixels(grid)
    with torch.no_grad():
        expected = reference(pixels[None], grid_thw=torch.tensor(grid)).last_hidden_state
    actual = encode(model, pixels, grid)
    torch.testing.assert_close(actual, expected.view_as(actual), atol=3e-5, rtol=0)


@pytest.mark.parametrize("variant", [PREVIEW, V1_5], ids=lambda v: v.name)
def test_two_images_equal_two_calls(variant):
    model = tiny.tiny_keye(variant)
    pixels = random_pixels(GRIDS["two images"])
    together = encode(model, pixels, GRIDS["two images"])
    alone = [encode(model, pixels[:16], [[1, 4, 4]]), encode(model, pixels[16:], [[1, 2, 10]])]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


def test_video_segments():
    pixels = random_pixels([[3, 4, 4]])
    frames = [encode(tiny.tiny_keye(V1_5), p, [[1, 4, 4]]) for p in pixels.split(16)]
    per_frame = encode(tiny.tiny_keye(V1_5), pixels, [[3, 4, 4]])
    torch.testing.assert_close(per_frame, torch.cat(frames), atol=2e-5, rtol=0)
    joint = encode(tiny.tiny_keye(PREVIEW), pixels, [[3, 4, 4]])
    assert (joint - per_frame).abs().max() > 0.1


@pytest.mark.parametrize("variant", [PREVIEW, V1_5], ids=lambda v: v.name)
def test_a_video_of_one_frame_is_an_image(variant):
    model = tiny.tiny_keye(variant)
    pixels = random_pixels([[1, 4, 6]])
    with torch.inference_mode():
        image = model.model.get_image_features(pixels, [[1, 4, 6]])
        video = model.model.get_video_features(pixels, [[1, 4, 6]])
    assert torch.equal(image, video)


def test_patches_may_be_reordered_inside_a_segment():
    # Only positions tell patches apart: a kernel may visit them in any order.
    model = tiny.tiny_keye().model
    tower, grid = model.visual, ((2, 4, 4),)
    step = vision_layout(grid, True, 2, tiny.DEVICE)
    order = torch.from_numpy(np.random.default_rng(0).permutation(32)).to(tiny.DEVICE)
    hidden = tiny.filler("hidden", (32, 144)).to(tiny.DEVICE)

    def run(x, step):
        return tower.norm(*tower.run_layers(x, step))

    with torch.inference_mode():
        expected = run(hidden, step)
        shuffled = run(hidden[order], dataclasses.replace(step, positions=step.positions[order]))
        merged = [model.mlp_AR(x, grid) for x in (expected, shuffled[order.argsort()])]
    torch.testing.assert_close(shuffled, expected[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(*merged, atol=1e-5, rtol=0)


def test_plan_positions_and_segments():
    grid = ((2, 2, 2), (1, 2, 4))
    joint = vision_layout(grid, True, 2, torch.device("cpu"))
    frames = vision_layout(grid, False, 2, torch.device("cpu"))
    square = [[0, 0], [0, 1], [1, 0], [1, 1]]
    wide = [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert joint.positions.tolist() == frames.positions.tolist() == square + square + wide
    assert (joint.cu_seqlens.tolist(), joint.max_seqlen) == ([0, 8, 16], 8)
    assert (frames.cu_seqlens.tolist(), frames.max_seqlen) == ([0, 4, 8, 16], 8)
    assert joint.cu_seqlens.dtype == torch.int32
    assert joint.schedule.tiles.tolist() == [[0, 0], [1, 0]]
    assert frames.schedule.tiles.tolist() == [[2, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("grid", "joint", "max_patches", "expected"),
    [
        (((1, 4, 4), (1, 2, 2)), True, 20, [((1, 4, 4), (1, 2, 2))]),
        (((1, 4, 4), (1, 2, 2)), True, 19, [((1, 4, 4),), ((1, 2, 2),)]),
        (((3, 4, 4),), True, 16, [((3, 4, 4),)]),  # one segment stays whole
        (((3, 4, 4),), False, 16, [((1, 4, 4),)] * 3),
        (((5, 4, 4),), False, 40, [((2, 4, 4),), ((2, 4, 4),), ((1, 4, 4),)]),
        (((1, 2, 2), (3, 4, 4)), False, 36, [((1, 2, 2), (2, 4, 4)), ((1, 4, 4),)]),
        (((2, 4, 4), (1, 2, 2)), False, 1, [((1, 4, 4),), ((1, 4, 4),), ((1, 2, 2),)]),
        ((), False, 1, []),
    ],
)
def test_split_grid(grid, joint, max_patches, expected):
    assert split_grid(grid, joint, max_patches) == expected
