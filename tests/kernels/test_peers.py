"""Other libraries' attention behind our contract, with stand-ins that have their signatures."""

# ruff: noqa: ARG001

import sys
import types

import pytest
import torch

from keye_kernels import _backends, _peers, reference
from keye_kernels._tune.cases import all_cases
from keye_kernels._tune.trial import Trial

VARLEN = [c for c in all_cases("cpu") if c.op == "varlen_attention" and not c.timed]
DECODE = [c for c in all_cases("cpu") if c.op == "paged_decode_attention" and not c.timed]


def attend(q, k, v, starts_q, starts_k, scale, causal):
    longest = q.shape[0], k.shape[0]
    return reference.varlen_attention(
        q, k, v, starts_q, starts_k, *longest, softmax_scale=scale, causal=causal
    )


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False,
):  # fmt: skip
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None,
):  # fmt: skip
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None


def flash_attn_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    page_table=None, softmax_scale=None, causal=False,
):  # fmt: skip
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return attend(query, key, value, cu_seq_q, cu_seq_k, None, is_causal)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = {(-1, -1): False, (-1, 0): True}[window_size]
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, causal)


def kvcache_2(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None,
              causal=False, block_table=None):  # fmt: skip
    assert causal
    return reference.paged_decode_attention(
        q[:, 0], k_cache, v_cache, block_table, cache_seqlens, softmax_scale=softmax_scale,
        max_seqlen_k=int(cache_seqlens.max()),
    )[:, None]  # fmt: skip


def kvcache_3(q, k_cache, v_cache, cache_seqlens=None, page_table=None, softmax_scale=None,
              causal=False):  # fmt: skip
    return kvcache_2(
        q, k_cache, v_cache, None, None, cache_seqlens, softmax_scale, causal, page_table
    )


@pytest.fixture
def installed(monkeypatch):
    """Puts a function into a module that can be imported."""

    def install(module, name, function):
        _peers._imported.cache_clear()
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)

    yield install
    _peers._imported.cache_clear()


def check(op, candidate, case):
    with torch.inference_mode():
        return Trial(op, candidate, "cpu", torch.bfloat16, 0).check(case)[:2]


@pytest.mark.parametrize("case", VARLEN, ids=str)
@pytest.mark.parametrize(
    ("candidate", "module", "name", "function"),
    [
        ("flash_attn_2", "flash_attn", "flash_attn_varlen_func", flash_attn_2),
        ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func", flash_attn_3),
        ("flash_attn_4", "flash_attn.cute", "flash_attn_varlen_func", flash_attn_4),
        ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_attn),
        ("torch_varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_attn_2_10),
    ],
)
def test_varlen_attention_of_libraries(case, candidate, module, name, function, installed):
    if candidate == "flash_attn_4":
        sys.modules.setdefault("flash_attn", types.ModuleType("flash_attn"))
    installed(module, name, function)
    status, reason = check("varlen_attention", candidate, case)
    if case.name.endswith("lse"):
        assert (status, reason) == ("refused", "the log-sum-exp is not asked of it")
    elif function is varlen_attn_2_10 and "(2, 2," not in case.name:
        assert (status, reason) == ("refused", "query heads must not share key/value heads")
    else:
        assert (status, reason) == ("right", "")


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_of_libraries(case, installed):
    installed("flash_attn_interface", "flash_attn_with_kvcache", kvcache_3)
    status, reason = check("paged_decode_attention", "flash_attn_3", case)
    lse = case.name.endswith("lse")
    assert status == ("refused" if lse else "right"), reason
    installed("flash_attn", "flash_attn_with_kvcache", kvcache_2)
    refused = "page_size must be a multiple of 256, got 64"
    refused = "the log-sum-exp is not asked of it" if lse else refused
    assert check("paged_decode_attention", "flash_attn_2", case) == ("refused", refused)


def test_flash_attention_2_reads_pages_of_256(installed):
    installed("flash_attn", "flash_attn_with_kvcache", kvcache_2)
    cache, q = torch.randn(3, 256, 2, 64, dtype=torch.bfloat16), torch.randn(2, 4, 64).bfloat16()
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    lengths, out = torch.tensor([300, 5], dtype=torch.int32), torch.empty_like(q)
    args = (q, cache, cache, table, lengths, 0.1, 300, out, None)
    assert _backends.run_candidate("paged_decode_attention", "flash_attn_2", args) is None
    wanted = reference.paged_decode_attention(
        q, cache, cache, table, lengths, softmax_scale=0.1, max_seqlen_k=300
    )
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("case", VARLEN, ids=str)
@pytest.mark.parametrize("candidate", ["sdpa", "math"])
def test_scaled_dot_product_attention(case, candidate):
    status, reason = check("varlen_attention", candidate, case)
    refused = {
        "lse": "the log-sum-exp is not asked of it",
        "[(0, 0), (65": "sequences must be equally long",
        "[(3, 70)": "sequences must be equally long",
        "[(5, 3)": "sequences must be equally long",
    }
    wanted = [why for what, why in refused.items() if what in case.name]
    assert status == ("refused" if wanted else "right"), reason
    assert not wanted or reason in wanted


def test_causal_needs_as_many_queries_as_keys_in_sdpa():
    q, k = torch.randn(4, 2, 8).bfloat16(), torch.randn(6, 2, 8).bfloat16()
    starts = torch.tensor([0, 4]).int(), torch.tensor([0, 6]).int()
    args = (q, k, k, *starts, 4, 6, 1.0, True, q.clone(), None, None, 0)
    for candidate in ("sdpa", "cudnn"):
        reason = _backends.run_candidate("varlen_attention", candidate, args)
        assert reason == "causal needs as many queries as keys"
    reason = _backends.run_candidate("varlen_attention", "cudnn", (q.float(), *args[1:]))
    assert reason.startswith("causal needs") or reason.startswith("dtype must be torch.bfloat16")


def test_a_library_that_is_not_there_or_broken_is_absent(installed, monkeypatch):
    _peers._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    why_not = _backends._registry["varlen_attention"]["flash_attn_3"].why_not
    assert "flash_attn_interface cannot be imported: ModuleNotFoundError" in why_not()
    installed("flash_attn_interface", "something_else", None)
    assert "flash_attn_interface cannot be imported: AttributeError" in why_not()


def test_a_scale_that_a_library_cannot_take_is_refused(installed):
    installed("torch.nn.attention.varlen", "varlen_attn", varlen_attn_2_10)
    q, starts = torch.randn(4, 2, 64).bfloat16(), torch.tensor([0, 4]).int()
    args = (q, q, q, starts, starts, 4, 4, 0.5, False, q.clone(), None, None, 0)
    reason = _backends.run_candidate("varlen_attention", "torch_varlen", args)
    assert reason == "softmax_scale must be 0.125, got 0.5"
