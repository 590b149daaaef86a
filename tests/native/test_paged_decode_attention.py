"""The CUDA kernel of paged_decode_attention, run by g++, with everything unused poisoned."""

import pytest
import torch

import keye_kernels as kk
from tests.compare import assert_close
from tests.kernels.paged import Cache, naive

pytestmark = pytest.mark.usefixtures("native", "num_sms")


def decode(q, cache, **keywords):
    return kk.paged_decode_attention(
        q, cache.k, cache.v, cache.table, cache.lengths, max_seqlen_k=cache.max_seqlen, **keywords
    )


CASES = {
    # cached tokens, page_size, heads, kv_heads, head_dim, dtype
    "one token": ([1], 16, 4, 1, 64, torch.float16),
    "page edges": ([15, 16, 17, 63, 65], 16, 2, 1, 64, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_decode_matches_naive(case):
    lengths, page_size, heads, kv_heads, head_dim, dtype = CASES[case]
    cache = Cache(lengths, page_size, kv_heads, head_dim, dtype, "cpu")
    q = torch.randn(len(lengths), heads, head_dim).mul_(1.5).to(dtype)
    ones, scale = [1] * len(lengths), head_dim**-0.5
    got = decode(q, cache)
    plain = naive(q, ones, cache, scale, dtype)
    assert_close(got, plain, naive(q, ones, cache, scale, torch.float64))
