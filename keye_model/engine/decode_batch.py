"""Running requests on the device, and the step that gives each of them one more token.

All tensors of a step lie in buffers that never move and whose shapes depend on nothing but a
number of rows and a capacity, so that a captured step can be replayed. Nothing in a step is read
back or comes from the host: the device counts by itself. The host writes the rows anew when
requests come or go, from what it knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from keye_kernels import sample
from keye_model.engine.sampling import SamplingParams
from keye_model.network.cache import CacheStep, PagedCache
from keye_model.network.model import KeyeModel
from keye_model.network.upload import upload

# Requests that run at once. From about 190 rows on the weights cost more arithmetic than bytes, so
# that more rows give no more tokens per second.
MAX_ROWS = 256

# Attention divides a sequence by its own length, whatever the capacity, which fixes only into how
# many pieces. So few capacities do: one for short sequences, which large batches need not divide
# at all, and steps of 4 from there on.
_MIN_CAPACITY = 2048
_CAPACITY_FACTOR = 4


@dataclass(eq=False)
class Running:
    """One running request, as the host knows it.

    Attributes:
        request: Its number among the requests.
        handle: Its sequence in the cache, which owns pages for all its tokens.
        prompt: [num_tokens], int64, on the host.
        params: How its tokens are chosen.
        next_position: Where its first generated token goes.
        token_ids: What it has generated; the last one is not in the cache yet.
    """

    request: int
    handle: int
    prompt: torch.Tensor
    params: SamplingParams
    next_position: int = 0
    token_ids: list[int] = field(default_factory=list)


class DecodeBatch:
    """A row of state for each running request, padding after them.

    Padding has no tokens and no pages: it stores nothing, attends to nothing, stays as it is, and
    what it chooses is not looked at.

    Args:
        cache: Holds what the requests said before.
        max_position_embeddings: Of the model; no sequence is longer.
        vocab_size: Of the logits.

    Attributes:
        token_ids: [MAX_ROWS], int64: each row's last token, which is not in the cache yet.
        counters: [3, MAX_ROWS], int64: tokens in the cache, where the last one goes, its number.
        penalised: A placed request has a repetition penalty.
    """

    def __init__(self, cache: PagedCache, max_position_embeddings: int, vocab_size: int) -> None:
        device = cache.device
        self.cache = cache
        self._vocab_size = vocab_size
        self._ints = torch.zeros(7, MAX_ROWS, dtype=torch.int64, device=device)
        # A step adds `active`, 1 or 0 for padding, to each of the three counters.
        self.counters, self._active = self._ints[:3], self._ints[3]
        self._stored, self._positions, self._step = self.counters
        self.token_ids, self._top_k, self._seed = self._ints[4:]
        self._floats = torch.ones(3, MAX_ROWS, device=device)
        self._temperature, self._top_p, self._penalty = self._floats
        self._seen: torch.Tensor | None = None  # [MAX_ROWS, vocab_size], once a penalty asks for it
        self._max_capacity = cache.pages_needed(max_position_embeddings) * cache.page_size
        pages = self.capacity(cache.num_pages * cache.page_size) // cache.page_size
        self._block_table = torch.full((MAX_ROWS, pages), -1, dtype=torch.int32, device=device)
        self._cache_seqlens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._cu_seqlens_q = torch.arange(MAX_ROWS + 1, dtype=torch.int32, device=device)
        self.penalised = False

    def place(self, running: Sequence[Running]) -> None:
        """Write one row for each of these requests, and make padding of all others."""
        ints = np.zeros(self._ints.shape, np.int64)
        floats = np.ones(self._floats.shape, np.float32)
        table = np.full(self._block_table.shape, -1, np.int32)
        for i, one in enumerate(running):
            p, new = one.params, len(one.token_ids)
            stored, last = self.cache.num_tokens(one.handle), one.token_ids[-1] if new else 0
            # The token that a step puts in is the last one generated, number new - 1.
            ints[:, i] = stored, one.next_position + new - 1, new, 1, last, p.top_k, p.seed
            floats[:, i] = p.temperature, p.top_p, p.repetition_penalty
            pages = self.cache.pages(one.handle)
            table[i, : len(pages)] = pages
        for buffer, rows in (
            (self._ints, ints), (self._floats, floats), (self._block_table, table)
        ):  # fmt: skip
            buffer.copy_(upload(torch.from_numpy(rows), self.cache.device))
        self.penalised = any(one.params.repetition_penalty != 1 for one in running)
        if self.penalised:
            self._place_seen(running)

    def _place_seen(self, running: Sequence[Running]) -> None:
        device = self.cache.device
        if self._seen is None:
            shape = (MAX_ROWS, self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        said = [torch.cat([one.prompt, torch.tensor(one.token_ids).long()]) for one in running]
        rows = torch.arange(len(said)).repeat_interleave(torch.tensor([len(ids) for ids in said]))
        self._seen[: len(said)] = False
        self._seen[upload(rows, device), upload(torch.cat(said), device)] = True

    def capacity(self, longest: int) -> int:
        """Tokens, at least `longest`, that a step lets a sequence have.

        Whole pages of the model's context, whatever the size of the cache: results depend on it.
        """
        capacity = _MIN_CAPACITY
        while capacity < longest:
            capacity *= _CAPACITY_FACTOR
        whole = self.cache.pages_needed(capacity) * self.cache.page_size
        return min(whole, self._max_capacity)

    def step(
        self,
        model: KeyeModel,
        lm_head: nn.Module,
        *,
        num_rows: int,
        capacity: int,
        penalised: bool,
    ) -> None:
        """Store each row's last token, and choose its next one.

        Args:
            model, lm_head: What all steps of these requests run.
            num_rows: The first rows take part; the others are left alone.
            capacity: From `capacity`, for the longest sequence with its new token.
            penalised: Whether a request has a repetition penalty.
        """
        rows, page_size = slice(num_rows), self.cache.page_size
        stored = self._stored[rows]
        table = self._block_table[rows, : capacity // page_size]
        page = table.gather(1, (stored // page_size)[:, None])[:, 0]
        slots = torch.add(stored % page_size, page, alpha=page_size)
        step = CacheStep(
            slot_mapping=slots.clamp_(min=-1),  # padding, whose page is -1, would come out lower
            block_table=table,
            cu_seqlens_q=self._cu_seqlens_q[: num_rows + 1],
            cache_seqlens=torch.add(stored, self._active[rows], out=self._cache_seqlens[rows]),
            max_seqlen_q=1,
            max_seqlen_k=capacity,
            is_decode=True,
        )
        # Padding of a broken model may have chosen -1; no request gets here that has.
        token_ids = self.token_ids[rows].clamp(min=0)
        if penalised:
            self._seen[rows].scatter_(1, token_ids[:, None], True)
        hidden = model.language_model.embed_tokens(token_ids)
        hidden = model(hidden, self._positions[rows].expand(3, -1), self.cache, step)
        self.sample(lm_head(hidden), penalised)
        self.counters[:, rows] += self._active[rows]

    def sample(self, logits: torch.Tensor, penalised: bool) -> None:
        """Choose a token for each of the first rows; logits: [num_rows, vocab_size]."""
        rows = slice(logits.shape[0])
        sample(
            logits,
            self._temperature[rows],
            self._top_k[rows],
            self._top_p[rows],
            self._seed[rows],
            self._step[rows],
            repetition_penalty=self._penalty[rows] if penalised else None,
            seen=self._seen[rows] if penalised else None,
            out=self.token_ids[rows],
        )

    def tokens(self, num_rows: int) -> list[int]:
        """What the first rows chose last, -1 where there was nothing to choose; waits for it."""
        return self.token_ids[:num_rows].tolist()
