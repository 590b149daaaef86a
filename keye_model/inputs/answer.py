"""What `Keye` returns: an answer, its token counts and its timings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: Image and video tokens included.
        cached_tokens: Those of the prompt that earlier requests had left in the cache. It is not
            compared: it says what ran before, not what was asked and answered.
    """

    prompt_tokens: int
    image_tokens: int
    video_tokens: int
    new_tokens: int
    cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Timings:
    """Seconds of the whole run that this request was part of. ``first_token`` is the request's own,
    from the start of its processing, without the time before a stream was first read.

    ``cuda_graphs``: forward passes that ran again were captured as CUDA graphs.
    """

    processing: float
    vision: float
    prefill: float
    decode: float
    first_token: float
    cuda_graphs: bool


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Attributes:
        text: The answer without its thinking and analysis parts and their tags.
        thinking: Between ``<think>`` and ``</think>``; None if the answer has no such part.
        analysis: Between ``<analysis>`` and ``</analysis>``; None if there is none.
        token_ids: All generated ids, with the stop id if there was one.
        finish_reason: "stop" (a stop id or a stop string) or "length".
    """

    text: str
    thinking: str | None
    analysis: str | None
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
