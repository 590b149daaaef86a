"""The decode step, one token for each running sequence, on device buffers with a row for each.

A captured step can be replayed, because its tensors lie in buffers that never move and their shapes
depend only on a number of rows and a capacity. It neither reads from the device nor uploads:
the device counts tokens itself. The host rewrites the rows when sequences come or go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from keye_kernels import sample
from keye_model.engine.sampling import SamplingParams
from keye_model.network.cache import CacheLayout, PagedCache
from keye_model.network.model import KeyeModel
from keye_model.network.upload import upload

# Sequences that run at once. Above about 190 rows a step is bound by arithmetic, not by reading the
# weights, so more rows give no more tokens per second.
MAX_ROWS = 256

# Attention splits each sequence by its own length; the capacity only fixes the number of splits. So
# few capacities are enough: one for short sequences, which large batches need not split at all, and
# then each four times the last.
_MIN_CAPACITY = 2048
_CAPACITY_FACTOR = 4


@dataclass(eq=False)
class Sequence:
    """Host state of a running request.

    Attributes:
        request: Index of the request.
        handle: Its handle in the cache, which has pages for all its tokens.
        prompt: [num_tokens], int64, on the host.
        params: How its tokens are sampled.
        next_position: Position of its first generated token.
        token_ids: Generated tokens; the last one is not in the cache yet.
    """

    request: int
    handle: int
    prompt: torch.Tensor
    params: SamplingParams
    next_position: int = 0
    token_ids: list[int] = field(default_factory=list)


class DecodeBatch:
    """A row of state for each running sequence, then rows of padding.

    A padding row has no tokens and no pages: it stores nothing, attends to nothing and does not
    change; its sampled token is ignored.

    Args:
        cache: Keys and values of the sequences.
        max_position_embeddings: The model's context; no sequence is longer.
        vocab_size: Width of the logits.

    Attributes:
        token_ids: [MAX_ROWS], int64: each row's last token, which is not in the cache yet.
        counters: [3, MAX_ROWS], int64: tokens in the cache, position of the last token, its index
            among the generated ones.
        penalised: A placed sequence has a repetition penalty.
    """

    def __init__(self, cache: PagedCache, max_position_embeddings: int, vocab_size: int) -> None:
        device = cache.device
        self.cache = cache
        self._vocab_size = vocab_size
        self._ints = torch.zeros(7, MAX_ROWS, dtype=torch.int64, device=device)
        # A step adds `active` to each of the three counters: 1, or 0 for padding.
        self.counters, self._active = self._ints[:3], self._ints[3]
        self._stored, self._positions, self._generated = self.counters
        self.token_ids, self._top_k, self._seed = self._ints[4:]
        self._floats = torch.ones(3, MAX_ROWS, device=device)
        self._temperature, self._top_p, self._penalty = self._floats
        self._seen: torch.Tensor | None = None  # [MAX_ROWS, vocab_size], from the first penalty on
        self._max_capacity = cache.pages_needed(max_position_embeddings) * cache.page_size
        pages = self.capacity(cache.num_pages * cache.page_size) // cache.page_size
        self._block_table = torch.full((MAX_ROWS, pages), -1, dtype=torch.int32, device=device)
        self._cache_seqlens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        self._cu_seqlens_q = torch.arange(MAX_ROWS + 1, dtype=torch.int32, device=device)
        self.penalised = False

    def place(self, running: list[Sequence]) -> None:
        """Write a row for each of these sequences, and turn all other rows into padding."""
        ints = np.zeros(self._ints.shape, np.int64)
        floats = np.ones(self._floats.shape, np.float32)
        table = np.full(self._block_table.shape, -1, np.int32)
        for i, one in enumerate(running):
            p, new = one.params, len(one.token_ids)
            stored, last = self.cache.num_tokens(one.handle), one.token_ids[-1] if new else 0
            # A step stores the last generated token, which has index new - 1.
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

    def _place_seen(self, running: list[Sequence]) -> None:
        device = self.cache.device
        if self._seen is None:
            shape = (MAX_ROWS, self._vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        said = [torch.cat([one.prompt, torch.tensor(one.token_ids).long()]) for one in running]
        rows = torch.arange(len(said)).repeat_interleave(torch.tensor([len(ids) for ids in said]))
        self._seen[: len(said)] = False
        self._seen[upload(rows, device), upload(torch.cat(said), device)] = True

    def capacity(self, longest: int) -> int:
        """Upper bound of a sequence's tokens in a step, at least ``longest``.

        Whole pages, limited by the model's context and not by the cache's size, since the bits of a
        result depend on the capacity.
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
        """Store each row's last token, and sample its next one.

        Args:
            model, lm_head: The same for all steps of these sequences.
            num_rows: Rows that take part, from the first; the others are left alone.
            capacity: From `capacity`, for the longest sequence with its new token.
            penalised: Whether a sequence has a repetition penalty.
        """
        rows, page_size = slice(num_rows), self.cache.page_size
        stored = self._stored[rows]
        table = self._block_table[rows, : capacity // page_size]
        page = table.gather(1, (stored // page_size)[:, None])[:, 0]
        slots = torch.add(stored % page_size, page, alpha=page_size)
        layout = CacheLayout(
            slot_mapping=slots.clamp_(min=-1),  # padding has page -1, so its slots are below -1
            block_table=table,
            cu_seqlens_q=self._cu_seqlens_q[: num_rows + 1],
            cache_seqlens=torch.add(stored, self._active[rows], out=self._cache_seqlens[rows]),
            max_seqlen_q=1,
            max_seqlen_k=capacity,
            is_decode=True,
        )
        # A padding row may have sampled -1 from broken logits; for a sequence that is an error.
        token_ids = self.token_ids[rows].clamp(min=0)
        if penalised:
            self._seen[rows].scatter_(1, token_ids[:, None], True)
        hidden = model.language_model.embed_tokens(token_ids)
        hidden = model(hidden, self._positions[rows].expand(3, -1), self.cache, layout)
        self.sample(lm_head(hidden), penalised)
        self.counters[:, rows] += self._active[rows]

    def sample(self, logits: torch.Tensor, penalised: bool) -> None:
        """Sample a token for each of the first rows; logits: [num_rows, vocab_size]."""
        rows = slice(logits.shape[0])
        sample(
            logits,
            self._temperature[rows],
            self._top_k[rows],
            self._top_p[rows],
            self._seed[rows],
            self._generated[rows],
            repetition_penalty=self._penalty[rows] if penalised else None,
            seen=self._seen[rows] if penalised else None,
            out=self.token_ids[rows],
        )

    def tokens(self, num_rows: int) -> list[int]:
        """The last tokens of the first rows, -1 where no logit was finite; waits for the device."""
        return self.token_ids[:num_rows].tolist()
