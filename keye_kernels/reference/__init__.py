"""The definition of every op in plain PyTorch, under the names and arguments of the public ops.

Used on the CPU, by the tests, and wherever no kernel serves. Readable first, but built from calls
that are fast on a CPU, because the model runs on them there. Shapes and rules are those of the
public ops; here stands what is computed and where it is rounded.
"""

from keye_kernels.reference.attention import (
    paged_decode_attention,
    paged_prefill_attention,
    varlen_attention,
)
from keye_kernels.reference.layers import (
    gelu,
    layer_norm,
    merge_patches,
    patch_embed,
    rms_norm,
    silu_mul,
)
from keye_kernels.reference.linear import linear
from keye_kernels.reference.rotation import mrope_, qk_norm_mrope_store, rope_2d_
from keye_kernels.reference.sampling import sample

__all__ = [
    "gelu",
    "layer_norm",
    "linear",
    "merge_patches",
    "mrope_",
    "paged_decode_attention",
    "paged_prefill_attention",
    "patch_embed",
    "qk_norm_mrope_store",
    "rms_norm",
    "rope_2d_",
    "sample",
    "silu_mul",
    "varlen_attention",
]
