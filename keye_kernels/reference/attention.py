"""Definitions of attention: over packed sequences, and over a paged key/value cache."""

import torch
import torch.nn.functional as F

from keye_kernels._checks import check_cu_seqlens, check_range
from keye_kernels.reference.layers import Pair

_MASKED_ROWS = 1024  # query rows per attention mask, so that a mask stays below 1024 x num_keys
_LSE_ROWS = 512  # query rows per block of explicit scores


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
) -> None:
    """Attention of equally long sequences, written to ``out``.

    q and out [batch_size, len_q, num_heads, head_dim], k and v [batch_size, len_k, num_kv_heads,
    head_dim]. Uses masks only where causal meets len_q != len_k: SDPA is slower with one.
    """
    q, k, v, out = (tensor.transpose(1, 2) for tensor in (q, k, v, out))
    len_q, len_k = q.shape[2], k.shape[2]
    blind = max(len_q - len_k, 0) if causal or len_k == 0 else 0  # queries that see no key
    out[:, :, :blind] = 0
    q, out = q[:, :, blind:], out[:, :, blind:]
    len_q -= blind
    if len_q == 0:
        return

    def attend(rows: slice, keys: int, **mask: object) -> None:
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, :keys],
            v[:, :, :keys],
            scale=softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
            **mask,
        )

    if not causal or len_q == 1:  # the last query sees all
        attend(slice(None), len_k)
    elif len_q == len_k:
        attend(slice(None), len_k, is_causal=True)
    else:
        cached = len_k - len_q  # keys that every query sees
        for start in range(0, len_q, _MASKED_ROWS):
            stop = min(start + _MASKED_ROWS, len_q)
            mask = torch.ones(stop - start, cached + stop, dtype=torch.bool, device=q.device)
            attend(slice(start, stop), cached + stop, attn_mask=mask.tril_(cached + start))


def _log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool, lse: torch.Tensor
) -> None:
    """Write lse [num_heads, len_q] of one sequence; q and k packed, heads before head_dim."""
    len_q, len_k = q.shape[0], k.shape[0]
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).permute(1, 2, 0)
    for start in range(0, len_q, _LSE_ROWS):
        rows = q[start : start + _LSE_ROWS].float().transpose(0, 1)
        scores = rows @ k * softmax_scale  # [num_heads, rows, len_k]
        if causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            visible.tril_(len_k - len_q + start)
            scores.masked_fill_(~visible, float("-inf"))
        lse[:, start : start + _LSE_ROWS] = scores.logsumexp(dim=2)


def varlen_attention_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: torch.Tensor | None = None,  # a schedule is for kernels: it is checked, not used
    block_m: int = 0,
) -> None:
    """``varlen_attention`` into tensors of the caller's, with the arguments of the op's schema."""
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], max_seqlen_k)
    batch_size = len(cu_q) - 1
    lengths = [(cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]) for i in range(batch_size)]
    if tiles is not None:
        planned = torch.bincount(tiles[:, 0], minlength=batch_size).tolist()
        needed = [-(-len_q // block_m) for len_q, _ in lengths]
        if planned != needed:
            raise ValueError(
                f"schedule must have {needed} tiles for the lengths in cu_seqlens_q, got {planned}"
            )
    first = 0
    while first < batch_size:
        # Neighbours of the same length share one call: frames of a video come by the dozen.
        last = first + 1
        while last < batch_size and lengths[last] == lengths[first]:
            last += 1
        queries, keys = slice(cu_q[first], cu_q[last]), slice(cu_k[first], cu_k[last])
        shape_q, shape_k = ((last - first, length) for length in lengths[first])
        _attend(
            q[queries].unflatten(0, shape_q),
            k[keys].unflatten(0, shape_k),
            v[keys].unflatten(0, shape_k),
            softmax_scale,
            causal,
            out[queries].unflatten(0, shape_q),
        )
        first = last
    if lse is not None:
        for i in range(batch_size):
            queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            _log_sum_exp(q[queries], k[keys], softmax_scale, causal, lse[:, queries])


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    schedule: object = None,  # noqa: ARG001 - for kernels
) -> torch.Tensor | Pair:
    """softmax(q k^T * softmax_scale) v per sequence; lse from explicit fp32 scores."""
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    varlen_attention_into(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, out, lse
    )
    return out if lse is None else (out, lse)


def _cached(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: list[int],
    max_seqlen_k: int,
) -> list[Pair]:
    """k and v of each sequence, [cache_seqlen, num_kv_heads, head_dim] each.

    All entries in use are checked before the first page is read. Neighbouring pages in order,
    which is what a fresh cache hands out, are viewed where they lie; others are copied together,
    by index_select, which takes a fifth of the time of indexing by a list.
    """
    num_pages, page_size = k_cache.shape[:2]
    longest = min(max_seqlen_k, block_table.shape[1] * page_size)
    check_range("cache_seqlens", cache_seqlens, 0, longest + 1)
    tables = [block_table[i, : -(-length // page_size)] for i, length in enumerate(cache_seqlens)]
    pages = [table.tolist() for table in tables]
    for listed in pages:
        check_range("block_table", listed, 0, num_pages)
    cached = []
    for table, listed, length in zip(tables, pages, cache_seqlens, strict=True):
        start, count = (listed[0] if listed else 0), len(listed)
        if listed == list(range(start, start + count)):
            k, v = k_cache[start : start + count], v_cache[start : start + count]
        else:
            k, v = k_cache.index_select(0, table), v_cache.index_select(0, table)
        cached.append((k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]))
    return cached


def paged_prefill_attention_into(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """``paged_prefill_attention`` into tensors of the caller's, in the order of the op's schema."""
    cu_q, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    for i, length in enumerate(lengths):
        if length < cu_q[i + 1] - cu_q[i]:
            raise ValueError(
                f"cache_seqlens must count the {cu_q[i + 1] - cu_q[i]} new tokens of sequence {i}, "
                f"got {length}"
            )
    cached = _cached(k_cache, v_cache, block_table, lengths, max_seqlen_k)
    for i, (k, v) in enumerate(cached):
        rows = slice(cu_q[i], cu_q[i + 1])
        _attend(q[None, rows], k[None], v[None], softmax_scale, True, out[None, rows])
        if lse is not None:
            _log_sum_exp(q[rows], k, softmax_scale, True, lse[:, rows])


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | Pair:
    """Causal attention of each sequence's queries over its pages; lse from explicit fp32 scores."""
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = (cu_seqlens_q, cache_seqlens, max_seqlen_q, max_seqlen_k)
    paged_prefill_attention_into(q, k_cache, v_cache, block_table, *lengths, scale, out, lse)
    return out if lse is None else (out, lse)


def paged_decode_attention_into(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    max_seqlen_k: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """``paged_decode_attention`` into tensors of the caller's, in the order of the op's schema."""
    cached = _cached(k_cache, v_cache, block_table, cache_seqlens.tolist(), max_seqlen_k)
    # The query heads of one key/value head act as its queries, so each key is read once.
    queries, results = (x.unflatten(1, (k_cache.shape[2], -1)) for x in (q, out))
    for i, (k, v) in enumerate(cached):
        if lse is not None:
            _log_sum_exp(q[i : i + 1], k, softmax_scale, False, lse[:, i : i + 1])
        if k.shape[0] == 0:
            results[i] = 0
            continue
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        results[i] = F.scaled_dot_product_attention(queries[i : i + 1], k, v, scale=softmax_scale)[
            0
        ]


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    max_seqlen_k: int,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | Pair:
    """Attention of one query per sequence over its pages; lse from explicit fp32 scores."""
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = (cache_seqlens, scale, max_seqlen_k)
    paged_decode_attention_into(q, k_cache, v_cache, block_table, *lengths, out, lse)
    return out if lse is None else (out, lse)
