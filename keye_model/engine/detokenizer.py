"""Text from tokens as they are generated: whole characters only, cut at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one growing answer.

    Text is held back while it could still change: bytes of an unfinished UTF-8 character, and an
    end that may become a stop string. Special tokens give no text.

    Args:
        tokenizer: The checkpoint's.
        stop_strings: The text ends before the first of these.

    Raises:
        ValueError: A stop string is empty or not a string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: str | Sequence[str] | None = None
    ) -> None:
        if isinstance(stop_strings, str):
            stop_strings = (stop_strings,)
        stop_strings = () if stop_strings is None else stop_strings
        if not isinstance(stop_strings, Sequence):
            raise ValueError(f"stop_strings must be strings, got {stop_strings!r}")
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings must hold non-empty strings, got {stop!r}")
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stop_strings)
        self._token_ids: list[int] = []
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text returned so far."""
        return self._decoded[: self._emitted]

    def add(self, token_id: int) -> str:
        """Take one token; return the text that became certain, often empty."""
        self._token_ids.append(token_id)
        return self._emit(self._stream.step(self._tokenizer, token_id) or "", final=False)

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        return self._emit(whole[len(self._decoded) :], final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._decoded += piece
        found = [self._decoded.find(stop, self._emitted) for stop in self._stops]
        found = [position for position in found if position >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._decoded) - (0 if final else self._held())
        new, self._emitted = self._decoded[self._emitted : end], max(end, self._emitted)
        return new

    def _held(self) -> int:
        """Length of the longest end of the text that is the start of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._decoded) - self._emitted), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stops):
                return length
        return 0
