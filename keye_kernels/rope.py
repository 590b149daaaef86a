"""Rotary position embedding: 2D for the vision tower, 3D (t, h, w) for the text decoder."""

from collections.abc import Sequence

import torch

from keye_kernels import reference
from keye_kernels._checks import FLOAT_DTYPES, check_divides, check_heads, check_tensor
from keye_kernels._ops import define_op

_rope_2d_op = define_op(
    "rope_2d_(Tensor(a!) q, Tensor(b!) k, Tensor positions, float theta) -> ()",
    reference=reference.rope_2d_,
)
_mrope_op = define_op(
    "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, int[] mrope_section, float theta, "
    "bool interleaved) -> ()",
    reference=reference.mrope_,
)
_qk_norm_mrope_store_op = define_op(
    "qk_norm_mrope_store(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor positions, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, int num_heads, "
    "int num_kv_heads, int[] mrope_section, float theta, float eps, Tensor(c!) out) -> ()",
    reference=reference.qk_norm_mrope_store,
)


def _check_pair(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Check q and k [num_tokens, heads, head_dim]; returns num_tokens and head_dim."""
    check_tensor("q", q, (None, None, None), FLOAT_DTYPES)
    num_tokens, _, head_dim = q.shape
    check_tensor("k", k, (num_tokens, None, head_dim), q.dtype, q.device)
    return num_tokens, head_dim


def _check_mrope(mrope_section: Sequence[int], theta: float, head_dim: int) -> list[int]:
    section = list(mrope_section)
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"mrope_section must hold 3 sizes that add up to head_dim / 2 = {head_dim / 2:g}, "
            f"got {section}"
        )
    _check_theta(theta)
    return section


def _check_theta(theta: float) -> None:
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")


def rope_2d_(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, theta: float = 10000.0
) -> None:
    """Rotate ``q`` and ``k`` in place by their patch's row and column.

    With d = head_dim, channel j pairs with channel j + d/2. The first d/4 pairs turn by
    ``row * theta^(-4j/d)``, the next d/4 by the same of ``column``.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16, head_dim a multiple of 4. Any
            strides with a contiguous last dim, so views of a packed qkv work.
        k: [num_tokens, num_kv_heads, head_dim], dtype of ``q``.
        positions: [num_tokens, 2] int64, (row, column) of each patch in its own frame.
        theta: Base of the frequencies.

    fp32 inside, rounded once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: SigLIPRotaryEmbedding and apply_rotary_pos_emb_flashatt, modeling_keye.py of
    Keye-VL-8B-Preview.
    """
    num_tokens, head_dim = _check_pair(q, k)
    check_divides("head_dim", head_dim, 4)
    check_tensor("positions", positions, (num_tokens, 2), torch.int64, q.device)
    _check_theta(theta)
    if num_tokens > 0:
        _rope_2d_op(q, k, positions, theta)


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    mrope_section: Sequence[int],
    theta: float,
    interleaved: bool = False,
) -> None:
    """Rotate ``q`` and ``k`` in place by their token's 3D position.

    With d = head_dim, channel j pairs with channel j + d/2 and the pair turns by
    ``positions[axis(j)] * theta^(-2j/d)``.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32 / fp16 / bf16. Any strides with a contiguous
            last dim.
        k: [num_tokens, num_kv_heads, head_dim], dtype of ``q``.
        positions: [3, num_tokens] int64: t, h, w.
        mrope_section: Pairs per axis, three sizes that add up to head_dim / 2.
        theta: Base of the frequencies.
        interleaved: False: the axes take contiguous blocks of pairs (Keye-VL, Qwen2-VL). True: pair
            j belongs to axis j % 3 as long as j < 3 * mrope_section[axis], then to t (Qwen3-VL).

    fp32 inside, rounded once at the store.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above.

    Source: apply_multimodal_rotary_pos_emb in modeling_keye.py of Keye-VL-8B-Preview;
    Qwen3VLTextRotaryEmbedding in transformers for the interleaved form.
    """
    num_tokens, head_dim = _check_pair(q, k)
    section = _check_mrope(mrope_section, theta, head_dim)
    check_tensor("positions", positions, (3, num_tokens), torch.int64, q.device)
    if num_tokens > 0:
        _mrope_op(q, k, positions, section, theta, interleaved)


def qk_norm_mrope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    mrope_section: Sequence[int],
    theta: float,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise and rotate q and k of a packed qkv, and write k and v to the paged cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], fp32 / fp16 / bf16: q heads,
            k heads, v heads. Rows may be strided.
        q_weight, k_weight: [head_dim], dtype of ``qkv``: RMSNorm weights shared by all heads.
        positions: [3, num_tokens] int64: t, h, w.
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim], dtype of ``qkv``,
            page_size a multiple of 16. Rows that no slot names keep their content.
        slot_mapping: [num_tokens] int64, ``page * page_size + row`` of each token; -1: k and v of
            this token are not stored. No slot may occur twice.
        mrope_section, theta: As in ``mrope_`` (contiguous sections).
        eps: Added to the mean square of a head.
        out: [num_tokens, num_heads, head_dim], dtype of ``qkv``. Must not overlap ``qkv``.

    Returns:
        q: [num_tokens, num_heads, head_dim], normalised and rotated. The norm is that of
        ``rms_norm`` with its two roundings; rotation in fp32, rounded once; v is copied bit by bit.

    Raises:
        ValueError: A shape, dtype, device or stride differs from the above, or, on a CPU, a slot
            lies outside the cache.

    Source: KeyeAttention in modeling_keye.py of Keye-VL-8B-Preview.
    """
    check_tensor("q_weight", q_weight, (None,), FLOAT_DTYPES)
    head_dim, dtype, device = q_weight.shape[0], q_weight.dtype, q_weight.device
    check_heads(num_heads, num_kv_heads)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    check_tensor("qkv", qkv, (None, width), dtype, device)
    num_tokens = qkv.shape[0]
    check_tensor("k_weight", k_weight, (head_dim,), dtype, device)
    section = _check_mrope(mrope_section, theta, head_dim)
    check_tensor("positions", positions, (3, num_tokens), torch.int64, device)
    check_tensor("k_cache", k_cache, (None, None, num_kv_heads, head_dim), dtype, device)
    check_tensor("v_cache", v_cache, k_cache.shape, dtype, device)
    check_divides("page_size", k_cache.shape[1], 16)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), torch.int64, device)
    shape = (num_tokens, num_heads, head_dim)
    if out is None:
        out = qkv.new_empty(shape)
    else:
        check_tensor("out", out, shape, dtype, device)
    if num_tokens > 0:
        _qk_norm_mrope_store_op(
            qkv,
            q_weight,
            k_weight,
            positions,
            k_cache,
            v_cache,
            slot_mapping,
            num_heads,
            num_kv_heads,
            section,
            theta,
            eps,
            out,
        )
    return out
