"""From a call of `generate` to the engine of its model, and back to the text of its answers."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

from torch import nn

from keye_kernels import backends
from keye_model.engine import memory
from keye_model.engine.cuda_graph import GRAPH_BYTES, why_no_graphs
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.engine import Engine
from keye_model.engine.job import Call, Job, Token
from keye_model.engine.memory import Limits, cache_pages, kept_pages
from keye_model.engine.sampling import SamplingParams
from keye_model.inputs.content import PromptInputs
from keye_model.inputs.request import Progress, Request
from keye_model.network.cache import PAGE_SIZE
from keye_model.network.model import KeyeModel


class Run:
    """The requests of one call; iterate to get their tokens as they are generated.

    They enter the engine with the first token asked for, and leave it with the iteration, however
    that ends.

    Attributes:
        timings, cuda_graphs: Seconds of the stages so far, and whether passes are captured.
        cached_tokens: Of each request, the prompt tokens that were found in the cache.
    """

    def __init__(
        self, engine: Engine, call: Call, jobs: list[Job], progress: Progress | None
    ) -> None:
        self._engine, self._call, self._progress = engine, call, progress
        self._jobs, self._new, self._stopped = jobs, jobs, set[int]()
        self.timings, self.cached_tokens = call.timings, call.cached_tokens
        self.cuda_graphs = engine.workspace.graphs is not None

    def __iter__(self) -> Iterator[Token]:
        jobs, self._new = [job for job in self._new if job.request not in self._stopped], []
        try:
            self._call.left += len(jobs)
            self._engine.enqueue(jobs)
            while (found := self._engine.next(self._call)) is not None:
                if not isinstance(found, Token):
                    self._progress(*found)
                elif found.request not in self._stopped:
                    yield found
        finally:
            self.close()

    def stop(self, request: int) -> None:
        """End a request early (a stop string, a closed connection): it gives no more tokens."""
        self._stopped.add(request)
        self._engine.stop([self._jobs[request]])

    def close(self) -> None:
        """End all requests and free what they hold."""
        if self._call.left:
            self._engine.stop(self._jobs)

    __del__ = close


class Engines:
    """The engine of one model, made at first use and again when what it was made for has changed.

    That is the caller's options, the kernels in force, and the weights. A call that needs more
    pages than an idle engine has gets a larger one, within the limits.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._made_for: tuple | None = None
        self.engine: Engine | None = None  # before the first use

    def __reduce__(self) -> tuple:
        return Engines, ()  # a copy of the model gets an engine of its own

    def run(
        self,
        model: KeyeModel,
        lm_head: nn.Module,
        requests: Sequence[Request],
        params: Sequence[SamplingParams],
        *,
        eos_token_ids: Collection[int],
        limits: Limits | None = None,
        cuda_graphs: bool = True,
        cache: bool = True,
        progress: Progress | None = None,
    ) -> Run:
        """Prepare requests for the engine.

        Args:
            model, lm_head: Tower, projector and decoder; and what maps hidden_size to vocab_size.
            requests, params, eos_token_ids: Prompts, how each is answered, and what ends any.
            limits: Bounds of memory.
            cuda_graphs: Capture passes where that is possible.
            cache: Find pages and features that earlier requests have left.
            progress: Called as ``progress(stage, done, total)`` before passes over prompts: tokens
                of "vision" and of "prefill", those that were found included.

        Raises:
            ValueError: There is no request, a prompt is malformed or longer than the context, or
                one request needs more cache than there may be. Raised before anything runs.
        """
        if not requests:
            raise ValueError("requests must hold at least one prompt, got none")
        tells, totals = progress is not None, {"vision": 0, "prefill": 0}
        call = Call(frozenset(eos_token_ids), [0] * len(requests), totals, tells)
        pairs = zip(requests, params, strict=True)
        jobs = [_job(call, k, *pair, model, cache) for k, pair in enumerate(pairs)]
        totals["prefill"] = sum(job.left for job in jobs)
        totals["vision"] = sum(len(item.index) for job in jobs for item in job.inputs.items)
        limits, weight = limits or Limits(), lm_head.weight
        wanted = kept_pages(model.config, cache_pages([job.max_tokens for job in jobs]), limits)
        kernels = backends(weight.device.type)
        made_for = limits, cuda_graphs, cache, kernels, _weights(model, lm_head)
        with self._lock:
            changed, had, idle = made_for != self._made_for, 0, False
            if self.engine is not None:
                had, idle = self.engine.workspace.cache.num_pages, self.engine.idle
            capture = cuda_graphs and not why_no_graphs(weight.device)
            if weight.is_cuda and (changed or wanted > had):
                itemsize, graphs = weight.dtype.itemsize, GRAPH_BYTES if capture else 0
                beside = memory.activation_bytes(model.config, requests, limits, itemsize) + graphs
                beside -= self.engine.workspace.cache.num_bytes if idle else 0
                wanted = min(wanted, memory.free_pages(model.config, limits, weight, beside))
            renew = changed or (idle and wanted > 1.2 * had)  # not for a little more
            _check_room(jobs, wanted if renew else had)
            if renew:
                self.engine = self._made_for = None  # its memory is needed
                self.engine = Engine(model, lm_head, limits, wanted, capture, cache)
                self._made_for = made_for
            return Run(self.engine, call, jobs, progress)

    def clear_cache(self) -> None:
        """Drop what could be found again."""
        if self.engine is not None:
            self.engine.clear()


def _job(
    call: Call, index: int, request: Request, params: SamplingParams, model: KeyeModel, cache: bool
) -> Job:
    """A request; its answer is as long as its own limit, or what the context leaves."""
    inputs = PromptInputs(request, model.config, PAGE_SIZE, index=index, hashed=cache)
    context, ids = model.config.text_config.max_position_embeddings, request.input_ids
    most = min(len(ids) + params.max_new_tokens, context)
    options = {"call": call, "inputs": inputs, "max_tokens": most, "findable": cache}
    return Job(index, None, ids, params, inputs.next_position, **options)


def _check_room(jobs: list[Job], num_pages: int) -> None:
    for job in jobs:
        if (pages := cache_pages([job.max_tokens])) > num_pages:
            raise ValueError(
                f"request {job.request} must fit into the cache with its prompt and "
                f"max_new_tokens: it needs {pages * PAGE_SIZE} tokens, got room for "
                f"{num_pages * PAGE_SIZE}"
            )


def _weights(model: KeyeModel, lm_head: nn.Module) -> tuple:
    """Changes when a weight is moved, converted or written to, but not through its `.data`."""
    return tuple(
        (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in (*model.parameters(), *lm_head.parameters())
    )


@dataclass(eq=False)
class Draft:
    """The answer to one request, as far as it is made.

    Attributes:
        detokenizer: Of its text; None where only ids are wanted.
        token_ids: All generated ids, with the stop id if there was one.
        finish_reason: "stop" (a stop id or a stop string) or "length", final when the loop ends.
        first_token: Seconds from the start of the loop to the first token.
    """

    detokenizer: Detokenizer | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    first_token: float = 0.0


def answer(run: Run, drafts: Sequence[Draft]) -> Iterator[tuple[int, str]]:
    """Run a batch to its end and fill its drafts.

    Args:
        run: Of the batch.
        drafts: One for each of its requests.

    Yields:
        (request, the next piece of its text), whole characters, none of them empty.
    """
    started = time.perf_counter()
    for token in run:
        draft, piece = drafts[token.request], ""
        if not draft.token_ids:
            draft.first_token = time.perf_counter() - started
        draft.token_ids.append(token.token_id)
        if token.finish_reason:
            draft.finish_reason = token.finish_reason
        if text := draft.detokenizer:
            piece = text.add(token.token_id) + (text.finish() if token.finish_reason else "")
            if text.stopped:
                run.stop(token.request)
                draft.finish_reason = "stop"
        if piece:
            yield token.request, piece
