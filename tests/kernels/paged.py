"""What the tests of paged attention share: a poisoned cache, and attention one token at a time."""

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
    message = "max_seqlen_k must be at most the 64 tokens that block_table can name, got 65"
    check(message, max_seqlen=lambda _: 65)
    check(r"max_seqlen_k must be a non-negative int, got 4\.5", max_seqlen=lambda _: 4.5)
    for scale in (float("inf"), 0.0):
        message = f"softmax_scale must be a finite number above 0, got {scale}"
        check(message, keywords={"softmax_scale": scale})
    message = r"out must have shape \(1, 4, 32\), got \(1, 2, 32\)"
    check(message, keywords={"out": q[:, :2]})


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
