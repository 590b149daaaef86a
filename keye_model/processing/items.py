"""Items of a message's content: what each is, the keys it may have and where its source stands.

A key that nothing reads is refused, so that a misspelt one is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keye_model.processing.rules import LINES
from keye_model.processing.rules.base import RESIZED_KEYS, Rules
from keye_model.processing.source import INNER, SOURCES, source_of

# What the type of an item may be called: ours, OpenAI's two interfaces' and Hugging Face's names.
TYPES = {"text": "text", "image": "image", "video": "video"}
TYPES |= {"input_text": "text", "output_text": "text", "input_image": "image"}
TYPES |= {"image_url": "image", "video_url": "video"}

# Other interfaces' keys without a meaning here; Anthropic and OpenAI clients send them by habit.
_TOLERATED = {"cache_control", "detail", "annotations"}


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


def checked_item(item: Mapping[str, Any], kind: str, where: str, rules: Rules) -> dict[str, Any]:
    """A copy of ``item`` with its ``type``, its source under that name, and no idle keys.

    A key with None counts as absent: data sets pad the items of a column to the same keys.

    Args:
        kind: "text", "image" or "video".
        where: How errors call the item.
        rules: Of the line whose keys it may have. A key of the other line is an error too, since
            ignoring it would run the video with defaults.

    Raises:
        ValueError: A key that is not read, two sources, or one of ``resized_height`` and
            ``resized_width``.
    """
    item = _present(item)
    source = source_of(item) if kind != "text" else None
    is_list = kind == "video" and (isinstance(source, (list, tuple)) or hasattr(source, "ndim"))
    _check_keys(item, "frames" if is_list else kind, where, rules)
    if is_list and isinstance(source, (list, tuple)):
        for index, frame in enumerate(source):
            if isinstance(frame, dict):
                _check_keys(_present(frame), "image", f"{where}['video'][{index}]", rules)
    idle = {*_TOLERATED, *SOURCES.get(kind, ())}
    kept = {key: value for key, value in item.items() if key not in idle}
    return {**kept, "type": kind} | ({} if source is None else {kind: source})


def _present(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if value is not None}


def _check_keys(item: Mapping[str, Any], kind: str, where: str, rules: Rules) -> None:
    known = rules.item_keys[kind]
    unknown = next((key for key in item if key not in {*known, "type", *_TOLERATED}), None)
    if unknown is not None:
        owner = next((line for line in LINES.values() if unknown in line.item_keys[kind]), None)
        twin, twin_name = {"video": ("frames", "list of frames")}.get(kind, ("video", "file"))
        reason = ""
        if owner is not None:
            reason = f", which belongs to {owner.name}"
        elif kind in ("video", "frames") and unknown in rules.item_keys[twin]:
            reason = f", which is for a {twin_name}"
        raise ValueError(f"{where} has unknown key {unknown!r}{reason}; known: {', '.join(known)}")
    named = [key for key in SOURCES.get("video" if kind == "frames" else kind, ()) if key in item]
    if len(named) > 1:
        raise ValueError(f"{where} must name its source once, got {' and '.join(named)}")
    for key in named:  # a source may be {"url": …}
        inner = _present(item[key]) if isinstance(item[key], dict) else {}
        extra = next((name for name in inner if name not in {*INNER, *_TOLERATED}), None)
        if extra is not None:
            known = ", ".join(INNER)
            raise ValueError(f"{where}[{key!r}] has unknown key {extra!r}; known: {known}")
        if len(told := [name for name in INNER if name in inner]) > 1:
            found = " and ".join(told)
            raise ValueError(f"{where}[{key!r}] must name its source once, got {found}")
    if sum(key in item for key in RESIZED_KEYS) == 1:
        raise ValueError(
            f"{where} must have both resized_height and resized_width or neither, got one"
        )
