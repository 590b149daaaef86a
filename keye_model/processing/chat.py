"""Conversations: what a message may be, thinking, and answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keye_model.processing.items import TYPES, checked_item, kind_of
from keye_model.processing.rules.base import Rules
from keye_model.processing.source import source_of

ROLES = ("system", "user", "assistant")
Messages = Sequence[dict[str, Any]]  # one conversation
Thinking = Literal["auto"] | bool

# Words of a template that are no further keys of a message, nor roles.
_OF_ITEMS = {"role", "content", "type", *TYPES, "images", "videos", "url", "path", "base64"}
# A key of a message that was meant to show something.
_SHOWS = {
    "video": re.compile(r"(?<![a-z])(video|clip|movie)"),
    "image": re.compile(r"(?<![a-z])(image|img|picture|photo|pixel)"),
}


@dataclass(frozen=True)
class Parsed:
    """The parts of an answer, stripped of surrounding white space.

    Attributes:
        analysis: Inside ``<analysis>``: the verdict on whether to reason; None if there is none.
        thinking: Inside ``<think>``; None if there is none.
        text: What is left, without its ``<answer>`` tags. Empty if the answer was cut off before.
    """

    analysis: str | None
    thinking: str | None
    text: str


def normalize_messages(
    messages: Messages,
    *,
    reserved: Collection[str],
    marks: Collection[str] = (),
    keys: Collection[str] = (),
    roles: Collection[str] = (),
    sources: bool,
    rules: Rules,
) -> list[dict[str, Any]]:
    """Check a conversation and return a copy in which every item of a content list has a type.

    Args:
        messages: Each has a ``role`` of `ROLES` and a ``content``: a string, or a list of items of
            ``type`` text, image or video (or one of `TYPES`). Without a ``type``, an item is what
            its only key among these says. A picture or video is named under its type or under
            ``url``, ``path`` or ``base64``. Other keys: see `fetch_image` for images,
            `rules.preview.sample` and `rules.v1_5.sample` for videos; ``detail`` and
            ``cache_control`` are passed over. A key with None counts as absent.
        reserved: Strings that no text may hold, because as special tokens they would open a turn
            or claim a picture's place.
        marks: Strings that only the assistant's text may hold: it may have repeated the marks of a
            video, and its answer must serve as the next turn's history.
        keys, roles: What the chat template reads (`template_reads`), which a message may have too,
            ``tool_calls`` and "tool" for one, with plain data. With ``tool_calls`` it needs no
            content.
        sources: Whether each image and video must name its source; else it may be a bare
            placeholder such as ``{"type": "image"}``.
        rules: Of the line whose keys a video may have.

    Raises:
        ValueError: Something is missing, unknown or reserved; the message says where.
        TypeError: A list, message or item is of the wrong kind.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    keys, roles = sorted(set(keys) - _OF_ITEMS), (*ROLES, *sorted(set(roles) - _OF_ITEMS))
    return [
        _message(message, f"messages[{index}]", reserved, marks, keys, roles, sources, rules)
        for index, message in enumerate(messages)
    ]


def vision_items(messages: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The items of type ``kind`` ("image" or "video") in reading order."""
    contents = (message["content"] for message in messages)
    lists = (content for content in contents if not isinstance(content, str))
    return [item for content in lists for item in content if item["type"] == kind]


def add_thinking(messages: list[dict[str, Any]], thinking: Thinking) -> list[dict[str, Any]]:
    """Glue the suffix that chooses the thinking mode to the last user text, on a copy.

    Args:
        thinking: True adds ``/think``, False ``/no_think``, "auto" nothing: the model decides. A
            last user turn without text gets the suffix as a text item at its end.

    Raises:
        ValueError: Another value, or no user message to carry the suffix.
    """
    if not (isinstance(thinking, bool) or thinking == "auto"):
        raise ValueError(f"thinking must be 'auto', True or False, got {thinking!r}")
    if thinking == "auto":
        return messages
    suffix = "/think" if thinking else "/no_think"
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError(f"thinking must be 'auto' without a user message, got {thinking!r}")
    content = messages[users[-1]]["content"]
    if isinstance(content, str):
        content = content + suffix
    else:
        content = list(content)
        texts = [index for index, item in enumerate(content) if item["type"] == "text"]
        if texts:
            content[texts[-1]] = {"type": "text", "text": content[texts[-1]]["text"] + suffix}
        else:
            content.append({"type": "text", "text": suffix})
    result = list(messages)
    result[users[-1]] = {**messages[users[-1]], "content": content}
    return result


def parse_answer(text: str) -> Parsed:
    """Split an answer into its analysis, its thinking and the rest.

    The sections are looked for at the start only, in the order in which the model writes them, so a
    tag that the answer merely mentions stays in it. A section that was cut off (no closing tag)
    takes everything that follows.

    Args:
        text: The decoded answer; ``<think>`` is an added token that survives decoding.
    """
    analysis, rest = _section(text, "analysis")
    thinking, rest = _section(rest, "think")
    answer = rest.strip()
    if answer.startswith("<answer>"):
        answer = answer.removeprefix("<answer>")
        head, closed, tail = answer.rpartition("</answer>")
        answer = head + tail if closed else answer
    return Parsed(analysis, thinking, answer.strip())


def _section(text: str, tag: str) -> tuple[str | None, str]:
    """Take a leading ``<tag>…</tag>`` off: its inside (None if there is none) and the rest."""
    body = text.lstrip()
    if not body.startswith(f"<{tag}>"):
        return None, text
    depth, last = 0, None
    for found in re.finditer(f"<(/?){tag}>", body):
        depth += -1 if found[1] else 1
        last = found if found[1] else last
        if depth == 0:
            break
    if last is None:
        return body.removeprefix(f"<{tag}>").strip(), ""
    # Nested tags that never balance: the last closing tag ends the section.
    return body[len(tag) + 2 : last.start()].strip(), body[last.end() :]


def check_message_keys(message: Any, where: str, known: Collection[str] | None) -> None:
    """Refuse a message's unknown keys, and say where their values belong.

    Args:
        known: Beside ``role`` and ``content``; None for all that name no picture or video.

    Raises:
        TypeError: The message is no dict.
        ValueError: It has an unknown key.
    """
    if not isinstance(message, dict):
        raise TypeError(f"{where} must be a dict, got {type(message).__name__}")
    for key, value in message.items():
        if value is None or key in ("role", "content"):
            continue
        kind = next((kind for kind, name in _SHOWS.items() if name.search(str(key).lower())), None)
        if kind is not None:
            raise ValueError(
                f"{where} has unknown key {key!r}: pictures and videos belong into its content, a "
                f'list of items such as {{"type": "{kind}", "{kind}": …}}'
            )
        if known is not None and key not in known:
            raise ValueError(
                f"{where} has unknown key {key!r}, which the chat template does not read; known: "
                "role, content"
            )


def plain_data(value: Any, where: str, reserved: Collection[str]) -> Any:
    """A copy of strings, numbers, lists and dicts that a template may see.

    Raises:
        TypeError: Something else, whose methods a checkpoint's template should not call.
        ValueError: A string in it holds one of ``reserved``.
    """
    if isinstance(value, str):
        _check_text(value, where, reserved)
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        pairs = value.items()
        return {plain_data(k, where, reserved): plain_data(v, where, reserved) for k, v in pairs}
    if isinstance(value, (list, tuple)):
        return [plain_data(one, where, reserved) for one in value]
    raise TypeError(
        f"{where} must hold strings, numbers, lists and dicts alone, got {type(value).__name__}"
    )


def _message(
    message: Any,
    where: str,
    reserved: Collection[str],
    marks: Collection[str],
    keys: Sequence[str],
    roles: Sequence[str],
    sources: bool,
    rules: Rules,
) -> dict[str, Any]:
    check_message_keys(message, where, keys)
    role, content = message.get("role"), message.get("content")
    if role not in roles:
        raise ValueError(f"{where}['role'] must be one of {', '.join(ROLES)}, got {role!r}")
    reserved = reserved if role == "assistant" else (*reserved, *marks)
    checked = {
        key: plain_data(message[key], f"{where}[{key!r}]", reserved)
        for key in keys
        if message.get(key) is not None
    }
    if content is None and checked.get("tool_calls"):
        content = ""
    where = f"{where}['content']"
    if isinstance(content, str):
        _check_text(content, where, reserved)
        return {"role": role, "content": content, **checked}
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"{where} must be a string or a list of items, got {type(content).__name__}"
        )
    if not content:
        raise ValueError(f"{where} must not be empty, got an empty list")
    items = [_item(item, f"{where}[{i}]", sources, rules) for i, item in enumerate(content)]
    # Neighbouring texts are joined without a separator, so they are searched as one.
    pieces = (item["text"] if item["type"] == "text" else "\0" for item in items)
    _check_text("".join(pieces), where, reserved)
    return {"role": role, "content": items, **checked}


def _item(item: Any, where: str, sources: bool, rules: Rules) -> dict[str, Any]:
    kind = kind_of(item, where)
    if kind == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"{where}['text'] must be a string, got {item.get('text')!r}")
    checked = checked_item(item, kind, where, rules)
    if sources and kind != "text" and source_of(checked) is None:
        raise ValueError(f"{where} must name its source under {kind!r}, got none")
    return checked


def _check_text(text: str, where: str, reserved: Collection[str]) -> None:
    found = next((token for token in reserved if token in text), None)
    if found is not None:
        raise ValueError(
            f"{where} must not hold the special token {found!r} in its text; pictures and videos "
            "are items of their own"
        )
