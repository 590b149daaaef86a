"""Code written for flash-attn with one import changed: three packed images attend to themselves.

Other keywords of flash-attn (dropout_p, window_size, softcap, alibi_slopes, block_table) must go.
"""

from itertools import accumulate

import torch

from keye_kernels import varlen_attention as flash_attn_varlen_func

device = "cuda" if torch.cuda.is_available() else "cpu"
lengths = [256, 700, 60]
q, k, v = torch.randn(sum(lengths), 3, 16, 72, dtype=torch.bfloat16, device=device).unbind(1)
cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
longest = max(lengths)
out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=False)
print(f"attention of {len(lengths)} images at head_dim 72: {tuple(out.shape)}")
