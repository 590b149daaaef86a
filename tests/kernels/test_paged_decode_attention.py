"""paged_decode_attention against a naive one that walks over tokens, the unused poisoned."""

import pytest
import torch

import keye_kernels as kk
from tests.compare import assert_close
from tests.kernels.paged import HUGE, Cache, check_shared_contents, check_shared_errors, naive

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decode(q, cache, **keywords):
    return kk.paged_decode_attention(
        q, cache.k, cache.v, cache.table, cache.lengths, max_seqlen_k=cache.max_seqlen, **keywords
    )


DECODE = {
    # cached tokens, page_size, heads, kv_heads, head_dim
    "one token": ([1], 16, 1, 1, 8),
    "page edges": ([15, 16, 17, 33], 16, 4, 2, 64),
    "padding row": ([5, 0, 48], 48, 8, 1, 128),
    "every head its own": ([40, 7], 32, 3, 3, 72),
}


@by_dtype
@pytest.mark.parametrize("case", DECODE)
def test_matches_naive(case, dtype, device):
    lengths, page_size, heads, kv_heads, head_dim = DECODE[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, device)
    q = torch.randn(len(lengths), heads, head_dim, device=device).mul_(1.5).to(dtype)
    ones, scale = [1] * len(lengths), head_dim**-0.5
    got = decode(q, cache)
    assert got.is_contiguous()
    plain = naive(q, ones, cache, scale, dtype)
    assert_close(got, plain, naive(q, ones, cache, scale, torch.float64))
    for row, length in enumerate(lengths):
        if length == 0:
            assert (got[row] == 0).all()


def test_equals_prefill_of_one_token(device):
    cache = Cache([21, 40], 16, 2, 32, torch.float32, device)
    q = torch.randn(2, 4, 32, device=device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    prefilled = kk.paged_prefill_attention(
        q, cache.k, cache.v, cache.table, starts, cache.lengths, 1, cache.max_seqlen
    )
    torch.testing.assert_close(decode(q, cache), prefilled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pages", [[3, 4, 5], [5, 3, 4]], ids=["in order", "scattered"])
def test_page_order_does_not_matter(pages, device):
    k, v = torch.randn(2, 40, 2, 16, device=device)
    cache = torch.full((2, 8, 16, 2, 16), float("nan"), device=device)
    for i, page in enumerate(pages):
        rows = slice(16 * i, min(16 * (i + 1), 40))
        cache[0, page, : len(k[rows])], cache[1, page, : len(k[rows])] = k[rows], v[rows]
    q = torch.randn(1, 4, 16, device=device)
    table = torch.tensor([[*pages, HUGE]], dtype=torch.int32, device=device)
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    got = kk.paged_decode_attention(q, *cache, table, lengths, max_seqlen_k=40)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, 40))
    expected = kk.varlen_attention(q, k, v, cu_q, cu_k, 1, 40)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_shared_pages(device):
    """Two sequences with one prefix may name the same pages."""
    cache = Cache([16, 16], 16, 1, 16, torch.float32, device)
    cache.table[1] = cache.table[0]
    q = torch.randn(1, 2, 16, device=device).expand(2, 2, 16).contiguous()
    got = decode(q, cache)
    assert torch.equal(got[0], got[1])


def test_strides_scale_and_out(device):
    cache = Cache([20, 9], 16, 2, 32, torch.bfloat16, device)
    q = torch.randn(2, 6, 32, device=device).bfloat16()
    expected = decode(q[:, 1:5].contiguous(), cache, softmax_scale=0.3)
    pair = torch.stack((cache.k, cache.v), dim=1)
    cache.k, cache.v = pair[:, 0], pair[:, 1]
    target = torch.full((2, 6, 32), 7.0, device=device).bfloat16()
    out = target[:, 1:5]
    assert decode(q[:, 1:5], cache, softmax_scale=0.3, out=out) is out
    assert torch.equal(out, expected)
    assert (target[:, [0, 5]] == 7).all()


def test_no_tokens(device):
    q = torch.empty(0, 1, 8, device=device)
    empty = Cache([], 16, 1, 8, torch.float32, device)
    assert decode(q, empty).shape == (0, 1, 8)


def test_errors(device):
    check_shared_errors(decode, device)
    cache = Cache([20], 16, 2, 32, torch.float32, device)
    q = torch.randn(2, 4, 32, device=device)
    message = r"q must have one row per row of block_table \(1\), got 2"
    with pytest.raises(ValueError, match=message):
        decode(q, cache)


def test_contents_are_checked_on_a_cpu():
    check_shared_contents(decode)
    cache = Cache([20], 16, 1, 8, torch.float32, "cpu")
    cache.lengths = torch.tensor([-3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens must hold values in \[0, 21\), got -3"):
        decode(torch.randn(1, 1, 8), cache)
