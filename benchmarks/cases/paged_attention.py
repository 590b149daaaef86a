"""Attention of the decoder over its paged cache: prompts, the rest of a prompt, one decode step."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import TEXT, Shapes

DTYPE = torch.bfloat16
KV_TOKEN = 2 * TEXT.num_kv_heads * TEXT.head_dim * DTYPE.itemsize  # bytes, one layer
QO_TOKEN = 2 * TEXT.num_heads * TEXT.head_dim * DTYPE.itemsize


def _cached(batch: int, new: int, context: int, device: torch.device) -> dict[str, Any]:
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


def _prefill(new: int, context: int, device: torch.device) -> dict[str, Any]:
    starts = torch.tensor([0, new], dtype=torch.int32, device=device)
    return _cached(1, new, context, device) | {"cu_seqlens_q": starts, "max_seqlen_q": new}


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: keys and values of all cached tokens and q read, out written.

    FLOP: both products, of each query with the keys it sees.
    """
    found = []
    prompts = {name: (count, count) for name, count in shapes.prefill.items()}
    chunk, longest = min(shapes.prefill.values()), max(shapes.prefill.values())
    if chunk < longest:
        prompts[f"last {chunk} of {longest}"] = (chunk, longest)
    for name, (new, context) in prompts.items():
        num_bytes = context * KV_TOKEN + new * QO_TOKEN
        pairs = new * context - new * (new - 1) // 2
        flops = 4 * pairs * TEXT.num_heads * TEXT.head_dim
        arguments = partial(_prefill, new, context)
        found.append(Case("paged_prefill_attention", name, arguments, num_bytes, flops))
    for name, step in shapes.decode.items():
        tokens = step.batch * step.context
        num_bytes = tokens * KV_TOKEN + step.batch * QO_TOKEN
        flops = 4 * tokens * TEXT.num_heads * TEXT.head_dim
        arguments = partial(_cached, step.batch, 1, step.context)
        found.append(Case("paged_decode_attention", name, arguments, num_bytes, flops))
    return found
