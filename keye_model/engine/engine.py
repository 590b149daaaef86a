"""What runs requests: prompts in chunks between decode steps, all from one paged cache.

Requests are admitted in the order of arrival, each when the cache has room for its prompt and
everything it may generate. There is no thread: whoever waits for a token takes a turn, one pass
over prompts or one decode step of all that run, and clients of other threads find their tokens in
their inboxes. What other threads or a garbage collector ask for is a chore, done between turns.
Decode steps count on the device; the one device read of a step is its sampled tokens.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import copy_context
from functools import partial
from threading import Condition, Lock, get_ident

import numpy as np
import torch
from torch import nn

from keye_model.engine.decode_batch import MAX_ROWS
from keye_model.engine.job import Call, Job, Token
from keye_model.engine.memory import Limits, kept_feature_bytes
from keye_model.engine.workspace import Workspace
from keye_model.network.cache import PAGE_SIZE
from keye_model.network.embedding import Embedding
from keye_model.network.model import KeyeModel
from keye_model.network.upload import upload
from keye_model.network.vision_cache import VisionCache


class Engine:
    """Cache, decode batch and graphs of a model, and the requests in them.

    Every turn has the kernels that `keye_kernels.use_backend` chose where the engine was made, and
    on a GPU the stream, whoever takes it.

    Args:
        model, lm_head, limits: As for `Engines.run`.
        num_pages: Of the cache.
        capture, cache: Capture passes as CUDA graphs; keep features of pictures and videos.

    Attributes:
        workspace, features: Cache, buffers and graphs; and the features that are kept.
        stats: Counts "prompt tokens" and how many of them were "cached tokens", "tower calls",
            "cached items" (whose features were kept) and decode "steps".
    """

    def __init__(
        self,
        model: KeyeModel,
        lm_head: nn.Module,
        limits: Limits,
        num_pages: int,
        capture: bool,
        cache: bool,
    ) -> None:
        self._model, self._lm_head, self._limits = model, lm_head, limits
        self._device = lm_head.weight.device
        self.workspace = Workspace.new(model, lm_head, num_pages, capture=capture)
        self.features = VisionCache(kept_feature_bytes(limits, self._device.type) if cache else 0)
        self.stats: Counter[str] = Counter()
        self._waiting: deque[Job] = deque()
        self._group: list[Job] = []  # admitted, and their prompts are not yet in the cache
        self._passes: Iterator[None] | None = None  # over the prompts of the group
        self._running: list[Job] = []
        self._placed: list[Job] | None = None  # rows of the decode batch
        self._stage, self._passed = "vision", False  # of the next pass; the last turn was a pass
        self._spans: list[tuple] = []  # (stage, calls, start, end) of passes not yet read
        self._touched: list[Job] = []
        self._turn, self._driver = Lock(), 0
        self._news, self._chores = Condition(), deque[Callable[[], None]]()
        self._context = copy_context()
        self._stream = torch.cuda.current_stream(self._device) if lm_head.weight.is_cuda else None

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._group or self._running or self._chores)

    def enqueue(self, jobs: list[Job]) -> None:
        """Let jobs wait for admission, after those that wait already."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for pixels in (item.pixels for job in jobs for item in job.inputs.items):
                if pixels.is_cuda:
                    pixels.record_stream(self._stream)
        self._later(partial(self._enter, jobs))

    def stop(self, jobs: Collection[Job]) -> None:
        """End jobs, wherever they are: they give no more tokens, and their pages are free."""
        self._later(partial(self._end, jobs))

    def clear(self) -> None:
        """Let nothing be found again."""
        self._later(self.workspace.cache.forget)
        self._later(self.features.clear)

    def next(self, call: Call) -> Token | tuple[str, int, int] | None:
        """What comes next in a call's inbox, after as many turns as it takes; None at its end.

        Raises the error that gave the call up, and RuntimeError within a turn of this thread.
        """
        me = get_ident()
        while True:
            ended = not call.left  # before the inbox: its last token came before its end
            if call.inbox:
                return call.inbox.popleft()
            if call.error is not None:
                raise call.error
            if ended:
                return None
            if self._turn.acquire(blocking=False):
                try:
                    self._driver = me
                    self._take_turn(call)
                finally:
                    self._driver = 0
                    self._release_turn()
                    self._settle()
            elif self._driver == me:
                raise RuntimeError("generate() must not be called from within a pass of its model")
            else:
                with self._news:
                    if self._turn.locked():  # its driver tells, unless Ctrl-C comes in between
                        self._news.wait(1.0)

    def _later(self, chore: Callable[[], None]) -> None:
        """Do it now, or after the turn that runs. Never waits: a finalizer may call it anywhere."""
        self._chores.append(chore)
        self._settle()

    def _settle(self) -> None:
        while self._chores and self._turn.acquire(blocking=False):
            try:
                self._chores[0]()
                self._chores.popleft()  # not before: Ctrl-C must not lose it, twice does no harm
            except BaseException as error:
                self._give_up(error)
                raise
            finally:
                self._release_turn()

    def _release_turn(self) -> None:
        self._turn.release()
        with self._news:
            self._news.notify_all()

    def _take_turn(self, call: Call) -> None:
        try:
            if not call.inbox and call.left:  # another driver may have been faster
                self._context.run(self._work)
        except BaseException as error:
            if not isinstance(error, Exception) or not self._touched:
                self._give_up(error)
                raise
            self._fail(self._touched, error)
        self._touched = []

    def _give_up(self, error: BaseException) -> None:
        """Fail all that run: Ctrl-C may have come in the middle of any bookkeeping."""
        self.workspace.cache.reset()
        for job in self._jobs():
            job.handle = None
        stopped = RuntimeError(f"all that ran was given up: {type(error).__name__}")
        self._fail((*self._group, *self._running), stopped)
        self._touched = []

    def _jobs(self) -> set[Job]:
        return {*self._waiting, *self._group, *self._running}

    def _enter(self, jobs: list[Job]) -> None:
        known = self._jobs()
        self._waiting.extend(job for job in jobs if job not in known)

    def _fail(self, jobs: Iterable[Job], error: BaseException) -> None:
        """Give up the calls of these jobs."""
        calls = {job.call for job in jobs}
        for call in calls:
            call.error = error
        self._end([job for job in self._jobs() if job.call in calls], findable=False)
        self._placed = None

    def _end(self, jobs: Collection[Job], findable: bool = True) -> None:
        ended = set(jobs)
        for job in self._jobs() & ended:
            job.call.left -= 1
            if job.handle is not None:
                keep = findable and job.findable
                self.workspace.cache.free(job.handle, job.inputs.page if keep else None)
                job.handle = None
        self._waiting = deque(job for job in self._waiting if job not in ended)
        self._group = [job for job in self._group if job not in ended]
        self._running = [job for job in self._running if job not in ended]
        if not self._group:
            self._passes, self._spans = None, []
        if not self._running:
            self._placed = None

    @torch.inference_mode()
    def _work(self) -> None:
        """One turn: passes over prompts and decode steps take turns themselves."""
        with torch.cuda.stream(self._stream):
            if not self._group:
                self._admit()
            if self._group and not (self._running and self._passed):
                self._passed, self._touched = True, list(self._group)
                self._prefill()
            elif self._running:
                self._passed, self._touched = False, self._running
                self._decode()
            elif self._waiting:  # room for each was checked, so pages were lost
                cache, job = self.workspace.cache, self._waiting[0]
                self._touched = [job]
                raise RuntimeError(
                    f"the cache must have {cache.pages_needed(job.max_tokens - 1)} free pages for "
                    f"request {job.request} when nothing runs, got {cache.num_free_pages} of "
                    f"{cache.num_pages}"
                )

    def _admit(self) -> None:
        """Begin a group: those in front that fit, up to one that needs what they will compute."""
        cache, group, begun = self.workspace.cache, [], set()
        for job in self._waiting:
            pages, missing = cache.find(job.inputs.shareable() if job.findable else ())
            full = len(self._running) + len(group) == MAX_ROWS
            if full or missing in begun or not cache.has_room(job.max_tokens - 1, pages):
                break
            if missing is not None:
                begun.add(missing)
            job.handle = cache.add(job.max_tokens - 1, pages)  # the last token is never stored
            job.num_cached = job.num_done = len(pages) * PAGE_SIZE
            group.append(job)
        self._group, self._passes = group, None
        for job in group:
            self._waiting.popleft()
            job.call.cached_tokens[job.request] = job.num_cached
            job.call.done["prefill"] += job.num_cached
            self.stats["prompt tokens"] += job.prompt.numel()
            self.stats["cached tokens"] += job.num_cached

    def _prefill(self) -> None:
        """One pass of the tower or of the decoder over the prompts of the group."""
        if self._passes is None:
            self._passes, self._stage = self._over_prompts(self._group), "vision"
        stage, calls, spans = self._stage, {job.call for job in self._group}, self._spans
        start, read = self._mark(), next(self._passes, True)
        spans.append((stage, calls, start, self._mark()))
        while read and spans:
            stage, calls, *edges = spans.pop()
            for call in calls:
                call.timings.add(stage, _seconds(*edges))

    def _over_prompts(self, group: list[Job]) -> Iterator[bool]:
        """The passes of a group, one between two yields; true if tokens were read after it."""
        _tell(group, "vision")
        yield False
        group = [job for job in group if job.handle is not None]  # without those that were stopped
        inputs, cached = [job.inputs for job in group], [job.num_cached for job in group]
        embedding = Embedding(self._model, inputs, cached, self.features)
        self.stats["cached items"] += embedding.num_hits
        for _ in embedding.calls(self._limits.max_patches_per_call, self.workspace.encode):
            self.stats["tower calls"] += 1
            self._tell_vision(group, embedding)
            yield False
        self._tell_vision(group, embedding)
        for job, start in zip(group, embedding.starts, strict=True):
            job.row, job.inputs.items = start - job.num_cached, []  # pixels are not needed again
        positions = [job.inputs.positions[:, job.num_cached :] for job in group]
        positions = torch.from_numpy(np.concatenate(positions, axis=1))
        inputs = embedding.hidden, upload(positions, self._device)
        self._stage, read = "prefill", False
        while pieces := self._pieces(group):
            _tell([job for job, _ in pieces], "prefill")
            yield read
            if pieces := self._pieces(group):  # some may have been stopped
                read = self._pass(pieces, *inputs)

    def _tell_vision(self, group: list[Job], embedding: Embedding) -> None:
        for job, tokens in zip(group, embedding.take_done(), strict=True):
            job.call.done["vision"] += tokens
        _tell(group, "vision")

    def _pieces(self, group: list[Job]) -> list[tuple[Job, int]]:
        """The next chunk of prompts, one run of rows: (job, so many of its tokens)."""
        pieces, room = [], self._limits.max_prefill_tokens
        for job in group:
            if job.handle is not None and job.left and room:
                pieces.append((job, min(job.left, room)))
                room -= pieces[-1][1]
            elif pieces:
                break
        return pieces

    def _pass(
        self, pieces: list[tuple[Job, int]], hidden: torch.Tensor, positions: torch.Tensor
    ) -> bool:
        """Run a chunk through the decoder; whether prompts ended in it, whose tokens were read."""
        cache, batch = self.workspace.cache, self.workspace.batch
        jobs, lengths = zip(*pieces, strict=True)
        layout = cache.append([job.handle for job in jobs], lengths)
        rows = slice(jobs[0].row + jobs[0].num_done, jobs[0].row + jobs[0].num_done + sum(lengths))
        out = self._model(hidden[rows], positions[:, rows], cache, layout)
        ready, last = [], []
        for (job, length), end in zip(pieces, itertools.accumulate(lengths), strict=True):
            job.num_done += length
            job.call.done["prefill"] += length
            if job.findable:
                cache.publish(job.handle, job.inputs.page)
            if not job.left:
                ready.append(job)
                last.append(out[end - 1 : end])
        if ready:
            batch.place(ready)
            batch.sample(self._lm_head(torch.cat(last)), batch.penalised)
            self._placed = None
            self._group = [job for job in self._group if job.left]
            self._running = self._running + ready
            self._collect(ready)
        return bool(ready)

    def _decode(self) -> None:
        started = time.perf_counter()
        running, workspace = self._running, self.workspace
        if self._placed != running:
            workspace.batch.place(running)
            self._placed = running
        longest = workspace.cache.advance([job.handle for job in running])
        workspace.step(self._model, self._lm_head, len(running), longest)
        self.stats["steps"] += 1
        self._collect(running)
        for call in {job.call for job in running}:
            call.timings.add("decode", time.perf_counter() - started)

    def _collect(self, jobs: list[Job]) -> None:
        """Read the tokens just sampled for the placed jobs; end those that have their last."""
        ended = []
        for job, token_id in zip(jobs, self.workspace.batch.tokens(len(jobs)), strict=True):
            if token_id < 0:
                error = RuntimeError(
                    f"logits of request {job.request} must hold a finite value, got none: the "
                    f"weights are broken, or {self._lm_head.weight.dtype} is too narrow for them"
                )
                self._fail([job], error)
                continue
            job.token_ids.append(token_id)
            reason = None
            if token_id in job.call.eos_token_ids:
                reason = "stop"
            elif job.prompt.numel() + len(job.token_ids) == job.max_tokens:
                reason = "length"
            job.call.inbox.append(Token(job.request, token_id, reason))
            if reason:
                ended.append(job)
        self._end(ended)

    def _mark(self) -> float | torch.cuda.Event:
        """Mark the edge of a stage: on a GPU by an event in its queue, so that nothing waits."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


def _tell(jobs: list[Job], stage: str) -> None:
    for call in {job.call for job in jobs}:
        call.tell(stage)


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
