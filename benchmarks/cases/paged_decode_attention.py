"""Attention of the decoder over its paged cache: one step of each sequence."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, Shapes

KV_TOKEN = 2 * TEXT.num_kv_heads * TEXT.head_dim * DTYPE.itemsize  # bytes, one layer
QO_TOKEN = 2 * TEXT.num_heads * TEXT.head_dim * DTYPE.itemsize


def cached(batch: int, new: int, context: int, device: torch.device) -> dict[str, Any]:
    """``batch`` sequences of ``context`` tokens, the last ``new`` of each as queries."""
    max_pages = -(-context // TEXT.page_size)
    cache = (batch * max_pages, TEXT.page_size, TEXT.num_kv_heads, TEXT.head_dim)
    queries = (batch * new, TEXT.num_heads, TEXT.head_dim)
    pages = torch.randperm(batch * max_pages, dtype=torch.int32, device=device)
    return {
        "q": torch.randn(queries, dtype=DTYPE, device=device),
        "k_cache": torch.randn(cache, dtype=DTYPE, device=device),
        "v_cache": torch.randn(cache, dtype=DTYPE, device=device),
        "block_table": pages.view(batch, max_pages),
        "cache_seqlens": torch.full((batch,), context, dtype=torch.int32, device=device),
        "max_seqlen_k": context,
    }


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: keys and values of all cached tokens and q read, out written.

    FLOP: both products.
    """
    found = []
    for name, step in shapes.decode.items():
        tokens = step.batch * step.context
        num_bytes = tokens * KV_TOKEN + step.batch * QO_TOKEN
        flops = 4 * tokens * TEXT.num_heads * TEXT.head_dim
        arguments = partial(cached, step.batch, 1, step.context)
        found.append(Case("paged_decode_attention", name, arguments, num_bytes, flops))
    return found
