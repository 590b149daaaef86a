"""`process_vision_info`: what keye-vl-utils offers beside a processor, in both its releases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from keye_model.processing.chat import Messages, check_message_keys
from keye_model.processing.film import Film
from keye_model.processing.image import fetch_image
from keye_model.processing.items import checked_item, kind_of
from keye_model.processing.rules import PREVIEW, V1_5, of
from keye_model.processing.rules.base import Rules
from keye_model.processing.source import source_of


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
            ``video`` or ``video_url`` a video; with the ``type`` the source may also stand under
            ``url``, ``path`` or ``base64``. See `fetch_image`, `rules.preview.sample` and
            `rules.v1_5.sample` for their other keys. What a message has beside its content is not
            read, and refused where it names pictures or videos.
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
        ValueError: No messages, a message without content, an item that should show something and
            names no source, an unknown key, or a source or key that is out of range.
        FileNotFoundError, TypeError, RuntimeError: A source is missing, of another kind, or could
            not be fetched.
    """
    rules = of(version)
    images: list[Image.Image] = []
    videos: list[torch.Tensor | list[Image.Image]] = []
    found: list[dict[str, Any]] = []
    # All items are checked before the first is loaded.
    for item in list(_vision_items(messages, rules)):
        if item["type"] == "image":
            images.append(fetch_image(item, rules, local_files_only=local_files_only))
        else:
            film = Film(item, local_files_only=local_files_only)
            sample = rules.sample(film)
            frames = list(sample.frames)
            if rules is V1_5:
                videos.append(torch.stack(frames))
            elif film.file is not None:
                videos.append(torch.stack(frames).float())
            else:
                pixels = (frame.permute(1, 2, 0).numpy() for frame in frames)
                videos.append([Image.fromarray(one) for one in pixels])
            found.append(sample.keywords)
    if rules is PREVIEW and not return_video_kwargs:
        return images or None, videos or None
    names = ["fps"] if rules is PREVIEW else dict.fromkeys(key for one in found for key in one)
    keywords = {name: [options.get(name) for options in found] for name in names}
    return images or None, videos or None, keywords


def _vision_items(
    messages: Messages | Sequence[Messages], rules: Rules
) -> Iterator[dict[str, Any]]:
    """Items that show something, over all conversations, checked and in reading order."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {messages!r}")
    for conversation in [messages] if isinstance(messages[0], dict) else messages:
        if not isinstance(conversation, (list, tuple)):
            raise TypeError(
                "messages must be one list of dicts or a list of such lists, got a "
                f"{type(conversation).__name__} in it"
            )
        for m, message in enumerate(conversation):
            check_message_keys(message, f"messages[{m}]", None)
            where = f"messages[{m}]['content']"
            content = message.get("content")
            if isinstance(content, str) or (content is None and "content" in message):
                continue
            if not isinstance(content, (list, tuple)):
                raise TypeError(
                    f"{where} must be a string or a list of items, got {type(content).__name__}"
                )
            for i, item in enumerate(content):
                kind = kind_of(item, f"{where}[{i}]")
                if kind == "text":
                    continue
                if source_of(item) is None:
                    raise ValueError(
                        f"{where}[{i}] must name an 'image', 'image_url', 'video' or 'video_url', "
                        f"got {sorted(map(str, item))}"
                    )
                yield checked_item(item, kind, f"{where}[{i}]", rules)
