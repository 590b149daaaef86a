"""The projector: 8B-Preview's against transformers' PaddleOCR-VL, 1.5's against its definition."""

import pytest
import torch
import torch.nn.functional as F

from keye_model.checkpoint.config import PREVIEW, V1_5
from tests.model import tiny

GRID = ((1, 4, 6), (2, 2, 4))


def features() -> torch.Tensor:
    return 4 * tiny.filler("features", (40, 144))


@torch.inference_mode()
def project(variant) -> torch.Tensor:
    model = tiny.tiny_keye(variant).model
    return model.mlp_AR(features().to(model.device), GRID).cpu()


def published(variant) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("mlp_AR."): tensor
        for name, tensor in tiny.state_dict(tiny.tiny_keye(variant).config).items()
        if name.startswith("mlp_AR.")
    }


def test_preview_equals_transformers_paddleocr():
    paddle = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    config = paddle.PaddleOCRVLConfig(
        vision_config={"hidden_size": 144, "spatial_merge_size": 2},
        text_config={"hidden_size": 256},
    )
    reference = paddle.PaddleOCRProjector(config)
    reference.load_state_dict(published(PREVIEW), strict=True)
    with torch.no_grad():
        expected = reference(features(), torch.tensor(GRID))
    torch.testing.assert_close(project(PREVIEW), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", [PREVIEW, V1_5], ids=lambda v: v.name)
@torch.inference_mode()
def test_the_towers_last_norm_may_be_left_to_it(variant):
    model = tiny.tiny_keye(variant).model
    pixels = tiny.pixels("pixel_values", 40).to(model.device)
    x = model.visual(pixels, GRID)
    branch, residual = model.visual.encode(pixels, GRID)
    norm = model.visual.post_layernorm
    torch.testing.assert_close(norm(branch, residual)[0], x, atol=0, rtol=0)
    expected = model.mlp_AR(x, GRID)
    assert torch.equal(model.mlp_AR(branch, GRID, residual=residual, tower_norm=norm), expected)
    assert torch.equal(model.get_image_features(pixels, GRID), expected)


def test_v1_5_equals_its_definition():
    # Token by token: four patches, top left to bottom right, then LayerNorm over all of them.
    w = published(V1_5)
    x, expected, start = features(), [], 0
    for t, h, width in GRID:
        frames = x[start : start + t * h * width].view(t, h, width, 144)
        start += t * h * width
        for f in range(t):
            for r in range(0, h, 2):
                for c in range(0, width, 2):
                    token = torch.cat([frames[f, r + a, c + b] for a in (0, 1) for b in (0, 1)])
                    token = F.layer_norm(token, (576,), w["pre_norm.weight"], w["pre_norm.bias"])
                    token = F.gelu(F.linear(token, w["linear_1.weight"], w["linear_1.bias"]))
                    expected.append(F.linear(token, w["linear_2.weight"], w["linear_2.bias"]))
    torch.testing.assert_close(project(V1_5), torch.stack(expected), atol=2e-5, rtol=0)
