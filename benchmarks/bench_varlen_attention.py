"""Packed attention at head_dim 72: SDPA, PyTorch's varlen, FlashInfer, FlashAttention 2 to 4."""

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

_MAX_SCORES = 2**33  # bytes


def _segments(x, cu_seqlens, longest):
    """[batch, heads, length, head_dim], without a copy, of segments that are all equally long."""
    batch = cu_seqlens.shape[0] - 1
    if batch * longest != x.shape[0]:
        raise NotImplementedError("segments of different lengths")
    return x.unflatten(0, (batch, longest)).transpose(1, 2)


def sdpa_segments(q, k, v, cu_seqlens_q, max_seqlen_q, **_):
    q, k, v = (_segments(x, cu_seqlens_q, max_seqlen_q) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def eager(q, k, v, cu_seqlens_q, max_seqlen_q, **_):
    q, k, v = (_segments(x, cu_seqlens_q, max_seqlen_q) for x in (q, k, v))
    if q.shape[:3].numel() * k.shape[2] * q.element_size() > _MAX_SCORES:
        raise NotImplementedError(f"scores would take more than {_MAX_SCORES >> 30} GiB")
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(0, 1)


def flash_attention(module):
    """`flash_attn_varlen_func` under the same name in FlashAttention 2, 3 and 4."""
    function = module.flash_attn_varlen_func

    def run(q, k, v, **lengths):
        return first(function(q, k, v, **accepted(function, lengths)))

    return run


def flashinfer(module):  # noqa: ARG001 - the plan holds what runs
    return lambda q, k, v, plan, **_: plan().run(q, k, v)


def prepare(inputs):
    def plan(module, workspace):
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        q, starts = inputs["q"], inputs["cu_seqlens_q"]
        heads, head_dim = q.shape[1:]
        wrapper.plan(starts, starts, heads, heads, head_dim, q_data_type=q.dtype)
        return wrapper

    return {"plan": flashinfer_plan("flashinfer.prefill", plan)}


@pytest.mark.parametrize("case", cases_of("varlen_attention"), ids=str)
def bench_varlen_attention(measure, case):
    varlen = torch_varlen(causal=False)
    measure(
        case,
        plain(eager, compiled=False)
        | sdpa(sdpa_segments)
        | {
            "torch varlen": gpu_library("torch.nn.attention.varlen", varlen),
            "flashinfer": gpu_library("flashinfer.prefill", flashinfer),
            "flash-attn 2": gpu_library("flash_attn", flash_attention),
            "flash-attn 3": gpu_library("flash_attn_interface", flash_attention),
            "flash-attn 4": gpu_library("flash_attn.cute", flash_attention),
        },
        prepare=prepare,
    )
