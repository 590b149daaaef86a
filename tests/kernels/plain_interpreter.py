"""Every op's Triton kernels under Triton's interpreter as it is, against the definition.

`python -m tests.kernels.plain_interpreter`, with TRITON_INTERPRET=1 set, prints one line of JSON:
case and dtype to what is wrong, "" if nothing is. A process of its own, for the repairs of
`testing/triton_interpreter.py` last as long as one.
"""

import json

import torch

import keye_kernels as kk
from keye_kernels import _backends
from tests.kernels.test_registration import CASES, int32, op_name, outcome

DEVICE = torch.device("cpu")
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def sample_one_way(top_k, top_p):
    logits = torch.randn(2, 300)
    ints, halves = torch.tensor([1, 2]), torch.full((2,), 0.5)
    arguments = [logits, halves, torch.full_like(ints, top_k), halves * 2 * top_p, ints, ints]
    return arguments, {}


def decode_in_pieces(_):
    """As many pieces as there are tiles, and pages that hold whole tiles."""
    caches = [torch.randn(5, 64, 1, 16) for _ in "kv"]
    table, lengths = int32(DEVICE, 2, 0, 3, 1).view(2, 2), int32(DEVICE, 128, 0)
    return [torch.randn(2, 2, 16), *caches, table, lengths], {"max_seqlen_k": 200}


def prefill_of_whole_pages(_):
    caches = [torch.randn(5, 64, 1, 72) for _ in "kv"]
    table, lengths = int32(DEVICE, 2, 0, 3, 1).view(2, 2), int32(DEVICE, 128, 70)
    starts = int32(DEVICE, 0, 3, 73)
    return [torch.randn(73, 2, 72), *caches, table, starts, lengths, 70, 128], {}


def merge_patches_of_both_kinds(device):
    args, keywords = CASES["merge_patches"](device)
    args[1:3] = torch.randn(2, 64)
    return args, keywords | {"norm_first": False}


def without_slots(device):
    args, keywords = CASES["qk_norm_mrope_store"](device)
    args[-1] = torch.full_like(args[-1], -1)
    return args, keywords


EXTRA = {
    "sample_top_k": lambda _: sample_one_way(5, 1.0),
    "sample_top_p": lambda _: sample_one_way(0, 0.7),
    "sample_all": lambda _: sample_one_way(0, 1.0),
    "paged_decode_attention_in_pieces": decode_in_pieces,
    "paged_prefill_attention_of_whole_pages": prefill_of_whole_pages,
    "merge_patches_merge_first": merge_patches_of_both_kinds,
    "qk_norm_mrope_store_without_slots": without_slots,
}


def in_dtype(value, dtype):
    """Floating tensors in ``dtype``; tuples and dicts by element."""
    if isinstance(value, dict):
        return {name: in_dtype(one, dtype) for name, one in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(in_dtype(one, dtype) for one in value)
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def fault(case, make, dtype):
    torch.manual_seed(0)
    args, keywords = make(DEVICE)
    if case.startswith("sample"):  # its parameters are fp32 whatever the logits are
        args[0] = args[0].to(dtype)
    else:
        args, keywords = in_dtype(args, dtype), in_dtype(keywords, dtype)
    public = getattr(kk, op_name(case))
    with kk.use_backend("reference"):
        expected = outcome(public, args, keywords)
    try:
        with kk.use_backend("triton"):
            results = outcome(public, args, keywords)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, **TOLERANCES[dtype])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main():
    torch.set_num_threads(1)
    cases = {
        name: make
        for name, make in (CASES | EXTRA).items()
        if "triton" in _backends._registry[op_name(name)]
    }
    found = {
        f"{name}, {dtype}": fault(name, make, dtype)
        for name, make in cases.items()
        for dtype in TOLERANCES
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
