"""Paged attention against a naive one that walks over tokens, with everything unused poisoned."""

import pytest
import torch

import keye_kernels as kk
from tests.compare import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HUGE = 2**30  # a page number that no cache has

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Cache:
    """Pages in random order; NaN in every unused row, a huge number in every unused entry."""

    def __init__(self, lengths, page_size, kv_heads, head_dim, dtype, device):
        needed = [-(-length // page_size) for length in lengths]
        num_pages = sum(needed) + 2
        shape = (num_pages, page_size, kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, float("nan"), device=device).to(dtype) for _ in "kv")
        self.table = torch.full((len(lengths), max([*needed, 0]) + 2), HUGE, dtype=torch.int32)
        free = torch.randperm(num_pages).tolist()
        self.sequences = []
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            pages = [free.pop() for _ in range(count)]
            self.table[row, :count] = torch.tensor(pages, dtype=torch.int32)
            k, v = torch.randn(2, length, kv_heads, head_dim, device=device).to(dtype)
            for token in range(length):
                page, offset = pages[token // page_size], token % page_size
                self.k[page, offset], self.v[page, offset] = k[token], v[token]
            self.sequences.append((k, v))
        self.table = self.table.to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.max_seqlen = max(lengths, default=0)


def naive(q, lens_q, cache, scale, dtype):
    """Each query, the last ones of their sequence, over the tokens up to its own, in ``dtype``."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    start = 0
    for len_q, (k, v) in zip(lens_q, cache.sequences, strict=True):
        group = q.shape[1] // k.shape[1]
        for i in range(len_q):
            visible = len(k) - len_q + i + 1
            for head in range(q.shape[1]):
                keys, values = (x[:visible, head // group].to(dtype) for x in (k, v))
                if visible > 0:
                    weights = (keys @ q[start + i, head].to(dtype) * scale).softmax(0)
                    out[start + i, head] = weights @ values
        start += len_q
    return out


def prefill(q, lens_q, cache, **keywords):
    cu = torch.tensor([0, *lens_q]).cumsum(0).to(device=q.device, dtype=torch.int32)
    return kk.paged_prefill_attention(
        q,
        cache.k,
        cache.v,
        cache.table,
        cu,
        cache.lengths,
        max(lens_q, default=0),
        cache.max_seqlen,
        **keywords,
    )


def decode(q, cache, **keywords):
    return kk.paged_decode_attention(
        q, cache.k, cache.v, cache.table, cache.lengths, max_seqlen_k=cache.max_seqlen, **keywords
    )


PREFILL = {
    # new tokens, cached tokens with them, page_size, heads, kv_heads, head_dim
    "one token": ([1], [1], 16, 1, 1, 8),
    "prompts": ([20, 3, 16], [20, 3, 16], 16, 4, 2, 32),
    "chunk and reused prefix": ([7, 1, 16], [39, 17, 32], 16, 8, 2, 16),
    "with an empty one": ([5, 0, 2], [5, 33, 40], 32, 2, 1, 128),
}


@by_dtype
@pytest.mark.parametrize("case", PREFILL)
def test_prefill_matches_naive(case, dtype, device):
    lens_q, lengths, page_size, heads, kv_heads, head_dim = PREFILL[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, device)
    q = torch.randn(sum(lens_q), heads, head_dim, device=device).mul_(1.5).to(dtype)
    scale = head_dim**-0.5
    got = prefill(q, lens_q, cache)
    assert got.is_contiguous()
    plain = naive(q, lens_q, cache, scale, dtype)
    assert_close(got, plain, naive(q, lens_q, cache, scale, torch.float64))


DECODE = {
    # cached tokens, page_size, heads, kv_heads, head_dim
    "one token": ([1], 16, 1, 1, 8),
    "page edges": ([15, 16, 17, 33], 16, 4, 2, 64),
    "padding row": ([5, 0, 48], 48, 8, 1, 128),
    "every head its own": ([40, 7], 32, 3, 3, 72),
}


@by_dtype
@pytest.mark.parametrize("case", DECODE)
def test_decode_matches_naive(case, dtype, device):
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


def test_decode_equals_prefill_of_one_token(device):
    cache = Cache([21, 40], 16, 2, 32, torch.float32, device)
    q = torch.randn(2, 4, 32, device=device)
    torch.testing.assert_close(decode(q, cache), prefill(q, [1, 1], cache), rtol=1e-5, atol=1e-6)


def test_chunks_equal_one_prefill(device):
    cache = Cache([29], 16, 2, 32, torch.float32, device)
    q = torch.randn(29, 4, 32, device=device)
    whole = prefill(q, [29], cache)
    for start, stop in ((0, 11), (11, 28), (28, 29)):
        cache.lengths.fill_(stop)
        chunk = prefill(q[start:stop], [stop - start], cache)
        torch.testing.assert_close(chunk, whole[start:stop], rtol=1e-5, atol=1e-6)


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
    out.fill_(7)
    assert prefill(q[:, 1:5], [1, 1], cache, softmax_scale=0.3, out=out) is out
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-9)
    assert (target[:, [0, 5]] == 7).all()


def test_no_tokens(device):
    cache = Cache([3], 16, 1, 8, torch.float32, device)
    q = torch.empty(0, 1, 8, device=device)
    assert prefill(q, [0], cache).shape == (0, 1, 8)
    empty = Cache([], 16, 1, 8, torch.float32, device)
    assert decode(q, empty).shape == (0, 1, 8)


def test_errors(device):
    cache = Cache([20], 16, 2, 32, torch.float32, device)
    q = torch.randn(1, 4, 32, device=device)

    def check(message, q=q, exception=ValueError, **changes):
        changed = Cache([20], 16, 2, 32, torch.float32, device)
        changed.__dict__.update(changes)
        for call in (lambda: decode(q, changed), lambda: prefill(q, [len(q)], changed)):
            with pytest.raises(exception, match=message):
                call()

    check(r"q must have shape \(\*, \*, \*\), got \(4, 32\)", q=q[0])
    check(r"k_cache must have shape \(\*, \*, \*, 32\), got", k=cache.k[..., :16])
    check(r"v_cache must have shape .* got \(3, 16, 2, 32\)", v=cache.v[:3])
    check(r"k_cache must have dtype torch.float32, got torch.float16", k=cache.k.half())
    check("num_heads must be a positive multiple of num_kv_heads 2, got 3", q=q[:, :3])
    check("page_size must be a positive multiple of 16, got 8", k=cache.k[:, :8], v=cache.v[:, :8])
    check(r"block_table must have dtype torch.int32, got torch.int64", table=cache.table.long())
    check(r"cache_seqlens must have shape \(1,\), got \(2,\)", lengths=cache.lengths.repeat(2))
    check(
        "max_seqlen_k must be at most the 64 tokens that block_table can name, got 65",
        max_seqlen=65,
    )
    check(r"max_seqlen_k must be a non-negative int, got 4\.5", max_seqlen=4.5)
    for attend in (lambda **k: decode(q, cache, **k), lambda **k: prefill(q, [1], cache, **k)):
        with pytest.raises(ValueError, match="softmax_scale must be a finite number, got inf"):
            attend(softmax_scale=float("inf"))
    with pytest.raises(ValueError, match=r"out must have shape \(1, 4, 32\), got \(1, 2, 32\)"):
        decode(q, cache, out=q[:, :2])
    with pytest.raises(ValueError, match=r"out must have shape \(1, 4, 32\), got \(1, 2, 32\)"):
        prefill(q, [1], cache, out=q[:, :2])
    with pytest.raises(
        ValueError, match=r"q must have one row per row of block_table \(1\), got 2"
    ):
        decode(q.repeat(2, 1, 1), cache)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have shape \(2,\), got \(3,\)"):
        prefill(q, [1, 0], cache)


def test_contents_are_checked_on_a_cpu():
    cache = Cache([20], 16, 1, 8, torch.float32, "cpu")
    q = torch.randn(1, 1, 8)

    def check(message, q=q, **changes):
        changed = Cache([20], 16, 1, 8, torch.float32, "cpu")
        changed.__dict__.update(changes)
        with pytest.raises(ValueError, match=message):
            decode(q, changed)
        with pytest.raises(ValueError, match=message):
            prefill(q, [1], changed)

    for page in (4, -1, HUGE):
        table = cache.table.clone()
        table[0, 1] = page
        check(rf"block_table must hold values in \[0, 4\), got {page}", table=table)
    check(r"cache_seqlens must hold values in \[0, 20\), got 20", max_seqlen=19)
    cache.lengths = torch.tensor([-3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens must hold values in \[0, 21\), got -3"):
        decode(q, cache)
    cache.lengths = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_seqlens must count the 3 new tokens of sequence 0"):
        prefill(torch.randn(3, 1, 8), [3], cache)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0 and end at 3 tokens, got 0"):
        prefill(torch.randn(3, 1, 8), [2], cache)
