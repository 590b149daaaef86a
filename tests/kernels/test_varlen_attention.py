"""varlen_attention against explicit fp64 softmax, one query at a time."""

import math

import pytest
import torch

import keye_kernels as kk
from tests.compare import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_mask = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def prefix_sums(lengths, device):
    sums = torch.tensor([0, *lengths]).cumsum(0)
    return sums.to(device=device, dtype=torch.int32)


def make(lens_q, lens_k, heads, kv_heads, head_dim, dtype, device):
    q = torch.randn(sum(lens_q), heads, head_dim, device=device).mul_(1.5).to(dtype)
    k, v = (torch.randn(sum(lens_k), kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
    return q, k, v


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
        for head in range(q.shape[1]):
            keys = k[start_k : start_k + len_k, head // group]
            values = v[start_k : start_k + len_k, head // group]
            for i in range(len_q):
                visible = len_k - len_q + i + 1 if causal else len_k
                if visible <= 0:
                    continue
                scores = keys[:visible] @ q[start_q + i, head] * scale
                out[start_q + i, head] = scores.softmax(0) @ values[:visible]
                lse[head, start_q + i] = scores.logsumexp(0)
        start_q, start_k = start_q + len_q, start_k + len_k
    return out, lse


CASES = {
    # lengths of queries, of keys, heads, kv_heads, head_dim
    "one token": ([1], [1], 1, 1, 8),
    "vision": ([21, 21, 5, 0, 21], [21, 21, 5, 0, 21], 2, 2, 72),
    "grouped heads": ([3, 17], [3, 17], 6, 2, 32),
    "more keys": ([4, 1, 9], [19, 8, 9], 4, 1, 16),
    "fewer keys": ([9, 3, 4], [4, 0, 4], 2, 1, 24),
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
    assert torch.equal(run(q, k, v, lens_q, lens_k, causal=causal), out)


@by_mask
def test_long_queries_pass_several_masks(causal, device):
    """1100 queries span two blocks of masked rows, 600 of explicit scores."""
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
    q, k, v = make([6], [6], 2, 2, 16, torch.float32, device)
    out = run(q, k, v, [6], [6], softmax_scale=0.7)
    exact, _ = explicit(q, k, v, [6], [6], False, 0.7, torch.float64)
    plain, _ = explicit(q, k, v, [6], [6], False, 0.7, torch.float32)
    assert_close(out, plain, exact)


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
    for scale in (math.nan, math.inf, "a"):
        with pytest.raises(
            ValueError, match=f"softmax_scale must be a finite number, got {scale!r}"
        ):
            attend(softmax_scale=scale)
    for length in (None, 4.0, -1):
        with pytest.raises(ValueError, match="max_seqlen_q must be a non-negative int, got"):
            kk.varlen_attention(q, k, v, cu, cu, length, 4)
        with pytest.raises(ValueError, match="max_seqlen_k must be a non-negative int, got"):
            kk.varlen_attention(q, k, v, cu, cu, 4, length)


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
def test_contents_are_checked_on_a_cpu(cu_q, max_q, message):
    q, k, v = make([4], [4], 1, 1, 8, torch.float32, "cpu")
    cu_q = torch.tensor(cu_q, dtype=torch.int32)
    cu_k = prefix_sums([4, *[0] * (len(cu_q) - 2)], "cpu")
    with pytest.raises(ValueError, match=message):
        kk.varlen_attention(q, k, v, cu_q, cu_k, max_q, 4)
    swapped = message.replace("_q", "_k")
    with pytest.raises(ValueError, match=swapped):
        kk.varlen_attention(q, k, v, cu_k, cu_q, 4, max_q)
