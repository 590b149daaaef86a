"""Not collected by itself: `test_sanitizer.py` runs it and wants AddressSanitizer to complain."""

import torch

import keye_kernels as kk


def test_a_page_that_the_cache_does_not_have(native):  # noqa: ARG001
    cache = torch.zeros(2, 1, 16, 1, 64).bfloat16()
    table = torch.ones(1, 1, dtype=torch.int32)
    lengths = torch.full((1,), 16, dtype=torch.int32)
    q = torch.zeros(1, 1, 64).bfloat16()
    kk.paged_decode_attention(q, *cache.clone(), table, lengths, max_seqlen_k=16)
