"""How the next token is chosen: the parameters of each request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch

from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.inputs.options import SamplingOptions

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SamplingParams:
    """One request's parameters: fields of `SamplingOptions` with a value each, 0 for top_k off.

    The seed drives a counter-based generator, so that a request's tokens depend on its own seed and
    never on its neighbours in the batch.

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
        # A decode step keeps them in tensors of int64 and fp32.
        _check("top_k", self.top_k, Integral, "an integer below 2^63", lambda x: x < 2**63)
        _check("temperature", self.temperature, Real, "at most 3.4e38", lambda x: x <= _LARGEST)
        _check(
            "repetition_penalty", self.repetition_penalty, Real, "between 1.2e-38 and 3.4e38",
            lambda x: _SMALLEST <= x <= _LARGEST,
        )  # fmt: skip


def sampling_params(
    options: SamplingOptions, defaults: GenerationDefaults, num_requests: int
) -> list[SamplingParams]:
    """Each request's parameters: what the caller gave, else the checkpoint's defaults.

    ``do_sample=False`` is greedy: top_k and top_p, which keep the most likely token, change nothing
    then, nor does a temperature of 0 or 1. Left out, sampling is on when the caller gives any of
    the three, else as the checkpoint says. ``top_k=-1`` is off, like 0. A seed left out is drawn
    from torch's global generator.

    Raises:
        ValueError: A value is out of its range, ``do_sample=True`` with temperature 0,
            ``do_sample=False`` with one that asks for sampling, or another number of seeds.
    """
    seed, temperature, do_sample = options.seed, options.temperature, options.do_sample
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * num_requests
    if len(seeds) != num_requests:
        raise ValueError(f"seed must be one value or {num_requests} values, got {len(seeds)}")
    if do_sample not in (None, True, False):
        raise ValueError(f"do_sample must be True, False or None, got {do_sample!r}")
    if do_sample and temperature == 0:
        raise ValueError("temperature must be positive when do_sample is True, got 0")
    if do_sample is None:
        given = (temperature, options.top_k, options.top_p)
        do_sample = defaults.do_sample or given != (None, None, None)

    def value(name: str) -> Any:
        given = getattr(options, name)
        return getattr(defaults, name) if given is None else given

    params = SamplingParams(
        options.max_new_tokens,
        value("temperature"),
        0 if options.top_k == -1 else value("top_k"),
        value("top_p"),
        value("repetition_penalty"),
    )
    if not do_sample:
        if temperature not in (None, 0, 1):
            raise ValueError(
                f"temperature must be left out when do_sample is False, got {temperature!r}"
            )
        params = replace(params, temperature=0.0, top_k=0, top_p=1.0)
    drawn = (int(torch.randint(2**63 - 1, ())) if one is None else one for one in seeds)
    return [replace(params, seed=one) for one in drawn]


def _check(name: str, value: object, kind: type, rule: str, holds: Callable) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not -math.inf < value < math.inf or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
