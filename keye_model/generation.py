"""Token generation for a packed batch: prefill in chunks, then decode from the paged cache.

Requests are admitted while the cache has room for their prompt and everything they may generate;
the rest wait until others finish. All lengths, positions and page numbers are host values; the one
device read of a step is its sampled tokens.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from keye_model.cache import PAGE_SIZE, PagedCache
from keye_model.decode_batch import DecodeBatch
from keye_model.inputs import Request, upload
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
            need, and on a GPU at most what fits into 90 % of the free memory beside the widest
            activations.
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


@dataclass(eq=False)
class _Running:
    request: int
    handle: int
    pages: int
    max_new_tokens: int
    num_tokens: int = 0


class Generation:
    """One run over several requests; iterate to get their tokens as they are made.

    Args:
        model: The decoder and tower.
        lm_head: hidden_size to vocab_size.
        requests: Prompts; the k-th token stream belongs to the k-th request.
        params: One for each request.
        eos_token_ids: A request ends after any of these.
        limits: Bounds of memory.

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
        self._requests: list[Request | None] = list(requests)
        self._params = list(params)
        self._eos = frozenset(eos_token_ids)
        self._limits = limits or Limits()
        self._device = lm_head.weight.device
        self._penalised = any(one.repetition_penalty != 1.0 for one in params)
        self._waiting = deque(range(len(requests)))
        self._running: list[_Running] = []
        self._batch: DecodeBatch | None = None
        self._stopped: set[int] = set()
        self._max_new_tokens = [self._room(index) for index in self._waiting]
        # The last generated token is never stored.
        self._pages = [
            -(-(request.input_ids.numel() + new - 1) // PAGE_SIZE)
            for request, new in zip(requests, self._max_new_tokens, strict=True)
        ]
        self._free_pages = min(sum(self._pages), self._max_pages())
        if max(self._pages) > self._free_pages:
            index = self._pages.index(max(self._pages))
            raise ValueError(
                f"request {index} must fit into the cache with its prompt and max_new_tokens: it "
                f"needs {self._pages[index] * PAGE_SIZE} tokens, got room for "
                f"{self._free_pages * PAGE_SIZE}"
            )
        self._cache: PagedCache | None = None

    def __iter__(self) -> Iterator[Token]:
        while self._waiting or self._running:
            yield from self._advance()

    def stop(self, request: int) -> None:
        """End a request from outside (a stop string, a closed connection): no more tokens of it."""
        self._stopped.add(request)

    @torch.inference_mode()
    def _advance(self) -> list[Token]:
        if self._cache is None:
            self._cache = PagedCache(
                self._model.config.text_config,
                self._free_pages,
                dtype=self._lm_head.weight.dtype,
                device=self._device,
            )
        self._release(self._stopped)
        admitted = self._admit()
        if admitted:
            return self._prefill(admitted)
        return self._decode() if self._running else []

    def _admit(self) -> list[_Running]:
        admitted = []
        while self._waiting:
            index = self._waiting[0]
            pages = 0 if index in self._stopped else self._pages[index]
            if pages > self._free_pages:
                break
            self._waiting.popleft()
            if pages:
                self._free_pages -= pages
                handle = self._cache.add()
                admitted.append(_Running(index, handle, pages, self._max_new_tokens[index]))
        return admitted

    def _prefill(self, admitted: list[_Running]) -> list[Token]:
        requests = [self._requests[state.request] for state in admitted]
        packed = pack(requests, self._model.config)
        started = self._mark()
        hidden = self._model.embed(packed, max_patches_per_call=self._limits.max_patches_per_call)
        positions = upload(packed.positions, self._device)
        embedded = self._mark()
        last = []
        for start, pieces in _chunks(packed.seqlens, self._limits.max_prefill_tokens):
            lengths = [length for _, length, _ in pieces]
            step = self._cache.step([admitted[k].handle for k, _, _ in pieces], lengths)
            chunk = slice(start, start + sum(lengths))
            out = self._model(hidden[chunk], positions[:, chunk], self._cache, step)
            ends = zip(pieces, itertools.accumulate(lengths), strict=True)
            # Copies: views would keep the output of every chunk.
            last.extend(out[end - 1 : end].clone() for (_, _, is_last), end in ends if is_last)
        params = [self._params[state.request] for state in admitted]
        batch = DecodeBatch.start(
            params, requests, packed.next_positions, self._lm_head.weight, self._penalised
        )
        tokens = self._sample(torch.cat(last), batch, admitted)
        for state in admitted:
            self._requests[state.request] = None  # its pixels are not needed again
        self._running += admitted
        self._batch = batch if self._batch is None else self._batch.joined(batch)
        self._release({token.request for token in tokens if token.finish_reason})
        self.timings.vision += _seconds(started, embedded)
        self.timings.prefill += _seconds(embedded, self._mark())
        return tokens

    def _decode(self) -> list[Token]:
        started = time.perf_counter()
        running, batch = self._running, self._batch
        step = self._cache.step([state.handle for state in running], [1] * len(running))
        hidden = self._model.language_model.embed_tokens(batch.token_ids)
        hidden = self._model(hidden, batch.positions, self._cache, step)
        batch.positions += 1
        tokens = self._sample(hidden, batch, running)
        self._release({token.request for token in tokens if token.finish_reason})
        self.timings.decode += time.perf_counter() - started
        return tokens

    def _sample(
        self, hidden: torch.Tensor, batch: DecodeBatch, states: list[_Running]
    ) -> list[Token]:
        """hidden: [batch, hidden_size], the last token of each request."""
        batch.sample(self._lm_head(hidden))
        tokens = []
        for state, token_id in zip(states, batch.token_ids.tolist(), strict=True):
            if token_id < 0:
                raise RuntimeError(
                    f"logits of request {state.request} must hold a finite value, got none: the "
                    f"weights are broken, or {hidden.dtype} is too narrow for them"
                )
            state.num_tokens += 1
            reason = None
            if token_id in self._eos:
                reason = "stop"
            elif state.num_tokens == state.max_new_tokens:
                reason = "length"
            tokens.append(Token(state.request, token_id, reason))
        batch.advance()
        return tokens

    def _release(self, ended: Collection[int]) -> None:
        """Give back what the requests in ``ended`` hold, those of them that are running."""
        kept = [k for k, state in enumerate(self._running) if state.request not in ended]
        if len(kept) == len(self._running):
            return
        for state in self._running:
            if state.request in ended:
                self._cache.free(state.handle)
                self._free_pages += state.pages
        self._running = [self._running[k] for k in kept]
        self._batch = self._batch.rows(kept) if kept else None

    def _room(self, index: int) -> int:
        """Most new tokens of a request: its own limit, or what the context leaves."""
        context = self._model.config.text_config.max_position_embeddings
        num_tokens = self._requests[index].input_ids.numel()
        if num_tokens >= context:
            raise ValueError(
                f"input_ids of request {index} must be shorter than the context of {context} "
                f"tokens, got {num_tokens}; fewer or smaller images and frames make it shorter "
                "(max_pixels, max_frames, fps)"
            )
        return min(self._params[index].max_new_tokens, context - num_tokens)

    def _max_pages(self) -> int:
        if self._limits.max_cache_tokens is not None:
            return self._limits.max_cache_tokens // PAGE_SIZE
        if self._device.type != "cuda":
            return 2**31
        free, _ = torch.cuda.mem_get_info(self._device)
        # Blocks that PyTorch keeps for reuse count as taken there.
        free += torch.cuda.memory_reserved(self._device)
        free -= torch.cuda.memory_allocated(self._device)
        text, itemsize = self._model.config.text_config, self._lm_head.weight.dtype.itemsize
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        # Each prompt token also has its embedding while its request is prefilled.
        token = (cached + text.hidden_size) * itemsize
        return max(int(0.9 * free) - self._workspace(), 0) // (token * PAGE_SIZE)

    def _workspace(self) -> int:
        """Bytes of the widest activations of one pass: tower or decoder, whichever needs more."""
        config, limits = self._model.config, self._limits
        text, vision = config.text_config, config.vision_config
        grids = [
            (grid, config.variant.joint_video_attention)
            for request in self._requests
            for grid in request.image_grid_thw + request.video_grid_thw
        ]
        segments = [t * h * w if joint else h * w for (t, h, w), joint in grids]
        patches = sum(t * h * w for (t, h, w), _ in grids)
        patches = min(patches, max([limits.max_patches_per_call, *segments]))
        tokens = sum(request.input_ids.numel() for request in self._requests)
        tokens = min(tokens, limits.max_prefill_tokens)
        # Input, residual, norm, qkv (3) and attention, beside the widest part of the MLP.
        tower = patches * (7 * vision.hidden_size + 2 * vision.intermediate_size)
        decoder = tokens * (7 * text.hidden_size + 3 * text.intermediate_size)
        # Logits twice, as fp32 too, and the tokens seen.
        logits = len(self._requests) * text.vocab_size * (4 + 1)
        itemsize = self._lm_head.weight.dtype.itemsize
        return max(tower, decoder, len(self._requests) * text.vocab_size) * itemsize + logits

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
