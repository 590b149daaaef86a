"""Turns pictures and videos of a vLLM request into patches, grids and placeholder ids."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

import keye_model
from keye_model.processing.expansion import Placeholders
from keye_model.processing.patches import VideoPatches
from keye_model.processing.rules import VIDEO_KEYWORDS

_MODALITIES = ("image", "video")


class KeyeProcessor(ProcessorMixin):
    """`keye_model.KeyeProcessor` with the interface that vLLM and `AutoProcessor` expect.

    Pixels stay uint8, a quarter of fp32 between vLLM's processes and to the GPU, where the patch
    embedding normalises them.
    """

    def __init__(self, processor: keye_model.KeyeProcessor) -> None:
        super().__init__(chat_template=processor.chat_template)
        self.inner = processor
        self.placeholders = Placeholders(
            processor.tokenizer,
            processor.token_ids,
            processor.config.vision_config.spatial_merge_size,
            processor.rules,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **loading: Any,
    ) -> KeyeProcessor:
        """As `keye_model.KeyeProcessor.from_pretrained`; vLLM passes a directory.

        Args:
            min_pixels, max_pixels: From ``mm_processor_kwargs``.
            loading: Not read: other keywords of the Auto classes (revision, tokenizer, …).
        """
        del loading
        return cls(
            keye_model.KeyeProcessor.from_pretrained(
                path_or_id, min_pixels=min_pixels, max_pixels=max_pixels
            )
        )

    def __call__(
        self,
        images: Sequence[Any] = (),
        videos: Sequence[tuple[Any, Mapping[str, Any]]] = (),
        *,
        return_tensors: str = "pt",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Resize the pictures and videos of one request and cut them into patches.

        Args:
            images: PIL images.
            videos: (frames, metadata) as vLLM decodes them; metadata may be empty.
            min_pixels, max_pixels: Not read: `from_pretrained` got the same.
            options: For the videos, as in `keye_model.KeyeProcessor.__call__`. Without any, the
                times of a video come from its metadata.

        Returns:
            pixel_values, pixel_values_videos: [num_patches, 3, patch, patch] uint8.
            image_grid_thw: [num_images, 3]; video_grid_thw: [num_rows, 3].
            num_rows: [num_videos], rows of video_grid_thw that each video has.
            video_ids: ids of all videos' placeholders, marks and times; num_ids: of each.
            seconds_bits: [num_videos] int32, seconds between frames as the bits of a fp32 number:
                vLLM casts floats to the model's dtype.

        Raises:
            TypeError: An unknown option, or one of the other model line.
        """
        del return_tensors, min_pixels, max_pixels
        known = self.inner.rules.video_keywords
        if unknown := sorted(options.keys() - known):
            raise TypeError(
                f"mm_processor_kwargs must be among max_pixels, min_pixels, "
                f"{', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        data: dict[str, torch.Tensor] = {}
        if images:
            cut = [self.inner.image_processor.patches(image) for image in images]
            data["pixel_values"] = torch.cat([one.pixels for one in cut])
            data["image_grid_thw"] = torch.tensor([one.grid_thw for one in cut])
        if videos:
            films = self._films(videos, options)
            token = self.inner.tokenizer.id_to_token(self.inner.token_ids.video)
            ids = [self.placeholders.expand([token], [], [film])[0] for film in films]
            seconds = torch.tensor([film.seconds_per_frame for film in films])
            data |= {
                "pixel_values_videos": torch.cat([film.pixels for film in films]),
                "video_grid_thw": torch.tensor([row for film in films for row in film.grid_thw]),
                "num_rows": torch.tensor([len(film.grid_thw) for film in films]),
                "video_ids": torch.tensor([token for row in ids for token in row]),
                "num_ids": torch.tensor([len(row) for row in ids]),
                "seconds_bits": seconds.float().view(torch.int32),
            }
        return BatchFeature(data)

    def _films(
        self, videos: Sequence[tuple[Any, Mapping[str, Any]]], options: Mapping[str, Any]
    ) -> list[VideoPatches]:
        cutter = self.inner.video_processor
        if options:
            return cutter.patches_of_each([video for video, _ in videos], **options)
        films = []
        for video, metadata in videos:
            times = _times(metadata, len(video))
            if times is None:
                films.append(cutter.patches_from_frames(video))
            else:
                films.append(cutter.patches({"type": "video", "video": video, "timestamps": times}))
        return films


class KeyeVL1_5Processor(KeyeProcessor):
    """`KeyeProcessor` under the name in a 1.5 checkpoint's files."""


def _times(metadata: Mapping[str, Any], num_frames: int) -> list[float] | None:
    """Seconds of each frame, if the metadata of vLLM's video loader have them."""
    indices, fps = metadata.get("frames_indices"), metadata.get("fps")
    if indices is None or not fps or len(indices) != num_frames:
        return None
    return [float(index) / float(fps) for index in indices]


class _DataParser(MultiModalDataParser):
    """Keeps a video's metadata beside its frames, an empty dict without any."""

    def _get_video_with_metadata(self, video: Any) -> tuple[Any, dict[str, Any]]:
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, metadata or {}


class KeyeProcessingInfo(BaseProcessingInfo):
    """How many tokens pictures and videos may have."""

    def get_hf_processor(self, **options: object) -> KeyeProcessor:
        # vLLM caches one processor per set of options. Options of one request's videos are not the
        # processor's and would make a new one every time.
        kept = {key: options[key] for key in ("min_pixels", "max_pixels") if key in options}
        return super().get_hf_processor(**kept)

    def get_data_parser(self) -> MultiModalDataParser:
        return _DataParser(
            video_needs_metadata=True, expected_hidden_size=self._get_expected_hidden_size()
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(_MODALITIES)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        image, frame = (math.prod(self.largest_grid(kind)) for kind in _MODALITIES)
        return {"image": image, "video": frame * self.max_frames(seq_len, mm_counts)}

    def max_frames(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Frames of the largest size that fit, with the other items of a prompt, in seq_len."""
        image, frame = (math.prod(self.largest_grid(kind)) for kind in _MODALITIES)
        room = seq_len - mm_counts.get("image", 0) * image
        return max(room // (frame * max(mm_counts.get("video", 0), 1)), 1)

    def largest_grid(self, modality: str) -> tuple[int, int]:
        """Rows and columns, in tokens, of the largest picture or frame."""
        inner = self.get_hf_processor().inner
        max_pixels = inner.image_processor.max_pixels
        if modality == "video":
            max_pixels = inner.rules.max_frame_pixels or max_pixels
        most = max_pixels // inner.image_processor.factor**2
        side = math.isqrt(most)
        rows = max(range(side, side // 2, -1), key=lambda rows: rows * (most // rows))
        return rows, most // rows


class KeyeDummyInputsBuilder(BaseDummyInputsBuilder[KeyeProcessingInfo]):
    """Makes the largest possible request, with which vLLM measures the memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        inner = self.info.get_hf_processor().inner
        tokens = {"image": inner.token_ids.image, "video": inner.token_ids.video}
        return "".join(
            inner.tokenizer.id_to_token(tokens[kind]) * mm_counts.get(kind, 0)
            for kind in _MODALITIES
        )

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        factor = self.info.get_hf_processor().inner.image_processor.factor
        height, width = (factor * side for side in self.info.largest_grid("image"))
        frame_height, frame_width = (factor * side for side in self.info.largest_grid("video"))
        return {
            "image": self._get_dummy_images(
                width=width,
                height=height,
                num_images=mm_counts.get("image", 0),
                overrides=mm_options.get("image"),
            ),
            "video": self._get_dummy_videos(
                width=frame_width,
                height=frame_height,
                num_frames=self.info.max_frames(seq_len, mm_counts),
                num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            ),
        }


class KeyeMultiModalProcessor(BaseMultiModalProcessor[KeyeProcessingInfo]):
    """Puts a request's placeholders in its prompt."""

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        del hf_processor_mm_kwargs
        none = torch.empty((0, 3), dtype=torch.int64)
        image_sizes = hf_inputs.get("image_grid_thw", none).prod(-1)
        num_rows = hf_inputs.get("num_rows", none[:, 0])
        row_sizes = hf_inputs.get("video_grid_thw", none).prod(-1)
        video_sizes = torch.tensor(
            [int(rows.sum()) for rows in row_sizes.split(num_rows.tolist())], dtype=torch.int64
        )
        flat, batched = MultiModalFieldConfig.flat_from_sizes, MultiModalFieldConfig.batched
        return {
            "pixel_values": flat("image", image_sizes),
            "image_grid_thw": batched("image", keep_on_cpu=True),
            "pixel_values_videos": flat("video", video_sizes),
            "video_grid_thw": flat("video", num_rows, keep_on_cpu=True),
            "num_rows": batched("video", keep_on_cpu=True),
            "video_ids": flat("video", hf_inputs.get("num_ids", none[:, 0]), keep_on_cpu=True),
            "seconds_bits": batched("video", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        del mm_items
        inner = self.info.get_hf_processor(**hf_processor_mm_kwargs).inner
        image_id, video_id = inner.token_ids.image, inner.token_ids.video
        merged = inner.image_processor.merge_size**2

        def image(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [image_id] * (int(grid.prod()) // merged)

        def video(index: int) -> PromptUpdateDetails:
            ids = out_mm_kwargs["video"][index]["video_ids"].data.tolist()
            return PromptUpdateDetails.select_token_id(ids, embed_token_id=video_id)

        return [
            PromptReplacement(modality="image", target=[image_id], replacement=image),
            PromptReplacement(modality="video", target=[video_id], replacement=video),
        ]

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        """The options; lists with a value per video keep those of videos not in vLLM's cache."""
        cached = mm_is_cached.get("video", [])
        return {
            key: [one for one, known in zip(value, cached, strict=True) if not known]
            if key in VIDEO_KEYWORDS
            and isinstance(value, (list, tuple))
            and len(value) == len(cached)
            else value
            for key, value in inputs.hf_processor_mm_kwargs.items()
        }
