"""2D rope of the tower; 3D rope of the decoder, alone and fused with QK-norm and cache write."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, VISION, Grid, Shapes, num_patches

POSITION = 8  # bytes


def _rope_2d(grids: list[Grid], device: torch.device) -> dict[str, Any]:
    shape = (num_patches(grids), 3, VISION.num_heads, VISION.head_dim)
    q, k, _ = torch.randn(shape, dtype=DTYPE, device=device).unbind(1)
    indices = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for _, h, w in grids]
    frames = [index.repeat(t, 1) for index, (t, _, _) in zip(indices, grids, strict=True)]
    return {"q": q, "k": k, "positions": torch.cat(frames).to(device), "theta": VISION.rope_theta}


def _qkv(num_tokens: int, device: torch.device) -> torch.Tensor:
    width = (TEXT.num_heads + 2 * TEXT.num_kv_heads) * TEXT.head_dim
    return torch.randn(num_tokens, width, dtype=DTYPE, device=device)


def _positions(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Different on each axis, up to the context of the checkpoint."""
    return torch.randint(0, 40960, (3, num_tokens), device=device)


def _mrope(num_tokens: int, device: torch.device) -> dict[str, Any]:
    heads = _qkv(num_tokens, device).unflatten(1, (-1, TEXT.head_dim))
    q, k, _ = heads.split((TEXT.num_heads, TEXT.num_kv_heads, TEXT.num_kv_heads), dim=1)
    return {
        "q": q,
        "k": k,
        "positions": _positions(num_tokens, device),
        "mrope_section": TEXT.mrope_section,
        "theta": TEXT.rope_theta,
    }


def _qk_norm_mrope_store(num_tokens: int, device: torch.device) -> dict[str, Any]:
    num_pages = -(-num_tokens // TEXT.page_size)
    cache = (num_pages, TEXT.page_size, TEXT.num_kv_heads, TEXT.head_dim)
    slots = torch.randperm(num_pages * TEXT.page_size, device=device)[:num_tokens]
    return {
        "qkv": _qkv(num_tokens, device),
        "q_weight": torch.randn(TEXT.head_dim, dtype=DTYPE, device=device),
        "k_weight": torch.randn(TEXT.head_dim, dtype=DTYPE, device=device),
        "positions": _positions(num_tokens, device),
        "k_cache": torch.zeros(cache, dtype=DTYPE, device=device),
        "v_cache": torch.zeros(cache, dtype=DTYPE, device=device),
        "slot_mapping": slots,
        "num_heads": TEXT.num_heads,
        "num_kv_heads": TEXT.num_kv_heads,
        "mrope_section": TEXT.mrope_section,
        "theta": TEXT.rope_theta,
        "eps": TEXT.eps,
    }


def cases(shapes: Shapes) -> list[Case]:
    """rope_2d_, mrope_: q, k and positions read, q and k written.

    qk_norm_mrope_store: qkv, positions, slots and weights read; q and the cache rows of k and v
    written: 24 KiB per token.
    """
    found = []
    for name, grids in shapes.grids.items():
        count = num_patches(grids)
        token = 4 * VISION.num_heads * VISION.head_dim * DTYPE.itemsize + 2 * POSITION
        # The second half of a row of 144 bytes begins 72 bytes into it.
        widths = {"load_width": 8, "store_width": 8}
        found.append(Case("rope_2d_", name, partial(_rope_2d, grids), count * token, **widths))
    for name, count in shapes.tokens.items():
        heads = 2 * (TEXT.num_heads + TEXT.num_kv_heads)
        token = heads * TEXT.head_dim * DTYPE.itemsize + 3 * POSITION
        found.append(Case("mrope_", name, partial(_mrope, count), count * token))
        heads += 2 * TEXT.num_kv_heads
        token = heads * TEXT.head_dim * DTYPE.itemsize + 4 * POSITION
        num_bytes = count * token + 2 * TEXT.head_dim * DTYPE.itemsize
        arguments = partial(_qk_norm_mrope_store, count)
        # A few tokens: half a head of 256 bytes over the 32 lanes of a warp.
        widths = {"load_width": 4, "store_width": 4} if count <= 33 else {}
        found.append(Case("qk_norm_mrope_store", name, arguments, num_bytes, **widths))
    return found
