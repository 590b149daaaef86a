"""What `Keye` returns: an answer, the tokens it took, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; image and video tokens are part of the prompt's."""

    prompt_tokens: int
    image_tokens: int
    video_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds of the run this request was part of; ``first_token`` is of this request, from the
    start of its processing, without the time a stream lay idle before it was read.

    ``cuda_graphs``: forward passes were captured as CUDA graphs where they came up again.
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
        text: What to show: without its thinking and analysis parts, and without their tags.
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
