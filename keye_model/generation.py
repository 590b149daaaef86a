"""Token generation for a packed batch: prefill in chunks, then decode from the paged cache.

Requests are admitted while the cache has room for their prompt and everything they may generate;
the rest wait until others finish. All lengths, positions and page numbers are host values; the one
device read of a step is its sampled tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from keye_kernels import sample
from keye_model.cache import PAGE_SIZE, PagedCache
from keye_model.inputs import Request
from keye_model.model import MAX_PATCHES_PER_CALL, KeyeModel
from keye_model.positions import pack
from keye_model.sampling import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What bounds memory, whatever the inputs.

    Attributes:
        max_prefill_tokens: Prompt tokens per forward pass of the decoder.
        max_patches_per_call: Patches per forward pass of the vision tower. A segment of attention
            (an image; a frame of 1.5; a whole video of 8B-Preview) is never split.
        max_cache_tokens: Tokens of all running requests together. None: as many as the requests
            need, and on a GPU at most what fits into 90 % of the free memory.
    """

    max_prefill_tokens: int = 8192
    max_patches_per_call: int = MAX_PATCHES_PER_CALL
    max_cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class Token:
    """One generated token of one request; ``finish_reason`` ("stop", "length") on its last."""

    request: int
    token_id: int
    finish_reason: str | None = None


@dataclass
class Timings:
    """Seconds spent in each stage, of the whole batch."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass
class _Running:
    request: int
    handle: int
    pages: int
    params: SamplingParams
    next_position: int
    token_ids: list[int] = field(default_factory=list)


class Generation:
    """One run over several requests; iterate to get their tokens as they are made.

    Args:
        model: The decoder and tower.
        lm_head: hidden_size to vocab_size.
        requests: Prompts; the k-th token stream belongs to the k-th request.
        params: One for each request.
        eos_token_ids: A request ends after any of these.

    Raises:
        ValueError: There is no request, a prompt is longer than the context, or one request needs
            more cache than there may be. Raised before anything runs.
    """

    def __init__(
        self,
        model: KeyeModel,
        lm_head: nn.Module,
        requests: Sequence[Request],
        params: Sequence[SamplingParams],
        *,
        eos_token_ids: Collection[int],
        limits: Limits | None = None,
    ) -> None:
        if not requests:
            raise ValueError("requests must hold at least one prompt, got none")
        self.timings = Timings()
        self._model, self._lm_head = model, lm_head
        self._requests, self._params = list(requests), list(params)
        self._eos = frozenset(eos_token_ids)
        self._limits = limits or Limits()
        self._device = lm_head.weight.device
        self._waiting = deque(range(len(self._requests)))
        self._running: list[_Running] = []
        self._batch: _Batch | None = None
        self._stopped: set[int] = set()
        pages = [self._num_pages(index) for index in self._waiting]
        self._free_pages = min(sum(pages), self._max_pages())
        if max(pages) > self._free_pages:
            index = pages.index(max(pages))
            raise ValueError(
                f"request {index} must fit into the cache with its prompt and max_new_tokens: it "
                f"needs {pages[index] * PAGE_SIZE} tokens, got room for "
                f"{self._free_pages * PAGE_SIZE}"
            )
        self._cache = PagedCache(
            model.config.text_config,
            self._free_pages,
            dtype=lm_head.weight.dtype,
            device=self._device,
        )

    def __iter__(self) -> Iterator[Token]:
        while self._waiting or self._running:
            yield from self._advance()

    def stop(self, request: int) -> None:
        """End a request from outside (a stop string, a closed connection): no more tokens of it."""
        self._stopped.add(request)

    @torch.inference_mode()
    def _advance(self) -> list[Token]:
        stopped = [state for state in self._running if state.request in self._stopped]
        if stopped:
            self._release(stopped)
        admitted = self._admit()
        if admitted:
            return self._prefill(admitted)
        return self._decode() if self._running else []

    def _admit(self) -> list[_Running]:
        admitted = []
        while self._waiting:
            index = self._waiting[0]
            pages = 0 if index in self._stopped else self._num_pages(index)
            if pages > self._free_pages:
                break
            self._waiting.popleft()
            if pages:
                self._free_pages -= pages
                handle = self._cache.add()
                admitted.append(_Running(index, handle, pages, self._params[index], 0))
        return admitted

    def _prefill(self, admitted: list[_Running]) -> list[Token]:
        packed = pack([self._requests[state.request] for state in admitted], self._model.config)
        started = self._mark()
        hidden = self._model.embed(packed, max_patches_per_call=self._limits.max_patches_per_call)
        positions = packed.positions.to(self._device, non_blocking=True)
        embedded = self._mark()
        last = []
        for start, pieces in _chunks(packed.seqlens, self._limits.max_prefill_tokens):
            lengths = [length for _, length, _ in pieces]
            step = self._cache.step([admitted[k].handle for k, _, _ in pieces], lengths)
            chunk = slice(start, start + sum(lengths))
            out = self._model(hidden[chunk], positions[:, chunk], self._cache, step)
            ends = [sum(lengths[: j + 1]) - 1 for j, piece in enumerate(pieces) if piece[2]]
            last.extend(out[end : end + 1] for end in ends)
        for state, position in zip(admitted, packed.next_positions, strict=True):
            state.next_position = position
        batch = _Batch(admitted, self._requests, self._lm_head.weight)
        tokens = self._sample(torch.cat(last), batch, admitted)
        self._running += admitted
        self._drop_finished(tokens)
        self._batch = None
        self.timings.vision += _seconds(started, embedded)
        self.timings.prefill += _seconds(embedded, self._mark())
        return tokens

    def _decode(self) -> list[Token]:
        started = time.perf_counter()
        running = self._running
        if self._batch is None:
            self._batch = _Batch(running, self._requests, self._lm_head.weight)
        batch = self._batch
        step = self._cache.step([state.handle for state in running], [1] * len(running))
        hidden = self._model.language_model.embed_tokens(batch.token_ids)
        hidden = self._model(hidden, batch.positions, self._cache, step)
        batch.positions += 1
        tokens = self._sample(hidden, batch, running)
        self._drop_finished(tokens)
        self.timings.decode += time.perf_counter() - started
        return tokens

    def _sample(self, hidden: torch.Tensor, batch: _Batch, states: list[_Running]) -> list[Token]:
        """hidden: [batch, hidden_size], the last token of each request."""
        batch.sample(self._lm_head(hidden))
        tokens = []
        for state, token_id in zip(states, batch.token_ids.tolist(), strict=True):
            if token_id < 0:
                raise RuntimeError(
                    f"logits of request {state.request} must hold a finite value, got none: the "
                    f"weights are broken, or {hidden.dtype} is too narrow for them"
                )
            state.token_ids.append(token_id)
            reason = None
            if token_id in self._eos:
                reason = "stop"
            elif len(state.token_ids) == self._max_new_tokens(state.request):
                reason = "length"
            tokens.append(Token(state.request, token_id, reason))
        batch.advance()
        return tokens

    def _drop_finished(self, tokens: list[Token]) -> None:
        ended = {token.request for token in tokens if token.finish_reason}
        if ended:
            self._release([state for state in self._running if state.request in ended])

    def _release(self, states: list[_Running]) -> None:
        for state in states:
            self._cache.free(state.handle)
            self._free_pages += state.pages
            self._running.remove(state)
        self._batch = None

    def _max_new_tokens(self, index: int) -> int:
        """The request's limit, or what the context leaves."""
        context = self._model.config.text_config.max_position_embeddings
        room = context - self._requests[index].input_ids.numel()
        if room < 1:
            raise ValueError(
                f"input_ids of request {index} must be shorter than the context of {context} "
                f"tokens, got {self._requests[index].input_ids.numel()}; fewer or smaller images "
                "and frames make it shorter (max_pixels, max_frames, fps)"
            )
        return min(self._params[index].max_new_tokens, room)

    def _num_pages(self, index: int) -> int:
        """Pages for the prompt and all but the last generated token, which is never stored."""
        new_tokens = self._max_new_tokens(index) - 1
        return -(-(self._requests[index].input_ids.numel() + new_tokens) // PAGE_SIZE)

    def _max_pages(self) -> int:
        if self._limits.max_cache_tokens is not None:
            return self._limits.max_cache_tokens // PAGE_SIZE
        if self._device.type != "cuda":
            return 2**31
        text, dtype = self._model.config.text_config, self._lm_head.weight.dtype
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free * 0.9) // (token * dtype.itemsize * PAGE_SIZE)

    def _mark(self) -> float | torch.cuda.Event:
        """A stage's edge: in the GPU's queue if there is one, so that nothing waits for it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class _Batch:
    """Device-side state of the running requests, rebuilt only when one joins or leaves."""

    def __init__(self, states: list[_Running], requests: list[Request], like: torch.Tensor) -> None:
        params = [state.params for state in states]

        def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)

        self.temperature = tensor([p.temperature for p in params], torch.float32)
        self.top_k = tensor([p.top_k for p in params], torch.int64)
        self.top_p = tensor([p.top_p for p in params], torch.float32)
        self.seed = tensor([p.seed for p in params], torch.int64)
        self.step = tensor([len(state.token_ids) for state in states], torch.int64)
        last = [state.token_ids[-1] if state.token_ids else 0 for state in states]
        self.token_ids = tensor(last, torch.int64)
        counts = [state.next_position + max(len(state.token_ids) - 1, 0) for state in states]
        self.positions = tensor([counts] * 3, torch.int64)
        self.penalty = self.seen = None
        if any(p.repetition_penalty != 1.0 for p in params):
            self.penalty = tensor([p.repetition_penalty for p in params], torch.float32)
            self.seen = torch.zeros(len(states), like.shape[0], dtype=torch.bool)
            for row, state in zip(self.seen, states, strict=True):
                row[requests[state.request].input_ids] = True
                row[state.token_ids] = True
            self.seen = self.seen.to(like.device, non_blocking=True)

    def sample(self, logits: torch.Tensor) -> None:
        """logits: [batch, vocab]. Leaves the chosen ids in ``token_ids``, -1 where there is none."""
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


def _chunks(
    seqlens: Sequence[int], max_tokens: int
) -> Iterator[tuple[int, list[tuple[int, int, bool]]]]:
    """Cut a packed sequence into runs of at most ``max_tokens``.

    Yields (first token, pieces), a piece being (sequence, its tokens in this run, whether they are
    its last).
    """
    pieces: list[tuple[int, int, bool]] = []
    start = filled = 0
    for k, seqlen in enumerate(seqlens):
        left = seqlen
        while left:
            length = min(left, max_tokens - filled)
            left -= length
            filled += length
            pieces.append((k, length, left == 0))
            if filled == max_tokens:
                yield start, pieces
                start, filled, pieces = start + filled, 0, []
    if pieces:
        yield start, pieces
