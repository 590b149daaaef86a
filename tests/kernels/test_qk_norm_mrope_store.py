"""qk_norm_mrope_store against fp64, against its parts, and where it reads and writes."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.qk_norm_mrope_store import LaunchConfig, launch_config
from testing import triton_interpreter
from tests.compare import assert_close, assert_same
from tests.kernels.rotation import angles_3d, axes, half_rotation, rotated
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


def norm(heads):
    """RMSNorm without a weight, fp64."""
    x = heads.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def norm_then_rotate(heads, weight, positions, section, double):
    """Per-head RMSNorm with its rounding points, then rotation; in fp64 or in the dtype given."""
    u = norm(heads)
    if double:
        return rotated(u * weight.double(), angles_3d(positions, section, 1e6))
    return half_rotation(u.to(heads.dtype) * weight, positions, axes(section), 1e6)


@by_dtype_and_tiles
@pytest.mark.parametrize(
    ("tokens", "section"), [(1, SMALL), (3, [4, 3, 3]), (2, KEYE)], ids=["one", "odd", "keye"]
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
    qkv, weights, positions, caches, slots = make_store(4, dtype, device)
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
    qkv, weights, positions, caches, slots = make_store(5, torch.float32, device)
    full = caches.clone()
    q = store(qkv, weights, positions, full, slots)
    skipped = slots.clone()
    skipped[[0, 3]] = -1
    kept = caches.clone()
    assert torch.equal(store(qkv, weights, positions, kept, skipped), q)
    for old, new, everything in zip(caches, kept, full, strict=True):
        old, new, everything = (cache.flatten(0, 1) for cache in (old, new, everything))
        assert torch.equal(new[slots[[0, 3]]], old[slots[[0, 3]]])
        rest = [1, 2, 4]
        assert torch.equal(new[slots[rest]], everything[slots[rest]])
        assert torch.equal(new[-1], old[-1])
    nothing = caches.clone()
    store(qkv, weights, positions, nothing, torch.full_like(slots, -1))
    assert torch.equal(nothing, caches)


def test_store_strided_inputs_and_out(device, backend):
    qkv, weights, positions, caches, slots = make_store(4, torch.bfloat16, device)
    expected_caches = caches.clone()
    expected = store(qkv, weights, positions, expected_caches, slots)
    wide = torch.randn(4, qkv.shape[1] + 32, device=device).bfloat16()
    wide[:, 16:-16] = qkv
    target = torch.full((4, HEADS + 2, 16), 7.0, device=device).bfloat16()
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
    assert_same(got, expected, backend)
    assert_same(together.transpose(0, 1), expected_caches, backend)
    assert (target[:, 0] == 7).all()
    assert (target[:, -1] == 7).all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(24, 8), (5, 5), (3, 1)], ids=str)
@few_and_many
def test_store_shares_any_number_of_heads(num_heads, num_kv_heads, device):
    qkv = torch.randn(1, (num_heads + 2 * num_kv_heads) * 16, device=device).bfloat16()
    ones = torch.ones(16, device=device).bfloat16()
    positions = torch.randint(0, 50, (3, 1), device=device)
    slots = torch.tensor([50], device=device)
    caches = torch.zeros(2, 2, 48, num_kv_heads, 16, device=device).bfloat16()
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    q = store(qkv, (ones, ones), positions, caches, slots, **heads)
    exact = rotated(norm(qkv.unflatten(1, (-1, 16))), angles_3d(positions, SMALL, 1e6))
    rows = caches.flatten(1, 2)[:, slots]
    near = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(q.double(), exact[:, :num_heads], **near)
    torch.testing.assert_close(rows[0].double(), exact[:, num_heads:-num_kv_heads], **near)
    assert torch.equal(rows[1], qkv.unflatten(1, (-1, 16))[:, -num_kv_heads:])


def test_store_height_and_width_turn_their_own_channels(device):
    """Of several tokens: positions read as one row per token would mix the axes."""
    qkv, weights, positions, caches, slots = make_store(4, torch.float32, device)
    start_q, start = store(qkv, weights, positions, caches, slots), caches.clone()
    for axis, channels in ((0, range(2)), (1, range(2, 5)), (2, range(5, 8))):
        moved = positions.clone()
        moved[axis, 2] += 9
        got = caches.clone()
        q = store(qkv, weights, moved, got, slots)
        changed = [j for half in (0, 8) for j in (c + half for c in channels)]
        assert (q != start_q).any(1).nonzero().tolist() == [[2, j] for j in changed]
        rows = (got != start).flatten(1, 2)[:, slots].any(2)
        assert rows.nonzero().tolist() == [[0, 2, j] for j in changed]


@by_dtype
def test_store_far_positions_turn_as_in_the_reference(dtype, device):
    qkv, weights, positions, caches, slots = make_store(4, dtype, device)
    positions = 131071 - positions
    inputs = [qkv, *weights, positions, *caches, slots]
    copies = [x.detach().clone().cpu() for x in inputs]
    keywords = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "mrope_section": SMALL}
    keywords |= {"theta": 8e6, "eps": 1e-6}
    got = kk.qk_norm_mrope_store(*inputs, **keywords)
    expected = kk.reference.qk_norm_mrope_store(*copies, **keywords)
    near = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps + 2e-6}
    torch.testing.assert_close(got.cpu(), expected, **near)
    torch.testing.assert_close(caches[0].cpu(), copies[4], **near)


def test_store_rounds_where_rms_norm_does(device):
    """With the norm's two roundings left out about half of the elements would differ."""
    qkv, weights, positions, caches, slots = make_store(6, torch.bfloat16, device)
    q = store(qkv, weights, positions * 0, caches, slots)
    heads = qkv.unflatten(1, (-1, 16))
    twice = norm(heads[:, :HEADS]).bfloat16() * weights[0]
    once = (norm(heads[:, :HEADS]) * weights[0]).bfloat16()
    assert (q == twice).double().mean() > 0.99
    assert (q == once).double().mean() < 0.9


def test_store_moves_every_byte_once(device, backend):
    if backend != "triton" or device.type != "cpu":
        pytest.skip("the interpreter of triton counts bytes")
    qkv, weights, positions, caches, slots = make_store(3, torch.bfloat16, device, head_dim=128)
    with triton_interpreter.traffic() as traffic:
        store(qkv, weights, positions, caches, slots, KEYE)
    assert traffic.stored == 3 * (HEADS + 2 * KV_HEADS) * 128 * 2
    # and per token two weights, the frequencies, three positions and a slot
    assert traffic.loaded == traffic.stored + 3 * (2 * 128 * 2 + 64 * 4 + 4 * 8)


@few_and_many
def test_store_offsets_past_2_to_the_31(device, backend):
    _, weights, positions, _, _ = make_store(3, torch.bfloat16, device)
    qkv = far_apart((3, (HEADS + 2 * KV_HEADS) * 16), torch.bfloat16, device)
    qkv.copy_(torch.randn(qkv.shape))
    near = torch.zeros(2, 3, PAGE, KV_HEADS, 16, device=device).bfloat16()
    far = [far_apart(near.shape[1:], torch.bfloat16, device) for _ in "kv"]
    slots = torch.tensor([2 * PAGE + 3, 0, 3 * PAGE - 1], device=device)
    expected = store(qkv.clone(), weights, positions, near, slots)
    out = far_apart((3, HEADS, 16), torch.bfloat16, device)
    store(qkv, weights, positions, far, slots, out=out)
    assert_same(out, expected, backend)
    for got, want in zip(far, near, strict=True):
        assert_same(got.flatten(0, 1)[slots], want.flatten(0, 1)[slots], backend)


def test_store_tokens_do_not_depend_on_their_neighbours(device, backend):
    qkv, weights, positions, caches, slots = make_store(6, torch.bfloat16, device)
    one, other = caches.clone(), caches.clone()
    alone = store(qkv[2:5], weights, positions[:, 2:5], one, slots[2:5])
    qkv[:2], qkv[5] = float("nan"), float("nan")
    together = store(qkv, weights, positions, other, slots)
    assert_same(together[2:5], alone, backend)
    for got, want in zip(other, one, strict=True):
        assert_same(got.flatten(0, 1)[slots[2:5]], want.flatten(0, 1)[slots[2:5]], backend)


def test_launch_config():
    # decode: a head per program for a few sequences, a warp full of 16-byte accesses for more
    assert launch_config(1, 32, 8, 256, 132) == LaunchConfig(32, 1, 1, 1)
    assert launch_config(33, 32, 8, 256, 132) == LaunchConfig(32, 1, 1, 1)
    assert launch_config(64, 32, 8, 256, 132) == LaunchConfig(8, 4, 1, 1)
    # prefill: a program per token, 64 threads for 64 angles
    assert launch_config(133, 32, 8, 256, 132) == LaunchConfig(1, 32, 8, 2)
    assert launch_config(32768, 32, 8, 256, 132) == LaunchConfig(1, 32, 8, 2)
    assert launch_config(32768, 32, 8, 512, 132) == LaunchConfig(1, 32, 8, 4)
    # every head is somebody's, also where q and kv heads round to different powers of two
    assert launch_config(64, 24, 8, 256, 132) == LaunchConfig(8, 4, 1, 1)


def test_store_no_tokens(device):
    qkv, weights, positions, caches, slots = make_store(0, torch.float32, device)
    assert store(qkv, weights, positions, caches, slots).shape == (0, HEADS, 16)


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
def test_store_checks_slots_before_it_writes(slot, backend):
    if backend != "reference":
        pytest.skip("a kernel takes slots as they are")
    qkv, weights, positions, caches, slots = make_store(4, torch.float32, "cpu")
    before = caches.clone()
    slots[2] = slot
    with pytest.raises(
        ValueError, match=rf"slot_mapping must hold values in \[-1, 64\), got {slot}"
    ):
        store(qkv, weights, positions, caches, slots)
    assert torch.equal(caches, before)
