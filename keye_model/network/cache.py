"""The paged key/value cache: pages on the device, bookkeeping on the host.

A sequence has whole pages, in any order; its block table lists them. Pages are never moved or
cleared; a row that its sequence has not written is never read.

A full page can be found again by its content, and sequences that begin alike then read the same
pages. Such a page is kept when nobody uses it, until its room is needed: the least recently used
one goes first, and of one sequence the last one, so the page before a findable page is findable.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch

from keye_model.checkpoint.config import KeyeTextConfig
from keye_model.network.upload import upload

PAGE_SIZE = 64


@dataclass(frozen=True)
class CacheLayout:
    """Where one forward pass over new tokens reads and writes the cache.

    Attributes:
        slot_mapping: [num_tokens], int64: page * page_size + row of each new token.
        block_table: [batch_size, max_pages], int32: pages of each sequence; entries past its last
            page are 0 and not read.
        cu_seqlens_q: [batch_size + 1], int32: where each sequence's new tokens start.
        cache_seqlens: [batch_size], int32: tokens of each sequence, the new ones included.
        max_seqlen_q, max_seqlen_k: Upper bounds of the new tokens and of all tokens of a sequence.
        is_decode: Every sequence adds exactly one token.
    """

    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cache_seqlens: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    is_decode: bool


# What a page holds, the same for equal pages after equal pages: token ids, pictures.
Content = Callable[[int], Hashable]


@dataclass
class _Sequence:
    """A sequence's number of tokens, its pages in order, and how many of these can be found."""

    num_tokens: int = 0
    pages: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    num_findable: int = 0


class PagedCache:
    """Keys and values of all layers for many sequences of growing length.

    Attributes:
        k, v: [num_layers, num_pages, page_size, num_kv_heads, head_dim].
    """

    def __init__(
        self,
        config: KeyeTextConfig,
        num_pages: int,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str,
        num_layers: int | None = None,
    ) -> None:
        """Allocate the pages.

        Args:
            config: Gives the number of layers, of key/value heads, and their size.
            num_pages: Pages of each layer.
            page_size: Tokens in a page, a multiple of 16.
            dtype, device: Those of the model.
            num_layers: Layers with pages of their own; 1 makes all layers share one set, which is
                enough for a single pass over whole sequences. None: every layer.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        if page_size < 1 or page_size % 16:
            raise ValueError(f"page_size must be a positive multiple of 16, got {page_size}")
        if num_layers not in (None, 1, config.num_hidden_layers):
            raise ValueError(
                f"num_layers must be None, 1 or {config.num_hidden_layers}, got {num_layers}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self.device = torch.device(device)
        layers = num_layers or config.num_hidden_layers
        shape = (layers, num_pages, page_size, config.num_key_value_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=self.device)
        self.v = torch.empty(shape, dtype=dtype, device=self.device)
        self._handles = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Forget all sequences and all contents."""
        self._sequences: dict[int, _Sequence] = {}
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._users = [0] * self.num_pages  # sequences that have each page
        # The page that holds a content after another page (-1: none). The number stands for all
        # that comes before; dict compares whole contents, so equal hashes confuse nothing.
        self._found: dict[tuple[int, Hashable], int] = {}
        self._keys: dict[int, tuple[int, Hashable]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # findable, the next to go first

    @classmethod
    def for_single_pass(
        cls,
        config: KeyeTextConfig,
        seqlens: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[PagedCache, CacheLayout]:
        """A cache that all layers share, for one pass over whole sequences, and its layout.

        Each layer writes all its keys and values before it reads any, so it never reads those of
        the layer before.
        """
        num_pages = sum(-(-length // PAGE_SIZE) for length in seqlens)
        cache = cls(config, num_pages, dtype=dtype, device=device, num_layers=1)
        return cache, cache.append([cache.add() for _ in seqlens], seqlens)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [num_pages, page_size, num_kv_heads, head_dim] each."""
        index = index if self.k.shape[0] > 1 else 0
        return self.k[index], self.v[index]

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has; some hold contents that can still be found."""
        return len(self._free) + len(self._unused)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return self.k.nbytes + self.v.nbytes

    def pages_needed(self, num_tokens: int) -> int:
        """Pages that a sequence of `num_tokens` tokens takes."""
        return -(-num_tokens // self.page_size)

    def num_tokens(self, handle: int) -> int:
        """Tokens of a sequence so far."""
        return self._sequence(handle).num_tokens

    def find(self, contents: Iterable[Hashable]) -> tuple[list[int], tuple[int, Hashable] | None]:
        """Look for pages with these contents, one after another from the start of a sequence.

        Returns:
            The pages found; and the key of the first one that was not, None if all were.
        """
        pages, last = [], -1
        for content in contents:
            key = last, content
            last = self._found.get(key, -1)
            if last < 0:
                return pages, key
            pages.append(last)
        return pages, None

    def has_room(self, num_tokens: int, shared: Sequence[int] = ()) -> bool:
        """Whether `add` would find enough pages."""
        taken = sum(self._users[page] == 0 for page in shared)
        return self.pages_needed(num_tokens) - len(shared) <= self.num_free_pages - taken

    def add(self, num_tokens: int = 0, shared: Sequence[int] = ()) -> int:
        """Start a sequence with pages for `num_tokens` tokens; it takes more as it grows.

        Args:
            shared: Pages from `find`, which its first tokens fill.

        Returns:
            Its handle.

        Raises:
            RuntimeError: There are too few free pages; nothing has changed then.
        """
        if not self.has_room(num_tokens, shared):
            self._refuse(self.pages_needed(num_tokens) - len(shared), num_tokens)
        for page in shared:
            self._users[page] += 1
            self._unused.pop(page, None)
        stored, pages = len(shared) * self.page_size, np.array(shared, np.int32)
        sequence = _Sequence(stored, pages, len(shared))
        self._take([sequence], [max(num_tokens - stored, 0)])
        handle = next(self._handles)
        self._sequences[handle] = sequence
        return handle

    def pages(self, handle: int) -> np.ndarray:
        """Pages of a sequence in order, int32."""
        return self._sequence(handle).pages

    def publish(self, handle: int, content: Content) -> None:
        """Let the full pages of a sequence be found, up to one whose equal is there already.

        Args:
            content: Gives what the page of an index holds. All of it must have been written.
        """
        sequence = self._sequence(handle)
        for index in range(sequence.num_findable, sequence.num_tokens // self.page_size):
            page = int(sequence.pages[index])
            last = int(sequence.pages[index - 1]) if index else -1
            if self._name(page, (last, content(index))) != page:
                return
            sequence.num_findable = index + 1

    def free(self, handle: int, content: Content | None = None) -> None:
        """Forget a sequence and give its pages back.

        Args:
            content: As for `publish`, of which this does the rest. None: pages that cannot be found
                yet never will be.
        """
        sequence = self._sequence(handle)
        pages = sequence.pages.tolist()
        alike = pages[: sequence.num_findable]  # the findable page equal to each of the first ones
        if content is not None:
            for index in range(len(alike), sequence.num_tokens // self.page_size):
                last = alike[-1] if alike else -1
                alike.append(self._name(pages[index], (last, content(index))))
        del self._sequences[handle]
        for index in range(len(pages) - 1, -1, -1):
            page = pages[index]
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._keys:
                    self._unused[page] = None
                else:
                    self._free.append(page)
            if index < len(alike) and alike[index] in self._unused:
                self._unused.move_to_end(alike[index])

    def forget(self) -> None:
        """Let no page be found; sequences keep theirs."""
        self._free += self._unused
        for one in (self._unused, self._found, self._keys):
            one.clear()
        for sequence in self._sequences.values():
            sequence.num_findable = 0

    def _name(self, page: int, key: tuple[int, Hashable]) -> int:
        """Let a page be found by a key; returns the page that was there before, if one was."""
        found = self._found.setdefault(key, page)
        if found == page:
            self._keys[page] = key
        return found

    def append(self, handles: Sequence[int], new_tokens: Sequence[int]) -> CacheLayout:
        """Make room for new tokens and say where they go.

        Args:
            handles: The sequences of one forward pass, in packed order.
            new_tokens: Tokens each of them adds, at least one.

        Raises:
            ValueError: A handle is unknown or doubled, or a count is not positive.
            RuntimeError: There are too few free pages; nothing has changed then.
        """
        if not handles or len(set(handles)) != len(handles):
            raise ValueError(f"handles must be distinct and not empty, got {list(handles)}")
        if len(new_tokens) != len(handles) or min(new_tokens) < 1:
            raise ValueError(
                f"new_tokens must hold {len(handles)} positive counts, got {list(new_tokens)}"
            )
        sequences = [self._sequence(handle) for handle in handles]
        self._take(sequences, new_tokens)
        for sequence, new in zip(sequences, new_tokens, strict=True):
            sequence.num_tokens += new
        return self._describe(sequences, np.array(new_tokens, np.int64))

    def advance(self, handles: Sequence[int]) -> int:
        """Count one more token for each sequence; the decode step finds its slot on the device.

        Returns:
            Tokens of the longest of them.

        Raises:
            ValueError: A handle is unknown.
            RuntimeError: The pages of a sequence are full; it gets no new ones here.
        """
        sequences = [self._sequence(handle) for handle in handles]
        for handle, sequence in zip(handles, sequences, strict=True):
            room = len(sequence.pages) * self.page_size
            if sequence.num_tokens >= room:
                raise RuntimeError(
                    f"sequence {handle} must own pages for another token, got room for {room}"
                )
        for sequence in sequences:
            sequence.num_tokens += 1
        return max(sequence.num_tokens for sequence in sequences)

    def _take(self, sequences: Sequence[_Sequence], new_tokens: Sequence[int]) -> None:
        """Give each sequence the pages that it still needs for its new tokens."""
        wanted = [
            max(self.pages_needed(s.num_tokens + new) - len(s.pages), 0)
            for s, new in zip(sequences, new_tokens, strict=True)
        ]
        if sum(wanted) > self.num_free_pages:
            self._refuse(sum(wanted), sum(new_tokens))
        for sequence, pages in zip(sequences, wanted, strict=True):
            if pages:
                taken = [self._take_page() for _ in range(pages)]
                sequence.pages = np.append(sequence.pages, np.array(taken, np.int32))

    def _take_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._found[self._keys.pop(page)]
        self._users[page] = 1
        return page

    def _refuse(self, pages: int, new_tokens: int) -> NoReturn:
        raise RuntimeError(
            f"the cache must have {pages} free pages of {self.page_size} tokens for "
            f"{new_tokens} new tokens, got {self.num_free_pages} free of {self.num_pages}"
        )

    def _describe(self, sequences: list[_Sequence], new_tokens: np.ndarray) -> CacheLayout:
        lengths = np.array([s.num_tokens for s in sequences], np.int64)
        table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        cu_seqlens_q = np.concatenate([[0], np.cumsum(new_tokens)])

        batch = np.repeat(np.arange(len(sequences)), new_tokens)  # sequence of each new token
        index = np.arange(len(batch)) + (lengths - cu_seqlens_q[1:])[batch]  # its index there
        page = table[batch, index // self.page_size].astype(np.int64)
        slots = page * self.page_size + index % self.page_size

        cu_seqlens_q, cache_seqlens, block_table = self._upload(cu_seqlens_q, lengths, table)
        return CacheLayout(
            slot_mapping=upload(torch.from_numpy(slots), self.device),
            block_table=block_table,
            cu_seqlens_q=cu_seqlens_q,
            cache_seqlens=cache_seqlens,
            max_seqlen_q=int(new_tokens.max()),
            max_seqlen_k=int(lengths.max()),
            is_decode=bool((new_tokens == 1).all()),
        )

    def _upload(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Several arrays as int32 on the device, in one copy."""
        # Each array starts at a multiple of 16 bytes: kernels are compiled for aligned pointers.
        ends = np.cumsum([-(-a.size // 4) * 4 for a in arrays])
        buffer = np.zeros(ends[-1], np.int32)
        starts = [0, *ends[:-1]]
        for start, array in zip(starts, arrays, strict=True):
            buffer[start : start + array.size] = array.ravel()
        uploaded = upload(torch.from_numpy(buffer), self.device)
        return [
            uploaded[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _sequence(self, handle: int) -> _Sequence:
        if handle not in self._sequences:
            raise ValueError(f"handle must be of a sequence in the cache, got {handle}")
        return self._sequences[handle]
