"""Small images on padded buffers: the tower's results, launched and captured."""

import pytest
import torch

from keye_kernels import use_backend
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.engine import vision_batch
from keye_model.engine.cuda_graph import CudaGraphs
from keye_model.engine.vision_batch import MAX_PATCHES, VisionBatch
from keye_model.inputs.request import host_grid
from keye_model.network.vision import KeyeVisionModel
from tests.model import tiny
from tests.model.tape import LaunchTape, OnlyMeta

ON_GPU = torch.cuda.is_available()
VARIANTS = pytest.mark.parametrize("variant", [PREVIEW, V1_5], ids=lambda v: v.name)

# Rows and segments of the buffers, and grids that share them.
SIZES = {
    (64, 2): ([[1, 4, 6]], [[1, 8, 8]], [[1, 2, 2]], [[1, 6, 4]]),
    (64, 4): ([[1, 4, 6], [1, 2, 2]], [[1, 2, 2]] * 3, [[1, 4, 4], [1, 2, 10], [1, 4, 6]]),
    (96, 2): ([[1, 2, 34]], [[1, 8, 12]]),
}


def pixels_of(grid, device):
    return tiny.pixels("pixel_values", sum(t * h * w for t, h, w in grid)).to(device)


def features(tower, batch, grid, device):
    """Through the final norm, as copies."""
    grid = host_grid("grid", grid)
    return tower.norm(*batch.run(tower, pixels_of(grid, device), grid))


@VARIANTS
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_padded_equals_unpadded(variant, size):
    model = tiny.tiny_keye(variant).model
    tower, device, batch = model.visual, model.device, VisionBatch(model.visual)
    for grid in SIZES[size]:
        want = tower(pixels_of(grid, device), grid)
        torch.testing.assert_close(features(tower, batch, grid, device), want, atol=2e-5, rtol=0)


@VARIANTS
@torch.inference_mode()
def test_a_video_is_segmented_as_always(variant):
    model = tiny.tiny_keye(variant).model
    tower, device, grid = model.visual, model.device, [[3, 4, 4], [2, 2, 2]]
    want = tower(pixels_of(grid, device), grid)
    got = features(tower, VisionBatch(tower), grid, device)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def compare_captured(model, sizes):
    """Bit by bit: run, captured, replayed for other sizes."""
    tower, device = model.visual, model.device
    graphs = CudaGraphs(device)
    launched, captured = VisionBatch(tower), VisionBatch(tower, graphs)
    for grids in sizes.values():
        for grid in grids:
            want = features(tower, launched, grid, device)
            assert torch.equal(features(tower, captured, grid, device), want)
    assert list(graphs._graphs) == [("vision", *size) for size in sizes]


@torch.inference_mode()
def test_captured_equals_launched(recorder):
    sizes = {size: (*grids, *grids) for size, grids in SIZES.items()}
    compare_captured(tiny.tiny_keye(PREVIEW).model, sizes)
    if not ON_GPU:
        assert recorder.captures == 3


@pytest.mark.skipif(ON_GPU, reason="a GPU captures for itself")
@torch.inference_mode()
def test_captured_launches_of_kernels(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "tape", LaunchTape)
    monkeypatch.setattr(vision_batch, "_MIN_PATCHES", 16)
    sizes = {(16, 4): ([[1, 4, 2], [1, 2, 2]], [[1, 2, 6], [1, 2, 2]], [[1, 2, 2], [1, 2, 4]])}
    with use_backend("triton"):
        compare_captured(tiny.tiny_keye(PREVIEW).model, sizes)


@torch.inference_mode()
def test_padding_reaches_no_patch():
    model = tiny.tiny_keye(PREVIEW).model
    tower, device, batch = model.visual, model.device, VisionBatch(model.visual)
    want = features(tower, batch, [[1, 4, 6]], device)
    for buffer in (batch._x, batch._residual):
        buffer.fill_(float("nan"))
    batch._positions.fill_(2**40)
    batch._cu_seqlens.fill_(-1)
    assert torch.equal(features(tower, batch, [[1, 4, 6]], device), want)
    assert batch._x[24:64].isnan().all()


@pytest.mark.parametrize(
    "grid", [[[1, 2, MAX_PATCHES // 2 + 1]], [[1, 2, 2]] * 64], ids=["patches", "segments"]
)
@torch.inference_mode()
def test_more_than_there_is_room_for(grid):
    """Not padded: exactly the tower's own result."""
    model = tiny.tiny_keye(PREVIEW).model
    tower, device, batch = model.visual, model.device, VisionBatch(model.visual)
    want = tower(pixels_of(grid, device), grid)
    assert torch.equal(features(tower, batch, grid, device), want)
    assert not batch._x.any()


@torch.inference_mode()
def test_as_much_as_there_is_room_for():
    model = tiny.tiny_keye(PREVIEW).model
    tower, device = model.visual, model.device
    for grid in ([[1, 32, MAX_PATCHES // 32]], [[1, 2, 2]] * 63):
        batch, want = VisionBatch(tower), tower(pixels_of(grid, device), grid)
        torch.testing.assert_close(features(tower, batch, grid, device), want, atol=2e-5, rtol=0)
        assert batch._x.any()


def test_a_pass_neither_reads_nor_uploads():
    """A meta tensor has no values to read, and nothing else takes part."""
    with torch.device("meta"):
        tower = KeyeVisionModel(tiny.tiny_keye(PREVIEW).config).requires_grad_(False)
    batch = VisionBatch(tower)
    with OnlyMeta():
        batch._forward(tower, 64, 2)
