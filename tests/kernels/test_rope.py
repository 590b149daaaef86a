"""Rotary embeddings against rotation by complex numbers in fp64, and against transformers."""

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextRotaryEmbedding,
    apply_rotary_pos_emb,
)

import keye_kernels as kk
from keye_kernels.rope import LaunchConfig, launch_config
from tests.compare import assert_close, assert_same
from tests.kernels.rotation import (
    angles_2d,
    angles_3d,
    axes,
    fp32_angles,
    half_rotation,
    rotated,
)
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend", "num_sms")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEYE = [16, 24, 24]
SMALL = [2, 3, 3]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A few tokens get the tiles of many where there is but one multiprocessor.
few_and_many = pytest.mark.parametrize("num_sms", [132, 1], ids=["few", "many"], indirect=True)
by_dtype_and_tiles = pytest.mark.parametrize(
    ("dtype", "num_sms"),
    [*((dtype, 1) for dtype in DTYPES), (torch.bfloat16, 132)],
    ids=["float32", "float16", "bfloat16", "bfloat16-few"],
    indirect=["num_sms"],
)


@by_dtype_and_tiles
@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 3, 20), (4, 16, 72)], ids=str)
def test_rope_2d_matches_complex_rotation(shape, dtype, device):
    packed = torch.randn(shape[0], 3, *shape[1:], device=device).to(dtype)
    positions = torch.randint(0, 100, (shape[0], 2), device=device)
    before = packed.clone()
    assert kk.rope_2d_(packed[:, 0], packed[:, 1], positions) is None
    angles = fp32_angles(positions, shape[2] // 2, 10000.0).flatten(1).repeat(1, 2)
    plain = apply_rotary_pos_emb_vision(before[:, 0], before[:, 1], angles.cos(), angles.sin())
    for i in (0, 1):
        exact = rotated(before[:, i], angles_2d(positions, shape[2]))
        assert_close(packed[:, i], plain[i], exact)
    assert torch.equal(packed[:, 2], before[:, 2])


def test_rope_2d_at_the_origin_is_the_identity(device):
    q, k = torch.randn(2, 5, 4, 72, device=device).bfloat16()
    before = q.clone(), k.clone()
    kk.rope_2d_(q, k, torch.zeros(5, 2, dtype=torch.int64, device=device))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_rope_2d_scores_depend_on_the_difference_of_positions(device):
    q, k = torch.randn(2, 1, 2, 72, device=device).expand(2, 40, 2, 72).clone()
    positions = torch.randint(0, 60, (40, 2), device=device)
    kk.rope_2d_(q, k, positions + torch.tensor([5, 9], device=device))
    scores = torch.einsum("nhd,mhd->hnm", q, k)
    q2, k2 = q.clone(), k.clone()
    shift = torch.tensor([[17, 3]], device=device).expand(40, 2).contiguous()
    kk.rope_2d_(q2, k2, shift)
    torch.testing.assert_close(torch.einsum("nhd,mhd->hnm", q2, k2), scores, rtol=0, atol=1e-3)
    assert (q2 - q).abs().max() > 0.1


def turned_units(head_dim, turn):
    """Angle each pair turns by: rotate (1, 0) in every pair with ``turn(q, k)``."""
    q = torch.zeros(1, 1, head_dim, dtype=torch.float32)
    q[..., : head_dim // 2] = 1
    k = q.clone()
    turn(q, k)
    assert torch.equal(q, k)
    return torch.atan2(q[0, 0, head_dim // 2 :], q[0, 0, : head_dim // 2])


def test_rope_2d_frequencies():
    angles = turned_units(72, lambda q, k: kk.rope_2d_(q, k, torch.tensor([[1, 0]])))
    published = {0: 1.0, 1: 0.599484, 17: 1.66810e-4}
    for j, value in published.items():
        assert angles[j].item() == pytest.approx(value, rel=3e-6)
    assert (angles[18:] == 0).all()
    columns = turned_units(72, lambda q, k: kk.rope_2d_(q, k, torch.tensor([[0, 1]])))
    torch.testing.assert_close(columns[18:], angles[:18], rtol=1e-6, atol=0)
    assert (columns[:18] == 0).all()


@pytest.mark.parametrize(
    ("theta", "published"),
    [
        (
            1e6,
            {1: 0.805842, 15: 0.0392419, 16: 0.0316228, 39: 2.20673e-4, 40: 1.77828e-4}
            | {63: 1.24094e-6},
        ),
        (
            8e6,
            {1: 0.78008, 15: 0.024104, 16: 0.018803, 39: 6.21483e-5, 40: 4.84807e-5}
            | {63: 1.6024e-7},
        ),
    ],
    ids=["preview", "1.5"],
)
def test_mrope_frequencies_and_axes(theta, published):
    def turn(position):
        positions = torch.tensor(position)[:, None]
        return turned_units(
            128, lambda q, k: kk.mrope_(q, k, positions, mrope_section=KEYE, theta=theta)
        )

    angles = turn([1, 1, 1])
    for j, value in published.items():
        assert angles[j].item() == pytest.approx(value, rel=3e-5)
    assert turn([1, 0, 0]).nonzero().squeeze(1).tolist() == list(range(16))
    assert turn([0, 1, 0]).nonzero().squeeze(1).tolist() == list(range(16, 40))
    assert turn([0, 0, 1]).nonzero().squeeze(1).tolist() == list(range(40, 64))


@by_dtype_and_tiles
@pytest.mark.parametrize(
    ("section", "interleaved", "tokens", "heads"),
    [
        ([1, 0, 1], False, 1, 1),
        ([4, 3, 3], False, 5, 3),
        (KEYE, False, 3, 8),
        ([1, 1, 0], True, 1, 1),
        ([4, 3, 3], True, 5, 3),
        ([24, 20, 20], True, 3, 8),
    ],
    ids=str,
)
def test_mrope_matches_complex_rotation(section, interleaved, tokens, heads, dtype, device):
    packed = torch.randn(tokens, heads + 1, 2 * sum(section), device=device).to(dtype)
    positions = torch.randint(0, 300, (3, tokens), device=device)
    before = packed.clone()
    result = kk.mrope_(
        packed[:, :heads],
        packed[:, heads:],
        positions,
        mrope_section=section,
        theta=1e6,
        interleaved=interleaved,
    )
    assert result is None
    exact = rotated(before, angles_3d(positions, section, 1e6, interleaved))
    choice = axes(section, interleaved)
    assert_close(packed, half_rotation(before, positions, choice, 1e6), exact)


def test_mrope_interleaved_equals_transformers(device):
    config = Qwen3VLTextConfig(
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    )
    q, k = torch.randn(7, 4, 128, device=device), torch.randn(7, 2, 128, device=device)
    positions = torch.randint(0, 200, (3, 7), device=device)
    cos, sin = Qwen3VLTextRotaryEmbedding(config).to(device)(q, positions[:, None])
    expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    kk.mrope_(q, k, positions, mrope_section=[24, 20, 20], theta=5e6, interleaved=True)
    torch.testing.assert_close(q, expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, expected[1][0], rtol=1e-5, atol=1e-5)


def test_mrope_with_equal_positions_is_plain_rope(device):
    q, k = torch.randn(2, 6, 2, 128, device=device)
    positions = torch.randint(0, 100, (1, 6), device=device).expand(3, 6)
    orders = []
    for interleaved in (False, True):
        q2, k2 = q.clone(), k.clone()
        kk.mrope_(q2, k2, positions, mrope_section=KEYE, theta=1e6, interleaved=interleaved)
        orders.append((q2, k2))
    assert torch.equal(orders[0][0], orders[1][0])
    assert torch.equal(orders[0][1], orders[1][1])


def test_height_and_width_turn_their_own_channels(device):
    """Of several tokens: positions read as one row per token would mix the axes."""
    q, k = torch.randn(2, 5, 2, 128, device=device)
    positions = torch.arange(15, device=device).view(3, 5) * 7 % 50
    start = q.clone()
    kk.mrope_(start, k.clone(), positions, mrope_section=KEYE, theta=1e6)
    for axis, channels in ((0, range(16)), (1, range(16, 40)), (2, range(40, 64))):
        moved, got = positions.clone(), q.clone()
        moved[axis, 3] += 9
        kk.mrope_(got, k.clone(), moved, mrope_section=KEYE, theta=1e6)
        changed = (got != start).any(1).nonzero().tolist()
        assert changed == [[3, j] for j in (*channels, *(j + 64 for j in channels))]


@by_dtype
def test_far_positions_turn_as_in_the_reference(dtype, device):
    """At 1e5 one unit in the last place of a frequency near 1 is 0.006 rad."""
    q, k = torch.randn(2, 6, 2, 128, device=device).to(dtype)
    positions = 131071 - torch.arange(18, device=device).view(3, 6) * 1999
    expected = q.cpu(), k.cpu()
    keywords = {"mrope_section": KEYE, "theta": 8e6}
    kk.reference.mrope_(*expected, positions.cpu(), interleaved=False, **keywords)
    kk.mrope_(q, k, positions, **keywords)
    unit = torch.finfo(dtype).eps
    for got, want in zip((q, k), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=unit, atol=unit / 4 + 5e-7)


def test_cos_and_sin_of_large_angles(device):
    """With theta 1 angles are the positions themselves, exact in fp32."""
    angles = torch.randint(0, 2**17, (1, 127), device=device)
    angles = torch.cat((angles, torch.tensor([[0, 1, 2**17]], device=device)), dim=1)
    q, k = torch.tensor([1.0, 0.0], device=device).expand(2, 130, 1, 2).clone()
    kk.mrope_(q, k, angles.expand(3, -1), mrope_section=[1, 0, 0], theta=1.0)
    exact = torch.stack((angles[0].double().cos(), angles[0].double().sin()), dim=1)
    assert torch.equal(q, k)
    assert (q[:, 0] - exact).abs().max() < 2**-23


def test_positions_may_be_strided(device, backend):
    q, k = torch.randn(2, 4, 2, 16, device=device).bfloat16()
    wide = torch.randint(0, 99, (3, 9), device=device)
    results = []
    for positions in (wide[:, 2:6], wide[:, 2:6].contiguous()):
        results.append((q.clone(), k.clone()))
        kk.mrope_(*results[-1], positions, mrope_section=SMALL, theta=1e6)
    wide = torch.randint(0, 99, (4, 5), device=device)
    for positions in (wide[:, 1:3], wide[:, 1:3].contiguous()):
        results.append((q.clone(), k.clone()))
        kk.rope_2d_(*results[-1], positions)
    for (q1, k1), (q2, k2) in (results[:2], results[2:]):
        assert_same(q1, q2, backend)
        assert_same(k1, k2, backend)
        assert not torch.equal(q1, q)


@few_and_many
def test_offsets_past_2_to_the_31(device, backend):
    q = far_apart((3, 2, 72), torch.bfloat16, device)
    q.copy_(torch.randn(3, 2, 72))
    # heads far apart instead of tokens
    k = far_apart((3, 3, 72), torch.bfloat16, device).transpose(0, 1)
    k.copy_(torch.randn(3, 3, 72))
    near = q.clone(), k.clone()
    positions = torch.randint(1, 50, (3, 2), device=device)
    kk.rope_2d_(q, k, positions)
    kk.rope_2d_(*near, positions)
    assert_same(q, near[0], backend)
    assert_same(k, near[1], backend)


def test_tokens_do_not_depend_on_their_neighbours(device, backend):
    q, k = torch.randn(2, 7, 3, 72, device=device).bfloat16()
    positions = torch.randint(1, 50, (7, 2), device=device)
    alone = q[2:5].clone(), k[2:5].clone()
    q[:2], q[5:] = float("nan"), float("nan")
    kk.rope_2d_(q, k, positions)
    kk.rope_2d_(*alone, positions[2:5])
    assert_same(q[2:5], alone[0], backend)
    assert_same(k[2:5], alone[1], backend)


def test_launch_config():
    # tower: 8-byte accesses; 8 heads at a time; one to four programs for the 2 x 16 heads
    for num_patches, num_splits in ((576, 4), (1024, 4), (5040, 1), (16384, 1)):
        config = launch_config(num_patches, (16, 16), 36, 2, 132)
        assert config == LaunchConfig(4, 128, 8, num_splits)
    # decoder: 16-byte accesses; a short program per block of heads for a few tokens
    assert launch_config(1, (32, 8), 64, 2, 132) == LaunchConfig(8, 64, 4, 10)
    assert launch_config(64, (32, 8), 64, 2, 132) == LaunchConfig(8, 64, 4, 10)
    assert launch_config(32768, (32, 8), 64, 2, 132) == LaunchConfig(8, 256, 4, 3)
    assert launch_config(32768, (32, 8), 64, 4, 132) == LaunchConfig(4, 128, 4, 3)


def test_no_tokens(device):
    q = torch.empty(0, 2, 16, device=device)
    kk.rope_2d_(q, q, torch.empty(0, 2, dtype=torch.int64, device=device))
    none = torch.empty(3, 0, dtype=torch.int64, device=device)
    kk.mrope_(q, q, none, mrope_section=SMALL, theta=1e6)


def test_rotation_errors(device):
    q, k = torch.randn(2, 4, 2, 16, device=device)
    positions = torch.zeros(4, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"k must have shape \(4, \*, 16\), got \(3, 2, 16\)"):
        kk.rope_2d_(q, k[:3], positions)
    with pytest.raises(ValueError, match="head_dim must be a positive multiple of 4, got 14"):
        kk.rope_2d_(q[..., :14], k[..., :14], positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(4, 2\), got \(2, 4\)"):
        kk.rope_2d_(q, k, positions.T)
    with pytest.raises(ValueError, match=r"positions must have dtype torch.int64, got .*int32"):
        kk.rope_2d_(q, k, positions.int())
    with pytest.raises(ValueError, match=r"theta must be positive, got 0.0"):
        kk.rope_2d_(q, k, positions, theta=0.0)
    positions = torch.zeros(3, 4, dtype=torch.int64, device=device)
    for section in ([2, 3, 4], [4, 4], [-1, 5, 4]):
        with pytest.raises(
            ValueError, match=r"mrope_section must hold 3 sizes that add up to .* 8"
        ):
            kk.mrope_(q, k, positions, mrope_section=section, theta=1e6)
    with pytest.raises(ValueError, match=r"positions must have shape \(3, 4\), got \(2, 4\)"):
        kk.mrope_(q, k, positions[:2], mrope_section=SMALL, theta=1e6)
    with pytest.raises(ValueError, match="q must be contiguous in its last dim"):
        kk.mrope_(q.transpose(1, 2), k, positions, mrope_section=SMALL, theta=1e6)
