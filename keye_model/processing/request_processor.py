"""Messages with pictures and videos → `Request`: what the model reads, prepared on the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tokenizers import Tokenizer

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.inputs.keywords import LOADING_PROCESSOR, refuse, without_idle
from keye_model.inputs.request import Progress, Request
from keye_model.processing import tokenizer as text_side
from keye_model.processing.budget import TokenBudget
from keye_model.processing.chat import (
    Messages,
    Thinking,
    add_thinking,
    normalize_messages,
    vision_items,
)
from keye_model.processing.expansion import Placeholders
from keye_model.processing.fetch import describe
from keye_model.processing.image import fetch_image
from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.patches import ImagePatches, VideoPatches
from keye_model.processing.rules import of
from keye_model.processing.source import source_of
from keye_model.processing.source_cache import SourceCache
from keye_model.processing.template import choose_template, read_template, render, template_reads
from keye_model.processing.tokenizer import TokenIds
from keye_model.processing.video_processor import KeyeVideoProcessor

if TYPE_CHECKING:
    from typing_extensions import Self

# What a wrong request raises; each is made from one string.
_REQUEST_ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError)
_REQUEST_ERRORS += (FileNotFoundError, PermissionError)

T = TypeVar("T")


class RequestProcessor:
    """Prepares requests for either line; reads no weights.

    Attributes:
        config: The checkpoint's `KeyeConfig`.
        rules: `Rules` of its line.
        tokenizer: A ``tokenizers.Tokenizer``, with ``eos_token_id`` and ``pad_token_id``.
        image_processor, video_processor: Their attributes may be set, ``max_pixels`` for one.
        chat_template: Source of the jinja2 template in use, or several by name; the one called
            "default" is taken unless another is named.
        special_tokens: What the files call ``eos_token`` and so on; chat templates see them.
        token_ids: Placeholder, padding and end ids.
        source_cache: Keeps what pictures and videos were processed into, so that a later turn of a
            conversation does not process them again. ``max_bytes = 0`` switches it off.
    """

    def __init__(
        self,
        config: KeyeConfig,
        tokenizer: Tokenizer,
        token_ids: TokenIds,
        image_processor: KeyeImageProcessor,
        video_processor: KeyeVideoProcessor,
        *,
        chat_template: str | dict[str, str],
        special_tokens: Mapping[str, Any] | None = None,
        clean_up_tokenization_spaces: bool = False,
        local_files_only: bool = False,
    ) -> None:
        self.config = config
        self.rules = of(config.variant.video_version)
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.image_processor = image_processor
        self.video_processor = video_processor
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.local_files_only = local_files_only
        self.source_cache = SourceCache()
        # Programs ask the tokenizer of transformers for these.
        tokenizer.eos_token_id, tokenizer.pad_token_id = token_ids.eos[0], token_ids.pad
        self._reserved = text_side.reserved_tokens(tokenizer)
        self._marks = text_side.video_marks(tokenizer)
        self._placeholders = Placeholders(
            tokenizer, token_ids, config.vision_config.spatial_merge_size, self.rules
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike | Checkpoint,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Read a checkpoint's configuration, tokenizer, pixel rules and chat template.

        Args:
            path_or_id: A directory in the layout of the Hub, or a Hub id.
            min_pixels, max_pixels: Instead of the bounds of `preprocessor_config.json`. A message
                item's own ``max_pixels`` cannot exceed these.
            local_files_only: Never touch the network, for the checkpoint or for a picture's URL.
            options: Keywords of transformers with a value that changes nothing, such as
                ``use_fast``; ``trust_remote_code`` is ignored: no code of a checkpoint is ever run.

        Raises:
            FileNotFoundError: The checkpoint or one of its files is missing.
            ValueError: A file is not what it should be, or the tokenizer lacks a token of the
                model's line.
            NotImplementedError, TypeError: An option is not served, or unknown.
        """
        refuse(without_idle(options, LOADING_PROCESSOR), "min_pixels, max_pixels, local_files_only")
        checkpoint = Checkpoint.at(path_or_id, local_files_only=local_files_only)
        config = KeyeConfig.from_pretrained(checkpoint)
        tokenizer = text_side.load_tokenizer(checkpoint.directory)
        token_ids = TokenIds.read(tokenizer, config, GenerationDefaults.from_pretrained(checkpoint))
        image_processor = KeyeImageProcessor.from_pretrained(
            checkpoint,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            version=config.variant.video_version,
        )
        vision = config.vision_config
        for name, expected in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
        ):
            if getattr(image_processor, name) != expected:
                raise ValueError(
                    f"preprocessor_config.json must have {name} {expected} like config.json, got "
                    f"{getattr(image_processor, name)}"
                )
        words = checkpoint.json("tokenizer_config.json", required=False) or {}
        return cls(
            config,
            tokenizer,
            token_ids,
            image_processor,
            KeyeVideoProcessor(
                image_processor,
                version=config.variant.video_version,
                local_files_only=checkpoint.local_files_only,
            ),
            chat_template=read_template(checkpoint),
            special_tokens=text_side.special_tokens(checkpoint),
            clean_up_tokenization_spaces=bool(words.get("clean_up_tokenization_spaces")),
            local_files_only=checkpoint.local_files_only,
        )

    @property
    def pad_token_id(self) -> int:
        """The id that fills batches up."""
        return self.token_ids.pad

    @property
    def eos_token_id(self) -> int:
        """The first of the ids that end an answer; ``token_ids.eos`` has all of them."""
        return self.token_ids.eos[0]

    def request(
        self,
        messages: Messages,
        *,
        thinking: Thinking = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        max_tokens: int | None = None,
        fit_videos: Callable[[str], None] | None = None,
        progress: Progress | None = None,
        shapes_only: bool = False,
    ) -> Request:
        """Turn one conversation into what the model reads.

        Pixels are raw bytes, which the model normalises by the checkpoint's mean and std, or
        normalised floats if the image processor's own were set to others.

        Pictures are resized as keye-vl-utils and then as the checkpoint's processor do. A video's
        own settings (``fps``, ``nframes``, …) stand in its message item.

        Args:
            messages: As for `normalize_messages`; every image and video names its source.
            thinking: True and False glue ``/think`` or ``/no_think`` to the last user text.
            add_generation_prompt: Open the assistant's turn at the end, which must not follow
                another of its turns. None does so unless the last message is continued.
            continue_final_message: Leave the last message open at its end: the answer goes on with
                it.
            add_vision_id: Number the pictures and videos: ``Picture 1: ``.
            max_tokens: Most tokens the prompt may have, say the model's context. What is too long
                is refused as soon as that is known: a video file of 8B-Preview before its frames
                are decoded, one of 1.5 before they are resized.
            fit_videos: Given, a video file that does not fit beside the text, the pictures and the
                other videos is sampled to the most frames that do, unless its item says how many
                (``fps``, ``nframes``, ``min_frames``, ``max_frames``): 8B-Preview's by fewer
                frames, 1.5's by a lower ``video_total_pixels`` and then by fewer frames. Of
                several, those that need less than an even share have all they need. Called with
                one line for each video so changed.
            progress: Called in this thread as ``progress("frames", done, total)`` while a video is
                decoded and resized, from the start again if it has to be decoded twice.
            shapes_only: Decode no frame of a video file: its patches are on the meta device, ids
                and grids as they will be, but for a file to be turned by a quarter (rows and
                columns change places) and for 1.5 (slow and fast frames are not known: those of
                the costliest split). Nothing is refused for its length.

        Raises:
            ValueError, TypeError, FileNotFoundError, RuntimeError: A message or a source is wrong,
                or the prompt too long; see `normalize_messages` and `load_image`.
        """
        budget = TokenBudget(max_tokens, enforced=not shapes_only)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
        if add_generation_prompt and isinstance(last, dict) and last.get("role") == "assistant":
            raise ValueError(
                "messages must not end with the assistant's turn when another is opened after it: "
                "end with a user's, or pass continue_final_message=True, or "
                "add_generation_prompt=False"
            )
        text, images, videos = self._prepare(
            messages,
            budget,
            thinking,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={"add_vision_id": True} if add_vision_id else {},
            of_videos={"fit_videos": fit_videos, "progress": progress, "shapes_only": shapes_only},
        )
        [ids] = self._placeholders.expand([text], images, videos)
        budget.check(len(ids) - budget.used, "the times of its videos' frames")
        timed = self.config.variant.timed_positions
        return Request(
            input_ids=torch.tensor(ids),
            pixel_values=self._model_pixels(images),
            image_grid_thw=tuple(image.grid_thw for image in images),
            pixel_values_videos=self._model_pixels(videos),
            video_grid_thw=tuple(row for video in videos for row in video.grid_thw),
            second_per_grid_ts=tuple(v.seconds_per_frame for v in videos) if timed else (),
            image_digests=self._digests(images),
            video_digests=self._digests(videos),
        )

    def requests(self, conversations: Sequence[Messages], **options: Any) -> list[Request]:
        """One `request` for each conversation; ``options`` as there, the same for all.

        An error among several says which one it is about, counted from 1: ``conversation 2: …``.
        """
        return each(conversations, lambda one: self.request(one, **options))

    def _render(
        self,
        messages: Messages,
        thinking: Thinking,
        *,
        sources: bool,
        chat_template: str | None = None,
        **options: Any,
    ) -> tuple[str, list[dict[str, Any]]]:
        template = choose_template(self.chat_template, chat_template)
        keys, roles = template_reads(template)
        checked = normalize_messages(
            messages,
            reserved=self._reserved,
            marks=self._marks,
            keys=keys,
            roles=roles,
            sources=sources,
            rules=self.rules,
        )
        checked = add_thinking(checked, thinking)
        return render(template, checked, special_tokens=self.special_tokens, **options), checked

    def _prepare(
        self,
        messages: Messages,
        budget: TokenBudget,
        thinking: Thinking,
        of_videos: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> tuple[str, list[ImagePatches], list[VideoPatches]]:
        """Render a conversation and load what it shows, as keye-vl-utils would.

        Args:
            of_videos: Keywords of `patches_of_items`.
            options: Keywords of `_render`.
        """
        text, checked = self._render(messages, thinking, sources=True, **options)
        pictures, films = vision_items(checked, "image"), vision_items(checked, "video")
        num_text = len(text_side.encode(self.tokenizer, text)) - len(pictures) - len(films)
        budget.take(num_text, "text")
        images = []
        for item in pictures:
            images.append(self._image(item))
            num_tokens = len(images[-1].pixels) // self.image_processor.merge_size**2
            budget.take(num_tokens, f"image {describe(source_of(item))}")
        videos = self.video_processor.patches_of_items(
            films,
            budget=budget,
            count_tokens=self._placeholders.count,
            sources=self.source_cache,
            **of_videos,
        )
        return text, images, videos

    def _image(self, item: Mapping[str, Any]) -> ImagePatches:
        key = self.source_cache.key(item, (self.rules.version, vars(self.image_processor)))
        found = self.source_cache.get(key)
        if found is None:
            picture = fetch_image(
                item,
                self.rules,
                factor=self.image_processor.factor,
                local_files_only=self.local_files_only,
            )
            found = self.image_processor.patches(picture)
            self.source_cache.put(key, found, found.pixels)
        return found

    def _digests(self, cut: Sequence[ImagePatches | VideoPatches]) -> tuple[bytes, ...] | None:
        """Digests that are kept with the patches; None: of other pixels, or nothing is kept."""
        if (
            self.source_cache.max_bytes == 0
            or not self._raw
            or any(one.pixels.is_meta for one in cut)
        ):
            return None
        return tuple(digest for one in cut for digest in one.digests)

    def _model_pixels(self, cut: Sequence[ImagePatches | VideoPatches]) -> torch.Tensor | None:
        """Patches as a `Request` holds them; None if there are none."""
        if not cut:
            return None
        pixels = joined(cut)
        if self._raw or pixels.is_meta:
            return pixels if self._raw else pixels.float()
        return self.image_processor.normalize(pixels)

    @property
    def _raw(self) -> bool:
        """Whether the model normalises as the image processor does."""
        given, known = self.image_processor, self.config.vision_config
        same = tuple(given.image_mean) == tuple(known.image_mean)
        return same and tuple(given.image_std) == tuple(known.image_std)


def each(conversations: Sequence[Messages], prepare: Callable[[Messages], T]) -> list[T]:
    """``prepare`` of each; an error among several says which it is about, counted from 1."""
    found = []
    for number, messages in enumerate(conversations, start=1):
        try:
            found.append(prepare(messages))
        except _REQUEST_ERRORS as error:
            if len(conversations) == 1 or type(error) not in _REQUEST_ERRORS:
                raise
            raise type(error)(f"conversation {number}: {error}") from error
    return found


def joined(cut: Sequence[ImagePatches | VideoPatches]) -> torch.Tensor:
    """All patches in one tensor; a lone video, which may be large, is not copied."""
    return cut[0].pixels if len(cut) == 1 else torch.cat([one.pixels for one in cut])
