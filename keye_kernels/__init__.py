"""Kernels for Keye-VL and other vision-language models.

All tensors are packed: one row per token, no padding. fp32, fp16 and bf16 come in, the same dtype
goes out, arithmetic inside is fp32; each op's docstring names its rounding points. Ops are
forward-only: a tensor that requires a gradient raises RuntimeError while grad mode is on.

`reference` holds the definition of every op in plain PyTorch, under the same name. `backends()`
tells which implementation serves each op, `use_backend` and the environment variable
KEYE_KERNELS_BACKEND choose another. `tune()` proves and times them on this machine.
"""

from keye_kernels import _peers, reference  # noqa: F401 - _peers registers candidates
from keye_kernels._backends import backends, use_backend
from keye_kernels._ext import describe_extension
from keye_kernels._tune import tune, verdicts
from keye_kernels.activation import gelu, silu_mul
from keye_kernels.linear import linear
from keye_kernels.merge_patches import merge_patches
from keye_kernels.norm import layer_norm, rms_norm
from keye_kernels.paged_decode_attention import paged_decode_attention
from keye_kernels.paged_prefill_attention import paged_prefill_attention
from keye_kernels.patch_embed import patch_embed
from keye_kernels.qk_norm_mrope_store import qk_norm_mrope_store
from keye_kernels.rope import mrope_, rope_2d_
from keye_kernels.sampling import sample
from keye_kernels.varlen_attention import (
    AttentionSchedule,
    attention_schedule,
    varlen_attention,
)

__version__ = "0.1.0"

linear_decode = linear  # its name while it took few rows only; goes with the next release

__all__ = [
    "AttentionSchedule",
    "__version__",
    "attention_schedule",
    "backends",
    "describe_extension",
    "gelu",
    "layer_norm",
    "linear",
    "linear_decode",
    "merge_patches",
    "mrope_",
    "paged_decode_attention",
    "paged_prefill_attention",
    "patch_embed",
    "qk_norm_mrope_store",
    "reference",
    "rms_norm",
    "rope_2d_",
    "sample",
    "silu_mul",
    "tune",
    "use_backend",
    "varlen_attention",
    "verdicts",
]
