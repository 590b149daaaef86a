"""Attention over a paged cache, prefill and decode.

SDPA cannot read pages: it is given the same keys and values in one piece, which a model that uses
it keeps instead of pages. FlashInfer's plan is made once per step for all layers and is not timed.
"""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import (
    accepted,
    first,
    flashinfer_plan,
    gpu_library,
    plain,
    sdpa,
    torch_varlen,
)


def _contiguous(cache, block_table, length):
    """[batch, num_kv_heads, length, head_dim]"""
    return cache[block_table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()


def _page_lists(inputs):
    """FlashInfer's form of a block table whose sequences are equally long."""
    table, length = inputs["block_table"], inputs["max_seqlen_k"]
    batch, pages = table.shape
    starts = table.new_tensor(range(0, batch * pages + 1, pages))
    last = table.new_full((batch,), (length - 1) % inputs["k_cache"].shape[1] + 1)
    return starts, table.flatten(), last


def _sizes(inputs):
    q, cache = inputs["q"], inputs["k_cache"]
    return q.shape[1], cache.shape[2], q.shape[2], cache.shape[1]


def prepare(inputs):
    def plan_decode(module, workspace):
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*_page_lists(inputs), *_sizes(inputs), q_data_type=inputs["q"].dtype)
        return wrapper

    def plan_prefill(module, workspace):
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts, pages, last = inputs["cu_seqlens_q"], *_page_lists(inputs)[1:]
        lists = (starts, _page_lists(inputs)[0], pages, last)
        wrapper.plan(*lists, *_sizes(inputs), causal=True, q_data_type=inputs["q"].dtype)
        return wrapper

    table, length = inputs["block_table"], inputs["max_seqlen_k"]
    prefill = "cu_seqlens_q" in inputs
    module, plan = ("prefill", plan_prefill) if prefill else ("decode", plan_decode)
    return {
        "keys": _contiguous(inputs["k_cache"], table, length),
        "values": _contiguous(inputs["v_cache"], table, length),
        "plan": flashinfer_plan(f"flashinfer.{module}", plan),
    }


def sdpa_decode(q, keys, values, **_):
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
    return out[:, :, 0]


def sdpa_prefill(q, keys, values, **_):
    if q.shape[0] != keys.shape[2]:
        raise NotImplementedError("its causal mask starts at the first key")
    q = q.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def gather_then_sdpa(q, k_cache, v_cache, block_table, max_seqlen_k, **_):
    """Pages copied together first, then SDPA with whatever backend it chooses."""
    keys, values = (_contiguous(x, block_table, max_seqlen_k) for x in (k_cache, v_cache))
    return sdpa_decode(q, keys, values)


def flashinfer(module):  # noqa: ARG001 - the plan holds what runs
    return lambda q, k_cache, v_cache, plan, **_: plan().run(q, (k_cache, v_cache))


def flash_attention(module):
    """`flash_attn_with_kvcache` of FlashAttention 2 (block_table) and 3 (page_table)."""
    function = module.flash_attn_with_kvcache

    def run(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q=None, **_):
        names = {"block_table": block_table, "page_table": block_table}
        pages = accepted(function, names)
        queries = q[None] if cu_seqlens_q is not None else q[:, None]  # one prompt, or one token
        out = function(queries, k_cache, v_cache, cache_seqlens=cache_seqlens, causal=True, **pages)
        return first(out).flatten(0, 1)

    return run


def paged_varlen(module):
    """PyTorch's varlen attention, from the release on in which it reads pages."""
    function = module.varlen_attn
    if not accepted(function, {"block_table": None}):
        raise NotImplementedError("varlen_attn reads no pages in this release")
    call = torch_varlen(causal=True, grouped=True)(module)

    def run(q, k_cache, v_cache, **x):
        batch = x["block_table"].shape[0]
        starts = x.get("cu_seqlens_q")
        if starts is None:
            starts = x["block_table"].new_tensor(range(batch + 1))
        pages = {"seqused_k": x["cache_seqlens"], "block_table": x["block_table"]}
        longest = x.get("max_seqlen_q", 1)
        return call(q, k_cache, v_cache, starts, None, longest, x["max_seqlen_k"], **pages)

    return run


def _libraries(kind):
    return {
        "torch varlen": gpu_library("torch.nn.attention.varlen", paged_varlen),
        "flashinfer": gpu_library(f"flashinfer.{kind}", flashinfer),
        "flash-attn 2": gpu_library("flash_attn", flash_attention),
        "flash-attn 3": gpu_library("flash_attn_interface", flash_attention),
    }


@pytest.mark.parametrize("case", cases_of("paged_decode_attention"), ids=str)
def bench_paged_decode_attention(measure, case):
    eager = plain(gather_then_sdpa, compiled=False)
    shapes = case.arguments("meta")
    tokens = shapes["block_table"].shape[0] * shapes["max_seqlen_k"]
    peers = eager | sdpa(sdpa_decode) | _libraries("decode")
    measure(case, peers, prepare=prepare, size=tokens)


@pytest.mark.parametrize("case", cases_of("paged_prefill_attention"), ids=str)
def bench_paged_prefill_attention(measure, case):
    measure(case, sdpa(sdpa_prefill) | _libraries("prefill"), prepare=prepare)
