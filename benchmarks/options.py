"""`--tokens`, `--heads` and `--dtype`: shapes of one's own, and which op understands which."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from benchmarks import shapes

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DECODER_HEADS = ("mrope_", "qk_norm_mrope_store", "paged_prefill_attention")
_DECODER_HEADS += ("paged_decode_attention",)
_TOWER_HEADS = ("rope_2d_", "varlen_attention")
_MOST_HEADS = 1024


@dataclass(frozen=True)
class Options:
    """What was asked for; None: as in the checkpoint."""

    tokens: list[int] | None = None
    heads: tuple[int, int] | None = None  # of queries, of keys and values
    dtype: torch.dtype | None = None

    def refuses(self, op: str) -> str:
        """Why `op` cannot be measured at these; "" if it can."""
        if self.tokens is not None:
            if op == "sample":
                return "--tokens does not apply to sample, which has a row for each request"
            odd = next((n for n in self.tokens if n % 4), None)
            if op == "merge_patches" and odd is not None:
                return f"--tokens must be a multiple of 4 for merge_patches, got {odd}"
        if self.heads is not None:
            heads, kv_heads = self.heads
            if op not in _DECODER_HEADS + _TOWER_HEADS:
                return f"--heads does not apply to {op}"
            if op in _TOWER_HEADS and heads != kv_heads:
                return f"{op} is measured with as many key/value heads as heads: --heads {heads}"
        return ""

    def __str__(self) -> str:
        words = []
        if self.tokens is not None:
            words.append(f"--tokens {','.join(map(str, self.tokens))}")
        if self.heads is not None:
            words.append(f"--heads {self.heads[0]}:{self.heads[1]}")
        if self.dtype is not None:
            words.append(f"--dtype {next(k for k, v in _DTYPES.items() if v is self.dtype)}")
        return " ".join(words)

    @property
    def given(self) -> list[str]:
        """Their names on the command line."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]

    def apply(self) -> None:
        """Make heads and dtype those of this process."""
        if self.heads is not None or self.dtype is not None:
            shapes.choose(self.heads, self.dtype)


chosen = Options()  # of this process


def tokens(text: str) -> list[int]:
    """`--tokens 1024` or `--tokens 1024,4096`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if not 0 < min(found) <= max(found) < 2**31:
        raise argparse.ArgumentTypeError(
            f"tokens must be ints from 1 to 2^31 - 1, apart by commas, got {text!r}"
        )
    return found


def heads(text: str) -> tuple[int, int]:
    """`--heads 16`, or `--heads 32:8` with 8 heads of keys and values."""
    try:
        found = [int(part) for part in text.split(":")]
    except ValueError:
        found = []
    many, few = (found * 2)[:2] if len(found) in (1, 2) else (0, 0)
    if not 0 < few <= many <= _MOST_HEADS or many % few:
        raise argparse.ArgumentTypeError(
            f"heads must be H, or H:K with K that divides H, from 1 to {_MOST_HEADS}, got {text!r}"
        )
    return many, few


def dtype(text: str) -> torch.dtype:
    """`--dtype fp16`."""
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"dtype must be {', '.join(_DTYPES)}, got {text!r}")
    return _DTYPES[text]
