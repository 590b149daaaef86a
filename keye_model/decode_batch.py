"""What a decode step needs of each running request, on the device from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from keye_kernels import sample
from keye_model.inputs import Request, upload
from keye_model.sampling import SamplingParams


@dataclass
class DecodeBatch:
    """Device-side state of the running requests, one row each.

    Attributes:
        token_ids: [batch], int64, each request's last token, not yet in the cache.
        positions: [3, batch], int64, where that token goes.
        temperature, top_k, top_p, seed, step, penalty, seen: As in `keye_kernels.sample`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    step: torch.Tensor
    penalty: torch.Tensor | None
    seen: torch.Tensor | None

    @classmethod
    def start(
        cls,
        params: Sequence[SamplingParams],
        requests: Sequence[Request],
        next_positions: Sequence[int],
        like: torch.Tensor,
        penalised: bool,
    ) -> DecodeBatch:
        """Rows of requests that have generated nothing yet; like: [vocab, hidden_size]."""

        def column(values: list, dtype: torch.dtype) -> torch.Tensor:
            return upload(torch.tensor(values, dtype=dtype), like.device)

        penalty = seen = None
        if penalised:
            penalty = column([p.repetition_penalty for p in params], torch.float32)
            seen = torch.zeros(len(requests), like.shape[0], dtype=torch.bool)
            for row, request in zip(seen, requests, strict=True):
                row[request.input_ids] = True
            seen = upload(seen, like.device)
        return cls(
            token_ids=column([0] * len(params), torch.int64),
            positions=column([list(next_positions)] * 3, torch.int64),
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float32),
            seed=column([p.seed for p in params], torch.int64),
            step=column([0] * len(params), torch.int64),
            penalty=penalty,
            seen=seen,
        )

    def sample(self, logits: torch.Tensor) -> None:
        """logits: [batch, vocab]. Leaves the choice in ``token_ids``, -1 where there is none."""
        self.token_ids = sample(
            logits,
            self.temperature,
            self.top_k,
            self.top_p,
            self.seed,
            self.step,
            repetition_penalty=self.penalty,
            seen=self.seen,
        )

    def advance(self) -> None:
        """Count the chosen tokens as said, and go on to the next step."""
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, self.token_ids[:, None], True)

    def rows(self, kept: Sequence[int]) -> DecodeBatch:
        """The same with only some of its requests."""
        index = upload(torch.tensor(kept), self.step.device)
        return self._map(lambda name, x: x.index_select(1 if name == "positions" else 0, index))

    def joined(self, other: DecodeBatch) -> DecodeBatch:
        """The requests of this batch, then those of another."""
        return self._map(
            lambda name, x: torch.cat([x, getattr(other, name)], 1 if name == "positions" else 0)
        )

    def _map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> DecodeBatch:
        columns = vars(self).items()
        return DecodeBatch(**{name: None if x is None else change(name, x) for name, x in columns})
