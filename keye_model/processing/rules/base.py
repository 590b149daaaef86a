"""What differs between the model lines in `processing`: one object for each line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keye_model.processing.source import SOURCES

RESIZED_KEYS = ("resized_height", "resized_width")
PICTURE_KEYS = ("min_pixels", "max_pixels", *RESIZED_KEYS)
CLIP_KEYS = ("video_start", "video_end")
Encode = Callable[[str], list[int]]  # text → ids
COMMON_KEYS = {"text": ("text",), "image": (*SOURCES["image"], *PICTURE_KEYS)}


@dataclass(frozen=True)
class Rules:
    """The rules of one line; the docstrings of its functions are in the line's file."""

    version: str  # the release of keye-vl-utils, by which public functions name the line
    name: str
    # Keys of an item by its kind: "text", "image", "video" (a file), "frames" (a list of pictures)
    item_keys: Mapping[str, tuple[str, ...]]
    video_keywords: frozenset[str]  # what process_vision_info returns beside a video's frames
    max_pixels: int  # of a picture after keye-vl-utils' resize, unless its item says otherwise
    alpha: Literal["white", "drop"]  # what keye-vl-utils does with transparency (`load_image`)
    enlarge_small: bool  # by the image processor, a picture with a side below 28 pixels
    max_frame_pixels: int | None  # None: the image processor's bounds hold for frames, too
    total_pixels_key: str  # of a video item, the bound of all frames together
    advice: str  # what may make a video fit that is too long for its prompt
    sample: Callable[..., Any]  # (Film, Fit or None, decode=, progress=) → Sample
    layout: Callable[..., Any]  # (Sample, patch size, output_size) → Frame of each, seconds
    resize: Callable[..., Any]  # ([3, h, w] uint8, height, width, resample) → the same, resized
    batch: Callable[..., dict[str, Any]]  # (VideoPatches of each) → what a batch says of them
    placeholders: Callable[..., list[int]]  # (frames, tokens of each, TokenIds, encode) → ids
