"""Items of a message's content: what each is, the keys it may have and where its source stands.

A key that nothing reads is refused, so that a misspelt one is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LINES = {"1.0": "Keye-VL-8B-Preview", "1.5": "Keye-VL-1.5"}  # by keye-vl-utils release

# What the type of an item may be called: ours, OpenAI's two interfaces' and Hugging Face's names.
TYPES = {"text": "text", "image": "image", "video": "video"}
TYPES |= {"input_text": "text", "output_text": "text", "input_image": "image"}
TYPES |= {"image_url": "image", "video_url": "video"}

# Where an item may name its source; the first two tell what it is, too.
SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}

_INNER = ("url", "path", "base64")  # where a source that is a dict names it

# Other interfaces' keys without a meaning here; Anthropic and OpenAI clients send them by habit.
_TOLERATED = {"cache_control", "detail", "annotations"}
_BASE64 = "data:application/octet-stream;base64"
_RESIZED = ("resized_height", "resized_width")
_PICTURE = ("min_pixels", "max_pixels", *_RESIZED)
_IMAGE = (*SOURCES["image"], *_PICTURE)
_CLIP = ("video_start", "video_end")
_1_0 = ("fps", "nframes", "min_frames", "max_frames", "total_pixels")
_1_5 = ("fps", "nframes", "max_frames", "min_pixels", "max_pixels", "video_total_pixels")
_1_5 += ("min_frame_similarity",)

# What each line reads. A video is a file, or "frames": a list, array or tensor of pictures.
_KEYS = {
    "1.0": {
        "text": ("text",),
        "image": _IMAGE,
        "video": (*SOURCES["video"], *_1_0, *_CLIP, *_PICTURE),
        "frames": (*SOURCES["video"], "fps", "timestamps", *_PICTURE),
    },
    "1.5": {
        "text": ("text",),
        "image": _IMAGE,
        "video": (*SOURCES["video"], *_1_5, *_CLIP),
        "frames": (*SOURCES["video"], *_1_5, "timestamps", *_RESIZED),
    },
}


def kind_of(item: Any, where: str) -> str:
    """What an item is by its ``type`` and its keys: "text", "image" or "video".

    Raises:
        TypeError: It is no dict.
        ValueError: It is none of them, or two at once.
    """
    if not isinstance(item, dict):
        raise TypeError(f"{where} must be a dict, got {type(item).__name__}")
    told = ("text", *SOURCES["image"][:2], *SOURCES["video"][:2])
    kinds = {TYPES[key] for key in told if item.get(key) is not None}
    named = item.get("type")
    if named is not None:
        if not (isinstance(named, str) and named in TYPES):
            *names, last = TYPES
            raise ValueError(f"{where}['type'] must be {', '.join(names)} or {last}, got {named!r}")
        kinds.add(TYPES[named])
    if len(kinds) != 1:
        found = f"the keys {sorted(map(str, item))}"
        found = f"{', '.join(sorted(kinds))} together" if kinds else found
        raise ValueError(f"{where} must be one of text, image or video, got {found}")
    return kinds.pop()


def source_of(item: Mapping[str, Any]) -> Any:
    """What an image or video item points at; None for a bare placeholder."""
    names = dict.fromkeys((*SOURCES["image"], *SOURCES["video"]))
    name = next((name for name in names if item.get(name) is not None), None)
    source = None if name is None else item[name]
    coded = name == "base64"
    if isinstance(source, dict):  # {"url": …}
        name = next((inner for inner in _INNER if source.get(inner) is not None), None)
        source = None if name is None else source[name]
        coded = coded or name == "base64"
    if not coded or not isinstance(source, (str, bytes)):
        return source
    text = source if isinstance(source, str) else source.decode("ascii", "replace")
    return text if text.lstrip()[:5].lower() == "data:" else f"{_BASE64},{text}"


def checked_item(item: Mapping[str, Any], kind: str, where: str, version: str) -> dict[str, Any]:
    """A copy of ``item`` with its ``type``, its source under that name, and no idle keys.

    A key with None counts as absent: data sets pad the items of a column to the same keys.

    Args:
        kind: "text", "image" or "video".
        where: How errors call the item.
        version: "1.0" or "1.5": the line whose keys it may have. A key of the other line is an
            error too, since ignoring it would run the video with defaults.

    Raises:
        ValueError: A key that is not read, two sources, or one of ``resized_height`` and
            ``resized_width``.
    """
    item = _present(item)
    source = source_of(item) if kind != "text" else None
    is_list = kind == "video" and (isinstance(source, (list, tuple)) or hasattr(source, "ndim"))
    _check_keys(item, "frames" if is_list else kind, where, version)
    if is_list and isinstance(source, (list, tuple)):
        for index, frame in enumerate(source):
            if isinstance(frame, dict):
                _check_keys(_present(frame), "image", f"{where}['video'][{index}]", version)
    idle = {*_TOLERATED, *SOURCES.get(kind, ())}
    kept = {key: value for key, value in item.items() if key not in idle}
    return {**kept, "type": kind} | ({} if source is None else {kind: source})


def _present(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}


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
    named = [key for key in SOURCES.get("video" if kind == "frames" else kind, ()) if key in item]
    if len(named) > 1:
        raise ValueError(f"{where} must name its source once, got {' and '.join(named)}")
    for key in named:  # a source may be {"url": …}
        inner = _present(item[key]) if isinstance(item[key], dict) else {}
        extra = next((name for name in inner if name not in {*_INNER, *_TOLERATED}), None)
        if extra is not None:
            known = ", ".join(_INNER)
            raise ValueError(f"{where}[{key!r}] has unknown key {extra!r}; known: {known}")
        if len(told := [name for name in _INNER if name in inner]) > 1:
            found = " and ".join(told)
            raise ValueError(f"{where}[{key!r}] must name its source once, got {found}")
    if sum(key in item for key in _RESIZED) == 1:
        raise ValueError(
            f"{where} must have both resized_height and resized_width or neither, got one"
        )
