"""The CUDA kernel of qk_norm_mrope_store, run by g++, against the definition."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.qk_norm_mrope_store import _LIMITS
from tests.memory import far_apart

pytestmark = pytest.mark.usefixtures("native", "num_sms")

# One multiprocessor: a warp has all heads of a token. 132: a warp has but a few.
many_and_few = pytest.mark.parametrize("num_sms", [1, 132], ids=["many", "few"], indirect=True)
KEYE = [16, 24, 24]
PAGE = 16


def make(tokens, heads, kv_heads, section, dtype, *, high=50):
    """Arguments of the op. The last token is not stored."""
    head_dim, pages = 2 * sum(section), tokens // PAGE + 2
    slots = torch.randperm(pages * PAGE)[:tokens]
    slots[-1] = -1
    caches = torch.full((2, pages, PAGE, kv_heads, head_dim), float("nan")).to(dtype)
    return {
        "qkv": torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).mul_(2).to(dtype),
        "q_weight": torch.rand(head_dim).add_(0.5).to(dtype),
        "k_weight": torch.rand(head_dim).add_(0.5).to(dtype),
        "positions": torch.randint(0, high, (3, tokens)),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slot_mapping": slots,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "mrope_section": section,
        "theta": 8e6,
        "eps": 1e-6,
    }


def both(arguments):
    """(q, k_cache, v_cache) from the kernel, then from the definition."""
    results = []
    for store in (kk.qk_norm_mrope_store, kk.reference.qk_norm_mrope_store):
        caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        results.append((store(**arguments | caches), *caches.values()))
    return results


def assert_same(arguments):
    got, expected = both(arguments)
    unit = torch.finfo(got[0].dtype).eps
    for x, y in zip(got[:2], expected[:2], strict=True):
        # The order of a sum, and the last bit of a cosine, may turn a rounding.
        assert ((x == y) | (x.isnan() & y.isnan())).double().mean() > 0.998
        torch.testing.assert_close(x, y, rtol=2 * unit, atol=2 * unit, equal_nan=True)
    assert torch.equal(got[2].view(torch.int16), expected[2].view(torch.int16))


CASES = {
    # tokens, heads, kv_heads, section, dtype
    "keye": (3, 32, 8, KEYE, torch.bfloat16),
    "half": (2, 6, 2, KEYE, torch.float16),
    "odd heads": (5, 5, 5, [8, 12, 12], torch.bfloat16),
    "idle lanes": (4, 3, 1, [8, 16, 16], torch.bfloat16),
    "sections within 16 bytes": (3, 4, 2, [5, 20, 7], torch.float16),
}


@many_and_few
@pytest.mark.parametrize("case", CASES)
def test_store_is_the_definition(case):
    assert_same(make(*CASES[case]))


def test_store_far_positions():
    assert_same(make(6, 2, 1, KEYE, torch.bfloat16, high=131072))


def test_store_copies_v_bit_by_bit():
    arguments = make(2, 2, 1, KEYE, torch.bfloat16)
    arguments["qkv"][0, -128:] = torch.tensor([float("nan"), float("-inf"), -0.0, 1.0]).repeat(32)
    got, _ = both(arguments)
    stored = got[2].flatten(0, 1)[arguments["slot_mapping"][0]].flatten()
    assert torch.equal(stored.view(torch.int16), arguments["qkv"][0, -128:].view(torch.int16))
    assert got[0].isfinite().all()


@many_and_few
def test_store_strided_inputs_and_out():
    arguments = make(4, 6, 2, KEYE, torch.bfloat16)
    q, k, v = both(arguments)[0]
    wide = torch.randn(4, arguments["qkv"].shape[1] + 32).bfloat16()
    wide[:, 16:-16] = arguments["qkv"]
    positions = torch.zeros(3, 9, dtype=torch.int64)
    positions[:, 2:6] = arguments["positions"]
    together = torch.full((2, *arguments["k_cache"].shape), float("nan")).bfloat16()
    together = together.transpose(0, 1).contiguous()
    target = torch.full((4, 8, 128), 7.0).bfloat16()
    changed = {"qkv": wide[:, 16:-16], "positions": positions[:, 2:6], "out": target[:, 1:-1]}
    changed |= {"k_cache": together[:, 0], "v_cache": together[:, 1]}
    got = kk.qk_norm_mrope_store(**arguments | changed)
    for x, y in ((got, q), (together[:, 0], k), (together[:, 1], v)):
        assert torch.equal(x.contiguous().view(torch.int16), y.view(torch.int16))
    assert (target[:, [0, -1]] == 7).all()


def test_store_offsets_past_2_to_the_31():
    arguments = make(3, 2, 1, KEYE, torch.float16)
    arguments["slot_mapping"] = torch.tensor([2 * PAGE + 3, 0, 3 * PAGE - 1])
    near = torch.zeros(3, PAGE, 1, 128).half()
    arguments |= {"k_cache": near, "v_cache": near}
    expected = both(arguments)[0]
    far = {name: far_apart(near.shape, near.dtype, near.device) for name in ("k_cache", "v_cache")}
    qkv = far_apart(arguments["qkv"].shape, near.dtype, near.device)
    out = far_apart(expected[0].shape, near.dtype, near.device)
    kk.qk_norm_mrope_store(**arguments | far | {"qkv": qkv.copy_(arguments["qkv"]), "out": out})
    assert torch.equal(out, expected[0])
    slots = arguments["slot_mapping"]
    for cache, want in zip(far.values(), expected[1:], strict=True):
        assert torch.equal(cache.flatten(0, 1)[slots], want.flatten(0, 1)[slots])


def test_store_refuses_what_it_has_no_kernel_for():
    def check(message, arguments):
        with pytest.raises(NotImplementedError, match=message):
            kk.qk_norm_mrope_store(**arguments)

    message = "dtype must be torch.bfloat16 or torch.float16, got torch.float32"
    check(message, make(1, 1, 1, KEYE, torch.float32))
    check("head_dim must be 64, 80 or 128, got 72", make(1, 1, 1, [12, 12, 12], torch.float16))
    arguments = make(2, 1, 1, KEYE, torch.float16)
    arguments["qkv"] = torch.zeros(2, 388).half()[:, 4:]
    check("the rows of qkv must begin at multiples of 16 bytes, got address 0x", arguments)


def test_head_dims_are_those_of_the_extension(native):
    assert _LIMITS.head_dims == native.module.qk_norm_mrope_store_head_dims
