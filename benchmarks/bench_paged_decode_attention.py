"""Attention of one new token per sequence over a paged cache: SDPA, PyTorch's varlen, libraries."""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.paged import contiguous, in_one_piece, libraries, page_lists, sizes
from benchmarks.providers import absent, flashinfer_plan, plain, sdpa

MOST_BYTES = 2**34  # of a cache that is also copied, once for all providers and once by `eager`


def prepare(inputs):
    def plan(module, workspace):
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*page_lists(inputs), *sizes(inputs), q_data_type=inputs["q"].dtype)
        return wrapper

    found = {"plan": flashinfer_plan("flashinfer.decode", plan)}
    return found | in_one_piece(inputs) if inputs["k_cache"].nbytes < MOST_BYTES // 2 else found


def sdpa_decode(q, keys, values, **_):
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
    return out[:, :, 0]


def gather_then_sdpa(q, k_cache, v_cache, block_table, max_seqlen_k, **_):
    """Pages copied together first, then SDPA with whatever backend it chooses."""
    keys, values = (contiguous(x, block_table, max_seqlen_k) for x in (k_cache, v_cache))
    return sdpa_decode(q, keys, values)


@pytest.mark.parametrize("case", cases_of("paged_decode_attention"), ids=str)
def bench_paged_decode_attention(measure, case):
    copying = plain(gather_then_sdpa, compiled=False) | sdpa(sdpa_decode)
    if case.num_bytes > MOST_BYTES:
        copying = dict.fromkeys(copying, absent("its copy of the cache does not fit beside it"))
    shapes = case.arguments("meta")
    tokens = shapes["block_table"].shape[0] * shapes["max_seqlen_k"]
    measure(case, copying | libraries("decode"), prepare=prepare, size=tokens)
