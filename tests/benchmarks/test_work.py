"""Bytes and FLOP that benchmarks count, worked out by hand; and what a case makes."""

import pytest
import torch
from torch.utils._pytree import tree_map

from benchmarks.cases import all_cases, call
from benchmarks.shapes import REAL, SMALL, TEXT
from keye_model import KeyeTextConfig

CASES = {str(case): case for case in all_cases(REAL)}


@pytest.mark.parametrize(
    ("case", "num_bytes"),
    [
        ("rms_norm, 1k tokens", (4 * 1024 + 1) * 4096 * 2),
        ("layer_norm, 1k patches", (4 * 1024 + 2) * 1152 * 2),
        ("silu_mul, 1k tokens", 1024 * 3 * 12288 * 2),
        ("rope_2d_, 1k patches", 1024 * (4 * 1152 * 2 + 16)),
        # 24 KiB of heads, 24 bytes of positions and 8 of slot per token, and two weights
        ("qk_norm_mrope_store, 1k tokens", 1024 * (24 * 1024 + 32) + 512),
        ("paged_decode_attention, batch 8, 16k", 8 * 16384 * 4096 + 8 * 2 * 8192),
        ("linear, qkv, 1 row", (6144 * 4096 + 2 * 4096 + 6144) * 2),
        ("linear, gate_up, 8 rows", (24576 * 4096 + 9 * 4096 + 8 * 12288) * 2),
        ("linear, down, 16 rows", (4096 * 12288 + 16 * 12288 + 32 * 4096) * 2),
        ("varlen_attention, 1k patches", 1024 * 4 * 1152 * 2),
        ("patch_embed, 1k patches", 1024 * 588 + (588 + 1 + 729 + 1024) * 1152 * 2),
        ("merge_patches, 1k patches, 8B-Preview", (3 * 1024 + 4) * 1152 * 2),
        ("merge_patches, 1k patches, 1.5", (3 * 1024 + 10) * 1152 * 2),
        ("merge_patches, 576 patches, 8B-Preview, alone", (2 * 576 + 2) * 1152 * 2),
        ("sample, batch 8, greedy", 8 * 151936 * 2),
    ],
)
def test_bytes(case, num_bytes):
    assert CASES[case].num_bytes == num_bytes


@pytest.mark.parametrize(
    ("case", "flops"),
    [
        ("patch_embed, 1k patches", 2 * 1024 * 588 * 1152),
        ("varlen_attention, 1k patches", 4 * 1024**2 * 16 * 72),
        ("varlen_attention, 64 frames of 512", 4 * (64 * 512) ** 2 * 16 * 72),
        ("varlen_attention, 64 frames of 512, each alone", 4 * 64 * 512**2 * 16 * 72),
        ("paged_prefill_attention, 1k tokens", 4 * (1024 * 1025 // 2) * 32 * 128),
        # Queries 31744 to 32767 see as many keys as their place says, and themselves.
        (
            "paged_prefill_attention, last 1024 of 32768",
            4 * sum(range(31745, 32769)) * 32 * 128,
        ),
        ("paged_decode_attention, batch 8, 16k", 4 * 8 * 16384 * 32 * 128),
        ("linear, head, 2 rows", 2 * 2 * 151936 * 4096),
    ],
)
def test_flops(case, flops):
    assert CASES[case].flops == flops


@pytest.mark.parametrize("case", all_cases(SMALL), ids=str)
def test_small_case_is_accepted_by_its_op(case, device):
    """Also on a device without contents: that is how the report of the compiler calls it."""
    arguments = case.arguments(device)
    call(case, arguments)
    shapes = case.arguments(torch.device("meta"))

    def shape(x):
        return getattr(x, "shape", x)

    assert tree_map(shape, shapes) == tree_map(shape, arguments)


def test_the_whole_model_counts_its_real_work():
    bench = pytest.importorskip("benchmarks.bench_generate", reason="needs transformers")
    text = KeyeTextConfig(
        vocab_size=TEXT.vocab_size,
        hidden_size=TEXT.hidden_size,
        intermediate_size=TEXT.intermediate_size,
        num_hidden_layers=36,
        num_attention_heads=TEXT.num_heads,
        num_key_value_heads=TEXT.num_kv_heads,
        head_dim=TEXT.head_dim,
        rms_norm_eps=TEXT.eps,
        rope_theta=TEXT.rope_theta,
        mrope_section=TEXT.mrope_section,
        max_position_embeddings=40960,
    )
    step = bench.text_work([1], [0], text)
    matrices = 36 * 4096 * (6144 + 4096 + 3 * 12288) + 4096 * 151936
    assert step["num_bytes"] == 2 * matrices + 36 * 4096  # 15.14 GB, one cached token
    assert step["flops"] == 2 * matrices + 36 * 4 * 32 * 128
    assert bench.tower_work([(1, 2, 2), (2, 2, 2)])["flops"] == (
        2
        * 12
        * (588 * 1152 + bench.VISION_CONFIG.num_hidden_layers * (4 * 1152**2 + 2 * 1152 * 4304))
        + bench.VISION_CONFIG.num_hidden_layers * 4 * 3 * 16 * 1152
    )
