"""The answering loop behind both doors: a batch's tokens, their text, and why each answer ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from keye_model.engine.calls import Run
from keye_model.engine.detokenizer import Detokenizer


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
