"""What candidates are tried on: edges, and the shapes of the published checkpoint.

Each case calls the public function of its op, so that there is no second description of what an
op is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import keye_kernels as kk

# Keye-VL-8B-Preview and 1.5: the decoder, and the tower.
_HIDDEN, _MLP, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCAB = 4096, 12288, 32, 8, 128, 151936
_ROPE = {"mrope_section": [16, 24, 24], "theta": 1e6}
_TOWER, _TOWER_MLP, _TOWER_HEADS, _TOWER_HEAD_DIM = 1152, 4304, 16, 72
_PAGE_SIZE = 64
_BLOCK = 2**20  # random numbers that are made; larger tensors repeat them


class Make:
    """Makes the tensors of a case.

    Args:
        device, dtype: Of the tensors.
        seed: Decides all contents.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._weights: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(self, *shape: int) -> torch.Tensor:
        """A matrix [out_features, in_features]; the last one of a shape is given out again."""
        if shape not in self._weights:
            self._weights = {shape: self.normal(*shape, scale=shape[1] ** -0.5)}
        return self._weights[shape]

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers times ``scale``."""
        size = torch.Size(shape).numel()
        block = torch.randn(min(size, _BLOCK), generator=self._generator) * scale
        block = block.to(self.dtype).to(self.device)
        return block.repeat(-(-size // _BLOCK) if size else 1)[:size].view(shape)

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)

    def permutation(self, count: int) -> torch.Tensor:
        """The numbers below ``count`` in random order, int64."""
        return torch.randperm(count, generator=self._generator).to(self.device)

    def tensor(self, values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """A tensor of given values."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: Its name.
        name: The shapes in words.
        call: Calls the public function on tensors of a `Make`.
        timed: A shape of the checkpoint, which gets a verdict; else an edge, which is checked only.
    """

    op: str
    name: str
    call: Callable[[Make], object]
    timed: bool

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def _linear(rows: int, width: int, columns: int, around: str, make: Make) -> None:
    x, weight = make.normal(rows, columns), make.weight(width, columns)
    options: dict[str, object] = {}
    if "bias" in around:
        options["bias"] = make.normal(width)
    if "norm" in around:
        options |= {"norm_weight": make.normal(columns), "eps": 1e-6}
    if "swiglu" in around:
        options["swiglu"] = True
    if "residual" in around:
        options["residual"] = make.normal(rows, width)
    kk.linear(x, weight, **options)


_MATRICES = {
    "qkv": ((_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, _HIDDEN, "norm"),
    "o": (_HIDDEN, _HEADS * _HEAD_DIM, "residual"),
    "gate_up": (2 * _MLP, _HIDDEN, "norm swiglu"),
    "down": (_HIDDEN, _MLP, "residual"),
    "head": (_VOCAB, _HIDDEN, ""),
}


def _linear_cases(large: bool, quick: bool) -> Iterator[Case]:
    edges = ((1, 8, 8, ""), (17, 72, 136, "bias"), (5, 64, 256, "norm swiglu"))
    edges += ((16, 200, 520, "residual"), (3, 48, 64, "bias norm"), (2, 40, 72, "bias residual"))
    for rows, width, columns, around in edges:
        name = f"{rows} x {columns} to {width} {around}".rstrip()
        yield Case("linear", name, partial(_linear, rows, width, columns, around), False)
    counts = (1, 2, 4, 8, 16, 64, 1024) if large else (1, 8, 64)
    for name, (width, columns, around) in _MATRICES.items():
        if name not in ("o", "gate_up") and (quick or not large):
            continue
        for rows in counts[::3] if quick else counts:
            if name == "head" and rows > 64:  # of a prompt only the last token comes here
                continue
            call = partial(_linear, rows, width, columns, around)
            yield Case("linear", f"{name}, {_counted(rows, 'row')}", call, True)


def _varlen(
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    make: Make,
    *,
    scheduled: bool = False,
    **options: bool,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    len_q, len_k = zip(*lengths, strict=True)
    q = make.normal(sum(len_q), num_heads, head_dim)
    # Views of one packed tensor, as the tower's.
    k, v = make.normal(sum(len_k), 2, num_kv_heads, head_dim).unbind(1)
    starts_q, starts_k = ([0, *itertools.accumulate(x)] for x in (len_q, len_k))
    if scheduled:
        options["schedule"] = kk.attention_schedule(
            len_q, len_k, num_heads=num_heads, device=make.device
        )
    kk.varlen_attention(
        q, k, v, make.tensor(starts_q), make.tensor(starts_k), max(len_q), max(len_k), **options
    )


def _varlen_cases(large: bool, quick: bool) -> Iterator[Case]:
    for lengths, heads, causal in (
        ([(1, 1)], (2, 2, 72), False),
        ([(0, 0), (65, 65), (0, 0), (1, 1)], (2, 2, 72), False),
        ([(70, 70), (70, 70)], (4, 2, 72), True),
        ([(3, 70), (129, 129)], (4, 2, 128), True),
        ([(5, 3), (2, 0)], (2, 1, 64), True),
    ):
        for lse in (False, True):
            name = f"{lengths} {heads}{', causal' * causal}{', lse' * lse}"
            call = partial(_varlen, lengths, heads, causal=causal, return_lse=lse)
            yield Case("varlen_attention", name, call, False)
    images = (256, 1024, 5040, 16384) if large else (64, 256, 1024)
    shapes = {f"image of {count} patches": [count] for count in images}
    frames = 64 if large else 2
    shapes |= {f"{frames} frames of 720 patches": [720] * frames}
    if large:
        shapes |= {"a video of 46080 patches": [46080]}
    heads = (_TOWER_HEADS, _TOWER_HEADS, _TOWER_HEAD_DIM)
    for name, lengths in list(shapes.items())[:: 2 if quick else 1]:
        call = partial(_varlen, [(n, n) for n in lengths], heads, scheduled=True)
        yield Case("varlen_attention", name, call, True)


def _paged(
    lengths: Sequence[tuple[int, int]], heads: tuple[int, int, int], lse: bool, make: Make
) -> None:
    """``lengths``: new tokens and all of each sequence; decode where each has one new token."""
    num_heads, num_kv_heads, head_dim = heads
    new, cached = zip(*lengths, strict=True)
    pages = [-(-length // _PAGE_SIZE) for length in cached]
    numbers = make.permutation(sum(pages) + 1).int()
    table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32, device=make.device)
    start = 0
    for row, count in enumerate(pages):
        table[row, :count] = numbers[start : start + count]
        start += count
    shape = sum(pages) + 1, _PAGE_SIZE, num_kv_heads, head_dim
    k_cache, v_cache = make.normal(*shape), make.normal(*shape)
    q = make.normal(sum(new), num_heads, head_dim)
    seqlens = make.tensor(cached)
    if max(new) == 1 == min(new):
        kk.paged_decode_attention(
            q, k_cache, v_cache, table, seqlens, max_seqlen_k=max(cached), return_lse=lse
        )
    else:
        starts = make.tensor([0, *itertools.accumulate(new)])
        longest = max(new), max(cached)
        kk.paged_prefill_attention(
            q, k_cache, v_cache, table, starts, seqlens, *longest, return_lse=lse
        )


def _paged_cases(large: bool, quick: bool) -> Iterator[Case]:
    heads = (_HEADS, _KV_HEADS, _HEAD_DIM)
    for op, edges in (
        ("paged_decode_attention", ([(1, 1)], [(1, 64), (1, 65), (1, 300)])),
        ("paged_prefill_attention", ([(2, 2)], [(65, 65), (1, 130), (0, 7)], [(3, 2100), (1, 5)])),
    ):
        for lengths in edges:
            for lse in (False, True):
                call = partial(_paged, lengths, heads, lse)
                yield Case(op, f"{lengths}{', lse' * lse}", call, False)
    sizes = ((1, 1024), (1, 16384), (8, 4096), (64, 1024), (64, 8192))
    sizes = sizes if large else ((1, 512), (1, 4096), (4, 1024))
    for batch, context in sizes[::2] if quick else sizes:
        call = partial(_paged, [(1, context)] * batch, heads, False)
        yield Case("paged_decode_attention", f"batch {batch} x {context}", call, True)
    sizes = ((1024, 1024), (8192, 8192), (64, 8192), (1024, 16384))
    sizes = sizes if large else ((256, 256), (1024, 1024), (16, 2048))
    for new, context in sizes[:2] if quick else sizes:
        call = partial(_paged, [(new, context)], heads, False)
        yield Case("paged_prefill_attention", f"{new} new of {context}", call, True)


def _rows(op: str, rows: int, width: int, make: Make) -> None:
    """Norms with the residual add in front; gelu with its bias."""
    x = make.normal(rows, width)
    if op == "silu_mul":
        kk.silu_mul(x)
    elif op == "gelu":
        kk.gelu(x, approximate="tanh", bias=make.normal(width))
    else:
        vectors = [make.normal(width) for _ in range(1 if op == "rms_norm" else 2)]
        getattr(kk, op)(x, *vectors, 1e-6, residual=make.normal(rows, width))


def _row_cases(large: bool, quick: bool) -> Iterator[Case]:
    widths = {"rms_norm": _HIDDEN, "layer_norm": _TOWER, "silu_mul": 2 * _MLP, "gelu": _TOWER_MLP}
    counts = (1, 64, 1024, 16384) if large else (1, 64, 1024)
    for op, width in widths.items():
        for rows, columns in ((1, 8), (3, 72), (130, 136)):
            yield Case(op, f"{rows} x {columns}", partial(_rows, op, rows, columns), False)
        for rows in counts[::2] if quick else counts:
            yield Case(op, f"{_counted(rows, 'row')}", partial(_rows, op, rows, width), True)


def _rope_2d(count: int, make: Make) -> None:
    q, k, _ = make.normal(count, 3, _TOWER_HEADS, _TOWER_HEAD_DIM).unbind(1)
    kk.rope_2d_(q, k, make.ints(0, 128, count, 2))


def _mrope(count: int, make: Make) -> None:
    q, k = make.normal(count, _HEADS, _HEAD_DIM), make.normal(count, _KV_HEADS, _HEAD_DIM)
    kk.mrope_(q, k, make.ints(0, 40960, 3, count), **_ROPE)


def _store(count: int, make: Make) -> None:
    num_pages = -(-count // _PAGE_SIZE) + 1
    shape = num_pages, _PAGE_SIZE, _KV_HEADS, _HEAD_DIM
    slots = make.permutation(num_pages * _PAGE_SIZE)[:count]
    slots[0] = -1 if count > 1 else slots[0]
    kk.qk_norm_mrope_store(
        make.normal(count, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM),
        make.normal(_HEAD_DIM), make.normal(_HEAD_DIM), make.ints(0, 40960, 3, count),
        make.normal(*shape), make.normal(*shape), slots,
        num_heads=_HEADS, num_kv_heads=_KV_HEADS, eps=1e-6, **_ROPE,
    )  # fmt: skip


def _token_cases(large: bool, quick: bool) -> Iterator[Case]:
    counts = (1, 8, 64, 1024, 16384) if large else (1, 64, 1024)
    for op, call in (("rope_2d_", _rope_2d), ("mrope_", _mrope), ("qk_norm_mrope_store", _store)):
        yield Case(op, "3 tokens", partial(call, 3), False)
        yield Case(op, "65 tokens", partial(call, 65), False)
        for count in counts[::2] if quick else counts:
            yield Case(op, _counted(count, "token"), partial(call, count), True)


def _patch_embed(grid: tuple[int, int, int], make: Make) -> None:
    count = grid[0] * grid[1] * grid[2]
    pixels = make.ints(0, 256, count, 3, 14, 14).to(torch.uint8)
    weight = make.normal(_TOWER, 3, 14, 14, scale=0.04)
    table = make.normal(27 * 27, _TOWER)
    half = [0.5] * 3
    kk.patch_embed(
        pixels, weight, make.normal(_TOWER), table, [grid], image_mean=half, image_std=half
    )


def _merge(norm_first: bool, grid: tuple[int, int, int], make: Make) -> None:
    width = _TOWER if norm_first else 4 * _TOWER
    x = make.normal(grid[0] * grid[1] * grid[2], _TOWER)
    weight, bias = make.normal(width), make.normal(width)
    kk.merge_patches(x, weight, bias, 1e-6, [grid], norm_first=norm_first)


def _patch_cases(large: bool, quick: bool) -> Iterator[Case]:
    calls = {
        "patch_embed": {"": _patch_embed},
        "merge_patches": {
            ", norm first": partial(_merge, True),
            ", norm last": partial(_merge, False),
        },
    }
    sides = (32, 72, 128) if large else (16, 32)
    for op, kinds in calls.items():
        for name, call in kinds.items():
            for grid in ((1, 2, 2), (2, 6, 4)):
                yield Case(op, f"{grid}{name}", partial(call, grid), False)
            for side in sides[:1] if quick else sides:
                yield Case(op, f"{side**2} patches{name}", partial(call, (1, side, side)), True)


def _sample(batch: int, drawn: bool, make: Make) -> None:
    def each(value: float, dtype: torch.dtype) -> torch.Tensor:
        return make.tensor([value] * batch, dtype)

    kk.sample(
        make.normal(batch, _VOCAB, scale=3.0),
        each(0.7 if drawn else 0.0, torch.float32),
        each(50 if drawn else _VOCAB, torch.int64),
        each(0.9 if drawn else 1.0, torch.float32),
        make.ints(0, 2**31, batch),
        each(7, torch.int64),
    )


def _sample_cases(large: bool, quick: bool) -> Iterator[Case]:
    for batch in (1, 8, 64) if large and not quick else (1, 8):
        for drawn in (False, True):
            name = f"batch {batch}, {'top-k 50, top-p 0.9' if drawn else 'greedy'}"
            yield Case("sample", name, partial(_sample, batch, drawn), True)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def all_cases(device_type: str, *, quick: bool = False) -> list[Case]:
    """Cases of all ops, edges before shapes; those for a CPU are what one core does in a moment."""
    large = device_type == "cuda"
    families = (
        _linear_cases, _varlen_cases, _paged_cases, _row_cases, _token_cases, _patch_cases,
        _sample_cases,
    )  # fmt: skip
    return [case for family in families for case in family(large, quick)]
