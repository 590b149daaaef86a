"""The next token of each request, greedy or drawn."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import DTYPE, TEXT, Shapes

KINDS = {  # temperature, top_k, top_p, repetition_penalty
    "greedy": (0.0, TEXT.vocab_size, 1.0, None),
    "greedy, penalty": (0.0, TEXT.vocab_size, 1.0, 1.2),
    "top-k 50, top-p 0.9": (0.7, 50, 0.9, None),
    "top-p 0.9": (0.7, TEXT.vocab_size, 0.9, None),
    "all tokens": (0.7, TEXT.vocab_size, 1.0, None),
}


def _sample(batch: int, kind: str, device: torch.device) -> dict[str, Any]:
    def each(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    temperature, top_k, top_p, penalty = KINDS[kind]
    logits = 3 * torch.randn(batch, TEXT.vocab_size, dtype=DTYPE, device=device)
    arguments = {
        "logits": logits,
        "temperature": each(temperature, torch.float32),
        "top_k": each(top_k, torch.int64),
        "top_p": each(top_p, torch.float32),
        "seed": torch.arange(batch, device=device),
        "step": each(7, torch.int64),
    }
    if penalty is not None:
        arguments["repetition_penalty"] = each(penalty, torch.float32)
        arguments["seen"] = torch.rand(logits.shape, device=device) < 0.01
    return arguments


def cases(shapes: Shapes) -> list[Case]:
    """The logits read, and what the penalty applies to; one token per row written."""
    found = []
    for batch in shapes.decode_batches:
        for kind in KINDS:
            width = DTYPE.itemsize + ("penalty" in kind)
            num_bytes = batch * TEXT.vocab_size * width
            arguments = partial(_sample, batch, kind)
            found.append(
                Case("sample", f"batch {batch}, {kind}", arguments, num_bytes, store_width=8)
            )
    return found
