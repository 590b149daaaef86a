"""Shapes of the published checkpoint (Keye-VL-8B-Preview and 1.5 share them), and small ones.

Widths are always the real ones: they decide what is compiled. What grows is the number of tokens,
so that is what the small versions cut, down to what one CPU core does in a moment.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

Grid = tuple[int, int, int]  # frames, rows, columns of patches


@dataclass(frozen=True)
class Vision:
    """The tower and its patches."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    head_dim: int = 72
    patch_size: int = 14
    position_grid: int = 27  # side of the learned position table
    merge_size: int = 2
    eps: float = 1e-6
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Text:
    """The decoder and its paged cache."""

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 1e6
    eps: float = 1e-6
    page_size: int = 64


@dataclass(frozen=True)
class Decode:
    """One step: ``batch`` sequences, each with ``context`` tokens in the cache."""

    batch: int
    context: int


@dataclass(frozen=True)
class Shapes:
    """Sizes that vary with the request, by the name a table shows."""

    images: dict[str, list[Grid]]
    videos: dict[str, list[Grid]]
    segments: dict[str, list[int]]  # patches that attend to each other, beside those of the grids
    prefill: dict[str, int]  # tokens
    decode: dict[str, Decode]
    decode_rows: list[int]  # of the matrix products of a step
    weight_share: int = 1  # these products have the real width divided by it, and all columns
    own: bool = False  # of the options --tokens, and not of the checkpoint

    @property
    def grids(self) -> dict[str, list[Grid]]:
        """Images, then videos."""
        return self.images | self.videos

    @property
    def decode_batches(self) -> list[int]:
        """For ops that the context's length does not touch."""
        return [] if self.own else sorted({step.batch for step in self.decode.values()})

    @property
    def tokens(self) -> dict[str, int]:
        """Of prompts, then of decode steps."""
        return self.prefill | {f"batch {n}": n for n in self.decode_batches}


def num_patches(grids: list[Grid]) -> int:
    """Patches of all grids together."""
    return sum(t * h * w for t, h, w in grids)


VISION = Vision()
TEXT = Text()
DTYPE = torch.bfloat16

REAL = Shapes(
    images={
        "576 patches": [(1, 24, 24)],
        "1k patches": [(1, 32, 32)],
        "5k patches": [(1, 60, 84)],
        "16k patches": [(1, 128, 128)],
    },
    videos={
        "64 frames of 512": [(64, 16, 32)],
        "64 frames of 2880": [(64, 40, 72)],  # 720p with every frame slow
    },
    segments={
        "256 tokens": [256],
        "64k tokens": [65536],
        "64 x 128": [128] * 64,
        "16k and 64 x 128": [*[128] * 32, 16384, *[128] * 32],
        "64 x 720 as one": [64 * 720],
        "64 x 720": [720] * 64,
        "40 of 20 to 6k": [20 + 4 * i * i for i in range(40)],
    },
    prefill={"1k tokens": 1024, "4k tokens": 4096, "32k tokens": 32768},
    decode={
        f"batch {batch}, {context // 1024}k": Decode(batch, context)
        for batch, contexts in {
            1: (1024, 4096, 32768, 131072),
            8: (1024, 16384, 131072),
            64: (1024, 4096, 32768, 131072),
        }.items()
        for context in contexts
    },
    decode_rows=[1, 2, 4, 8, 16],
)

SMALL = Shapes(
    images={"24 patches": [(1, 4, 6)]},
    videos={"3 frames of 8": [(3, 4, 2)]},
    segments={"1 to 20": [1, 20, 7]},
    prefill={"19 tokens": 19},
    decode={"batch 3, 40": Decode(3, 40)},
    decode_rows=[3, 9],
    weight_share=16,
)


def own_shapes(tokens: Sequence[int], base: Shapes) -> Shapes:
    """So many tokens or patches, one image, prompt, cached sequence or matrix of each number."""
    grids = {f"{n} patches": [grid_of(n)] for n in tokens}
    prompts = {f"{n} tokens": n for n in tokens}
    decode = {f"batch 1, {n} tokens": Decode(1, n) for n in tokens}
    return replace(
        base, images=grids, videos={}, segments={}, prefill=prompts, decode=decode,
        decode_rows=list(tokens), own=True,
    )  # fmt: skip


def grid_of(patches: int) -> Grid:
    """The picture nearest to a square, with even sides where the number allows it."""
    side = 1 if patches % 4 else 2
    area = patches // side**2
    rows = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
    return 1, side * rows, side * area // rows


def choose(heads: tuple[int, int] | None, dtype: torch.dtype | None) -> None:
    """Set heads of tower and decoder and the dtype of this process, before any case is made.

    Raises:
        RuntimeError: Cases that hold others were imported already.
    """
    global DTYPE, TEXT, VISION
    if any(name.startswith("benchmarks.cases.") for name in sys.modules):
        raise RuntimeError("heads and dtype must be chosen before benchmarks.cases are imported")
    if heads is not None:
        TEXT = replace(TEXT, num_heads=heads[0], num_kv_heads=heads[1])
        VISION = replace(VISION, num_heads=heads[0])
    DTYPE = dtype or DTYPE
