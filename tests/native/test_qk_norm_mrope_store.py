"""The CUDA kernel of qk_norm_mrope_store, run by g++, against the definition."""

import pytest
import torch

import keye_kernels as kk

pytestmark = pytest.mark.usefixtures("native", "num_sms")

# One multiprocessor: a warp has all heads of a token. 132: a warp has but a few.
many_and_few = pytest.mark.parametrize("num_sms", [1, 132], ids=["many", "few"], indirect=True)


def store_both(tokens, heads, kv_heads, section, dtype, far=False):
    """q and the two caches from the kernel, then from the definition."""
    head_dim, page_size = 2 * sum(section), 16
    pages = tokens // page_size + 2
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).mul_(2).to(dtype)
    weights = [torch.rand(head_dim).add_(0.5).to(dtype) for _ in range(2)]
    positions = torch.randint(0, 100_000 if far else 50, (3, tokens))
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[tokens // 2] = -1
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "mrope_section": section}
    options |= {"theta": 8e6, "eps": 1e-6}
    results = []
    caches = torch.randn(2, pages, page_size, kv_heads, head_dim).to(dtype)
    for store in (kk.qk_norm_mrope_store, kk.reference.qk_norm_mrope_store):
        k, v = caches.clone()
        q = store(qkv, *weights, positions, k, v, slots, **options)
        results.append((q, k, v))
    return results


CASES = {
    # tokens, heads, kv_heads, section, dtype
    "keye": (3, 32, 8, [16, 24, 24], torch.bfloat16),
    "half": (2, 6, 2, [16, 24, 24], torch.float16),
    "odd heads": (5, 5, 5, [8, 12, 12], torch.bfloat16),
    "idle lanes": (4, 3, 1, [8, 16, 16], torch.bfloat16),
}


@many_and_few
@pytest.mark.parametrize("case", CASES)
def test_store_is_the_definition(case):
    got, expected = store_both(*CASES[case])
    dtype = CASES[case][-1]
    for x, y, same in zip(got, expected, (False, False, True), strict=True):
        if same:
            assert torch.equal(x, y)
        else:
            # The order of a sum, and the last bit of a cosine, may turn a rounding.
            assert (x == y).double().mean() > 0.999
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=1e-6)
