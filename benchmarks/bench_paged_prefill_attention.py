"""Causal attention of new tokens over a paged cache: SDPA, PyTorch's varlen, the libraries."""

import pytest
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.paged import in_one_piece, libraries, page_lists, sizes
from benchmarks.providers import flashinfer_plan, sdpa


def prepare(inputs):
    def plan(module, workspace):
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        lists = (inputs["cu_seqlens_q"], *page_lists(inputs))
        wrapper.plan(*lists, *sizes(inputs), causal=True, q_data_type=inputs["q"].dtype)
        return wrapper

    return in_one_piece(inputs) | {"plan": flashinfer_plan("flashinfer.prefill", plan)}


def sdpa_prefill(q, keys, values, **_):
    if q.shape[0] != keys.shape[2]:
        raise NotImplementedError("its causal mask starts at the first key")
    q = q.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("case", cases_of("paged_prefill_attention"), ids=str)
def bench_paged_prefill_attention(measure, case):
    measure(case, sdpa(sdpa_prefill) | libraries("prefill"), prepare=prepare)
