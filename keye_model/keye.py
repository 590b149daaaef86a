"""The façade: messages in, answers out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from keye_kernels import backends, use_backend
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.detokenizer import Detokenizer
from keye_model.generation import Generation, Limits
from keye_model.inputs import Request
from keye_model.processing.chat import parse_answer
from keye_model.processing.processor import KeyeProcessor

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; image and video tokens are part of the prompt's."""

    prompt_tokens: int
    image_tokens: int
    video_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds of the run this request was part of, and to this request's first token."""

    processing: float
    vision: float
    prefill: float
    decode: float
    first_token: float


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


class Keye:
    """A checkpoint, ready to answer.

    >>> keye = Keye.from_pretrained("Kwai-Keye/Keye-VL-8B-Preview")
    >>> image = {"type": "image", "image": "photo.jpg"}
    >>> question = {"type": "text", "text": "Describe this image."}
    >>> print(keye.generate([{"role": "user", "content": [image, question]}]).text)
    """

    def __init__(
        self,
        model: KeyeForConditionalGeneration,
        processor: KeyeProcessor,
        *,
        backend: str = "auto",
        limits: Limits | None = None,
    ) -> None:
        _check_backend(backend)
        self.model = model
        self.processor = processor
        self.backend = backend
        self.limits = limits or Limits()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        backend: str = "auto",
        limits: Limits | None = None,
        local_files_only: bool = False,
    ) -> Keye:
        """Load a checkpoint of either line.

        Args:
            path_or_id: A directory in the layout of the Hub, or a Hub id.
            dtype: Of the parameters; "auto" is the checkpoint's.
            device: "auto" is a GPU if there is one, else the CPU.
            backend: Who serves the ops of this object: "cuda", "triton", "reference", or "auto",
                which leaves the choice to `keye_kernels.use_backend`.
            limits: Bounds of memory.
            local_files_only: Never touch the network.

        Raises:
            FileNotFoundError: The checkpoint or one of its files is missing.
            ValueError: A file is not what it should be.
            RuntimeError: The device or the backend is not there.
        """
        _check_backend(backend)
        processor = KeyeProcessor.from_pretrained(path_or_id, local_files_only=local_files_only)
        model = KeyeForConditionalGeneration.from_pretrained(
            path_or_id, dtype=dtype, device_map=device, local_files_only=local_files_only
        )
        return cls(model, processor, backend=backend, limits=limits)

    def generate(
        self,
        messages: Messages | Sequence[Messages],
        *,
        max_new_tokens: int = 512,
        thinking: Literal["auto"] | bool = "auto",
        stop_strings: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Answer | list[Answer]:
        """Answer one conversation, or several in one packed batch.

        Args:
            messages: A conversation, or a list of them. Each message is ``{"role": …, "content":
                …}``; content is a string or a list of items of type text, image or video.
            max_new_tokens: At most this many tokens for each answer.
            thinking: True and False ask for it or against it; "auto" leaves it to the model.
            stop_strings: An answer ends before the first of these.
            sampling: do_sample, temperature, top_k, top_p, repetition_penalty, seed, as in
                `GenerationDefaults.params`; what is left out follows the checkpoint.

        Returns:
            An `Answer`, or a list of them in the order of the conversations.

        Raises:
            ValueError, TypeError, FileNotFoundError: A message, a file or a parameter is wrong.
        """
        listed = isinstance(messages, (list, tuple)) and len(messages) > 0
        several = listed and isinstance(messages[0], (list, tuple))
        conversations = list(messages) if several else [messages]
        run = _Run(self, conversations, max_new_tokens, thinking, stop_strings, sampling)
        for _ in run:
            pass
        return run.answers if several else run.answers[0]

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 512,
        thinking: Literal["auto"] | bool = "auto",
        stop_strings: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Stream:
        """Answer one conversation piece by piece; arguments as in `generate`.

        Returns:
            An iterable of strings, whole characters each, tags included; its ``answer`` is there
            when it is exhausted.
        """
        return Stream(_Run(self, [messages], max_new_tokens, thinking, stop_strings, sampling))


def _backend(name: str) -> AbstractContextManager:
    return nullcontext() if name == "auto" else use_backend(name)


def _check_backend(name: str) -> None:
    """Refuse a backend that cannot serve here and now, rather than in the first answer."""
    with _backend(name):
        for op, served in backends().items():
            if served.backend is None:
                raise RuntimeError(f"backend {name!r} cannot serve {op}: {served.why_not[name]}")


class Stream:
    """The pieces of one answer as they are made; ``answer`` is None until the last of them."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        for _, piece in self._run:
            yield piece
        self.answer = self._run.answers[0]


class _Run:
    """One batch from messages to answers; iterates over (request, piece of text)."""

    def __init__(
        self,
        keye: Keye,
        conversations: Sequence[Messages],
        max_new_tokens: int,
        thinking: Literal["auto"] | bool,
        stop_strings: str | Sequence[str],
        sampling: dict[str, Any],
    ) -> None:
        self.answers: list[Answer] = []
        self._backend = keye.backend
        self._started = time.perf_counter()
        defaults, tokenizer = keye.model.generation_config, keye.processor.tokenizer
        params = [defaults.params(max_new_tokens=max_new_tokens, **sampling) for _ in conversations]
        self._texts = [Detokenizer(tokenizer, stop_strings) for _ in conversations]
        self._requests = [keye.processor.request(c, thinking=thinking) for c in conversations]
        self._processing = time.perf_counter() - self._started
        self._config = keye.model.config
        self._generation = Generation(
            keye.model.model,
            keye.model.lm_head,
            self._requests,
            params,
            eos_token_ids=defaults.eos_token_ids,
            limits=keye.limits,
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        token_ids: list[list[int]] = [[] for _ in self._requests]
        reasons = ["length"] * len(self._requests)
        first: list[float] = [0.0] * len(self._requests)
        tokens = iter(self._generation)
        while True:
            with _backend(self._backend):  # not across a yield: the caller has a choice too
                token = next(tokens, None)
            if token is None:
                break
            k = token.request
            if not token_ids[k]:
                first[k] = time.perf_counter() - self._started
            token_ids[k].append(token.token_id)
            piece = self._texts[k].add(token.token_id)
            if self._texts[k].stopped:
                self._generation.stop(k)
                reasons[k] = "stop"
            elif token.finish_reason:
                reasons[k] = token.finish_reason
                piece += self._texts[k].finish()
            if piece:
                yield k, piece
        for k, request in enumerate(self._requests):
            self.answers.append(self._answer(k, request, token_ids[k], reasons[k], first[k]))

    def _answer(
        self, k: int, request: Request, token_ids: list[int], reason: str, first: float
    ) -> Answer:
        merge = self._config.vision_config.spatial_merge_size**2
        images = sum(t * h * w for t, h, w in request.image_grid_thw) // merge
        videos = sum(t * h * w for t, h, w in request.video_grid_thw) // merge
        usage = Usage(request.input_ids.numel(), images, videos, len(token_ids))
        stages = self._generation.timings
        timings = Timings(self._processing, stages.vision, stages.prefill, stages.decode, first)
        parts = parse_answer(self._texts[k].text)
        return Answer(
            parts.text, parts.thinking, parts.analysis, tuple(token_ids), reason, usage, timings
        )
