"""What differs between the model lines in `processing`: one object for each line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keye_model.processing.source import SOURCES

RESIZED_KEYS = ("resized_height", "resized_width")
PICTURE_KEYS = ("min_pixels", "max_pixels", *RESIZED_KEYS)
CLIP_KEYS = ("video_start", "video_end")
COMMON_KEYS = {"text": ("text",), "image": (*SOURCES["image"], *PICTURE_KEYS)}


@dataclass(frozen=True)
class Rules:
    """The rules of one line. Its functions stand, under the same names, in the line's file.

    Attributes:
        version: The release of keye-vl-utils, by which public functions name the line.
        name: The model's name.
        item_keys: Keys that an item may have, by its kind: "text", "image", "video" (a file) or
            "frames" (a list, array or tensor of pictures).
        video_keywords: Names of what `process_vision_info` returns beside a video's frames.
        keywords_always: Whether it returns them without being asked.
        max_pixels: Of a picture after keye-vl-utils' resize, unless its item says otherwise.
        alpha: What keye-vl-utils does with a picture's transparency, as `load_image` names it.
        enlarge_small: Whether the image processor first enlarges a picture with a side below 28
            pixels.
        max_frame_pixels: Of a frame of a file, by default; None if frames are resized a second
            time, within the image processor's bounds.
        total_pixels_key: The key of a video item that bounds the pixels of all frames together.
        advice: What may make a video fit that is too long for its prompt.
        frame_count: (frames of a clip, their rate, options) → how many are sampled.
        sample: (`Film`, `Fit` or None, decode=, progress=) → `Sample`. Without ``decode``, no frame
            of a file is decoded, and the sample has sizes and keywords alone.
        layout: (`Sample`, patch size, the image processor's `output_size`) → `Frame` of each
            frame, seconds between two.
        resize: (frame, height, width, Pillow filter of the image processor) → frame; frames are
            [3, height, width] uint8.
        published: (frames, whether they are of a file) → what `process_vision_info` returns.
        batch: (`VideoPatches` of each video) → what the processor's batch says of their times.
        placeholders: (frames, merged tokens of each, `TokenIds`, function from text to ids) → ids
            of a video in the prompt.
    """

    version: str
    name: str
    item_keys: Mapping[str, tuple[str, ...]]
    video_keywords: frozenset[str]
    keywords_always: bool
    max_pixels: int
    alpha: Literal["white", "drop"]
    enlarge_small: bool
    max_frame_pixels: int | None
    total_pixels_key: str
    advice: str
    frame_count: Callable[..., int]
    sample: Callable[..., Any]
    layout: Callable[..., Any]
    resize: Callable[..., Any]
    published: Callable[..., Any]
    batch: Callable[..., dict[str, Any]]
    placeholders: Callable[..., list[int]]
