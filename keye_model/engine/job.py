"""One request in the engine, and the call it came with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from keye_model.engine.decode_batch import Sequence
from keye_model.inputs.content import PromptInputs


@dataclass(frozen=True)
class Token:
    """A generated token of a request; ``finish_reason`` ("stop", "length") on its last."""

    request: int
    token_id: int
    finish_reason: str | None = None


@dataclass
class Timings:
    """Seconds spent in each stage, of all requests that ran in it together."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    def add(self, stage: str, seconds: float) -> None:
        setattr(self, stage, getattr(self, stage) + seconds)


@dataclass(eq=False)
class Call:
    """What the engine knows of a call; it holds nothing of its client, who may be gone.

    Attributes:
        eos_token_ids, cached_tokens: What ends a request; tokens of each that were found.
        totals, done: Tokens of "vision" and of "prefill", of all its prompts and so far.
        tells: Whether `tell` shall put (stage, done, total) into the inbox.
        left: Requests that have not ended.
        inbox, error: What the client has not taken yet; why the engine gave the call up.
    """

    eos_token_ids: frozenset[int]
    cached_tokens: list[int]
    totals: dict[str, int]
    tells: bool
    left: int = 0
    timings: Timings = field(default_factory=Timings)
    inbox: deque[Token | tuple[str, int, int]] = field(default_factory=deque)
    error: BaseException | None = None
    done: dict[str, int] = field(default_factory=lambda: {"vision": 0, "prefill": 0})
    _told: tuple[str, int, int] | None = None

    def tell(self, stage: str) -> None:
        news = stage, self.done[stage], self.totals[stage]
        if self.tells and self.totals[stage] and news != self._told:
            self.inbox.append(news)
            self._told = news


@dataclass(eq=False, kw_only=True)
class Job(Sequence):
    """A request; its handle is None unless it has pages.

    Attributes:
        call, inputs: What it is part of, and its prompt.
        max_tokens, findable: Prompt and answer at most; whether others may find its pages.
        num_cached, num_done: Prompt tokens that were found in the cache, and that are there now.
        row: That of its token 0 among the new tokens of its group; negative if that was found.
    """

    call: Call
    inputs: PromptInputs
    max_tokens: int
    findable: bool
    num_cached: int = 0
    num_done: int = 0
    row: int = 0

    def __post_init__(self) -> None:
        self.token_ids = self.inputs.answer

    @property
    def left(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return len(self.prompt) - self.num_done
