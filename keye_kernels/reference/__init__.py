"""The definition of every op in plain PyTorch, under the names and arguments of the public ops.

Used on the CPU, by the tests, and wherever no kernel serves. Readable first, but built from calls
that are fast on a CPU, because the model runs on them there. Shapes and rules are those of the
public ops; here stands what is computed and where it is rounded. An op that writes two tensors
gives its definition the pair of them as ``out``.
"""

from keye_kernels.reference.activation import gelu, silu_mul
from keye_kernels.reference.linear import linear
from keye_kernels.reference.merge_patches import merge_patches
from keye_kernels.reference.norm import layer_norm, rms_norm
from keye_kernels.reference.paged_decode_attention import paged_decode_attention
from keye_kernels.reference.paged_prefill_attention import paged_prefill_attention
from keye_kernels.reference.patch_embed import patch_embed
from keye_kernels.reference.qk_norm_mrope_store import qk_norm_mrope_store
from keye_kernels.reference.rope import mrope_, rope_2d_
from keye_kernels.reference.sampling import sample
from keye_kernels.reference.varlen_attention import varlen_attention

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
