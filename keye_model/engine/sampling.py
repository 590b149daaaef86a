"""How the next token is chosen: one request's parameters, and a checkpoint's defaults for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch

from keye_model.checkpoint.hub import end_ids, read_json

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SamplingParams:
    """One request's parameters.

    Attributes:
        max_new_tokens: At most this many tokens are generated.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together reach this probability; 1 keeps all.
        repetition_penalty: Logits of tokens seen in prompt or answer are divided by it when
            positive, multiplied when negative; 1 changes nothing.
        seed: Drives a counter-based generator, so that a request's tokens depend on its own seed
            and never on its neighbours in the batch.

    Raises:
        ValueError: A value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            "max_new_tokens", self.max_new_tokens, Integral, "a positive integer", lambda x: x > 0
        )
        _check("temperature", self.temperature, Real, "at least 0", lambda x: x >= 0)
        _check("top_k", self.top_k, Integral, "an integer of at least 0", lambda x: x >= 0)
        _check("top_p", self.top_p, Real, "in (0, 1]", lambda x: 0 < x <= 1)
        _check("repetition_penalty", self.repetition_penalty, Real, "positive", lambda x: x > 0)
        _check("seed", self.seed, Integral, "an integer in [0, 2^63)", lambda x: 0 <= x < 2**63)
        # A step keeps them in tensors of int64 and fp32.
        _check("top_k", self.top_k, Integral, "an integer below 2^63", lambda x: x < 2**63)
        _check("temperature", self.temperature, Real, "at most 3.4e38", lambda x: x <= _LARGEST)
        _check(
            "repetition_penalty", self.repetition_penalty, Real, "between 1.2e-38 and 3.4e38",
            lambda x: _SMALLEST <= x <= _LARGEST,
        )  # fmt: skip


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generation_config.json` says; the published values where it is silent."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    do_sample: bool = True
    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationDefaults:
        """Read `generation_config.json`; `end_ids` says what holds where it names no ids.

        Raises:
            ValueError: No file names an id that ends an answer.
        """
        raw = read_json(directory, "generation_config.json", required=False) or {}
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        return cls(*end_ids(directory), **given)

    def params(
        self,
        *,
        max_new_tokens: int,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> SamplingParams:
        """One request's parameters: what the caller gave, else these defaults.

        ``do_sample=False`` is greedy: top_k and top_p, which keep the most likely token, change
        nothing then, nor does a temperature of 0 or 1. Left out, sampling is on when the caller
        gives any of the three, else as the checkpoint says. ``top_k=-1`` is off, like 0. A seed
        left out is drawn from torch's global generator.

        Raises:
            ValueError: A value is out of its range, ``do_sample=True`` with temperature 0, or
                ``do_sample=False`` with one that asks for sampling.
        """
        if do_sample not in (None, True, False):
            raise ValueError(f"do_sample must be True, False or None, got {do_sample!r}")
        if do_sample and temperature == 0:
            raise ValueError("temperature must be positive when do_sample is True, got 0")
        if do_sample is None:
            do_sample = self.do_sample or (temperature, top_k, top_p) != (None, None, None)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        params = SamplingParams(
            max_new_tokens,
            self.temperature if temperature is None else temperature,
            self.top_k if top_k is None else 0 if top_k == -1 else top_k,
            self.top_p if top_p is None else top_p,
            penalty,
            seed,
        )
        if do_sample:
            return params
        if temperature not in (None, 0, 1):
            raise ValueError(
                f"temperature must be left out when do_sample is False, got {temperature!r}"
            )
        return SamplingParams(max_new_tokens, repetition_penalty=penalty, seed=seed)


def _check(name: str, value: object, kind: type, rule: str, holds: Callable) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not -math.inf < value < math.inf or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
