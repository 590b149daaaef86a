"""Items of a message's content: the keys each may have, so that a misspelt one is never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LINES = {"1.0": "Keye-VL-8B-Preview", "1.5": "Keye-VL-1.5"}  # by keye-vl-utils release

# Other interfaces' keys without a meaning here; Anthropic and OpenAI clients send them by habit.
_TOLERATED = {"cache_control", "detail"}
_RESIZED = ("resized_height", "resized_width")
_PICTURE = ("min_pixels", "max_pixels", *_RESIZED)
_IMAGE = ("image", "image_url", *_PICTURE)
_SOURCE = ("video", "video_url")
_CLIP = ("video_start", "video_end")
_1_0 = ("fps", "nframes", "min_frames", "max_frames", "total_pixels")
_1_5 = ("fps", "nframes", "max_frames", "min_pixels", "max_pixels", "video_total_pixels")
_1_5 += ("min_frame_similarity",)

# What each line reads. A video is a file, or "frames": a list, array or tensor of pictures.
_KEYS = {
    "1.0": {
        "text": ("text",),
        "image": _IMAGE,
        "video": (*_SOURCE, *_1_0, *_CLIP, *_PICTURE),
        "frames": (*_SOURCE, "fps", "timestamps", *_PICTURE),
    },
    "1.5": {
        "text": ("text",),
        "image": _IMAGE,
        "video": (*_SOURCE, *_1_5, *_CLIP),
        "frames": (*_SOURCE, *_1_5, "timestamps", *_RESIZED),
    },
}


def source_of(item: Mapping[str, Any]) -> Any:
    """What an image or video item points at; None for a bare placeholder."""
    names = ("image", "image_url", "video", "video_url")
    source = next((item[name] for name in names if item.get(name) is not None), None)
    return source.get("url") if isinstance(source, dict) else source


def checked_item(item: Mapping[str, Any], kind: str, where: str, version: str) -> dict[str, Any]:
    """A copy of ``item`` with its ``type``, a video's source under ``video``, and no idle keys.

    A key with None counts as absent: data sets pad the items of a column to the same keys.

    Args:
        kind: "text", "image" or "video".
        where: How errors call the item.
        version: "1.0" or "1.5": the line whose keys it may have. A key of the other line is an
            error too, since ignoring it would run the video with defaults.

    Raises:
        ValueError: A key that is not read, or one of ``resized_height`` and ``resized_width``.
    """
    item = {key: value for key, value in item.items() if value is not None}
    source = source_of(item)
    is_list = kind == "video" and (isinstance(source, (list, tuple)) or hasattr(source, "ndim"))
    _check_keys(item, "frames" if is_list else kind, where, version)
    if is_list and isinstance(source, (list, tuple)):
        for index, frame in enumerate(source):
            if isinstance(frame, dict):
                _check_keys(frame, "image", f"{where}['video'][{index}]", version)
    kept = {key: value for key, value in item.items() if key not in _TOLERATED}
    if kind == "video" and source is not None:
        kept.pop("video_url", None)
        kept["video"] = source
    return {**kept, "type": kind}


def _check_keys(item: Mapping[str, Any], kind: str, where: str, version: str) -> None:
    known = _KEYS[version][kind]
    unknown = next((key for key in item if key not in {*known, "type", *_TOLERATED}), None)
    if unknown is not None:
        other = next(line for line in LINES if line != version)
        twin, twin_name = {"video": ("frames", "list of frames")}.get(kind, ("video", "file"))
        reason = ""
        if unknown in _KEYS[other][kind]:
            reason = f", which belongs to {LINES[other]}"
        elif kind in ("video", "frames") and unknown in _KEYS[version][twin]:
            reason = f", which is for a {twin_name}"
        raise ValueError(f"{where} has unknown key {unknown!r}{reason}; known: {', '.join(known)}")
    for key in known[:2]:  # a source may be {"url": …}
        inner = item.get(key)
        if isinstance(inner, dict) and (extra := sorted(set(inner) - {"url", *_TOLERATED})):
            raise ValueError(f"{where}[{key!r}] has unknown key {extra[0]!r}; known: url")
    if sum(key in item for key in _RESIZED) == 1:
        raise ValueError(
            f"{where} must have both resized_height and resized_width or neither, got one"
        )
