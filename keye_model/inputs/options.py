"""What a caller may ask of the answers: the keywords of every `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from keye_model.inputs.keywords import refuse


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keywords, for editors and type checkers."""

    max_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are generated; `keye_model.engine.sampling` checks the values.

    Attributes:
        max_new_tokens: At most this many tokens for each answer, fewer where the context ends.
        do_sample: False is greedy. None follows the checkpoint's `generation_config.json`, or
            samples if one of the next three is given.
        temperature: Divides the logits; 0 is greedy. None follows the checkpoint, as for the next
            three.
        top_k: Sample among the k most likely tokens; 0 and -1 are off.
        top_p: In (0, 1]: sample among the most likely tokens that together reach it; 1 is off.
        repetition_penalty: Logits of tokens seen in prompt or answer are divided by it when
            positive, multiplied when negative; 1 is off.
        seed: One for all conversations (equal ones then get equal answers), or one for each. None
            draws them from torch's global generator.
        stop_strings: An answer ends with the first of these in its text.
    """

    max_new_tokens: int = 512
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None

    @classmethod
    def of(cls, keywords: Mapping[str, Any], *others: str) -> SamplingOptions:
        """Options from the keywords of a call, which also takes ``others``.

        Raises:
            TypeError: A keyword is unknown.
        """
        known = [field.name for field in fields(cls)]
        unknown = {name: keywords[name] for name in keywords if name not in known}
        refuse(unknown, ", ".join([*known, *others]))
        return cls(**keywords)
