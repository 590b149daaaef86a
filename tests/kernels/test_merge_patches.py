"""merge_patches against one patch at a time, and against layer_norm and itself in turn."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.merge_patches import _segments, launch_config
from tests.compare import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
GRIDS = {
    2: [[(1, 2, 2)], [(1, 4, 6), (3, 2, 4), (1, 2, 2)]],
    1: [[(2, 1, 3)]],
    3: [[(2, 3, 6), (1, 6, 3)]],
}
by_order = pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "merge first"])
CASES = [(merge, grid) for merge, grids in GRIDS.items() for grid in grids]


def make(grid, merge, norm_first, dtype, device, hidden=24):
    num_patches = sum(t * h * w for t, h, w in grid)
    norm_size = hidden if norm_first else merge * merge * hidden
    x = torch.randn(num_patches, hidden, device=device).mul_(2).add_(1).to(dtype)
    weight, bias = (torch.randn(norm_size, device=device).to(dtype) for _ in range(2))
    return x, weight, bias


def one_by_one(x, weight, bias, grid, merge, norm_first):
    """Walk over merged tokens and pick their patches by the address of the raster order."""

    def norm(row):
        return F.layer_norm(row, row.shape, weight, bias, EPS)

    tokens, base = [], 0
    for t, h, w in grid:
        for f in range(t):
            for row in range(0, h, merge):
                for column in range(0, w, merge):
                    patches = [
                        x[base + (f * h + row + a) * w + column + b]
                        for a in range(merge)
                        for b in range(merge)
                    ]
                    if norm_first:
                        tokens.append(torch.cat([norm(patch) for patch in patches]))
                    else:
                        tokens.append(norm(torch.cat(patches)))
        base += t * h * w
    return torch.stack(tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_order
@pytest.mark.parametrize(("merge", "grid"), CASES, ids=str)
def test_matches_one_by_one(merge, grid, norm_first, dtype, device):
    x, weight, bias = make(grid, merge, norm_first, dtype, device)
    got = kk.merge_patches(x, weight, bias, EPS, grid, merge_size=merge, norm_first=norm_first)
    plain = one_by_one(x, weight, bias, grid, merge, norm_first)
    doubles = (tensor.double() for tensor in (x, weight, bias))
    assert_close(got, plain, one_by_one(*doubles, grid, merge, norm_first))


@by_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_hidden_size(norm_first, dtype, device):
    grid = [(1, 2, 4)]
    x, weight, bias = make(grid, 2, norm_first, dtype, device, hidden=1152)
    got = kk.merge_patches(x, weight, bias, EPS, grid, norm_first=norm_first)
    plain = one_by_one(x, weight, bias, grid, 2, norm_first)
    doubles = (tensor.double() for tensor in (x, weight, bias))
    assert_close(got, plain, one_by_one(*doubles, grid, 2, norm_first))


@by_order
def test_many_images(norm_first, device, backend):
    grid = [(1, 2, 2), (1, 2, 4)] * 9  # 18 runs of one width: two launches
    x, weight, bias = make(grid, 2, norm_first, torch.float32, device)
    got = kk.merge_patches(x, weight, bias, EPS, grid, norm_first=norm_first)
    plain = one_by_one(x, weight, bias, grid, 2, norm_first)
    doubles = (tensor.double() for tensor in (x, weight, bias))
    assert_close(got, plain, one_by_one(*doubles, grid, 2, norm_first))
    last = kk.merge_patches(x[-8:], weight, bias, EPS, grid[-1:], norm_first=norm_first)
    assert_same(got[-2:], last, backend)


def two_ops(x, weight, bias, residual, patch_norm, grid, merge, norm_first):
    if residual is not None:
        x = x + residual
    if patch_norm is not None:
        x = kk.layer_norm(x, *patch_norm)
    return kk.merge_patches(x, weight, bias, EPS, grid, merge_size=merge, norm_first=norm_first)


def make_tower_end(x, eps=1e-6):
    residual = torch.randn_like(x).mul_(3)
    return residual, (*(torch.randn_like(x[0]) for _ in range(2)), eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_order
@pytest.mark.parametrize(
    ("merge", "grid", "hidden"),
    [
        (2, [(1, 2, 4)], 1152),
        (2, [(1, 2, 2)], 4096),
        (2, [(1, 4, 6), (3, 2, 4), (1, 2, 2)], 24),
        (3, [(2, 3, 6), (1, 6, 3)], 300),
    ],
    ids=["real", "wide", "images", "squares of 9"],
)
def test_end_of_the_tower_in_the_same_pass(merge, grid, hidden, norm_first, dtype, device):
    x, weight, bias = make(grid, merge, norm_first, dtype, device, hidden)
    residual, patch_norm = make_tower_end(x)

    def run(x, weight, bias, residual, patch_norm):
        return kk.merge_patches(
            x, weight, bias, EPS, grid,
            residual=residual, patch_norm=patch_norm, merge_size=merge, norm_first=norm_first,
        )  # fmt: skip

    got = run(x, weight, bias, residual, patch_norm)
    # Bit by bit: both norms round and add where the two ops do.
    assert torch.equal(got, two_ops(x, weight, bias, residual, patch_norm, grid, merge, norm_first))
    total = F.layer_norm(x + residual, x.shape[1:], *patch_norm)
    plain = one_by_one(total, weight, bias, grid, merge, norm_first)
    *vectors, eps = patch_norm
    total = F.layer_norm(
        x.double() + residual.double(), x.shape[1:], *(v.double() for v in vectors), eps
    )
    exact = one_by_one(total, weight.double(), bias.double(), grid, merge, norm_first)
    assert_close(got, plain, exact)


@by_order
@pytest.mark.parametrize("given", ["residual", "patch_norm"])
def test_residual_or_patch_norm_alone(given, norm_first, device):
    grid = [(1, 2, 4)]
    x, weight, bias = make(grid, 2, norm_first, torch.bfloat16, device)
    both = dict(zip(("residual", "patch_norm"), make_tower_end(x), strict=True))
    one = {name: both[name] if name == given else None for name in both}
    got = kk.merge_patches(x, weight, bias, EPS, grid, norm_first=norm_first, **one)
    assert torch.equal(got, two_ops(x, weight, bias, *one.values(), grid, 2, norm_first))


def test_padding_is_not_summed_without_eps(device):
    """Squares of 9 patches lie in 16 rows; an empty one has variance 0."""
    grid = [(1, 3, 3)]
    x, weight, bias = make(grid, 3, False, torch.float32, device)
    _, patch_norm = make_tower_end(x, eps=0.0)
    got = kk.merge_patches(
        x, weight, bias, EPS, grid, patch_norm=patch_norm, merge_size=3, norm_first=False
    )
    assert torch.equal(got, two_ops(x, weight, bias, None, patch_norm, grid, 3, False))
    assert got.isfinite().all()


def test_segments():
    assert _segments([1, 4, 6], 2) == [(0, 3)]
    assert _segments([3, 4, 6, 1, 2, 6, 1, 2, 4, 1, 6, 2], 2) == [(0, 3), (21, 2), (23, 1)]


def test_launch_configuration():
    assert launch_config(1152, 2, torch.bfloat16) == (4, 256, 4)
    assert launch_config(1152, 2, torch.float32) == (4, 128, 4)
    assert launch_config(1152, 3, torch.bfloat16) == (16, 256, 16)
    assert launch_config(1, 16, torch.bfloat16) == (256, 1, 1)


@by_order
@pytest.mark.parametrize("start", [8, 7], ids=["aligned", "unaligned"])
def test_strided_rows_out_and_tensor_grid(norm_first, start, device, backend):
    grid = [(1, 2, 4), (2, 2, 2)]
    x, weight, bias = make(grid, 2, norm_first, torch.bfloat16, device)
    residual = torch.randn_like(x)
    expected = kk.merge_patches(
        x, weight, bias, EPS, grid, residual=residual, norm_first=norm_first
    )
    wide = torch.full((16, 72), float("nan"), device=device, dtype=torch.bfloat16)
    strided, strided_residual = wide[:, start : start + 24], wide[:, 40 : 40 + 24]
    strided.copy_(x)
    strided_residual.copy_(residual)
    target = torch.full((4, 128), 7.0, device=device).bfloat16()
    out = target[:, 2 * start : 2 * start + 96]
    got = kk.merge_patches(
        strided, weight, bias, EPS, torch.tensor(grid),
        residual=strided_residual, norm_first=norm_first, out=out,
    )  # fmt: skip
    assert got is out
    assert_same(out, expected, backend)
    assert (target[:, : 2 * start] == 7).all()
    assert (target[:, 2 * start + 96 :] == 7).all()


@by_order
def test_offsets_past_2_to_the_31(norm_first, device, backend, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    grid = [(1, 2, 8)]
    x, weight, bias = make(grid, 2, norm_first, torch.bfloat16, device)
    near = kk.merge_patches(x, weight, bias, EPS, grid, residual=x, norm_first=norm_first)
    # Only the pages that are touched take memory on a CPU.
    memory = torch.empty(2**31 + 256, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((16, 24), (2**31 // 15 + 1, 1))
    far_out = memory[128:].as_strided((4, 96), (2**31 // 3 + 1, 1))
    far.copy_(x)
    kk.merge_patches(far, weight, bias, EPS, grid, residual=far, norm_first=norm_first, out=far_out)
    assert_same(far_out, near, backend)


def test_no_patches(device):
    x = torch.empty(0, 8, device=device)
    weight = torch.ones(8, device=device)
    assert kk.merge_patches(x, weight, weight, EPS, [], norm_first=True).shape == (0, 32)


def test_errors(device):
    x, weight, bias = make([(1, 2, 4)], 2, True, torch.float32, device)
    run = kk.merge_patches
    with pytest.raises(ValueError, match="merge_size must be positive, got 0"):
        run(x, weight, bias, EPS, [(1, 2, 4)], merge_size=0, norm_first=True)
    with pytest.raises(ValueError, match=r"weight must have shape \(96,\), got \(24,\)"):
        run(x, weight, bias, EPS, [(1, 2, 4)], norm_first=False)
    with pytest.raises(ValueError, match=r"h and w that divide by merge_size 2, got \(1, 1, 8\)"):
        run(x, weight, bias, EPS, [(1, 1, 8)], norm_first=True)
    with pytest.raises(ValueError, match="grid_thw must add up to the 8 patches given, got 4"):
        run(x, weight, bias, EPS, [(1, 2, 2)], norm_first=True)
    with pytest.raises(ValueError, match=r"residual must have shape \(8, 24\), got \(4, 24\)"):
        run(x, weight, bias, EPS, [(1, 2, 4)], residual=x[:4], norm_first=True)
    for norm, message in (
        ((weight[:8], bias, EPS), r"patch_norm\[0\] must have shape \(24,\), got \(8,\)"),
        ((weight, bias.half(), EPS), r"patch_norm\[1\] must have dtype torch.float32, got .*16"),
        ((weight, bias), r"patch_norm must be \(weight, bias, eps\), got 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            run(x, weight, bias, EPS, [(1, 2, 4)], patch_norm=norm, norm_first=True)
    with pytest.raises(ValueError, match=r"out must have shape \(2, 96\), got \(8, 24\)"):
        run(x, weight, bias, EPS, [(1, 2, 4)], norm_first=True, out=x)
