"""What the tests of paged attention share: a poisoned cache, and attention one token at a time."""

import numpy as np
import pytest
import torch

HUGE = 2**30  # a page number that no cache has


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


def check_shared_errors(call, device):
    """Each error of the arguments that both ops take; ``call(q, cache, **keywords)``."""

    def check(message, q=None, keywords=None, **changes):
        cache = Cache([20], 16, 2, 32, torch.float32, device)
        changed = {name: change(getattr(cache, name)) for name, change in changes.items()}
        cache.__dict__.update(changed)
        q = torch.randn(1, 4, 32, device=device) if q is None else q
        with pytest.raises(ValueError, match=message):
            call(q, cache, **(keywords or {}))

    q = torch.randn(1, 4, 32, device=device)
    check(r"q must have shape \(\*, \*, \*\), got \(4, 32\)", q=q[0])
    check(r"k_cache must have shape \(\*, \*, \*, 32\), got", k=lambda k: k[..., :16])
    check(r"v_cache must have shape .* got \(3, 16, 2, 32\)", v=lambda v: v[:3])
    check(r"k_cache must have dtype torch.float32, got torch.float16", k=lambda k: k.half())
    check("num_heads must be a positive multiple of num_kv_heads 2, got 3", q=q[:, :3])
    message = "page_size must be a positive multiple of 16, got 8"
    check(message, k=lambda k: k[:, :8], v=lambda v: v[:, :8])
    check("block_table must have dtype torch.int32, got torch.int64", table=lambda t: t.long())
    message = r"cache_seqlens must have shape \(1,\), got \(2,\)"
    check(message, lengths=lambda x: x.repeat(2))
    check("max_seqlen_k must be a non-negative int, got -1", max_seqlen=lambda _: -1)
    check("max_seqlen_k must be a non-negative int, got True", max_seqlen=lambda _: True)
    message = r"max_seqlen_k must be a non-negative int, got a tensor of shape \(\)"
    check(message, max_seqlen=torch.tensor)
    check(r"max_seqlen_k must be a non-negative int, got 4\.5", max_seqlen=lambda _: 4.5)
    for scale in (float("inf"), 0.0, 10**400, True, "1"):
        message = f"softmax_scale must be a finite number above 0, got {scale!r}"
        check(message, keywords={"softmax_scale": scale})
    message = r"softmax_scale must be a finite number above 0, got a tensor of shape \(\)"
    check(message, keywords={"softmax_scale": torch.tensor(0.1)})
    message = r"out must have shape \(1, 4, 32\), got \(1, 2, 32\)"
    check(message, keywords={"out": q[:, :2]})


def check_longer_maxima(call, device, head_dim=32, dtype=torch.float32):
    """``call(q, cache)`` with more than the table can name: nothing else is read or comes out."""
    cache = Cache([20, 0, 48], 16, 2, head_dim, dtype, device)
    cache.table = cache.table[:, :3].contiguous()
    q = torch.randn(3, 4, head_dim, device=device).to(dtype)
    results = []
    for longest in (48, 49, 2**31 - 1, 2**31, 2**63, 2**70, np.int32(60), np.uint64(2**63)):
        cache.max_seqlen = longest
        results.append(call(q, cache))
    for got in results[1:]:
        assert torch.equal(got, results[0])
    cache.max_seqlen = 2**63
    scaled = [call(q, cache, softmax_scale=scale) for scale in (0.25, np.float32(0.25))]
    assert torch.equal(*scaled)


def lse_of(q, lens_q, cache, scale):
    """Log-sum-exp of ``naive``'s scores, [num_heads, num_tokens], in fp64."""
    lse = torch.full((q.shape[1], len(q)), float("-inf"), dtype=torch.float64, device=q.device)
    start = 0
    for len_q, (k, _) in zip(lens_q, cache.sequences, strict=True):
        group = q.shape[1] // k.shape[1]
        for i in range(len_q):
            visible = len(k) - len_q + i + 1
            for head in range(q.shape[1]):
                keys = k[:visible, head // group].double()
                if visible > 0:
                    scores = keys @ q[start + i, head].double() * scale
                    lse[head, start + i] = scores.logsumexp(0)
        start += len_q
    return lse


def check_lse(got, q, lens_q, cache, scale):
    """The pair of an op with ``return_lse``; -inf exactly where the definition has it."""
    out, lse = got
    exact = lse_of(q, lens_q, cache, scale)
    assert lse.shape == exact.shape
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    assert (out[(lse == float("-inf")).all(dim=0)] == 0).all()


def merged(parts):
    """Pairs (out, lse) over parts of a cache, added up as their users do."""
    lse = torch.stack([lse for _, lse in parts])  # [parts, num_heads, num_tokens]
    weights = lse.softmax(dim=0).nan_to_num(0.0).transpose(1, 2)[..., None]
    outs = torch.stack([out.float() for out, _ in parts])
    return (outs * weights).sum(dim=0)


def check_shared_contents(call):
    """Each error of the contents that both references check on a CPU."""

    def check(message, **changes):
        cache = Cache([20], 16, 1, 8, torch.float32, "cpu")
        cache.__dict__.update(
            {name: change(getattr(cache, name)) for name, change in changes.items()}
        )
        with pytest.raises(ValueError, match=message):
            call(torch.randn(1, 1, 8), cache)

    def with_page(table, page):
        table[0, 1] = page
        return table

    for page in (4, -1, HUGE):
        message = rf"block_table must hold values in \[0, 4\), got {page}"
        check(message, table=lambda table, page=page: with_page(table, page))
    message = r"cache_seqlens must hold values in \[0, 20\), got 20"
    check(message, max_seqlen=lambda _: 19)
