"""Token generation for a packed batch: prefill in chunks, then decode from the paged cache.

Requests are admitted while the cache has room for their prompt and everything they may generate;
the rest wait until others finish. A prompt's lengths, positions and slots are host values; decode
steps count on the device. The one device read of a step is its sampled tokens.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from keye_model.engine.cuda_graph import GRAPH_BYTES, why_no_graphs
from keye_model.engine.decode_batch import MAX_ROWS, Sequence
from keye_model.engine.memory import Limits, activation_bytes, cache_pages
from keye_model.engine.sampling import SamplingParams
from keye_model.engine.workspace import Workspace, WorkspacePool
from keye_model.inputs.packing import pack
from keye_model.inputs.request import Progress, Request
from keye_model.network.cache import PAGE_SIZE
from keye_model.network.model import KeyeModel
from keye_model.network.upload import upload


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


class Scheduler:
    """One run over several requests; iterate to get their tokens as they are generated.

    Args:
        model: Tower, projector and decoder.
        lm_head: Maps hidden_size to vocab_size.
        requests: Prompts.
        params: Sampling parameters of each request.
        eos_token_ids: A request ends after any of these.
        limits: Bounds of memory.
        workspaces: The model's pool: passes are captured where that is possible, and the graphs
            kept for the next run. None: kernels are launched one by one.
        progress: Called as ``progress(stage, done, total)`` while prompts are launched: tokens of
            "vision" and of "prefill".

    Attributes:
        timings: Seconds of the run so far.
        cuda_graphs: Whether passes are captured; known with the first token.

    Raises:
        ValueError: There is no request, a prompt is longer than the context, or one request needs
            more cache than there may be. Raised before anything runs.
    """

    def __init__(
        self,
        model: KeyeModel,
        lm_head: nn.Module,
        requests: Collection[Request],
        params: Collection[SamplingParams],
        *,
        eos_token_ids: Collection[int],
        limits: Limits | None = None,
        workspaces: WorkspacePool | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not requests:
            raise ValueError("requests must hold at least one prompt, got none")
        self.timings, self.cuda_graphs = Timings(), False
        self._model, self._lm_head = model, lm_head
        self._requests: list[Request | None] = list(requests)
        self._params = list(params)
        self._eos = frozenset(eos_token_ids)
        self._limits = limits or Limits()
        self._device = lm_head.weight.device
        self._workspaces = workspaces
        self._progress = progress or (lambda *_: None)
        self._workspace: Workspace | None = None
        self._waiting = deque(range(len(requests)))
        self._running: list[Sequence] = []
        self._placed: list[Sequence] | None = None  # rows of the decode batch
        self._stopped: set[int] = set()
        self._max_new_tokens = [self._room(index) for index in self._waiting]
        pairs = zip(requests, self._max_new_tokens, strict=True)
        self._tokens = [one.input_ids.numel() + new for one, new in pairs]
        self._num_pages = min(cache_pages(self._tokens), self._max_pages())
        for index, num_tokens in enumerate(self._tokens):
            if (pages := cache_pages([num_tokens])) > self._num_pages:
                raise ValueError(
                    f"request {index} must fit into the cache with its prompt and max_new_tokens: "
                    f"it needs {pages * PAGE_SIZE} tokens, got room for "
                    f"{self._num_pages * PAGE_SIZE}"
                )

    def __iter__(self) -> Iterator[Token]:
        answered = False
        while self._waiting or self._running:
            tokens = self._advance()
            answered = answered or bool(tokens)
            yield from tokens
        if self._workspaces is not None and answered:  # the last token was read: no work is queued
            self._workspaces.keep(self._workspace)
        self._workspace = None

    def stop(self, request: int) -> None:
        """End a request early (a stop string, a closed connection): it gives no more tokens."""
        self._stopped.add(request)

    @torch.inference_mode()
    def _advance(self) -> list[Token]:
        if self._workspace is None:
            needed = self._model, self._lm_head, self._num_pages
            if self._workspaces is None:
                self._workspace = Workspace.new(*needed)
            else:
                self._workspace = self._workspaces.take(*needed, self._max_pages())
            self.cuda_graphs = self._workspace.graphs is not None
        self._release(self._stopped)
        admitted = self._admit()
        if admitted:
            return self._prefill(admitted)
        if self._running:
            return self._decode()
        if self._waiting:  # room for each was checked, so pages were lost
            cache, index = self._workspace.cache, self._waiting[0]
            needed = cache.pages_needed(self._tokens[index] - 1)
            raise RuntimeError(
                f"the cache must have {needed} free pages for request {index} when nothing runs, "
                f"got {cache.num_free_pages} of {cache.num_pages}"
            )
        return []

    def _admit(self) -> list[Sequence]:
        cache, admitted = self._workspace.cache, []
        while self._waiting and len(self._running) + len(admitted) < MAX_ROWS:
            index = self._waiting[0]
            tokens = self._tokens[index] - 1  # the last generated token is never stored
            if index not in self._stopped:
                if cache.pages_needed(tokens) > cache.num_free_pages:
                    break
                request, params = self._requests[index], self._params[index]
                state = Sequence(index, cache.add(tokens), request.input_ids, params)
                admitted.append(state)
            self._waiting.popleft()
        return admitted

    def _prefill(self, admitted: list[Sequence]) -> list[Token]:
        cache, batch = self._workspace.cache, self._workspace.batch
        requests = [self._requests[state.request] for state in admitted]
        packed = pack(requests, self._model.config)
        started = self._mark()
        hidden = self._model.embed(
            packed,
            self._limits.max_patches_per_call,
            self._workspace.encode,
            partial(self._progress, "vision"),
        )
        positions = upload(packed.positions, self._device)
        embedded = self._mark()
        last = []
        for start, pieces in _chunks(packed.seqlens, self._limits.max_prefill_tokens):
            self._progress("prefill", start, sum(packed.seqlens))
            lengths = [length for _, length, _ in pieces]
            layout = cache.append([admitted[k].handle for k, _, _ in pieces], lengths)
            chunk = slice(start, start + sum(lengths))
            out = self._model(hidden[chunk], positions[:, chunk], cache, layout)
            ends = zip(pieces, itertools.accumulate(lengths), strict=True)
            # Copies: views would keep the output of every chunk.
            last.extend(out[end - 1 : end].clone() for (_, _, is_last), end in ends if is_last)
        for state, position in zip(admitted, packed.next_positions, strict=True):
            state.next_position = position
            self._requests[state.request] = None  # its pixels are not needed again
        batch.place(admitted)
        batch.sample(self._lm_head(torch.cat(last)), batch.penalised)
        self._placed = None
        self._running = self._running + admitted
        tokens = self._collect(admitted)
        self.timings.vision += _seconds(started, embedded)
        self.timings.prefill += _seconds(embedded, self._mark())
        return tokens

    def _decode(self) -> list[Token]:
        started = time.perf_counter()
        running, workspace = self._running, self._workspace
        if self._placed != running:
            workspace.batch.place(running)
            self._placed = running
        longest = workspace.cache.advance([state.handle for state in running])
        workspace.step(self._model, self._lm_head, len(running), longest)
        tokens = self._collect(running)
        self.timings.decode += time.perf_counter() - started
        return tokens

    def _collect(self, states: list[Sequence]) -> list[Token]:
        """Read the tokens just sampled for the placed sequences; release those that ended."""
        tokens = []
        chosen = self._workspace.batch.tokens(len(states))
        for state, token_id in zip(states, chosen, strict=True):
            if token_id < 0:
                raise RuntimeError(
                    f"logits of request {state.request} must hold a finite value, got none: the "
                    f"weights are broken, or {self._lm_head.weight.dtype} is too narrow for them"
                )
            state.token_ids.append(token_id)
            reason = None
            if token_id in self._eos:
                reason = "stop"
            elif len(state.token_ids) == self._max_new_tokens[state.request]:
                reason = "length"
            tokens.append(Token(state.request, token_id, reason))
        self._release({token.request for token in tokens if token.finish_reason})
        return tokens

    def _release(self, ended: Collection[int]) -> None:
        """Free the pages of running requests that are in ``ended``."""
        for state in self._running:
            if state.request in ended:
                self._workspace.cache.free(state.handle)
        self._running = [state for state in self._running if state.request not in ended]

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
        # mem_get_info counts blocks that PyTorch keeps for reuse as taken.
        free += torch.cuda.memory_reserved(self._device)
        free -= torch.cuda.memory_allocated(self._device)
        free += self._workspaces.idle_bytes if self._workspaces is not None else 0
        text, itemsize = self._model.config.text_config, self._lm_head.weight.dtype.itemsize
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        # Each prompt token also has its embedding while its request is prefilled.
        token = (cached + text.hidden_size) * itemsize
        workspace = activation_bytes(self._model.config, self._requests, self._limits, itemsize)
        if self._workspaces is not None and not why_no_graphs(self._device):
            workspace += GRAPH_BYTES
        return max(int(0.9 * free) - workspace, 0) // (token * PAGE_SIZE)

    def _mark(self) -> float | torch.cuda.Event:
        """Mark the edge of a stage: on a GPU by an event in its queue, so that nothing waits."""
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
    seqlens: tuple[int, ...], max_tokens: int
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
