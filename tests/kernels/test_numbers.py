"""Numbers that ops take on the host: what Python, NumPy and peers' callers pass."""

import numpy as np
import pytest
import torch

import keye_kernels as kk
from tests.kernels import test_registration as calls

INT = "must be a non-negative int, got"
NUMBER = "must be a finite number above 0, got"
NOT_INTS = (-1, 4.0, "4", None, True, float("inf"))
NOT_NUMBERS = (0.0, -1.0, float("nan"), float("inf"), 10**400, "1", True, 1j)


def refuse(op, message, device, case=None, **changed):
    """`op` with changed arguments, by name or by position ("_6")."""
    args, keywords = calls.CASES[case or op](device)
    for name, value in changed.items():
        if name.startswith("_"):
            args[int(name[1:])] = value
        else:
            keywords[name] = value
    with pytest.raises(ValueError, match=message):
        getattr(kk, op)(*args, **keywords)


def test_maxima(device):
    for value in NOT_INTS:
        refuse("varlen_attention", f"max_seqlen_q {INT}", device, _5=value)
        refuse("varlen_attention", f"max_seqlen_k {INT}", device, _6=value)
        refuse("paged_prefill_attention", f"max_seqlen_q {INT}", device, _6=value)
        refuse("paged_prefill_attention", f"max_seqlen_k {INT}", device, _7=value)
        refuse("paged_decode_attention", f"max_seqlen_k {INT}", device, max_seqlen_k=value)
    longest = torch.tensor(5, device=device)
    refuse("varlen_attention", rf"max_seqlen_q {INT} a tensor of shape \(\)", device, _5=longest)


@pytest.mark.parametrize("longest", [6, 2**31, 2**63, 10**30, np.int64(5), np.uint8(200)], ids=repr)
def test_maxima_are_bounds(longest, device):
    args, keywords = calls.CASES["varlen_attention_lse"](device)
    expected = kk.varlen_attention(*args, **keywords)
    args[5] = args[6] = longest
    for got, want in zip(kk.varlen_attention(*args, **keywords), expected, strict=True):
        assert torch.equal(got, want)


def test_scale(device):
    for op in ("varlen_attention", "paged_prefill_attention", "paged_decode_attention"):
        for value in NOT_NUMBERS:
            refuse(op, f"softmax_scale {NUMBER}", device, softmax_scale=value)
        args, keywords = calls.CASES[op](device)
        results = [
            getattr(kk, op)(*args, **keywords | {"softmax_scale": value})
            for value in (1.0, 1, np.float32(1), np.float64(1), np.int32(1))
        ]
        assert all(torch.equal(results[0], result) for result in results)


def test_eps(device):
    for op, name in (
        ("rms_norm", "_2"),
        ("layer_norm", "_3"),
        ("merge_patches", "_3"),
        ("qk_norm_mrope_store", "eps"),
    ):
        for value in (-1.0, float("nan"), float("inf"), 10**400, "1", None):
            message = r"eps must be (a finite number|at least 0), got"
            refuse(op, message, device, **{name: value})
    message = r"patch_norm\[2\] must be at least 0, got -1"
    norm = (torch.ones(16, device=device), torch.ones(16, device=device), -1)
    refuse("merge_patches", message, device, patch_norm=norm)


def test_sizes(device):
    op = "qk_norm_mrope_store"
    for value in (0, -1, 2.0, True, "2"):
        refuse(op, "num_heads must be a positive int, got", device, num_heads=value)
        refuse(op, "num_kv_heads must be a positive int, got", device, num_kv_heads=value)
    refuse(op, r"qkv must have shape \(\*, \d+\), got", device, num_heads=2**63)
    refuse(op, "each size in mrope_section must be .* int, got 2.0", device,
           mrope_section=[2.0, 3, 3])  # fmt: skip
    refuse(op, "mrope_section must hold 3 sizes", device, mrope_section=[2**63, 3, 3])
    for value in (0.0, -1.0):
        refuse("rope_2d_", "theta must be positive, got", device, theta=value)
    for value in (float("inf"), float("nan"), 10**400, "1", None):
        refuse("rope_2d_", "theta must be a finite number, got", device, theta=value)
        refuse("mrope_", "theta must be a finite number, got", device, theta=value)
        refuse(op, "theta must be a finite number, got", device, theta=value)
    for value in (2.0, "2", True, -1):
        message = "merge_size must be a non-negative int, got"
        refuse("merge_patches", message, device, merge_size=value)
    message = "each of image_std must be a finite number, got"
    for value in (float("nan"), float("inf"), "1"):
        refuse("patch_embed", message, device, image_std=[0.5, value, 0.5])


def test_tokens_without_sequences(device):
    message = "q must have no tokens where there is no sequence, got"
    none = torch.zeros(1, dtype=torch.int32, device=device)
    refuse("varlen_attention", f"{message} 8", device, _3=none, _4=none)
    empty = {"_3": none.view(1, 1)[:0], "_4": none, "_5": none[:0]}
    refuse("paged_prefill_attention", f"{message} 6", device, **empty)


def test_sampling_parameters_are_tensors(device):
    args, keywords = calls.CASES["sample"](device)
    for i, name in enumerate(("temperature", "top_k", "top_p", "seed", "step"), start=1):
        for value in (2**63, 1, np.int64(1), [1, 1]):
            changed = [*args[:i], value, *args[i + 1 :]]
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got"):
                kk.sample(*changed, **keywords)
