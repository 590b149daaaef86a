"""`process_vision_info`: what keye-vl-utils offers beside a processor, in both its releases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from keye_model.processing.chat import Messages
from keye_model.processing.image import fetch_image
from keye_model.processing.items import checked_item, source_of
from keye_model.processing.video_loading import sample_1_5, sample_preview


def process_vision_info(
    messages: Messages | Sequence[Messages],
    return_video_kwargs: bool = False,
    *,
    version: str = "1.0",
    local_files_only: bool = False,
) -> tuple[Any, ...]:
    """Load the pictures and sample the videos of a conversation, or of a list of them.

    Args:
        messages: An item of a content list with ``image`` or ``image_url`` is a picture, one with
            ``video`` or ``video_url`` a video; see `fetch_image`, `sample_preview` and `sample_1_5`
            for their keys.
        return_video_kwargs: Whether "1.0" returns its third value.
        version: The release of keye-vl-utils: "1.0" for Keye-VL-8B-Preview, "1.5" for Keye-VL-1.5.
        local_files_only: Refuse https URLs. ``HF_HUB_OFFLINE=1`` does the same.

    Returns:
        images: RGB PIL images in reading order; None if there are none.
        videos: None if there are none. "1.0": for a file [frames, 3, height, width], fp32, 0 to
            255, resized; for a list of frames, PIL images. "1.5": [frames, 3, height, width],
            uint8, in the original size.
        video keywords, to be passed to the processor: "1.0", with ``return_video_kwargs``:
            ``{"fps": [...]}``. "1.5", always: lists ``height``, ``width``, ``fast_height``,
            ``fast_width``, ``frame_types`` and ``timestamps`` (None for a list of frames without
            times, where the published helper leaves a gap that shifts the times of later videos).

    Raises:
        ValueError: No messages, an item that should show something and names no source, an
            unknown key, or a source or key that is out of range.
        FileNotFoundError, TypeError, RuntimeError: A source is missing, of another kind, or could
            not be fetched.
    """
    if version not in ("1.0", "1.5"):
        raise ValueError(f"version must be '1.0' or '1.5', got {version!r}")
    images: list[Image.Image] = []
    videos: list[torch.Tensor | list[Image.Image]] = []
    found: list[dict[str, Any]] = []
    # All items are checked before the first is loaded.
    for item in list(_vision_items(messages, version)):
        if item["type"] == "image":
            images.append(fetch_image(item, version=version, local_files_only=local_files_only))
        elif version == "1.0":
            frames, fps = sample_preview(item, local_files_only=local_files_only)
            is_file = isinstance(frames[0], torch.Tensor)
            videos.append(torch.stack(frames).float() if is_file else frames)
            found.append({"fps": fps})
        else:
            frames, options = sample_1_5(item, local_files_only=local_files_only)
            videos.append(torch.stack(list(frames)))
            found.append(options)
    names = {"1.0": ["fps"], "1.5": list(dict.fromkeys(key for one in found for key in one))}
    keywords = {name: [options.get(name) for options in found] for name in names[version]}
    if version == "1.0" and not return_video_kwargs:
        return images or None, videos or None
    return images or None, videos or None, keywords


def _vision_items(
    messages: Messages | Sequence[Messages], version: str
) -> Iterator[dict[str, Any]]:
    """Items that show something, over all conversations, checked and in reading order."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r}")
    for conversation in [messages] if isinstance(messages[0], dict) else messages:
        for m, message in enumerate(conversation):
            content = message.get("content")
            for i, item in enumerate(content if isinstance(content, (list, tuple)) else ()):
                kinds = _kinds(item) if isinstance(item, dict) else set()
                if not kinds:
                    continue
                where = f"messages[{m}]['content'][{i}]"
                if source_of(item) is None or len(kinds) > 1:
                    raise ValueError(
                        f"{where} must name an 'image', 'image_url', 'video' or 'video_url', got "
                        f"{sorted(item)}"
                    )
                yield checked_item(item, kinds.pop(), where, version)


def _kinds(item: dict[str, Any]) -> set[str]:
    """What an item shows: "image", "video", nothing or, wrongly, both."""
    named = {key for key, value in item.items() if value is not None} | {item.get("type")}
    pairs = {"image": {"image", "image_url"}, "video": {"video", "video_url"}}
    return {kind for kind, names in pairs.items() if names & named}
