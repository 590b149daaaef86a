"""Rotary embeddings, alone and fused with QK-norm and the cache write.

Ours compute cos and sin inside. Peers are given tables in bf16, repeated to the full head_dim, made
before the clock starts: a model makes them once and reads them in every layer.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import cases_of
from benchmarks.providers import gpu_library, plain


def _tables(angles, dtype):
    """cos and sin of [..., head_dim / 2], repeated to head_dim."""
    angles = torch.cat((angles, angles), dim=-1)
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def _frequencies(dim, theta, device):
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def tables_2d(inputs):
    q = inputs["q"]
    frequencies = _frequencies(q.shape[-1] // 2, inputs["theta"], q.device)
    return _tables((inputs["positions"][:, :, None] * frequencies).flatten(1), q.dtype)


def tables_3d(inputs):
    """cos, sin [3, num_tokens, head_dim]; section_cos, section_sin with axes chosen."""
    tensor = inputs["q"] if "q" in inputs else inputs["qkv"]
    section = inputs["mrope_section"]
    frequencies = _frequencies(2 * sum(section), inputs["theta"], tensor.device)
    found = _tables(inputs["positions"][:, :, None] * frequencies, tensor.dtype)
    for name in ("cos", "sin"):
        parts = found[name].split((*section, *section), dim=-1)
        chosen = [part[i % 3] for i, part in enumerate(parts)]
        found[f"section_{name}"] = torch.cat(chosen, dim=-1)
    return found


def _rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def eager_rope_2d(q, k, cos, sin, **_):
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def eager_mrope(q, k, section_cos, section_sin, **_):
    return _rotate(q, section_cos, section_sin), _rotate(k, section_cos, section_sin)


def liger_rope_2d(module):
    def run(q, k, cos, sin, **_):
        heads_first = (x[None].transpose(1, 2) for x in (q, k))
        q, k = module.LigerRopeFunction.apply(*heads_first, cos[None], sin[None])
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return run


def liger_mrope(module):
    def run(q, k, cos, sin, mrope_section, **_):
        heads_first = (x[None].transpose(1, 2) for x in (q, k))
        apply = module.LigerQwen2VLMRopeFunction.apply
        q, k = apply(*heads_first, cos[:, None], sin[:, None], list(mrope_section))
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return run


def _unfused(norm, rotate):
    """Norm of q, norm of k, rope, cache write: what one calls without a fused kernel."""

    def run(qkv, q_weight, k_weight, k_cache, v_cache, slot_mapping, num_heads, num_kv_heads, **x):
        heads = qkv.unflatten(1, (-1, q_weight.shape[0]))
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        q, k = rotate(norm(q, q_weight, x["eps"]), norm(k, k_weight, x["eps"]), **x)
        k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
        v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)
        return q, k_cache, v_cache

    return run


def eager_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, None, eps) * weight


def liger_sequence(module):
    from liger_kernel.ops import qwen2vl_mrope

    def norm(x, weight, eps):
        return module.LigerRMSNormFunction.apply(x, weight, eps)

    return _unfused(norm, liger_mrope(qwen2vl_mrope))


def flashinfer_norms(module):
    return _unfused(module.rmsnorm, eager_mrope)


def _rotated(_, inputs):
    return inputs["q"], inputs["k"]


@pytest.mark.parametrize("case", cases_of("rope_2d_"), ids=str)
def bench_rope_2d(measure, case):
    liger = gpu_library("liger_kernel.ops.rope", liger_rope_2d)
    peers = plain(eager_rope_2d) | {"liger": liger}
    measure(case, peers, outputs=_rotated, prepare=tables_2d)


@pytest.mark.parametrize("case", cases_of("mrope_"), ids=str)
def bench_mrope(measure, case):
    liger = gpu_library("liger_kernel.ops.qwen2vl_mrope", liger_mrope)
    peers = plain(eager_mrope) | {"liger": liger}
    measure(case, peers, outputs=_rotated, prepare=tables_3d)


@pytest.mark.parametrize("case", cases_of("qk_norm_mrope_store"), ids=str)
def bench_qk_norm_mrope_store(measure, case):
    peers = plain(_unfused(eager_norm, eager_mrope)) | {
        "liger, 2 norms + rope": gpu_library("liger_kernel.ops.rms_norm", liger_sequence),
        "flashinfer, 2 norms": gpu_library("flashinfer.norm", flashinfer_norms),
    }
    measure(
        case,
        peers,
        outputs=lambda q, inputs: (q, inputs["k_cache"], inputs["v_cache"]),
        prepare=tables_3d,
    )
