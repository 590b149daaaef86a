"""The façade: messages in, answers out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from keye_kernels import backends, use_backend
from keye_model.chat import Chat
from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.conditional_generation import KeyeForConditionalGeneration, resolve_device
from keye_model.engine.calls import Draft, answer
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.memory import Limits
from keye_model.engine.sampling import sampling_params
from keye_model.inputs.answer import Answer, Timings, Usage
from keye_model.inputs.options import SamplingKeywords, SamplingOptions
from keye_model.inputs.request import Progress, Request, num_patches
from keye_model.processing.chat import Messages, Thinking, parse_answer
from keye_model.processing.processor import KeyeProcessor

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AnswerKeywords(SamplingKeywords, total=False):
    """Keywords of `Keye.generate`, for editors and type checkers."""

    thinking: Thinking
    progress: Progress | None


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
        cache: bool = True,
    ) -> None:
        if not isinstance(limits, Limits | None):
            raise TypeError(f"limits must be a Limits, got {type(limits).__name__}")
        for name, switch in (("cuda_graphs", cuda_graphs), ("cache", cache)):
            if not isinstance(switch, bool):
                raise TypeError(f"{name} must be True or False, got {switch!r}")
        check_backend(backend, model.device)
        self.model = model
        self.processor = processor
        self.backend = backend
        self.limits = limits or Limits()
        self.cuda_graphs = cuda_graphs
        self.cache = cache
        if not cache:
            processor.source_cache.max_bytes = 0

    def __repr__(self) -> str:
        name, dtype = self.model.config.variant.name, str(self.model.dtype).removeprefix("torch.")
        return f"Keye({name}, {dtype}, {self.model.device}, backend={self.backend!r})"

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike | Checkpoint,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        backend: str = "auto",
        limits: Limits | None = None,
        cuda_graphs: bool = True,
        cache: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        local_files_only: bool = False,
    ) -> Keye:
        """Load a checkpoint of either line.

        Args:
            path_or_id: A directory in the layout of the Hub, a Hub id, or a `Checkpoint`, which has
                its own ``local_files_only``. So for the other classes' `from_pretrained`.
            dtype: Of the parameters; "auto" is the checkpoint's.
            device: "auto" is a GPU if there is one, else the CPU.
            backend: Backend of the ops of this object: "cuda", "triton", "reference", or "auto",
                which leaves the choice to `keye_kernels.use_backend`.
            limits: Bounds of memory.
            cuda_graphs: On a GPU capture decode steps, and the tower's layers for small images, and
                replay them, which saves the time of their launches; the results are the same.
            cache: Keep what requests leave, and find it again by its content: keys and values of
                prompts and answers, features of pictures and videos, and the patches of files, URLs
                and bytes. A later turn of a conversation then computes only what is new.
            min_pixels, max_pixels: Of an image, instead of the checkpoint's own bounds.
            local_files_only: Never touch the network.

        Raises:
            FileNotFoundError: The checkpoint or one of its files is missing.
            ValueError: A file is not what it should be.
            RuntimeError: The device or the backend is not there.
        """
        device = resolve_device("device", device)
        check_backend(backend, device)
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        processor = KeyeProcessor.from_pretrained(
            checkpoint, min_pixels=min_pixels, max_pixels=max_pixels
        )
        model = KeyeForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, device_map=device
        )
        return cls(
            model,
            processor,
            backend=backend,
            limits=limits,
            cuda_graphs=cuda_graphs,
            cache=cache,
        )

    def clear_cache(self) -> None:
        """Drop what requests have left to be found again."""
        self.model.engines.clear_cache()
        self.processor.source_cache.clear()

    def warm_up(
        self, *, batch_sizes: Sequence[int] = (1,), images: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Compile kernels, and capture CUDA graphs, before the first request needs them.

        What was kept to be found again is dropped.

        Args:
            batch_sizes: Numbers of requests that will decode at once.
            images: Heights and widths, in pixels, of pictures to come.

        Raises:
            ValueError: A number is not a positive int. Nothing runs then.
        """
        for name, numbers in (("batch_sizes", batch_sizes), ("images", sum(images, ()))):
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                    raise ValueError(f"{name} must hold positive ints, got {number!r}")
        greedy: AnswerKeywords = {"do_sample": False, "max_new_tokens": 4}
        conversations: list[list[Messages]] = [
            [[{"role": "user", "content": f"{index}"}] for index in range(size)]
            for size in batch_sizes
        ]
        for height, width in images:
            picture = {"type": "image", "image": np.zeros((height, width, 3), np.uint8)}
            conversations.append([[{"role": "user", "content": [picture]}]])
        for batch in conversations:
            for _ in range(2):  # the first launches compile, the second is captured
                self.clear_cache()
                self.generate(batch, **greedy)
        self.clear_cache()

    @overload
    def generate(
        self, messages: Messages | Request, **options: Unpack[AnswerKeywords]
    ) -> Answer: ...

    @overload
    def generate(
        self, messages: Sequence[Messages | Request], **options: Unpack[AnswerKeywords]
    ) -> list[Answer]: ...

    def generate(
        self,
        messages: Messages | Request | Sequence[Messages | Request],
        *,
        thinking: Thinking = "auto",
        progress: Progress | None = None,
        **options: Unpack[SamplingKeywords],
    ) -> Answer | list[Answer]:
        """Answer one conversation, or several in one packed batch.

        Args:
            messages: A conversation, or a list of them. A conversation is a list of ``{"role":
                "system" | "user" | "assistant", "content": …}``; content is a string or a list of
                items ``{"type": "text", "text": …}``, ``{"type": "image", "image": source}``,
                ``{"type": "video", "video": source}``. Sources, and what else an item may say
                (``max_pixels``, ``fps``, …), stand in the README. What `processor.request` made of
                a conversation is taken too.
            thinking: True asks for thinking, False for none; "auto" leaves it to the model.
            progress: Called as ``progress(stage, done, total)`` while the prompt is read: "frames"
                of a video that is decoded, then tokens that were handed to the "vision" tower and
                to the decoder's "prefill". A GPU may still be at work on these.
            options: Fields of `SamplingOptions`: ``max_new_tokens`` (512, fewer where the context
                ends); ``do_sample`` (False is greedy), ``temperature``, ``top_k``, ``top_p`` and
                ``repetition_penalty``, which follow the checkpoint if left out; ``seed``, one for
                all or one for each; ``stop_strings``, before the first of which an answer ends.

        Returns:
            An `Answer`, or a list of them in the order of the conversations.

        Raises:
            ValueError, TypeError, FileNotFoundError: A message, a source or an option is wrong.
        """
        several = _is_list(messages) and len(messages) > 0
        several = several and (_is_list(messages[0]) or isinstance(messages[0], Request))
        conversations = list(messages) if several else [messages]
        run = _Run(self, conversations, options, thinking, progress)
        for _ in run.pieces():
            pass
        return run.answers if several else run.answers[0]

    def stream(
        self,
        messages: Messages | Request,
        *,
        thinking: Thinking = "auto",
        progress: Progress | None = None,
        **options: Unpack[SamplingKeywords],
    ) -> Stream:
        """Answer one conversation piece by piece; arguments as in `generate`.

        Returns:
            An iterator over strings, whole characters each, tags included; its ``answer`` is there
            when it is exhausted. The model runs only when pieces are asked for; pictures and
            videos are read, and mistakes raised, here.
        """
        return Stream(_Run(self, [messages], options, thinking, progress))

    def chat(self, system: str | None = None, **options: Unpack[AnswerKeywords]) -> Chat:
        """Begin a conversation, with a system message if there is one.

        Args:
            options: As in `stream`, for all its turns.
        """
        return Chat(self, system, **options)


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
            return next(self._pieces)
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
        keywords: SamplingKeywords,
        thinking: Thinking,
        progress: Progress | None,
    ) -> None:
        self.answers: list[Answer] = []
        started = time.perf_counter()
        model, processor = keye.model, keye.processor
        options = SamplingOptions.of(keywords, "thinking", "progress")
        params = sampling_params(options, model.generation_config, len(conversations))
        self._drafts = [
            Draft(Detokenizer(processor.tokenizer, options.stop_strings)) for _ in params
        ]
        prepared = [isinstance(one, Request) for one in conversations]
        if not any(prepared):
            room = model.config.text_config.max_position_embeddings - 1
            requests = processor.requests(
                conversations, thinking=thinking, max_tokens=room, progress=progress
            )
        elif all(prepared) and thinking == "auto":
            requests = conversations
        else:
            raise TypeError(
                "messages must be all conversations, or all requests with thinking 'auto'"
            )
        merge = model.config.vision_config.spatial_merge_size**2
        self._prompts = [_prompt_usage(request, merge) for request in requests]
        self._processing = time.perf_counter() - started
        with _chosen(keye.backend):
            self._run = model.engines.run(
                model.model,
                model.lm_head,
                requests,
                params,
                eos_token_ids=model.generation_config.eos_token_ids,
                limits=keye.limits,
                cuda_graphs=keye.cuda_graphs,
                cache=keye.cache,
                progress=progress,
            )

    def pieces(self) -> Iterator[str]:
        """Run the batch; yields pieces of text and fills ``answers`` at the end."""
        for _, piece in answer(self._run, self._drafts):
            yield piece
        drafts = zip(self._drafts, self._prompts, self._run.cached_tokens, strict=True)
        self.answers = [self._answer(*one) for one in drafts]

    def _answer(self, draft: Draft, prompt: tuple[int, int, int], cached_tokens: int) -> Answer:
        timings = Timings(
            processing=self._processing,
            first_token=self._processing + draft.first_token,
            cuda_graphs=self._run.cuda_graphs,
            **vars(self._run.timings),
        )
        parts = parse_answer(draft.detokenizer.text)
        return Answer(
            parts.text,
            parts.thinking,
            parts.analysis,
            tuple(draft.token_ids),
            draft.finish_reason,
            Usage(*prompt, len(draft.token_ids), cached_tokens),
            timings,
        )


def _prompt_usage(request: Request, merge: int) -> tuple[int, int, int]:
    """Prompt, image and video tokens."""
    grids = (request.image_grid_thw, request.video_grid_thw)
    images, videos = (num_patches(grid) // merge for grid in grids)
    return request.input_ids.numel(), images, videos


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that cannot serve the model, rather than in the first answer."""
    with _chosen(name):
        for op, served in backends(device.type).items():
            if served.backend is None and op != "mrope_":  # the model rotates in another op
                why = [*served.why_not.values()][-1]  # of the only candidate, after the others
                raise RuntimeError(f"backend must serve {op}, got {name!r}, which does not: {why}")


def _chosen(backend: str) -> AbstractContextManager:
    """`use_backend`, where "auto" leaves the choice as it is."""
    return nullcontext() if backend == "auto" else use_backend(backend)
