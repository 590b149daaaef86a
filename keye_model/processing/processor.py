"""Prompts, pictures and videos → batches, in the shapes of Hugging Face's processors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from keye_model.inputs.keywords import PROCESSING, TEMPLATING, refuse, without_idle
from keye_model.processing import tokenizer as text_side
from keye_model.processing.batch import BatchFeature, pad
from keye_model.processing.budget import TokenBudget
from keye_model.processing.chat import Messages, Thinking, plain_data
from keye_model.processing.patches import ImagePatches, VideoPatches
from keye_model.processing.request_processor import RequestProcessor, each, joined
from keye_model.processing.rules import VIDEO_KEYWORDS
from keye_model.processing.vision_info import process_vision_info


class KeyeProcessor(RequestProcessor):
    """The processor in the shapes of Hugging Face's; `RequestProcessor` has the rest."""

    def process_vision_info(
        self, messages: Messages | Sequence[Messages], return_video_kwargs: bool = False
    ) -> tuple[Any, ...]:
        """`keye_model.process_vision_info` for this checkpoint's line."""
        return process_vision_info(
            messages,
            return_video_kwargs,
            version=self.config.variant.video_version,
            local_files_only=self.local_files_only,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        padding: bool | str = False,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        **video_kwargs: Any,
    ) -> BatchFeature:
        """Turn rendered prompts and loaded pictures into a batch, as Hugging Face processors do.

        Each ``<|image_pad|>`` and ``<|video_pad|>`` in the texts stands for one picture or video,
        in order over the whole batch, and is expanded here.

        Args:
            images: None, one picture, a list of them, or a list of lists (what `load_image` takes).
                They are resized by the image processor's rule alone.
            text: One prompt or several. Given before the images, as some snippets do, it is told
                from them unless these are strings as well.
            videos: None, one video or a list: tensors [frames, 3, height, width] or lists of
                pictures, as `process_vision_info` of ours or of keye-vl-utils returns them.
            padding: True or "longest" fills shorter rows up; needed for prompts of unequal length.
            padding_side: "left" (for generation) or "right".
            return_tensors: "pt", or None for plain lists of ids and masks.
            video_kwargs: What `process_vision_info` returns as its keywords: ``fps`` for
                8B-Preview; ``height``, ``width``, ``fast_height``, ``fast_width``, ``timestamps``
                and ``frame_types`` for 1.5. A list holds one value for each video. Keywords of
                transformers with a value that changes nothing are taken, too.

        Returns:
            input_ids, attention_mask: [batch_size, num_tokens], int64.
            pixel_values, pixel_values_videos: [num_patches, 3, patch, patch], fp32, normalised.
            image_grid_thw, video_grid_thw: [rows, 3], int64, in patches.
            second_per_grid_ts: [num_videos], fp32, seconds between frames; 8B-Preview only.
            num_frames: [num_videos], int64, frames of each video; 1.5 only.

        Raises:
            ValueError: Placeholders and pictures or videos differ in number, rows differ in length
                without padding, or a value is out of range.
            TypeError: No text, an unknown keyword, or a source of the wrong kind.
            NotImplementedError: A keyword of transformers that is not served, ``truncation=True``
                for one.
        """
        video_kwargs = without_idle(video_kwargs, PROCESSING)
        if unknown := sorted(set(video_kwargs) - VIDEO_KEYWORDS):
            known = "images, text, videos, padding, padding_side, return_tensors"
            videos_too = ", ".join(sorted(self.rules.video_keywords))
            raise TypeError(
                f"unknown keyword {unknown[0]!r}; known: {known}, and of videos {videos_too}"
            )
        if text is None:
            raise TypeError(
                "text must be a prompt or a list of them, got None; the order is images, text, "
                "videos"
            )
        if _is_text(images) and not _is_text(text):
            images, text = text, images
        texts = [text] if isinstance(text, str) else list(text)
        cut = [self.image_processor.patches(image) for image in _flat(images)]
        films = self.video_processor.patches_of_each(videos, **video_kwargs)
        rows = self._placeholders.expand(texts, cut, films)
        filling = {"padding_side": padding_side, "return_tensors": return_tensors}
        return self._batch(rows, cut, films, padding=padding, **filling)

    def apply_chat_template(
        self,
        messages: Messages | Sequence[Messages],
        chat_template: str | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        thinking: Thinking = "auto",
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        padding: bool | str = False,
        padding_side: str = "left",
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str | list[str] | BatchFeature | torch.Tensor | list[list[int]]:
        """Render one conversation or several; with ``tokenize``, do the whole job.

        Args:
            messages: A conversation, or a list of them.
            chat_template: Instead of the checkpoint's: the name of another of its templates, or
                the source of one.
            tools, documents: JSON schemas and texts, for a template that reads them.
            tokenize: False returns the prompt, one placeholder for each picture and video, whose
                items may lack a source. True loads, resizes, expands and tokenises.
            return_dict: With ``tokenize``: the whole batch of `__call__`; else its ids only.
            continue_final_message: End within the last message, for the model to go on with it.
            thinking, add_generation_prompt, add_vision_id: As in `request`.
            padding, padding_side, return_tensors: As in `__call__`; ``processor_kwargs`` may hold
                them, too, and goes before.
            variables: Plain data for the chat template, ``enable_thinking`` for one, which must
                read them; or keywords of transformers with a value that changes nothing.

        Returns:
            The prompt (a list of them for a list of conversations), or the batch, or its ids.

        Raises:
            TypeError: The template does not read one of ``variables``, tools or documents.
            NotImplementedError: A keyword of transformers that is not served.
            ValueError, FileNotFoundError, RuntimeError: As for `request`.
        """
        several = (
            isinstance(messages, (list, tuple))
            and len(messages) > 0
            and isinstance(messages[0], (list, tuple))
        )
        conversations = list(messages) if several else [messages]
        filling = {"padding": padding, "padding_side": padding_side}
        filling |= {"return_tensors": return_tensors}
        given = without_idle(processor_kwargs or {}, PROCESSING)
        refuse({name: given[name] for name in given.keys() - filling}, ", ".join(filling))
        filling |= given
        variables |= {"tools": tools, "documents": documents}
        if add_vision_id:
            variables["add_vision_id"] = True
        options = {
            "variables": {
                name: plain_data(value, name, self._reserved)
                for name, value in without_idle(variables, TEMPLATING).items()
            },
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if not tokenize:
            prompts = each(
                conversations, lambda one: self._render(one, thinking, sources=False, **options)[0]
            )
            return prompts if several else prompts[0]
        prepared = each(
            conversations, lambda one: self._prepare(one, TokenBudget(), thinking, **options)
        )
        images = [image for _, images, _ in prepared for image in images]
        videos = [video for _, _, videos in prepared for video in videos]
        rows = [self._placeholders.expand([text], *media)[0] for text, *media in prepared]
        batch = self._batch(rows, images, videos, **filling)
        return batch if return_dict else batch.input_ids

    def decode(
        self,
        ids: int | Iterable[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Text of one row of ids.

        Args:
            skip_special_tokens: Leave out tokens such as ``<|im_end|>``; ``<think>`` stays.
            clean_up_tokenization_spaces: Drop spaces before punctuation; None follows the
                checkpoint, which does not.
        """
        clean_up = clean_up_tokenization_spaces
        return text_side.decode(
            self.tokenizer,
            ids,
            skip_special_tokens=skip_special_tokens,
            clean_up=self.clean_up_tokenization_spaces if clean_up is None else clean_up,
        )

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` for each row of a tensor [batch_size, num_tokens] or list of rows."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences
        ]

    def _batch(
        self,
        rows: list[list[int]],
        images: list[ImagePatches],
        videos: list[VideoPatches],
        **filling: Any,
    ) -> BatchFeature:
        batch = pad(rows, self.token_ids.pad, **filling)
        normalize = self.image_processor.normalize
        if images:
            batch["pixel_values"] = normalize(joined(images))
            batch["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        if videos:
            grids = [video.grid_thw for video in videos]
            batch["pixel_values_videos"] = normalize(joined(videos))
            batch["video_grid_thw"] = torch.tensor([row for grid in grids for row in grid])
            batch.update(self.rules.batch(videos))
        return batch


def _is_text(value: Any) -> bool:
    """Whether a value is a string or a list of nothing else."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) > 0 and all(isinstance(one, str) for one in values)


def _flat(images: Any) -> list[Any]:
    """Pictures in one list, whether given as one, a list, or a list for each prompt."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [one for entry in images for one in _flat(entry)]
