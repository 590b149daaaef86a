"""The definition of every op in plain PyTorch, under the names and arguments of the public ops.

Used on the CPU, by the tests, and wherever no kernel serves. Readable first, but built from calls
that are fast on a CPU, because the model runs on them there. Shapes and rules are those of the
public ops; here stands what is computed and where it is rounded.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from keye_kernels._checks import Grid, check_cu_seqlens, check_each, check_range

Pair = tuple[torch.Tensor, torch.Tensor]

_BLOCK_ELEMENTS = 2**17  # 512 KiB of fp32
_MASKED_ROWS = 1024  # query rows per attention mask, so that a mask stays below 1024 x num_keys
_LSE_ROWS = 512  # query rows per block of explicit scores


def _blocks(x: torch.Tensor) -> Iterator[slice]:
    """Rows of x in blocks whose temporaries stay in a CPU's cache.

    1024 rows of q, rotated in fp32 on 2 cores: 1.7 ms in blocks, 9.7 ms at once.
    """
    row_size = max(x.numel() // max(x.shape[0], 1), 1)
    step = max(x.shape[0], 1) if x.is_cuda else max(_BLOCK_ELEMENTS // row_size, 1)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """round(x * rsqrt(mean(x^2) + eps)) * weight."""
    if residual is not None:
        y, total = (None, torch.empty_like(x)) if out is None else out
        x = torch.add(x, residual, out=total)
        return rms_norm(x, weight, eps, out=y), total
    out = torch.empty_like(x) if out is None else out
    for rows in _blocks(x):
        # Without a weight F.rms_norm computes in fp32 and rounds once.
        torch.mul(F.rms_norm(x[rows], x.shape[-1:], None, eps), weight, out=out[rows])
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | Pair | None = None,
) -> torch.Tensor | Pair:
    """(x - mean) * rsqrt(variance + eps) * weight + bias, fp32 inside, rounded once."""
    if residual is not None:
        y, total = (None, torch.empty_like(x)) if out is None else out
        x = torch.add(x, residual, out=total)
        return layer_norm(x, weight, bias, eps, out=y), total
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if out is None else out.copy_(y)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """round(silu(gate)) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate) if out is None else out
    for rows in _blocks(gate_up):
        torch.mul(F.silu(gate[rows]), up[rows], out=out[rows])
    return out


def gelu(
    x: torch.Tensor,
    *,
    approximate: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gelu(x + bias), fp32 inside, rounded once."""
    out = torch.empty_like(x) if out is None else out
    for rows in _blocks(x):
        total = x[rows] if bias is None else x[rows].float() + bias.float()
        out[rows] = F.gelu(total, approximate=approximate)
    return out


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear; in bf16 on a CPU as weight x^T, which streams the matrix 1.1 to 1.5x faster."""
    if x.is_cuda or x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    if x.shape[0] == 1:
        row = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return row[None]
    if bias is None:
        return torch.mm(weight, x.T).T
    return torch.addmm(bias[:, None], weight, x.T).T


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """rms_norm, linear, then silu_mul or the residual, each rounded."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    y = _few_rows(x, weight, bias)
    if swiglu:
        y = silu_mul(y)
    elif residual is not None:
        return torch.add(y, residual, out=out)
    return y.contiguous() if out is None else out.copy_(y)


def _resample(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Bilinear resampling of a square map [side * side, hidden] to [h * w, hidden], fp32."""
    side = int(table.shape[0] ** 0.5 + 0.5)
    table = table.view(side, side, -1)

    def taps(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = torch.arange(size, dtype=torch.float32, device=table.device)
        scale = torch.tensor(side / size, dtype=torch.float32, device=table.device)
        at = ((grid + 0.5) * scale - 0.5).clamp(min=0)
        low = at.floor().clamp(max=side - 1)
        return low.long(), (low + 1).clamp(max=side - 1).long(), at - low

    y0, y1, fy = taps(h)
    x0, x1, fx = taps(w)
    fy, fx = fy[:, None, None], fx[:, None]
    top, bottom = table[y0].float(), table[y1].float()  # [h, side, hidden]
    top = (1 - fx) * top[:, x0] + fx * top[:, x1]  # [h, w, hidden]
    bottom = (1 - fx) * bottom[:, x0] + fx * bottom[:, x1]
    return ((1 - fy) * top + fy * bottom).flatten(0, 1)


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position_table: torch.Tensor,
    grid_thw: Grid,
    *,
    image_mean: list[float],
    image_std: list[float],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight @ normalised pixels + bias + position, summed in fp32, rounded once."""
    if pixels.dtype == torch.uint8:
        # In fp32 this division gives the published processor's fp32(value * (1 / 255) in fp64)
        # for each of the 256 bytes. By a tensor: CUDA multiplies by the reciprocal of a number.
        scaled = pixels.float().div_(torch.full((), 255.0, device=pixels.device))
        mean = torch.tensor(image_mean, dtype=torch.float32, device=pixels.device)
        std = torch.tensor(image_std, dtype=torch.float32, device=pixels.device)
        pixels = scaled.sub_(mean[:, None, None]).div_(std[:, None, None])
    pixels = pixels.to(weight.dtype).float().flatten(1)
    y = torch.addmm(bias.float(), pixels, weight.float().flatten(1).T)
    maps: dict[tuple[int, int], torch.Tensor] = {}
    start = 0
    for t, h, w in grid_thw:
        t, h, w = int(t), int(h), int(w)
        if (h, w) not in maps:
            maps[h, w] = _resample(position_table, h, w)
        y[start : start + t * h * w].unflatten(0, (t, h * w)).add_(maps[h, w])
        start += t * h * w
    return y.to(weight.dtype) if out is None else out.copy_(y)


def merge_patches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grid_thw: Grid,
    *,
    residual: torch.Tensor | None = None,
    patch_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    merge_size: int = 2,
    norm_first: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm per patch, then gather; or gather, then LayerNorm over the whole token.

    The residual add and the norm that may come before either round as ops of their own.
    """
    if residual is not None:
        x = x + residual
    if patch_norm is not None:
        x = layer_norm(x, *patch_norm)
    if norm_first:
        x = layer_norm(x, weight, bias, eps)
    tokens = []
    start = 0
    for t, h, w in grid_thw:
        t, h, w = int(t), int(h) // merge_size, int(w) // merge_size
        size = t * h * w * merge_size**2
        squares = x[start : start + size].view(t, h, merge_size, w, merge_size, -1).transpose(2, 3)
        tokens.append(squares.reshape(t * h * w, -1))
        start += size
    merged = torch.cat(tokens)
    if not norm_first:
        return layer_norm(merged, weight, bias, eps, out=out)
    return merged if out is None else out.copy_(merged)


def _rotate(x: torch.Tensor, angles: torch.Tensor, out: torch.Tensor) -> None:
    """Turn pairs (j, j + head_dim / 2) of x [num_tokens, heads, head_dim] into ``out``.

    angles: [num_tokens, head_dim / 2] fp32. fp32 inside, rounded once. ``out`` may be ``x``.
    """
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    half = angles.shape[1]
    for rows in _blocks(x):
        low, high = x[rows].float().chunk(2, dim=-1)
        turned_low = (low * cos[rows]).addcmul_(high, sin[rows], value=-1)
        turned_high = (high * cos[rows]).addcmul_(low, sin[rows])
        out[rows, :, :half] = turned_low
        out[rows, :, half:] = turned_high


@lru_cache(maxsize=16)
def _frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-2k / dim) for k < dim / 2, fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def rope_2d_(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, theta: float = 10000.0
) -> None:
    """First half of the pairs by row, second half by column."""
    frequencies = _frequencies(q.shape[-1] // 2, theta, q.device)
    angles = (positions.float()[:, :, None] * frequencies).flatten(1)
    _rotate(q, angles, out=q)
    _rotate(k, angles, out=k)


@lru_cache(maxsize=16)
def _axis_of_pairs(
    mrope_section: tuple[int, ...], interleaved: bool, device: torch.device
) -> torch.Tensor:
    """Which of t, h, w (0, 1, 2) turns each pair, int64."""
    num_pairs = sum(mrope_section)
    if interleaved:
        axis = [j % 3 if j < 3 * mrope_section[j % 3] else 0 for j in range(num_pairs)]
    else:
        axis = [a for a, size in enumerate(mrope_section) for _ in range(size)]
    return torch.tensor(axis, device=device)


def _mrope_angles(
    positions: torch.Tensor, mrope_section: list[int], theta: float, interleaved: bool
) -> torch.Tensor:
    """Angles [num_tokens, head_dim / 2] of positions [3, num_tokens]."""
    axis = _axis_of_pairs(tuple(mrope_section), interleaved, positions.device)
    frequencies = _frequencies(2 * axis.shape[0], theta, positions.device)
    return positions.T.index_select(1, axis) * frequencies


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    mrope_section: list[int],
    theta: float,
    interleaved: bool = False,
) -> None:
    """Each pair by the position on its own axis."""
    angles = _mrope_angles(positions, mrope_section, theta, interleaved)
    _rotate(q, angles, out=q)
    _rotate(k, angles, out=k)


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
    mrope_section: list[int],
    theta: float,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """rms_norm per head of q and k, then mrope_, then k and v to their slots."""
    num_pages, page_size, _, head_dim = k_cache.shape
    slots = slot_mapping.tolist()
    check_range("slot_mapping", slots, -1, num_pages * page_size)
    heads = qkv.unflatten(1, (-1, head_dim))
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
    angles = _mrope_angles(positions, mrope_section, theta, interleaved=False)
    qk = rms_norm(qk, weight, eps)
    _rotate(qk, angles, out=qk)
    q, k = qk.split((num_heads, num_kv_heads), dim=1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.copy_(q)
    if min(slots, default=0) < 0:
        stored = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[stored], k[stored], v[stored]
    pages, rows = slot_mapping // page_size, slot_mapping % page_size
    k_cache[pages, rows] = k
    v_cache[pages, rows] = v
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
) -> None:
    """Attention of equally long sequences, written to ``out``.

    q and out [batch_size, len_q, num_heads, head_dim], k and v [batch_size, len_k, num_kv_heads,
    head_dim]. Uses masks only where causal meets len_q != len_k: SDPA is slower with one.
    """
    q, k, v, out = (tensor.transpose(1, 2) for tensor in (q, k, v, out))
    len_q, len_k = q.shape[2], k.shape[2]
    blind = max(len_q - len_k, 0) if causal or len_k == 0 else 0  # queries that see no key
    out[:, :, :blind] = 0
    q, out = q[:, :, blind:], out[:, :, blind:]
    len_q -= blind
    if len_q == 0:
        return

    def attend(rows: slice, keys: int, **mask: object) -> None:
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, :keys],
            v[:, :, :keys],
            scale=softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
            **mask,
        )

    if not causal or len_q == 1:  # the last query sees all
        attend(slice(None), len_k)
    elif len_q == len_k:
        attend(slice(None), len_k, is_causal=True)
    else:
        cached = len_k - len_q  # keys that every query sees
        for start in range(0, len_q, _MASKED_ROWS):
            stop = min(start + _MASKED_ROWS, len_q)
            mask = torch.ones(stop - start, cached + stop, dtype=torch.bool, device=q.device)
            attend(slice(start, stop), cached + stop, attn_mask=mask.tril_(cached + start))


def _log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool, lse: torch.Tensor
) -> None:
    """Write lse [num_heads, len_q] of one sequence; q and k packed, heads before head_dim."""
    len_q, len_k = q.shape[0], k.shape[0]
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).permute(1, 2, 0)
    for start in range(0, len_q, _LSE_ROWS):
        rows = q[start : start + _LSE_ROWS].float().transpose(0, 1)
        scores = rows @ k * softmax_scale  # [num_heads, rows, len_k]
        if causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            visible.tril_(len_k - len_q + start)
            scores.masked_fill_(~visible, float("-inf"))
        lse[:, start : start + _LSE_ROWS] = scores.logsumexp(dim=2)


def _varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: torch.Tensor | None = None,  # a schedule is for kernels: it is checked, not used
    block_m: int = 0,
) -> None:
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("cu_seqlens_k", cu_k, k.shape[0], max_seqlen_k)
    batch_size = len(cu_q) - 1
    lengths = [(cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]) for i in range(batch_size)]
    if tiles is not None:
        planned = torch.bincount(tiles[:, 0], minlength=batch_size).tolist()
        needed = [-(-len_q // block_m) for len_q, _ in lengths]
        if planned != needed:
            raise ValueError(
                f"schedule must have {needed} tiles for the lengths in cu_seqlens_q, got {planned}"
            )
    first = 0
    while first < batch_size:
        # Neighbours of the same length share one call: frames of a video come by the dozen.
        last = first + 1
        while last < batch_size and lengths[last] == lengths[first]:
            last += 1
        queries, keys = slice(cu_q[first], cu_q[last]), slice(cu_k[first], cu_k[last])
        shape_q, shape_k = ((last - first, length) for length in lengths[first])
        _attend(
            q[queries].unflatten(0, shape_q),
            k[keys].unflatten(0, shape_k),
            v[keys].unflatten(0, shape_k),
            softmax_scale,
            causal,
            out[queries].unflatten(0, shape_q),
        )
        first = last
    if lse is not None:
        for i in range(batch_size):
            queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            _log_sum_exp(q[queries], k[keys], softmax_scale, causal, lse[:, queries])


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    schedule: object = None,  # noqa: ARG001 - for kernels
) -> torch.Tensor | Pair:
    """softmax(q k^T * softmax_scale) v per sequence; lse from explicit fp32 scores."""
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32) if return_lse else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, out, lse
    )
    return out if lse is None else (out, lse)


def _cached(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: list[int],
    max_seqlen_k: int,
) -> list[Pair]:
    """k and v of each sequence, [cache_seqlen, num_kv_heads, head_dim] each.

    All entries in use are checked before the first page is read. Neighbouring pages in order,
    which is what a fresh cache hands out, are viewed where they lie; others are copied together,
    by index_select, which takes a fifth of the time of indexing by a list.
    """
    num_pages, page_size = k_cache.shape[:2]
    check_range("cache_seqlens", cache_seqlens, 0, max_seqlen_k + 1)
    tables = [block_table[i, : -(-length // page_size)] for i, length in enumerate(cache_seqlens)]
    pages = [table.tolist() for table in tables]
    for listed in pages:
        check_range("block_table", listed, 0, num_pages)
    cached = []
    for table, listed, length in zip(tables, pages, cache_seqlens, strict=True):
        start, count = (listed[0] if listed else 0), len(listed)
        if listed == list(range(start, start + count)):
            k, v = k_cache[start : start + count], v_cache[start : start + count]
        else:
            k, v = k_cache.index_select(0, table), v_cache.index_select(0, table)
        cached.append((k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]))
    return cached


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache_seqlens: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's queries over its pages."""
    out = torch.empty_like(q) if out is None else out
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu_q, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    check_cu_seqlens("cu_seqlens_q", cu_q, q.shape[0], max_seqlen_q)
    for i, length in enumerate(lengths):
        if length < cu_q[i + 1] - cu_q[i]:
            raise ValueError(
                f"cache_seqlens must count the {cu_q[i + 1] - cu_q[i]} new tokens of sequence {i}, "
                f"got {length}"
            )
    cached = _cached(k_cache, v_cache, block_table, lengths, max_seqlen_k)
    for i, (k, v) in enumerate(cached):
        rows = slice(cu_q[i], cu_q[i + 1])
        _attend(q[None, rows], k[None], v[None], scale, True, out[None, rows])
    return out


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    max_seqlen_k: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per sequence over its pages."""
    out = torch.empty_like(q) if out is None else out
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cached = _cached(k_cache, v_cache, block_table, cache_seqlens.tolist(), max_seqlen_k)
    # The query heads of one key/value head act as its queries, so each key is read once.
    queries, results = (x.unflatten(1, (k_cache.shape[2], -1)) for x in (q, out))
    for i, (k, v) in enumerate(cached):
        if k.shape[0] == 0:
            results[i] = 0
            continue
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        results[i] = F.scaled_dot_product_attention(queries[i : i + 1], k, v, scale=scale)[0]
    return out


def _philox(tokens: torch.Tensor, step: torch.Tensor, seed: torch.Tensor) -> Pair:
    """First two words of Philox4x32-10, counter (token, step, 0), key seed, each in [0, 2^32)."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = tokens, step & mask, step >> 32 & mask, torch.zeros_like(tokens)
    k0, k1 = seed & mask, seed >> 32 & mask

    def product(factor: int, x: torch.Tensor) -> Pair:
        # High and low word. In halves, for int64 is signed and the product has 64 bits.
        low = factor * (x & 0xFFFF)
        middle = factor * (x >> 16) + (low >> 16)
        return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0, c1


def _gumbel(tokens: torch.Tensor, step: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Noise of each token at its request's step, fp64."""
    w0, w1 = _philox(tokens, step, seed)
    u = ((w0 << 20 | w1 >> 12).double() + 0.5) * 2.0**-52  # 53 bits: exact, never 0 or 1
    return -torch.log(-torch.log(u))


def _kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> Pair:
    """Tokens of one row that top-k and top-p leave, in rising order, and their scores in fp64."""
    keep = logits > float("-inf")
    if 0 < top_k < logits.shape[0]:
        keep &= logits >= logits.topk(top_k).values[-1]
    tokens = keep.nonzero().squeeze(1)
    kept = logits[tokens].double()
    largest, scale = kept.max(), 1 / temperature
    if top_p < 1:
        ranked = kept.sort(descending=True).values
        weights = ((ranked - largest) * scale).exp()
        before = F.pad(weights.cumsum(dim=0)[:-1], (1, 0))  # weight of those ranked higher
        count = max(int((before < top_p * weights.sum()).sum()), 1)
        keep = kept >= ranked[count - 1]
        tokens, kept = tokens[keep], kept[keep]
    scores = (kept - largest) * scale
    return tokens, scores


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    *,
    repetition_penalty: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalty, then per row: argmax, or top-k, top-p and Gumbel-max over the tokens left."""
    infinity = float("inf")
    columns = [x.tolist() for x in (temperature, top_k, top_p, seed, step)]
    rule = "be finite and at least 0"
    check_each("temperature", columns[0], rule, lambda value: 0 <= value < infinity)
    check_each("top_k", columns[1], "be at least 0", lambda value: value >= 0)
    check_each("top_p", columns[2], "lie between 0 and 1", lambda value: 0 <= value <= 1)
    check_each("step", columns[4], "be at least 0", lambda value: value >= 0)

    logits = logits.float().nan_to_num(nan=-infinity, posinf=infinity, neginf=-infinity)
    if repetition_penalty is not None:
        rule = "be finite and positive"
        penalties = repetition_penalty.tolist()
        check_each("repetition_penalty", penalties, rule, lambda value: 0 < value < infinity)
        penalty = repetition_penalty[:, None]
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    logits = logits.clamp(max=torch.finfo(torch.float32).max)
    best, tokens = logits.max(dim=1)
    tokens.masked_fill_(best == -infinity, -1)
    drawn = [i for i, value in enumerate(columns[0]) if value > 0 and best[i] > -infinity]
    if drawn:
        kept = [_kept(logits[i], *(column[i] for column in columns[:3])) for i in drawn]
        rows = torch.tensor(drawn, device=logits.device)
        sizes = [len(ids) for ids, _ in kept]
        row_of = rows.repeat_interleave(torch.tensor(sizes, device=logits.device))
        noise = _gumbel(torch.cat([ids for ids, _ in kept]), step[row_of], seed[row_of])
        for i, (ids, scores), row_noise in zip(drawn, kept, noise.split(sizes), strict=True):
            tokens[i] = ids[(scores + row_noise).argmax()]
    return tokens if out is None else out.copy_(tokens)
