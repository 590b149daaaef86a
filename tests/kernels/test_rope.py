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
from tests.compare import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEYE = [16, 24, 24]
SMALL = [2, 3, 3]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rotated(x, angles):
    """x [N, heads, d] as complex numbers of channels (j, j + d/2), turned by angles [N, d/2]."""
    low, high = x.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def angles_2d(positions, head_dim, theta=10000.0):
    """fp64 angles [N, head_dim / 2], pair by pair."""
    quarter = head_dim // 4
    columns = [
        positions[:, j // quarter].double() * theta ** (-4 * (j % quarter) / head_dim)
        for j in range(head_dim // 2)
    ]
    return torch.stack(columns, dim=1)


def axes(section, interleaved=False):
    """Axis of each pair."""
    if not interleaved:
        return [0] * section[0] + [1] * section[1] + [2] * section[2]
    layout = [0] * sum(section)
    for axis in (1, 2):
        for n in range(section[axis]):
            layout[axis + 3 * n] = axis
    return layout


def angles_3d(positions, section, theta, interleaved=False):
    """fp64 angles [N, head_dim / 2], pair by pair."""
    columns = [
        positions[axis].double() * float(theta) ** (-j / sum(section))
        for j, axis in enumerate(axes(section, interleaved))
    ]
    return torch.stack(columns, dim=1)


def fp32_angles(positions, dim, theta):
    """Angles [..., dim / 2] as transformers computes them."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return positions.float()[..., None] * (1.0 / theta**exponents)


def half_rotation(x, positions, choice, theta):
    """The usual rotate-half form in the dtype of x, with cos and sin rounded to it first."""
    per_axis = fp32_angles(positions, x.shape[-1], theta)  # [3, N, head_dim / 2]
    angles = torch.stack([per_axis[axis, :, j] for j, axis in enumerate(choice)], dim=1)
    cos, sin = (f.to(x.dtype)[:, None].repeat(1, 1, 2) for f in (angles.cos(), angles.sin()))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@by_dtype
@pytest.mark.parametrize("shape", [(1, 1, 4), (9, 3, 20), (70, 16, 72)], ids=str)
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


@by_dtype
@pytest.mark.parametrize(
    ("section", "interleaved", "tokens", "heads"),
    [
        ([1, 0, 1], False, 1, 1),
        (SMALL, False, 9, 3),
        (KEYE, False, 33, 8),
        ([1, 1, 0], True, 1, 1),
        ([4, 2, 2], True, 9, 3),
        ([24, 20, 20], True, 33, 8),
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


HEADS, KV_HEADS, PAGE = 6, 2, 16


def make_store(tokens, dtype, device, head_dim=16, pages=4):
    width = (HEADS + 2 * KV_HEADS) * head_dim
    qkv = torch.randn(tokens, width, device=device).mul_(2).to(dtype)
    weights = [torch.rand(head_dim, device=device).add_(0.5).to(dtype) for _ in range(2)]
    positions = torch.randint(0, 50, (3, tokens), device=device)
    caches = torch.randn(2, pages, PAGE, KV_HEADS, head_dim, device=device).to(dtype)
    # Never the last slot, where an index of -1 would end up.
    slots = torch.randperm(pages * PAGE - 1, device=device)[:tokens]
    return qkv, weights, positions, caches, slots


def store(qkv, weights, positions, caches, slots, section=SMALL, **keywords):
    options = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "mrope_section": section,
        "theta": 1e6,
        "eps": 1e-6,
    }
    return kk.qk_norm_mrope_store(
        qkv, *weights, positions, *caches, slots, **{**options, **keywords}
    )


def norm_then_rotate(heads, weight, positions, section, double):
    """Per-head RMSNorm with its rounding points, then rotation; in fp64 or in the dtype given."""
    x = heads.double()
    u = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if double:
        return rotated(u * weight.double(), angles_3d(positions, section, 1e6))
    return half_rotation(u.to(heads.dtype) * weight, positions, axes(section), 1e6)


@by_dtype
@pytest.mark.parametrize(
    ("tokens", "section"), [(1, SMALL), (21, SMALL), (40, KEYE)], ids=["one", "21", "keye"]
)
def test_store_matches_norm_then_rotation(tokens, section, dtype, device):
    head_dim = 2 * sum(section)
    qkv, weights, positions, caches, slots = make_store(tokens, dtype, device, head_dim)
    before = caches.clone()
    q = store(qkv, weights, positions, caches, slots, section)
    heads = qkv.unflatten(1, (-1, head_dim))
    parts = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    k_rows, v_rows = (cache.flatten(0, 1)[slots] for cache in caches)
    for got, part, weight in ((q, parts[0], weights[0]), (k_rows, parts[1], weights[1])):
        plain = norm_then_rotate(part, weight, positions, section, double=False)
        assert_close(got, plain, norm_then_rotate(part, weight, positions, section, double=True))
    assert torch.equal(v_rows, parts[2])
    untouched = torch.ones(caches.shape[1] * PAGE, dtype=torch.bool, device=device)
    untouched[slots] = False
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.flatten(0, 1)[untouched], old.flatten(0, 1)[untouched])


@by_dtype
def test_store_is_rms_norm_then_mrope(dtype, device):
    """The fused op and its parts agree to the bit up to the order of fp32 sums."""
    qkv, weights, positions, caches, slots = make_store(12, dtype, device)
    q = store(qkv, weights, positions, caches, slots)
    heads = qkv.unflatten(1, (-1, 16))
    q_parts, k_parts = (
        kk.rms_norm(part.flatten(0, 1), weight, 1e-6).view_as(part)
        for part, weight in (
            (heads[:, :HEADS], weights[0]),
            (heads[:, HEADS:-KV_HEADS], weights[1]),
        )
    )
    kk.mrope_(q_parts, k_parts, positions, mrope_section=SMALL, theta=1e6)
    k = caches[0].flatten(0, 1)[slots]
    for got, expected in ((q, q_parts), (k, k_parts)):
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=unit, atol=unit)


def test_store_copies_v_bit_by_bit_and_reads_poisoned_caches_nowhere(device):
    qkv, weights, positions, caches, slots = make_store(5, torch.bfloat16, device)
    v = qkv.unflatten(1, (-1, 16))[:, -KV_HEADS:]
    v[0, 0, 0], v[1, 0, 0], v[2, 1, 3] = float("nan"), float("-inf"), -0.0
    caches.fill_(float("nan"))
    q = store(qkv, weights, positions, caches, slots)
    assert q.isfinite().all()
    rows = caches.flatten(1, 2)[:, slots]
    assert rows[0].isfinite().all()
    assert torch.equal(rows[1].view(torch.int16), v.contiguous().view(torch.int16))


def test_store_skips_negative_slots(device):
    qkv, weights, positions, caches, slots = make_store(8, torch.float32, device)
    full = caches.clone()
    q = store(qkv, weights, positions, full, slots)
    skipped = slots.clone()
    skipped[[0, 3]] = -1
    kept = caches.clone()
    assert torch.equal(store(qkv, weights, positions, kept, skipped), q)
    for old, new, everything in zip(caches, kept, full, strict=True):
        old, new, everything = (cache.flatten(0, 1) for cache in (old, new, everything))
        assert torch.equal(new[slots[[0, 3]]], old[slots[[0, 3]]])
        rest = [i for i in range(8) if i not in (0, 3)]
        assert torch.equal(new[slots[rest]], everything[slots[rest]])
        assert torch.equal(new[-1], old[-1])
    nothing = caches.clone()
    store(qkv, weights, positions, nothing, torch.full_like(slots, -1))
    assert torch.equal(nothing, caches)


def test_store_strided_inputs_and_out(device):
    qkv, weights, positions, caches, slots = make_store(9, torch.bfloat16, device)
    expected_caches = caches.clone()
    expected = store(qkv, weights, positions, expected_caches, slots)
    wide = torch.randn(9, qkv.shape[1] + 32, device=device).bfloat16()
    wide[:, 16:-16] = qkv
    target = torch.full((9, HEADS + 2, 16), 7.0, device=device).bfloat16()
    # k and v of a page side by side, as some engines keep them
    together = caches.transpose(0, 1).contiguous()
    got = store(
        wide[:, 16:-16],
        weights,
        positions,
        (together[:, 0], together[:, 1]),
        slots,
        out=target[:, 1:-1],
    )
    assert torch.equal(got, expected)
    assert torch.equal(together.transpose(0, 1), expected_caches)
    assert (target[:, 0] == 7).all()
    assert (target[:, -1] == 7).all()


def test_no_tokens(device):
    q = torch.empty(0, 2, 16, device=device)
    kk.rope_2d_(q, q, torch.empty(0, 2, dtype=torch.int64, device=device))
    none = torch.empty(3, 0, dtype=torch.int64, device=device)
    kk.mrope_(q, q, none, mrope_section=SMALL, theta=1e6)
    qkv, weights, positions, caches, slots = make_store(0, torch.float32, device)
    assert store(qkv, weights, positions, caches, slots).shape == (0, HEADS, 16)


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


def test_store_errors(device):
    qkv, weights, positions, caches, slots = make_store(4, torch.float32, device)
    with pytest.raises(
        ValueError, match=r"num_heads must be a .* multiple of num_kv_heads 2, got 5"
    ):
        store(qkv, weights, positions, caches, slots, num_heads=5)
    with pytest.raises(ValueError, match=r"qkv must have shape \(\*, 160\), got \(4, 128\)"):
        store(qkv[:, :128], weights, positions, caches, slots)
    with pytest.raises(ValueError, match=r"k_weight must have shape \(16,\), got \(8,\)"):
        store(qkv, (weights[0], weights[1][:8]), positions, caches, slots)
    with pytest.raises(ValueError, match=r"k_cache must have shape \(\*, \*, 2, 16\), got"):
        store(qkv, weights, positions, caches[..., :1, :], slots)
    with pytest.raises(ValueError, match=r"v_cache must have shape \(4, 16, 2, 16\), got \(3, 16"):
        store(qkv, weights, positions, (caches[0], caches[1, :3]), slots)
    with pytest.raises(ValueError, match="page_size must be a positive multiple of 16, got 8"):
        store(qkv, weights, positions, caches[:, :, :8], slots)
    with pytest.raises(ValueError, match=r"slot_mapping must have dtype torch.int64, got .*int32"):
        store(qkv, weights, positions, caches, slots.int())
    with pytest.raises(ValueError, match=r"out must have shape \(4, 6, 16\), got \(4, 2, 16\)"):
        store(qkv, weights, positions, caches, slots, out=qkv.new_empty(4, 2, 16))


@pytest.mark.parametrize("slot", [-2, 64])
def test_store_checks_slots_before_it_writes(slot):
    qkv, weights, positions, caches, slots = make_store(4, torch.float32, "cpu")
    before = caches.clone()
    slots[2] = slot
    with pytest.raises(
        ValueError, match=rf"slot_mapping must hold values in \[-1, 64\), got {slot}"
    ):
        store(qkv, weights, positions, caches, slots)
    assert torch.equal(caches, before)
