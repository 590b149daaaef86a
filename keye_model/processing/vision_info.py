"""`process_vision_info`: what keye-vl-utils offers beside a processor, in both its releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from keye_model.processing.image import fetch_image, image_source
from keye_model.processing.video_loading import sample_1_5, sample_preview

Messages = Sequence[dict[str, Any]]


def process_vision_info(
    messages: Messages | Sequence[Messages],
    return_video_kwargs: bool = False,
    *,
    version: str = "1.0",
) -> tuple[Any, ...]:
    """Load the pictures and sample the videos of a conversation, or of a list of them.

    Args:
        messages: An item of a content list with ``image`` or ``image_url`` is a picture, one with
            ``video`` a video; see `fetch_image`, `sample_preview` and `sample_1_5` for their keys.
        return_video_kwargs: Whether "1.0" returns its third value.
        version: The release of keye-vl-utils: "1.0" for Keye-VL-8B-Preview, "1.5" for Keye-VL-1.5.

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
        ValueError: No messages, an item that should show something and names no source, or a
            source or key that is out of range.
        FileNotFoundError, TypeError, RuntimeError: A source is missing, of another kind, or could
            not be fetched.
    """
    if version not in ("1.0", "1.5"):
        raise ValueError(f"version must be '1.0' or '1.5', got {version!r}")
    images: list[Image.Image] = []
    videos: list[torch.Tensor | list[Image.Image]] = []
    found: list[dict[str, Any]] = []
    for item in _vision_items(messages):
        if image_source(item) is not None:
            images.append(fetch_image(item, version=version))
        elif item.get("video") is None:
            raise ValueError(
                f"a vision item must name an 'image', 'image_url' or 'video', got {sorted(item)}"
            )
        elif version == "1.0":
            frames, fps = sample_preview(item)
            is_file = isinstance(frames[0], torch.Tensor)
            videos.append(torch.stack(frames).float() if is_file else frames)
            found.append({"fps": fps})
        else:
            frames, options = sample_1_5(item)
            videos.append(torch.stack(list(frames)))
            found.append(options)
    names = {"1.0": ["fps"], "1.5": list(dict.fromkeys(key for one in found for key in one))}
    keywords = {name: [options.get(name) for options in found] for name in names[version]}
    if version == "1.0" and not return_video_kwargs:
        return images or None, videos or None
    return images or None, videos or None, keywords


def _vision_items(messages: Messages | Sequence[Messages]) -> list[dict[str, Any]]:
    """Items that show something, over all conversations, in reading order."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r}")
    conversations = [messages] if isinstance(messages[0], dict) else messages
    keys = ("image", "image_url", "video")
    return [
        item
        for conversation in conversations
        for message in conversation
        if isinstance(message.get("content"), (list, tuple))
        for item in message["content"]
        if isinstance(item, dict) and (item.get("type") in keys or any(k in item for k in keys))
    ]
