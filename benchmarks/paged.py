"""What the benchmarks of paged attention share: other forms of the cache, and the libraries.

SDPA cannot read pages: it is given the same keys and values in one piece, which a model that uses
it keeps instead of pages. FlashInfer's plan is made once per step for all layers and is not timed.
"""

from benchmarks.providers import accepted, first, gpu_library, torch_varlen


def contiguous(cache, block_table, length):
    """[batch, num_kv_heads, length, head_dim]"""
    return cache[block_table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()


def in_one_piece(inputs):
    """``keys`` and ``values`` for SDPA."""
    table, length = inputs["block_table"], inputs["max_seqlen_k"]
    caches = {"keys": inputs["k_cache"], "values": inputs["v_cache"]}
    return {name: contiguous(cache, table, length) for name, cache in caches.items()}


def page_lists(inputs):
    """FlashInfer's form of a block table whose sequences are equally long."""
    table, length = inputs["block_table"], inputs["max_seqlen_k"]
    batch, pages = table.shape
    starts = table.new_tensor(range(0, batch * pages + 1, pages))
    last = table.new_full((batch,), (length - 1) % inputs["k_cache"].shape[1] + 1)
    return starts, table.flatten(), last


def sizes(inputs):
    """Heads, key/value heads, head_dim and page_size, as FlashInfer takes them."""
    q, cache = inputs["q"], inputs["k_cache"]
    return q.shape[1], cache.shape[2], q.shape[2], cache.shape[1]


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


def libraries(kind):
    """``kind``: "prefill" or "decode", FlashInfer's module."""
    return {
        "torch varlen": gpu_library("torch.nn.attention.varlen", paged_varlen),
        "flashinfer": gpu_library(f"flashinfer.{kind}", flashinfer),
        "flash-attn 2": gpu_library("flash_attn", flash_attention),
        "flash-attn 3": gpu_library("flash_attn_interface", flash_attention),
    }
