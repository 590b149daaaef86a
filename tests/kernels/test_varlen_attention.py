"""varlen_attention against explicit fp64 softmax, one query at a time."""

import math

import pytest
import torch
import triton
import triton.language as tl

import keye_kernels as kk
from keye_kernels import _attention, _backends, _device
from keye_kernels._attention import find_tile
from keye_kernels.varlen_attention import VARIANTS
from tests.compare import assert_close
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_mask = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def prefix_sums(lengths, device):
    sums = torch.tensor([0, *lengths]).cumsum(0)
    return sums.to(device=device, dtype=torch.int32)


def make(lens_q, lens_k, heads, kv_heads, head_dim, dtype, device):
    """q and k in steps of 1/8: their scores are exact in fp32, whatever the order of the sum."""
    q = torch.randn(sum(lens_q), heads, head_dim, device=device).mul_(12).round_().div_(8)
    k = torch.randn(sum(lens_k), kv_heads, head_dim, device=device).mul_(8).round_().div_(8)
    v = torch.randn(sum(lens_k), kv_heads, head_dim, device=device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(q, k, v, lens_q, lens_k, **keywords):
    cu_q, cu_k = prefix_sums(lens_q, q.device), prefix_sums(lens_k, q.device)
    return kk.varlen_attention(
        q, k, v, cu_q, cu_k, max(lens_q, default=0), max(lens_k, default=0), **keywords
    )


def explicit(q, k, v, lens_q, lens_k, causal, scale, dtype):
    """Scores, softmax and sum of each sequence and head in ``dtype``; returns (out, lse)."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[1::-1], -math.inf, dtype=dtype, device=q.device)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[1] // k.shape[1]
    start_q = start_k = 0
    for len_q, len_k in zip(lens_q, lens_k, strict=True):
        queries, keys = slice(start_q, start_q + len_q), slice(start_k, start_k + len_k)
        visible = torch.full((len_q,), len_k)
        if causal:
            visible = (torch.arange(len_q) + len_k - len_q + 1).clamp(min=0)
        hidden = (torch.arange(len_k) >= visible[:, None]).to(q.device)
        sees = (visible > 0).to(q.device)
        for head in range(q.shape[1]):
            scores = (q[queries, head] @ k[keys, head // group].T * scale).masked_fill(
                hidden, -math.inf
            )[sees]
            rows = torch.arange(start_q, start_q + len_q, device=q.device)[sees]
            out[rows, head] = scores.softmax(1) @ v[keys, head // group]
            lse[head, rows] = scores.logsumexp(1)
        start_q, start_k = start_q + len_q, start_k + len_k
    return out, lse


CASES = {
    # lengths of queries, of keys, heads, kv_heads, head_dim
    "one token": ([1], [1], 1, 1, 8),
    "vision": ([21, 21, 5, 0, 21], [21, 21, 5, 0, 21], 2, 2, 72),
    "one past a tile": ([65], [65], 1, 1, 64),
    # That of fp32 has 32 keys. The second sequence's first query, causal, sees 63.
    "one short of a tile": ([1, 3, 2, 31], [63, 65, 127, 31], 1, 1, 16),
    "grouped heads": ([3, 17], [3, 17], 4, 2, 32),
    "more keys": ([1, 9], [19, 70], 1, 1, 80),
    "fewer keys": ([9, 3, 4], [4, 0, 4], 2, 1, 96),
    "eight to one": ([4], [9], 8, 1, 16),
    "two wide parts": ([3], [40], 1, 1, 200),
    "decoder": ([5], [66], 1, 1, 128),
    "widest head": ([5], [7], 1, 1, 256),
}


@by_dtype
@by_mask
@pytest.mark.parametrize("case", CASES)
def test_matches_explicit_softmax(case, causal, dtype, device):
    lens_q, lens_k, heads, kv_heads, head_dim = CASES[case]
    q, k, v = make(lens_q, lens_k, heads, kv_heads, head_dim, dtype, device)
    out, lse = run(q, k, v, lens_q, lens_k, causal=causal, return_lse=True)
    scale = head_dim**-0.5
    exact, exact_lse = explicit(q, k, v, lens_q, lens_k, causal, scale, torch.float64)
    plain, _ = explicit(q, k, v, lens_q, lens_k, causal, scale, dtype)
    _, fp32_lse = explicit(q, k, v, lens_q, lens_k, causal, scale, torch.float32)
    assert_close(out, plain, exact)
    assert_close(lse, fp32_lse, exact_lse)
    blind = exact_lse.T.isneginf()
    assert (out[blind] == 0).all()
    assert torch.equal(lse.T.isneginf(), blind)
    if dtype == torch.bfloat16 or causal:  # nor does lse change it, nor a schedule
        schedule = kk.attention_schedule(
            lens_q, lens_k, num_heads=heads, causal=causal, device=device
        )
        planned = run(q, k, v, lens_q, lens_k, causal=causal, schedule=schedule)
        assert torch.equal(planned, out)


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    """Serve the op by a variant of the kernel that only `tune` chooses."""

    def run_or_skip(*args):
        reason = _backends.run_candidate("varlen_attention", request.param, args)
        if reason is not None:
            pytest.skip(reason)

    monkeypatch.setattr(_backends, "find", lambda *_: run_or_skip)
    return request.param


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@by_mask
@pytest.mark.parametrize("case", [*CASES, "many tiles"])
def test_variants_match_explicit_softmax(case, causal, dtype, device, variant):
    many = ([130, 1, 0, 70], [200, 257, 3, 70], 2, 1, 72)
    lens_q, lens_k, heads, kv_heads, head_dim = CASES.get(case, many)
    q, k, v = make(lens_q, lens_k, heads, kv_heads, head_dim, dtype, device)
    out = run(q, k, v, lens_q, lens_k, causal=causal)
    exact, exact_lse = explicit(q, k, v, lens_q, lens_k, causal, head_dim**-0.5, torch.float64)
    plain, _ = explicit(q, k, v, lens_q, lens_k, causal, head_dim**-0.5, dtype)
    assert_close(out, plain, exact)
    assert (out[exact_lse.T.isneginf()] == 0).all()
    schedule = kk.attention_schedule(lens_q, lens_k, num_heads=heads, device=device)
    assert torch.equal(run(q, k, v, lens_q, lens_k, causal=causal, schedule=schedule), out)
    if variant == "triton_polynomial":
        return
    with_lse, lse = run(q, k, v, lens_q, lens_k, causal=causal, return_lse=True)
    assert torch.equal(with_lse, out)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_variant_that_loads_values_early_has_the_same_bits(device):
    q, k, v = make([70, 3], [130, 3], 2, 1, 72, torch.bfloat16, device)
    expected = run(q, k, v, [70, 3], [130, 3])
    cu_q, cu_k = prefix_sums([70, 3], device), prefix_sums([130, 3], device)
    out = torch.empty_like(q)
    args = (q, k, v, cu_q, cu_k, 70, 130, 72**-0.5, False, out, None, None, 0)
    assert _backends.run_candidate("varlen_attention", "triton_early", args) is None
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays GPUs of several kinds on a CPU")
def test_what_variants_refuse(monkeypatch):
    cu = prefix_sums([4], "cpu")

    def reason(name, dtype=torch.bfloat16, head_dim=72, causal=False, lse=None):
        q, k, v = make([4], [4], 1, 1, head_dim, dtype, "cpu")
        args = (q, k, v, cu, cu, 4, 4, 0.1, causal, torch.empty_like(q), lse, None, 0)
        return _backends.run_candidate("varlen_attention", name, args)

    coarse = "its exponentials are too coarse for the log-sum-exp, and never 0"
    assert reason("triton_polynomial", lse=torch.empty(1, 4)) == coarse
    assert reason("triton_polynomial", causal=True) == coarse
    assert reason("triton_128_keys", head_dim=96) == "head_dim must be at most 80, got 96"
    for name in VARIANTS:
        assert reason(name) is None
        message = "dtype must be torch.bfloat16 or torch.float16, got torch.float32"
        assert reason(name, dtype=torch.float32) == message
    monkeypatch.setattr(_device, "elsewhere", _device.Device((8, 0), 108))
    for name in VARIANTS:
        assert reason(name) == "it spills or does not fit except on sm_90 and sm_100"


@triton.jit
def _exp2_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + places, _attention._exp2(tl.load(x_ptr + places)))


def test_error_of_the_polynomial(device):
    """exp2 between -126 and 0, at most 1.1e-4 off; 1 at 0, 2^-126 below."""
    x = torch.linspace(-127, 0, 2**16, device=device)
    x[:3] = torch.tensor([-math.inf, -1e30, math.nan])
    y = torch.empty_like(x)
    _exp2_kernel[(16,)](x, y, BLOCK=2**12)
    exact = x.double().clamp(min=-126).exp2()
    assert ((y.double() - exact).abs() / exact)[3:].max() < 1.1e-4
    assert not y[2] <= 1  # no NaN is hidden
    assert y[-1] == 1
    assert y[0] == y[1] == 2.0**-126


@by_mask
def test_long_queries_pass_several_masks(causal, device, backend):
    """1100 queries span two blocks of the reference's masked rows, 600 of its explicit scores."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("about 1500 tiles: too slow interpreted, and no edge that others lack")
    lens_q, lens_k = [1100], [1300]
    q, k, v = make(lens_q, lens_k, 2, 1, 8, torch.float32, device)
    out, lse = run(q, k, v, lens_q, lens_k, causal=causal, return_lse=True)
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * 8**-0.5
    if causal:
        mask = torch.arange(1300, device=device) > torch.arange(1100, device=device)[:, None] + 200
        scores.masked_fill_(mask, -math.inf)
    exact = torch.einsum("hqk,kd->qhd", scores.softmax(2), v[:, 0].double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(2), rtol=1e-5, atol=1e-5)


def test_softmax_scale(device):
    q, k, v = make([6], [6], 1, 1, 24, torch.float32, device)
    out, lse = run(q, k, v, [6], [6], softmax_scale=0.7, return_lse=True)
    exact, exact_lse = explicit(q, k, v, [6], [6], False, 0.7, torch.float64)
    plain, plain_lse = explicit(q, k, v, [6], [6], False, 0.7, torch.float32)
    assert_close(out, plain, exact)
    assert_close(lse, plain_lse, exact_lse)


@by_mask
def test_many_lengths(causal, device):
    """40 segments of 0 to 130 tokens, with and without a schedule."""
    lengths = [1 << i % 7 if i % 3 == 1 else i // 8 for i in range(39)] + [130]
    q, k, v = make(lengths, lengths, 2, 1, 72, torch.bfloat16, device)
    out = run(q, k, v, lengths, lengths, causal=causal)
    exact, _ = explicit(q, k, v, lengths, lengths, causal, 72**-0.5, torch.float64)
    plain, _ = explicit(q, k, v, lengths, lengths, causal, 72**-0.5, torch.bfloat16)
    assert_close(out, plain, exact)
    schedule = kk.attention_schedule(lengths, num_heads=2, causal=causal, device=device)
    assert torch.equal(run(q, k, v, lengths, lengths, causal=causal, schedule=schedule), out)


@triton.jit
def _find_kernel(cu_seqlens_ptr, tiles_ptr, found_ptr, batch_size):
    i = tl.program_id(0)
    sequence, first = find_tile(cu_seqlens_ptr, tl.load(tiles_ptr + i), batch_size, 64)
    tl.store(found_ptr + 2 * i, sequence)
    tl.store(found_ptr + 2 * i + 1, first)


def test_every_tile_is_found_among_many_sequences(device):
    """Of 600 sequences, which take three steps of the search."""
    lengths = torch.randint(0, 3, (600,))
    lengths[[0, 255, 256, 511, 512, 599]] = torch.tensor([64, 65, 128, 0, 300, 1])
    cu = prefix_sums(lengths.tolist(), device)
    begins = (cu[:-1] // 64).cpu() + torch.arange(600)
    expected = [[i, 0] for i in (0, 1, 254, 255, 256, 257, 511, 512, 513, 599)]
    expected += [[255, 64], [256, 64], [512, 64], [512, 256]]
    tiles = [begins[i] + first // 64 for i, first in expected]
    found = torch.empty(len(tiles), 2, dtype=torch.int32, device=device)
    tiles = torch.stack(tiles).to(device=device, dtype=torch.int32)
    _find_kernel[(len(tiles),)](cu, tiles, found, 600)
    assert found.tolist() == expected


@by_mask
@pytest.mark.parametrize("num_sms", [1, 132], indirect=True)
@pytest.mark.usefixtures("num_sms")
def test_a_sequence_does_not_depend_on_its_neighbours(causal, device, backend):
    """Bit by bit, also where the batch is so large that programs take twice as many queries."""
    if backend == "reference":
        pytest.skip("the reference promises it within rounding only")
    lengths = [130, 7, 66]
    q, k, v = make(lengths, lengths, 2, 1, 72, torch.bfloat16, device)
    together = run(q, k, v, lengths, lengths, causal=causal)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = run(q[rows], k[rows], v[rows], [length], [length], causal=causal)
        assert torch.equal(together[rows], alone)
        start += length


def test_sequences_do_not_see_each_other(device):
    lengths = [7, 7, 3]
    q, k, v = make(lengths, lengths, 2, 2, 72, torch.bfloat16, device)
    together = run(q, k, v, lengths, lengths)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = run(q[rows], k[rows], v[rows], [length], [length])
        torch.testing.assert_close(together[rows], alone, rtol=2**-7, atol=2**-9)
        start += length
    k[7:14], v[7:14] = float("nan"), float("nan")
    poisoned = run(q, k, v, lengths, lengths)
    assert torch.equal(poisoned[:7], together[:7])
    assert torch.equal(poisoned[14:], together[14:])


def test_views_of_packed_qkv_and_out(device):
    lengths = [5, 8]
    packed = torch.randn(13, 3, 2, 72, device=device).bfloat16()
    q, k, v = packed.unbind(1)
    expected = run(q.contiguous(), k.contiguous(), v.contiguous(), lengths, lengths)
    result = run(q, k, v, lengths, lengths)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-9)
    target = torch.full((13, 4, 72), 7.0, device=device).bfloat16()
    out = target[:, 1:3]
    assert run(q, k, v, lengths, lengths, out=out) is out
    assert torch.equal(out, result)
    assert (target[:, 0] == 7).all()
    assert (target[:, 3] == 7).all()


# Offsets are counted in elements, or in units of 8 where that divides all strides.
by_unit = pytest.mark.parametrize("padding", [0, 1], ids=["in units of 8", "in elements"])


def check_far_apart(q, k, v, out, lens_q, lens_k):
    """Against the same numbers side by side."""
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, device=x.device))
    near = [x.contiguous() for x in (q, k, v)]
    out.fill_(torch.nan)
    assert run(q, k, v, lens_q, lens_k, causal=True, out=out) is out
    expected = run(*near, lens_q, lens_k, causal=True)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=2**-9, atol=2**-11)


@by_unit
@pytest.mark.parametrize(
    ("lens_q", "lens_k"), [([3], [3]), ([2, 1], [2, 2])], ids=["one sequence", "two"]
)
@pytest.mark.parametrize("head_dim", [8, 72])
def test_rows_past_2_to_the_31_elements(head_dim, lens_q, lens_k, padding, device):
    """Row 2: of the first sequence, or where the second starts."""

    def far(lengths):
        shape = (sum(lengths), 1, head_dim + padding)
        return far_apart(shape, torch.float16, device, row=2)[..., :head_dim]

    check_far_apart(far(lens_q), far(lens_k), far(lens_k), far(lens_q), lens_q, lens_k)


@by_unit
def test_heads_past_2_to_the_31_elements(padding, device):
    shape = (3, 2, 16 + padding)
    far = [far_apart(shape, torch.float16, device)[..., :16].transpose(0, 1) for _ in range(4)]
    check_far_apart(*far, [2], [2])


def test_lse_past_2_to_the_31_elements(device):
    """The op's own argument: the public function allocates it in one piece."""
    q, k, v = make([3], [3], 3, 3, 8, torch.float32, device)
    cu = prefix_sums([3], device)
    lse = far_apart((3, 3), torch.float32, device)
    torch.ops.keye.varlen_attention(
        q, k, v, cu, cu, 3, 3, 0.5, True, torch.empty_like(q), lse, None, 0
    )
    _, expected = run(q, k, v, [3], [3], softmax_scale=0.5, causal=True, return_lse=True)
    assert torch.equal(lse, expected)


def test_strides_that_8_does_not_divide(device):
    """No 16-byte access is aligned, and none may be assumed."""
    packed = torch.randn(9, 3, 2 * 72 + 3, device=device).half()[..., 1 : 2 * 72 + 1]
    q, k, v = packed.unflatten(2, (2, 72)).unbind(1)
    expected = run(q.contiguous(), k.contiguous(), v.contiguous(), [4, 5], [4, 5])
    torch.testing.assert_close(run(q, k, v, [4, 5], [4, 5]), expected, rtol=2**-9, atol=2**-11)


@by_mask
def test_large_scores_do_not_overflow(causal, device):
    q, k, v = make([9], [9], 1, 1, 16, torch.float16, device)
    q, k = q * 100, k * 100  # scores of the order of 1e5
    out, lse = run(q, k, v, [9], [9], causal=causal, return_lse=True)
    exact, exact_lse = explicit(q, k, v, [9], [9], causal, 0.25, torch.float64)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


def test_longer_maxima_are_allowed_and_no_tokens(device):
    q, k, v = make([4], [4], 1, 1, 8, torch.float32, device)
    cu = prefix_sums([4], device)
    assert torch.equal(
        kk.varlen_attention(q, k, v, cu, cu, 99, 99), kk.varlen_attention(q, k, v, cu, cu, 4, 4)
    )
    out, lse = run(q[:0], k, v, [0], [4], return_lse=True)
    assert out.shape == (0, 1, 8)
    assert lse.shape == (1, 0)
    assert run(q[:0], k[:0], v[:0], [], []).shape == (0, 1, 8)
    out, lse = run(q, k[:0], v[:0], [4], [0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_errors(device):
    q, k, v = make([4], [4], 4, 2, 16, torch.float32, device)
    cu = prefix_sums([4], device)

    def attend(q=q, k=k, v=v, cu_q=cu, cu_k=cu, **keywords):
        return kk.varlen_attention(q, k, v, cu_q, cu_k, 4, 4, **keywords)

    with pytest.raises(ValueError, match=r"q must have shape \(\*, \*, \*\), got \(4, 64\)"):
        attend(q=q.flatten(1))
    with pytest.raises(ValueError, match=r"k must have shape \(\*, \*, 16\), got \(4, 2, 8\)"):
        attend(k=k[..., :8])
    with pytest.raises(ValueError, match=r"v must have shape \(4, 2, 16\), got \(4, 1, 16\)"):
        attend(v=v[:, :1])
    with pytest.raises(ValueError, match=r"k must have dtype torch.float32, got torch.float16"):
        attend(k=k.half())
    with pytest.raises(ValueError, match="num_heads must be a positive multiple of num_kv_heads 2"):
        attend(q=q[:, :3])
    for head_dim in (4, 12, 264):
        wide = torch.randn(4, 2, head_dim, device=device)
        with pytest.raises(ValueError, match=f"head_dim must be a .* up to 256, got {head_dim}"):
            attend(wide, wide, wide)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have dtype torch.int32, got .*int64"):
        attend(cu_q=cu.long())
    with pytest.raises(ValueError, match=r"cu_seqlens_k must have shape \(2,\), got \(3,\)"):
        attend(cu_k=prefix_sums([2, 2], device))
    with pytest.raises(ValueError, match="cu_seqlens_q must have at least 1 element, got 0"):
        attend(cu_q=cu[:0], cu_k=cu[:0])
    with pytest.raises(ValueError, match=r"out must have shape \(4, 4, 16\), got \(4, 2, 16\)"):
        attend(out=k)
    for scale in (math.nan, math.inf, -0.1, 0.0, "a"):
        with pytest.raises(
            ValueError, match=f"softmax_scale must be a finite number above 0, got {scale!r}"
        ):
            attend(softmax_scale=scale)
    for length in (None, 4.0, -1):
        with pytest.raises(ValueError, match="max_seqlen_q must be a non-negative int, got"):
            kk.varlen_attention(q, k, v, cu, cu, length, 4)
        with pytest.raises(ValueError, match="max_seqlen_k must be a non-negative int, got"):
            kk.varlen_attention(q, k, v, cu, cu, 4, length)


def test_schedule_holds_each_tile_once_the_longest_first(device):
    schedule = kk.attention_schedule([64, 0, 200, 1], num_heads=2, device=device)
    assert schedule[1:] == (64, 265, 265, 4)
    assert schedule.tiles.dtype == torch.int32
    assert schedule.tiles.tolist() == [[2, 0], [2, 64], [2, 128], [2, 192], [0, 0], [3, 0]]
    schedule = kk.attention_schedule([130, 70], [130, 300], num_heads=1, causal=True, device=device)
    assert schedule.tiles.tolist() == [[1, 64], [1, 0], [0, 128], [0, 64], [0, 0]]
    assert schedule[1:] == (64, 200, 430, 2)
    assert kk.attention_schedule([], num_heads=1, device=device).tiles.shape == (0, 2)


@pytest.mark.parametrize("num_sms", [1], indirect=True)
@pytest.mark.usefixtures("num_sms")
def test_schedule_takes_larger_tiles_where_they_fill_the_gpu():
    assert kk.attention_schedule([256], num_heads=1, device="cpu").block_m == 128
    assert kk.attention_schedule([255], num_heads=1, device="cpu").block_m == 64
    assert kk.attention_schedule([128], num_heads=2, device="cpu").block_m == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays GPUs of two kinds on a CPU")
def test_a_gpu_that_takes_other_tiles_than_the_schedule(monkeypatch):
    """Heads of 128 have 128 queries, whatever was planned, where 64 would spill: the same bits."""
    q, k, v = make([70, 3], [70, 3], 1, 1, 128, torch.float16, "cpu")
    schedule = kk.attention_schedule([70, 3], num_heads=1, device="cpu")
    assert schedule.block_m == 64
    found = []
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(_device, "elsewhere", _device.Device(capability, 132))
        for given in (schedule, None):
            found.append(run(q, k, v, [70, 3], [70, 3], causal=True, schedule=given))
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_schedule_errors(device):
    q, k, v = make([4], [4], 4, 2, 16, torch.float32, device)

    def check(message, *lengths):
        schedule = kk.attention_schedule(*lengths, num_heads=4, device=device)
        with pytest.raises(ValueError, match=message):
            run(q, k, v, [4], [4], schedule=schedule)

    made = "schedule must be made for 4 queries and 4 keys of 1 sequences, got one for"
    check(f"{made} 5 and 5 of 1", [5])
    check(f"{made} 4 and 4 of 2", [3, 1])
    check(f"{made} 4 and 9 of 1", [4], [9])
    schedule = kk.attention_schedule([4], num_heads=4, device="meta")
    with pytest.raises(ValueError, match=r"schedule must be on device .*, got meta"):
        run(q, k, v, [4], [4], schedule=schedule)
    with pytest.raises(TypeError, match="schedule must be an AttentionSchedule, got tuple"):
        run(q, k, v, [4], [4], schedule=tuple(schedule))
    with pytest.raises(ValueError, match="seqlens_q must hold no negative length, got -2"):
        kk.attention_schedule([3, -2], num_heads=4, device=device)
    with pytest.raises(ValueError, match="seqlens_k must hold no negative length, got -1"):
        kk.attention_schedule([3], [-1], num_heads=4, device=device)
    with pytest.raises(ValueError, match=r"seqlens_k must have one length for each of 1 seq.* 2"):
        kk.attention_schedule([3], [1, 2], num_heads=4, device=device)
    for num_heads in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"num_heads must be a positive int, got {num_heads}"):
            kk.attention_schedule([3], num_heads=num_heads, device=device)
    for lengths in ([2**31], [2**30] * 2, [2**62] * 2, [2**63]):
        with pytest.raises(ValueError, match=r"seqlens_k must add up to less than 2\^31, got"):
            kk.attention_schedule([1] * len(lengths), lengths, num_heads=4, device=device)
    for lengths in ([1.5, 2], "34", [[3, 1]], 4, [2**70], [True]):
        with pytest.raises(ValueError, match="seqlens_q must be a sequence of ints, got"):
            kk.attention_schedule(lengths, num_heads=4, device=device)


def test_schedule_of_other_lengths_with_the_same_totals():
    q, k, v = make([100, 28], [100, 28], 1, 1, 8, torch.float32, "cpu")
    schedule = kk.attention_schedule([28, 100], num_heads=1, device="cpu")
    message = r"schedule must have \[2, 1\] tiles for the lengths in cu_seqlens_q, got \[1, 2\]"
    with kk.use_backend("reference"), pytest.raises(ValueError, match=message):
        run(q, k, v, [100, 28], [100, 28], schedule=schedule)


@pytest.mark.parametrize(
    ("cu_q", "max_q", "message"),
    [
        ([1, 4], 4, "cu_seqlens_q must start at 0 and end at 4 tokens, got 1 to 4"),
        ([0, 3], 4, "cu_seqlens_q must start at 0 and end at 4 tokens, got 0 to 3"),
        ([0, 5], 5, "cu_seqlens_q must start at 0 and end at 4 tokens, got 0 to 5"),
        ([0, 3, 2, 4], 4, r"cu_seqlens_q must not decrease, got \[0, 3, 2, 4\]"),
        ([0, 4], 3, "max_seqlen_q must be at least 4, got 3"),
    ],
    ids=["start", "short", "long", "decreasing", "maximum"],
)
def test_contents_are_checked_on_a_cpu(cu_q, max_q, message, backend):
    if backend == "triton":
        pytest.skip("a kernel does not read contents to check them")
    q, k, v = make([4], [4], 1, 1, 8, torch.float32, "cpu")
    cu_q = torch.tensor(cu_q, dtype=torch.int32)
    cu_k = prefix_sums([4, *[0] * (len(cu_q) - 2)], "cpu")
    with pytest.raises(ValueError, match=message):
        kk.varlen_attention(q, k, v, cu_q, cu_k, max_q, 4)
    swapped = message.replace("_q", "_k")
    with pytest.raises(ValueError, match=swapped):
        kk.varlen_attention(q, k, v, cu_k, cu_q, 4, max_q)
