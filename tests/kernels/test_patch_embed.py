"""patch_embed against conv2d and interpolate."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels._device import Device
from tests.compare import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("backend")

module = importlib.import_module("keye_kernels.patch_embed")  # the package holds the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.27, 0.26, 0.28]}
# No scale and shift give all its bytes in 16 bits: the kernel must divide.
STUBBORN = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.25, 0.5]}


def make(num_patches, dtype, device, hidden=40, patch=14, side=27):
    pixels = torch.randint(0, 256, (num_patches, 3, patch, patch), dtype=torch.uint8, device=device)
    weight = torch.randn(hidden, 3, patch, patch, device=device).div_(24).to(dtype)
    bias = torch.randn(hidden, device=device).to(dtype)
    table = torch.randn(side * side, hidden, device=device).to(dtype)
    return pixels, weight, bias, table


def published_pixels(pixels, image_mean=HALF["image_mean"], image_std=HALF["image_std"]):
    """The image processor's arithmetic: rescale in fp64, normalise in fp32."""
    scaled = (pixels.double() * (1 / 255)).float()
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=pixels.device)[:, None, None]
        for v in (image_mean, image_std)
    )
    return (scaled - mean) / std


def interpolated(table, h, w):
    side = round(table.shape[0] ** 0.5)
    image = table.T.reshape(1, -1, side, side)
    return F.interpolate(image, (h, w), mode="bilinear", align_corners=False)[0].flatten(1).T


def conv_and_interpolate(pixels, weight, bias, table, grid):
    """pixels: normalised, in the dtype to compute in."""
    y = F.conv2d(pixels, weight, bias).flatten(1)
    positions = [interpolated(table, h, w).repeat(t, 1) for t, h, w in grid]
    return y + torch.cat(positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "grid",
    [
        [(1, 1, 1)],
        [(1, 4, 6)],
        [(1, 2, 34), (3, 4, 2), (1, 27, 1)],  # 68 patches: a tile and a bit
        [(1, 2, size) for size in range(2, 11)],  # more sizes than one launch takes
        [(1, 2, 3), (2, 2, 3), (1, 3, 2), (1, 2, 3)],  # neighbours of one size
    ],
    ids=["one patch", "image", "image video image", "many sizes", "same sizes"],
)
def test_matches_conv_and_interpolate(grid, dtype, device):
    num_patches = sum(t * h * w for t, h, w in grid)
    pixels, weight, bias, table = make(num_patches, dtype, device)
    normalised = published_pixels(pixels).to(dtype)
    doubles = [x.double() for x in (normalised, weight, bias, table)]
    got = kk.patch_embed(pixels, weight, bias, table, grid, **HALF)
    assert_close(
        got,
        conv_and_interpolate(normalised, weight, bias, table, grid),
        conv_and_interpolate(*doubles, grid),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_pixels_give_the_same(dtype, device):
    pixels, weight, bias, table = make(24, dtype, device)
    from_bytes = kk.patch_embed(pixels, weight, bias, table, [(1, 4, 6)], **CLIP)
    floats = published_pixels(pixels, **CLIP)
    for given in (floats, floats.to(dtype)):
        got = kk.patch_embed(given, weight, bias, table, [(1, 4, 6)], **CLIP)
        assert torch.equal(got, from_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [HALF, CLIP, STUBBORN], ids=["half", "clip", "stubborn"])
def test_every_byte_is_normalised_as_published(normalise, dtype, device):
    pixels = torch.arange(256, dtype=torch.uint8, device=device)[:, None, None, None]
    pixels = pixels.expand(256, 3, 1, 1).contiguous()
    eye = torch.eye(3, device=device)[:, :, None, None].to(dtype).contiguous()
    zero = torch.zeros(4, 3, dtype=dtype, device=device)
    got = kk.patch_embed(pixels, eye, zero[0], zero, [(1, 16, 16)], **normalise)
    assert torch.equal(got, published_pixels(pixels, **normalise)[:, :, 0, 0].to(dtype))


def test_normalising_divides_only_where_it_must():
    def pair(normalise, dtype):
        return module._scale_and_shift(*map(tuple, normalise.values()), dtype)

    assert pair(HALF, torch.bfloat16) == ((pytest.approx(1 / 127.5),) * 3, (-1,) * 3)
    assert pair(CLIP, torch.bfloat16) is not None
    assert pair(STUBBORN, torch.bfloat16) is None
    assert pair(STUBBORN, torch.float16) is None
    assert pair(HALF, torch.float32) is None


def only_positions(table, h, w):
    pixels = torch.zeros(h * w, 3, 1, 1, device=table.device)
    hidden = table.shape[1]
    weight = torch.zeros(hidden, 3, 1, 1, device=table.device)
    bias = torch.zeros(hidden, device=table.device)
    return kk.patch_embed(pixels, weight, bias, table, [(1, h, w)], **HALF)


@pytest.mark.parametrize("size", [(4, 6), (27, 27), (40, 10), (5, 94)], ids=str)
def test_position_map_equals_interpolate(size, device):
    table = torch.randn(27 * 27, 8, device=device)
    difference = only_positions(table, *size) - interpolated(table, *size)
    assert difference.abs().max() < 5e-6 * table.abs().max()


@pytest.mark.parametrize(
    ("size", "coordinates"),
    [
        (2, {0: 6.25, 1: 19.75}),
        (4, {0: 2.875, 1: 9.625, 2: 16.375, 3: 23.125}),
        (6, {0: 1.75, 1: 6.25, 5: 24.25}),
        (26, {0: 0.0192, 1: 1.0577, 25: 25.9808}),
        (27, {i: float(i) for i in range(27)}),
        (34, {0: 0.0, 1: 0.6912, 2: 1.4853, 33: 26.0}),  # 26.1029 lies past the last row
        (94, {0: 0.0, 1: 0.0, 2: 0.2181, 3: 0.5053, 93: 26.0}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_source_coordinates(size, coordinates, device):
    """A table that holds its own coordinates shows where each patch samples it."""
    rows = torch.arange(27.0, device=device)
    table = torch.stack((rows.repeat_interleave(27), rows.repeat(27)), dim=1)
    column, row = only_positions(table, size, 1), only_positions(table, 1, size)
    for i, value in coordinates.items():
        assert column[i, 0].item() == pytest.approx(value, abs=6e-5)
        assert row[i, 1].item() == pytest.approx(value, abs=6e-5)


def test_frames_share_their_map_and_images_are_independent(device):
    pixels, weight, bias, table = make(44, torch.float32, device)
    pixels[12:24] = pixels[:12]
    grid = [(2, 3, 4), (1, 4, 5)]
    got = kk.patch_embed(pixels, weight, bias, table, grid, **HALF)
    torch.testing.assert_close(got[:12], got[12:24], rtol=1e-6, atol=1e-6)
    second = kk.patch_embed(pixels[24:], weight, bias, table, [(1, 4, 5)], **HALF)
    torch.testing.assert_close(got[24:], second, rtol=1e-6, atol=1e-6)
    as_tensor = kk.patch_embed(pixels, weight, bias, table, torch.tensor(grid), **HALF)
    assert torch.equal(as_tensor, got)


def test_rows_do_not_depend_on_others(device):
    pixels, weight, bias, table = make(70, torch.bfloat16, device)
    grid = [(1, 33, 2), (1, 2, 2)]
    got = kk.patch_embed(pixels, weight, bias, table, grid, **HALF)
    assert torch.equal(kk.patch_embed(pixels, weight, bias, table, grid, **HALF), got)
    floats = published_pixels(pixels)
    floats[1:66] = torch.nan
    poisoned = kk.patch_embed(floats, weight, bias, table, grid, **HALF)
    assert torch.equal(poisoned[[0, 66, 67, 68, 69]], got[[0, 66, 67, 68, 69]])
    assert poisoned[1:66].isnan().all()


def test_reads_nothing_beside_its_tensors(device, backend):
    """Neighbours in memory are NaN, and no start divides by 16 bytes."""
    given = make(5, torch.float32, device)
    given = (published_pixels(given[0]), *given[1:])
    framed = []
    for x in given:
        memory = torch.full((x.numel() + 1303,), torch.nan, device=device)
        framed.append(memory[3 : 3 + x.numel()].view(x.shape).copy_(x))
    exact = kk.patch_embed(*given, [(1, 1, 5)], **HALF)
    assert_same(kk.patch_embed(*framed, [(1, 1, 5)], **HALF), exact, backend)
    pixels = torch.randint(0, 256, (5 * 588 + 1,), dtype=torch.uint8, device=device)[1:]
    pixels = pixels.view(5, 3, 14, 14)
    got = kk.patch_embed(pixels, *given[1:], [(1, 1, 5)], **HALF)
    clone = kk.patch_embed(pixels.clone(), *given[1:], [(1, 1, 5)], **HALF)
    assert_same(got, clone, backend)


def test_rows_past_2_to_31_elements(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    pixels, weight, bias, table = make(3, torch.bfloat16, device)
    near = kk.patch_embed(pixels, weight, bias, table, [(1, 1, 3)], **HALF)
    memory = torch.empty(2**31 + 40, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((3, 40), (2**30, 1))
    kk.patch_embed(pixels, weight, bias, table, [(1, 1, 3)], **HALF, out=far)
    assert torch.equal(far, near)


def test_launch_config():
    """Real sizes: all multiprocessors at work with few patches, large tiles with many."""
    hopper, ampere = Device((9, 0), 132), Device((8, 0), 108)
    sixteen = (torch.bfloat16, torch.uint8)
    assert module.launch_config(576, 1152, *sixteen, hopper) == (64, 64, 64, 4, 4, None)
    assert module.launch_config(5040, 1152, *sixteen, hopper) == (128, 128, 64, 8, 3, 128)
    assert module.launch_config(5040, 1152, *sixteen, ampere) == (128, 128, 64, 8, 3, None)
    floats = (torch.float32, torch.uint8)
    assert module.launch_config(5040, 1152, *floats, hopper) == (64, 64, 32, 8, 2, None)


def test_out_and_empty(device):
    pixels, weight, bias, table = make(4, torch.bfloat16, device)
    wide = torch.full((4, 56), 7.0, device=device).bfloat16()
    out = wide[:, 8:48]
    assert kk.patch_embed(pixels, weight, bias, table, [(1, 2, 2)], **HALF, out=out) is out
    assert torch.equal(out, kk.patch_embed(pixels, weight, bias, table, [(1, 2, 2)], **HALF))
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 48:] == 7).all()
    assert kk.patch_embed(pixels[:0], weight, bias, table, [], **HALF).shape == (0, 40)


def test_errors(device):
    pixels, weight, bias, table = make(4, torch.float32, device)
    good = [pixels, weight, bias, table, [(1, 2, 2)]]

    def run(index=None, value=None, **keywords):
        args = list(good)
        if index is not None:
            args[index] = value
        return kk.patch_embed(*args, **{**HALF, **keywords})

    with pytest.raises(ValueError, match=r"pixels must have shape \(\*, 3, \*, \*\), got \(4, 1,"):
        run(0, pixels[:, :1])
    with pytest.raises(ValueError, match=r"pixels must have dtype torch.uint8 or .*, got .*int32"):
        run(0, pixels.int())
    with pytest.raises(ValueError, match="pixels must be contiguous, got strides"):
        run(0, pixels.transpose(2, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, 3, 14, 14\), got"):
        run(1, weight[:, :, :7, :7].contiguous())
    with pytest.raises(ValueError, match=r"bias must have shape \(40,\), got \(39,\)"):
        run(2, bias[:39])
    with pytest.raises(
        ValueError, match="position_table must have a square number of rows, got 72"
    ):
        run(3, table[:728])
    with pytest.raises(ValueError, match="grid_thw must add up to the 4 patches given, got 6"):
        run(4, [(1, 2, 3)])
    with pytest.raises(
        ValueError, match=r"grid_thw must hold rows of positive ints .*, got \(2, 2\)"
    ):
        run(4, [(2, 2)])
    with pytest.raises(ValueError, match=r"grid_thw must hold rows of positive ints .*, got \(0,"):
        run(4, [(0, 2, 2), (1, 2, 2)])
    with pytest.raises(ValueError, match=r"grid_thw must hold rows of positive ints .*, got 1"):
        run(4, (1, 2, 2))
    with pytest.raises(
        ValueError, match="grid_thw must be a list or a CPU tensor, got a tensor on"
    ):
        run(4, torch.empty(1, 3, device="meta"))
    with pytest.raises(ValueError, match="image_mean must hold 3 values, got 1"):
        run(image_mean=[0.5])
    with pytest.raises(ValueError, match=r"image_std must be positive, got \(0.5, 0.0, 0.5\)"):
        run(image_std=[0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"out must have shape \(4, 40\), got \(4, 8\)"):
        run(out=torch.empty(4, 8, device=device))
