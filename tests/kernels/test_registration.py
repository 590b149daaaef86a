"""Every op: opcheck, torch.compile in one graph, the public list, and a direct reference call."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keye_kernels as kk


def randn(device, *shape):
    return torch.randn(shape, device=device)


def int32(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def norm(device):
    return [randn(device, 4, 16), randn(device, 16)]


def attention(device):
    cu = int32(device, 0, 3, 3, 8)
    return [*(randn(device, 8, 2, 16) for _ in "qkv"), cu, cu, 5, 5]


def paged(device):
    caches = [randn(device, 4, 16, 1, 16) for _ in "kv"]
    return caches, int32(device, 2, 0, 3, 1).view(2, 2), int32(device, 18, 7)


def positions(device, tokens):
    return torch.arange(3 * tokens, device=device).view(3, tokens)


# Per case: arguments, keyword arguments. A case is named after its op, plus a suffix.
def rms_norm(device):
    return [*norm(device), 1e-6], {}


def rms_norm_residual(device):
    return [*norm(device), 1e-6], {"residual": randn(device, 4, 16)}


def layer_norm(device):
    return [*norm(device), randn(device, 16), 1e-6], {}


def layer_norm_residual(device):
    return [*norm(device), randn(device, 16), 1e-6], {"residual": randn(device, 4, 16)}


def padded(device):
    """[2, 3, 16] in the corner of a larger batch: no single distance from row to row."""
    return randn(device, 2, 5, 48)[:, :3, :16]


def rms_norm_batch(device):
    return [padded(device), randn(device, 16), 1e-6], {"residual": padded(device)}


def layer_norm_batch(device):
    return [padded(device), randn(device, 16), randn(device, 16), 1e-6], {}


def silu_mul_batch(device):
    return [padded(device)], {}


def gelu_batch(device):
    return [padded(device).transpose(0, 1)], {"approximate": "none", "bias": randn(device, 16)}


def silu_mul(device):
    return [randn(device, 4, 16)], {}


def gelu(device):
    return [randn(device, 4, 16)], {"approximate": "tanh"}


def gelu_bias(device):
    return [randn(device, 4, 16)], {"approximate": "none", "bias": randn(device, 16)}


def linear(device):
    return [randn(device, 3, 16), randn(device, 8, 16)], {}


def linear_fused(device):
    keywords = {"norm_weight": randn(device, 16), "eps": 1e-6, "swiglu": True}
    return [randn(device, 3, 16), randn(device, 8, 16)], keywords | {"bias": randn(device, 8)}


def patch_embed(device):
    pixels = torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8, device=device)
    weights = [randn(device, 8, 3, 2, 2), randn(device, 8), randn(device, 9, 8)]
    return [pixels, *weights, [(1, 2, 3)]], {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def rope_2d_(device):
    q, k, _ = randn(device, 5, 3, 2, 8).unbind(1)
    return [q, k, positions(device, 5).T[:, :2].contiguous()], {"theta": 100.0}


def mrope_(device):
    keywords = {"mrope_section": [2, 1, 1], "theta": 1e4, "interleaved": True}
    return [randn(device, 5, 2, 8), randn(device, 5, 1, 8), positions(device, 5)], keywords


def qk_norm_mrope_store(device):
    caches, _, _ = paged(device)
    slots = torch.tensor([3, -1, 40], device=device)
    weights = [randn(device, 16) for _ in "qk"]
    keywords = {"num_heads": 2, "num_kv_heads": 1, "mrope_section": [2, 3, 3]}
    keywords |= {"theta": 1e6, "eps": 1e-6}
    return [randn(device, 3, 64), *weights, positions(device, 3), *caches, slots], keywords


def varlen_attention(device):
    return attention(device), {"causal": True}


def varlen_attention_lse(device):
    return attention(device), {"return_lse": True, "softmax_scale": 0.3}


def varlen_attention_scheduled(device):
    return attention(device), {
        "schedule": kk.attention_schedule([3, 0, 5], num_heads=2, device=device)
    }


def merge_patches(device):
    args = [randn(device, 8, 16), randn(device, 16), randn(device, 16), 1e-5, [(1, 2, 4)]]
    return args, {"norm_first": True}


def merge_patches_residual(device):
    args, keywords = merge_patches(device)
    patch_norm = (randn(device, 16), randn(device, 16), 1e-6)
    return args, keywords | {"residual": randn(device, 8, 16), "patch_norm": patch_norm}


def paged_prefill_attention(device):
    caches, table, lengths = paged(device)
    return [randn(device, 6, 2, 16), *caches, table, int32(device, 0, 2, 6), lengths, 4, 18], {}


def paged_prefill_attention_lse(device):
    args, keywords = paged_prefill_attention(device)
    return args, keywords | {"return_lse": True}


def paged_decode_attention_lse(device):
    args, keywords = paged_decode_attention(device)
    return args, keywords | {"return_lse": True, "softmax_scale": 0.3}


def paged_decode_attention(device):
    caches, table, lengths = paged(device)
    return [randn(device, 2, 2, 16), *caches, table, lengths], {"max_seqlen_k": 18}


def sample(device):
    logits = randn(device, 2, 30)
    top_k, seed = torch.tensor([0, 5], device=device), torch.tensor([1, 2], device=device)
    temperature, top_p = torch.tensor([0.0, 0.9], device=device), torch.ones(2, device=device)
    keywords = {"repetition_penalty": top_p * 1.2, "seen": logits > 0}
    return [logits, temperature, top_k, top_p, seed, seed], keywords


CASES = {
    f.__name__: f
    for f in (
        rms_norm,
        rms_norm_residual,
        layer_norm,
        rms_norm_batch,
        layer_norm_residual,
        layer_norm_batch,
        silu_mul,
        silu_mul_batch,
        gelu,
        gelu_batch,
        gelu_bias,
        linear,
        linear_fused,
        patch_embed,
        rope_2d_,
        mrope_,
        qk_norm_mrope_store,
        varlen_attention,
        varlen_attention_lse,
        varlen_attention_scheduled,
        merge_patches,
        merge_patches_residual,
        paged_prefill_attention,
        paged_prefill_attention_lse,
        paged_decode_attention,
        paged_decode_attention_lse,
        sample,
    )
}
OPS = [
    name
    for name in CASES
    if not name.endswith(("_residual", "_bias", "_fused", "_lse", "_scheduled", "_batch"))
]

by_case = pytest.mark.parametrize("case", CASES)


def op_name(case):
    return max((name for name in OPS if case.startswith(name)), key=len)


def outcome(function, args, keywords):
    """Result and every tensor argument afterwards, from copies of the arguments."""
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    result = function(*args, **keywords)
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in (*results, *args) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops, with the arguments that the public function gave them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "keye":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@by_case
def test_opcheck(case, device):
    args, keywords = CASES[case](device)
    with Recorder() as recorder:
        getattr(kk, op_name(case))(*args, **keywords)
    ((op, op_args),) = recorder.calls
    torch.library.opcheck(op, op_args)


@by_case
def test_compiles_in_one_graph(case, device):
    args, keywords = CASES[case](device)
    public = getattr(kk, op_name(case))
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    expected = outcome(public, args, keywords)
    for got, want in zip(outcome(compiled, args, keywords), expected, strict=True):
        assert torch.equal(got, want)


def test_compiles_for_any_number_of_tokens(device):
    weight = randn(device, 16)
    compiled = torch.compile(kk.rms_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 9):
        x = randn(device, num_tokens, 16)
        assert torch.equal(compiled(x, weight, 1e-6), kk.rms_norm(x, weight, 1e-6))


def test_compiles_for_any_leading_dims(device):
    weight = randn(device, 16)

    def run(x):
        y, total = kk.rms_norm(x[:, 1:], weight, 1e-6, residual=x[:, 1:])
        return kk.gelu(y, approximate="tanh"), kk.silu_mul(total), kk.layer_norm(
            x[0], weight, weight, 1e-6
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 5), (2, 7), (4, 3)):
        x = randn(device, *shape, 16)
        for got, want in zip(compiled(x), run(x), strict=True):
            assert torch.equal(got, want)


def test_longer_maxima_compile_for_any_number_of_tokens(device):
    caches, table, lengths = paged(device)
    starts = int32(device, 0, 1, 2)

    def run(q, longest):
        decoded = kk.paged_decode_attention(
            q, *caches, table, lengths, max_seqlen_k=longest, return_lse=True
        )
        return *decoded, kk.varlen_attention(q, q, q, starts, starts, longest, longest)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    q = randn(device, 2, 2, 16)
    caches = [cache.expand(-1, -1, 2, -1) for cache in caches]
    for longest in (18, 40, 10**6):
        for got, want in zip(compiled(q, longest), run(q, longest), strict=True):
            assert torch.equal(got, want)


def test_a_block_of_ops_compiles_with_inductor(device):
    """A pair as result, in-place ops on views of one buffer, out= that is an input."""
    weight, where = randn(device, 48), positions(device, 6).T[:, :2].contiguous()
    cu = int32(device, 0, 2, 6)

    def block(x):
        y, x = kk.rms_norm(x, weight, 1e-6, residual=x)
        q, k, v = y.unflatten(1, (3, 2, 8)).unbind(1)
        kk.rope_2d_(q, k, where)
        y = kk.varlen_attention(q, k, v, cu, cu, 4, 4).flatten(1)
        return kk.gelu(y, approximate="tanh", out=y), x

    x = randn(device, 6, 48)
    compiled = torch.compile(block, fullgraph=True)
    for got, want in zip(compiled(x), block(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@by_case
def test_the_reference_is_callable_under_the_same_name(case, device):
    args, keywords = CASES[case](device)
    public, reference = (getattr(m, op_name(case)) for m in (kk, kk.reference))
    assert list(inspect.signature(public).parameters) == list(
        inspect.signature(reference).parameters
    )
    expected = outcome(public, args, keywords)
    for got, want in zip(outcome(reference, args, keywords), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_public_op_is_registered_and_covered():
    others = {"__version__", "backends", "describe_extension", "use_backend", "reference"}
    others |= {"tune", "verdicts"}
    others |= {"AttentionSchedule", "attention_schedule"}
    others |= {"linear_decode"}  # the old name of linear
    assert set(kk.__all__) - others == set(kk.backends()) == set(OPS)
    for name in kk.__all__:
        assert hasattr(kk, name)
