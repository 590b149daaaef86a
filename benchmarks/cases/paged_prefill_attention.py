"""Attention of the decoder over its paged cache: whole prompts, and the rest of a prompt."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, attention_loop_flops
from benchmarks.cases.paged_decode_attention import KV_TOKEN, QO_TOKEN, cached
from benchmarks.shapes import TEXT, Shapes


def _prefill(new: int, context: int, device: torch.device) -> dict[str, Any]:
    starts = torch.tensor([0, new], dtype=torch.int32, device=device)
    return cached(1, new, context, device) | {"cu_seqlens_q": starts, "max_seqlen_q": new}


def _small_pages(count: int, device: torch.device) -> dict[str, Any]:
    """A prompt in pages of 16 tokens."""
    arguments = _prefill(count, count, device)
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].view(-1, 16, *arguments[name].shape[2:])
    num_pages = arguments["k_cache"].shape[0]
    pages = torch.randperm(num_pages, dtype=torch.int32, device=device)
    return arguments | {"block_table": pages.view(1, num_pages)}


def cases(shapes: Shapes) -> list[Case]:
    """Bytes: keys and values of all cached tokens and q read, out written.

    FLOP: both products, of each query with the keys it sees.
    """
    found = []
    prompts = {name: (count, count) for name, count in shapes.prefill.items()}
    chunk, longest = min(shapes.prefill.values()), max(shapes.prefill.values())
    if chunk < longest:
        prompts[f"last {chunk} of {longest}"] = (chunk, longest)
        prompts[f"last 64 of {longest}"] = (64, longest)  # keys are split
    for name, (new, context) in prompts.items():
        found.append(_case(name, new, context, partial(_prefill, new, context)))
    return found


def compiled_cases() -> list[Case]:
    """Compiled, never run: a prompt so short that programs take 64 queries, in small pages."""
    return [_case("256 tokens, pages of 16", 256, 256, partial(_small_pages, 256))]


def _case(
    name: str, new: int, context: int, arguments: Callable[[torch.device], dict[str, Any]]
) -> Case:
    num_bytes = context * KV_TOKEN + new * QO_TOKEN
    pairs = new * context - new * (new - 1) // 2
    flops = 4 * pairs * TEXT.num_heads * TEXT.head_dim
    case = Case("paged_prefill_attention", name, arguments, num_bytes, flops)
    return replace(case, loop_flops=attention_loop_flops)
