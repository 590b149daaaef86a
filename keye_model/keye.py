"""The façade: messages in, answers out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch

from keye_kernels import backends, use_backend
from keye_model.answer import Answer, Timings, Usage
from keye_model.conditional_generation import KeyeForConditionalGeneration, resolve_device
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.plan import Limits
from keye_model.engine.scheduler import Scheduler
from keye_model.inputs.request import Progress, Request
from keye_model.processing.chat import Messages, Thinking, parse_answer
from keye_model.processing.processor import KeyeProcessor


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
        cuda_graphs: bool = True,
    ) -> None:
        if not isinstance(limits, Limits | None):
            raise TypeError(f"limits must be a Limits, got {type(limits).__name__}")
        if not isinstance(cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be True or False, got {cuda_graphs!r}")
        check_backend(backend, model.device)
        self.model = model
        self.processor = processor
        self.backend = backend
        self.limits = limits or Limits()
        self.cuda_graphs = cuda_graphs

    def __repr__(self) -> str:
        name, dtype = self.model.config.variant.name, str(self.model.dtype).removeprefix("torch.")
        return f"Keye({name}, {dtype}, {self.model.device}, backend={self.backend!r})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        backend: str = "auto",
        limits: Limits | None = None,
        cuda_graphs: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        local_files_only: bool = False,
    ) -> Keye:
        """Load a checkpoint of either line.

        Args:
            path_or_id: A directory in the layout of the Hub, or a Hub id.
            dtype: Of the parameters; "auto" is the checkpoint's.
            device: "auto" is a GPU if there is one, else the CPU.
            backend: Backend of the ops of this object: "cuda", "triton", "reference", or "auto",
                which leaves the choice to `keye_kernels.use_backend`.
            limits: Bounds of memory.
            cuda_graphs: On a GPU capture decode steps, and the tower's layers for small images, and
                replay them, which saves the time of their launches; the results are the same. Up to
                8192 tokens of cache then stay with the model between runs.
            min_pixels, max_pixels: Of an image, instead of the checkpoint's own bounds.
            local_files_only: Never touch the network.

        Raises:
            FileNotFoundError: The checkpoint or one of its files is missing.
            ValueError: A file is not what it should be.
            RuntimeError: The device or the backend is not there.
        """
        device = resolve_device("device", device)
        check_backend(backend, device)
        local = {"local_files_only": local_files_only}
        processor = KeyeProcessor.from_pretrained(
            path_or_id, min_pixels=min_pixels, max_pixels=max_pixels, **local
        )
        model = KeyeForConditionalGeneration.from_pretrained(
            path_or_id, dtype=dtype, device_map=device, **local
        )
        return cls(model, processor, backend=backend, limits=limits, cuda_graphs=cuda_graphs)

    @overload
    def generate(self, messages: Messages | Request, **options: Any) -> Answer: ...

    @overload
    def generate(self, messages: Sequence[Messages | Request], **options: Any) -> list[Answer]: ...

    def generate(
        self,
        messages: Messages | Request | Sequence[Messages | Request],
        *,
        max_new_tokens: int = 512,
        thinking: Thinking = "auto",
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Answer | list[Answer]:
        """Answer one conversation, or several in one packed batch.

        Args:
            messages: A conversation, or a list of them. A conversation is a list of ``{"role":
                "system" | "user" | "assistant", "content": …}``; content is a string or a list of
                items ``{"type": "text", "text": …}``, ``{"type": "image", "image": source}``,
                ``{"type": "video", "video": source}``. Sources, and what else an item may say
                (``max_pixels``, ``fps``, …), stand in the README. What `processor.request` made of
                a conversation is taken too.
            max_new_tokens: At most this many tokens for each answer, fewer where the context ends.
            thinking: True asks for thinking, False for none; "auto" leaves it to the model.
            do_sample: False is greedy; None follows the checkpoint, or samples if one of the next
                three is given.
            temperature, top_k, top_p: 0 and more; 0 (off) and more; in (0, 1]. None follows the
                checkpoint.
            repetition_penalty: Positive, 1 is off; None follows the checkpoint.
            seed: One for all conversations (equal ones then get equal answers), or one for each.
                None draws them from torch's global generator.
            stop_strings: An answer ends before the first of these.
            progress: Called as ``progress(stage, done, total)`` while the prompt is read: "frames"
                of a video that is decoded, then tokens that were handed to the "vision" tower and
                to the decoder's "prefill". A GPU may still be at work on these.

        Returns:
            An `Answer`, or a list of them in the order of the conversations.

        Raises:
            ValueError, TypeError, FileNotFoundError: A message, a source or an option is wrong.
        """
        several = _is_list(messages) and len(messages) > 0
        several = several and (_is_list(messages[0]) or isinstance(messages[0], Request))
        run = _Run(
            self,
            list(messages) if several else [messages],
            thinking,
            stop_strings,
            seed,
            progress,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        for _ in run.pieces():
            pass
        return run.answers if several else run.answers[0]

    def stream(
        self,
        messages: Messages | Request,
        *,
        max_new_tokens: int = 512,
        thinking: Thinking = "auto",
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Stream:
        """Answer one conversation piece by piece; arguments as in `generate`.

        Returns:
            An iterator over strings, whole characters each, tags included; its ``answer`` is there
            when it is exhausted. The model runs only when pieces are asked for; pictures and
            videos are read, and mistakes raised, here.
        """
        run = _Run(
            self,
            [messages],
            thinking,
            stop_strings,
            seed,
            progress,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        return Stream(run)


class Stream(Iterator[str]):
    """The pieces of one answer as they are made.

    Attributes:
        answer: The whole `Answer`; None until the last piece was taken.
    """

    def __init__(self, run: _Run) -> None:
        self._run: _Run | None = run
        self._pieces = run.pieces()
        self.answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)[1]
        except StopIteration:
            if self._run is not None and self._run.answers:
                self.answer = self._run.answers[0]
            self.close()
            raise
        except BaseException:
            self.close()  # free the cache: the caller may have caught out-of-memory
            raise

    def close(self) -> None:
        """Give the answer up and free what it holds; taken pieces stay as they are."""
        self._pieces.close()
        self._run = None


class _Run:
    """One batch from messages to answers."""

    def __init__(
        self,
        keye: Keye,
        conversations: list[Messages | Request],
        thinking: Thinking,
        stop_strings: str | Sequence[str] | None,
        seed: int | Sequence[int] | None,
        progress: Progress | None,
        **sampling: Any,
    ) -> None:
        self.answers: list[Answer] = []
        self._backend = keye.backend
        started = time.perf_counter()
        defaults = keye.model.generation_config
        seeds = list(seed) if _is_list(seed) else [seed] * len(conversations)
        if len(seeds) != len(conversations):
            raise ValueError(
                f"seed must be one value or {len(conversations)} values, got {len(seeds)}"
            )
        params = [defaults.params(seed=one, **sampling) for one in seeds]
        self._texts = [Detokenizer(keye.processor.tokenizer, stop_strings) for _ in seeds]
        context = keye.model.config.text_config.max_position_embeddings
        requests = _requests(keye.processor, conversations, thinking, context - 1, progress)
        merge = keye.model.config.vision_config.spatial_merge_size**2
        self._prompts = [_prompt_usage(request, merge) for request in requests]
        self._processing = time.perf_counter() - started
        self._scheduler = Scheduler(
            keye.model.model,
            keye.model.lm_head,
            requests,
            params,
            eos_token_ids=defaults.eos_token_ids,
            limits=keye.limits,
            workspaces=keye.model.workspaces if keye.cuda_graphs else None,
            progress=progress,
        )

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Run the batch; yields (request, piece of its text) and fills ``answers`` at the end."""
        started = time.perf_counter()
        token_ids: list[list[int]] = [[] for _ in self._texts]
        reasons = ["length"] * len(self._texts)
        first = [0.0] * len(self._texts)
        tokens = iter(self._scheduler)
        while True:
            with _backend(self._backend):  # not across a yield: the caller has a choice too
                token = next(tokens, None)
            if token is None:
                break
            k = token.request
            if not token_ids[k]:
                first[k] = self._processing + time.perf_counter() - started
            token_ids[k].append(token.token_id)
            piece = self._texts[k].add(token.token_id)
            if self._texts[k].stopped:
                self._scheduler.stop(k)
                reasons[k] = "stop"
            elif token.finish_reason:
                reasons[k] = token.finish_reason
                piece += self._texts[k].finish()
                if self._texts[k].stopped:
                    reasons[k] = "stop"
            if piece:
                yield k, piece
        for k, ids in enumerate(token_ids):
            self.answers.append(self._answer(k, ids, reasons[k], first[k]))

    def _answer(self, k: int, token_ids: list[int], reason: str, first: float) -> Answer:
        stages = self._scheduler.timings
        timings = Timings(
            self._processing,
            stages.vision,
            stages.prefill,
            stages.decode,
            first,
            self._scheduler.cuda_graphs,
        )
        parts = parse_answer(self._texts[k].text)
        usage = Usage(*self._prompts[k], len(token_ids))
        return Answer(
            parts.text, parts.thinking, parts.analysis, tuple(token_ids), reason, usage, timings
        )


def _requests(
    processor: KeyeProcessor,
    conversations: list[Messages | Request],
    thinking: Thinking,
    max_tokens: int,
    progress: Progress | None,
) -> list[Request]:
    prepared = [isinstance(one, Request) for one in conversations]
    if not any(prepared):
        return processor.requests(
            conversations, thinking=thinking, max_tokens=max_tokens, progress=progress
        )
    if not all(prepared) or thinking != "auto":
        raise TypeError("messages must be all conversations, or all requests with thinking 'auto'")
    return conversations


def _prompt_usage(request: Request, merge: int) -> tuple[int, int, int]:
    """Prompt, image and video tokens."""
    grids = (request.image_grid_thw, request.video_grid_thw)
    images, videos = (sum(t * h * w for t, h, w in grid) // merge for grid in grids)
    return request.input_ids.numel(), images, videos


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _backend(name: str) -> AbstractContextManager:
    return nullcontext() if name == "auto" else use_backend(name)


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that cannot serve the model, rather than in the first answer."""
    with _backend(name):
        for op, served in backends(device.type).items():
            if served.backend is None and op != "mrope_":  # the model rotates in another op
                why = [*served.why_not.values()][-1]  # of the only candidate, after the others
                raise RuntimeError(f"backend must serve {op}, got {name!r}, which does not: {why}")
