"""The answering loop behind both doors: a batch's tokens, their text, and why each answer ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from keye_kernels import use_backend
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.scheduler import Scheduler


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


def answer(
    scheduler: Scheduler, drafts: Sequence[Draft], backend: str = "auto"
) -> Iterator[tuple[int, str]]:
    """Run a batch to its end and fill its drafts.

    Args:
        scheduler: Of the batch.
        drafts: One for each of its requests.
        backend: Serves the ops; "auto" leaves the choice to `keye_kernels.use_backend`.

    Yields:
        (request, the next piece of its text), whole characters, none of them empty.
    """
    started = time.perf_counter()
    tokens = iter(scheduler)
    while True:
        with chosen(backend):  # not across a yield: the caller has a choice too
            token = next(tokens, None)
        if token is None:
            return
        draft, piece = drafts[token.request], ""
        if not draft.token_ids:
            draft.first_token = time.perf_counter() - started
        draft.token_ids.append(token.token_id)
        if token.finish_reason:
            draft.finish_reason = token.finish_reason
        if text := draft.detokenizer:
            piece = text.add(token.token_id) + (text.finish() if token.finish_reason else "")
            if text.stopped:
                scheduler.stop(token.request)
                draft.finish_reason = "stop"
        if piece:
            yield token.request, piece


def chosen(backend: str) -> AbstractContextManager:
    """`use_backend`, where "auto" leaves the choice as it is."""
    return nullcontext() if backend == "auto" else use_backend(backend)
