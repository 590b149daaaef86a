"""The next token of each request, greedy or drawn."""

from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.shapes import TEXT, Shapes

DTYPE = torch.bfloat16
TOP_K, TOP_P, TEMPERATURE = 50, 0.9, 0.7


def _sample(batch: int, greedy: bool, device: torch.device) -> dict[str, Any]:
    def each(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    return {
        "logits": 3 * torch.randn(batch, TEXT.vocab_size, dtype=DTYPE, device=device),
        "temperature": each(0 if greedy else TEMPERATURE, torch.float32),
        "top_k": each(0 if greedy else TOP_K, torch.int64),
        "top_p": each(1 if greedy else TOP_P, torch.float32),
        "seed": torch.arange(batch, device=device),
        "step": each(7, torch.int64),
    }


def cases(shapes: Shapes) -> list[Case]:
    """The logits read."""
    found = []
    for batch in sorted(shapes.decode_batches):
        for kind in ("greedy", f"top-k {TOP_K}, top-p {TOP_P}"):
            num_bytes = batch * TEXT.vocab_size * DTYPE.itemsize
            arguments = partial(_sample, batch, kind == "greedy")
            found.append(Case("sample", f"batch {batch}, {kind}", arguments, num_bytes))
    return found
