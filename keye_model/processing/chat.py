"""Conversations as prompts: what a message may be, the chat template, thinking, and answers.

A checkpoint's template is somebody else's program, so it runs in jinja2's sandbox, on messages that
were checked and reduced to what the published template reads.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from keye_model.checkpoint.hub import read_json
from keye_model.processing.items import checked_item, source_of

ROLES = ("system", "user", "assistant")
Messages = Sequence[dict[str, Any]]  # one conversation
Thinking = Literal["auto"] | bool

# What chat_template.json of both published checkpoints renders.
DEFAULT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if item.type == 'image' -%}
                {%- set seen.images = seen.images + 1 -%}
                {{- 'Picture ' ~ seen.images ~ ': ' if add_vision_id -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {{- 'Video ' ~ seen.videos ~ ': ' if add_vision_id -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""

_KEYS = {key: key for key in ("text", "image", "video")}
_KEYS |= {"image_url": "image", "video_url": "video"}


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


def read_template(directory: Path) -> str:
    """The checkpoint's chat template, or the published one if the directory holds none.

    `chat_template.jinja` goes before `chat_template.json`. The text-only template inside
    `tokenizer_config.json` is not used: it knows no pictures.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raw = read_json(directory, "chat_template.json", required=False)
    if raw is None:
        return DEFAULT_TEMPLATE
    template = raw.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(
            "chat_template.json must hold the string 'chat_template', got "
            f"{type(template).__name__}"
        )
    return template


def normalize_messages(
    messages: Messages,
    *,
    reserved: Collection[str],
    marks: Collection[str] = (),
    sources: bool,
    version: str,
) -> list[dict[str, Any]]:
    """Check a conversation and return a copy in which every item of a content list has a type.

    Args:
        messages: Each has a ``role`` of `ROLES` and a ``content``: a string, or a list of items of
            ``type`` text, image (also image_url) or video (also video_url). Without a ``type``, an
            item is what its only key among these says. Other keys: see `fetch_image` for images,
            `sample_preview` and `sample_1_5` for videos; ``detail`` and ``cache_control`` are
            passed over.
        reserved: Strings that no text may hold, because as special tokens they would open a turn
            or claim a picture's place.
        marks: Strings that only the assistant's text may hold: it may have repeated the marks of a
            video, and its answer must serve as the next turn's history.
        sources: Whether each image and video must name its source; else it may be a bare
            placeholder such as ``{"type": "image"}``.
        version: "1.0" (8B-Preview) or "1.5": the line whose keys a video may have.

    Raises:
        ValueError: Something is missing, unknown or reserved; the message says where.
        TypeError: A list, message or item is of the wrong kind.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    return [
        _message(message, f"messages[{index}]", reserved, marks, sources, version)
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


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    add_vision_id: bool = False,
) -> str:
    """Run a chat template on normalised messages.

    Of a picture or video the template sees only that it is there: methods of the user's objects
    (say, saving a PIL image) are nothing a checkpoint should be able to call.

    Raises:
        ValueError: The template is broken, refuses the messages, or reaches for Python internals.
    """
    try:
        return _compile(template).render(
            messages=[_without_sources(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            add_vision_id=add_vision_id,
        )
    except SecurityError as error:
        raise ValueError(f"chat template must not reach into Python: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template could not be rendered: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"chat template could not be rendered: {type(error).__name__}: {error}"
        ) from error


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


def _message(
    message: Any,
    where: str,
    reserved: Collection[str],
    marks: Collection[str],
    sources: bool,
    version: str,
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TypeError(f"{where} must be a dict, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}['role'] must be one of {', '.join(ROLES)}, got {role!r}")
    reserved = reserved if role == "assistant" else (*reserved, *marks)
    if isinstance(content, str):
        _check_text(content, where, reserved)
        return {"role": role, "content": content}
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"{where}['content'] must be a string or a list of items, got {type(content).__name__}"
        )
    if not content:
        raise ValueError(f"{where}['content'] must not be empty, got an empty list")
    items = [
        _item(item, f"{where}['content'][{index}]", sources, version)
        for index, item in enumerate(content)
    ]
    # Neighbouring texts are joined without a separator, so they are searched as one.
    pieces = (item["text"] if item["type"] == "text" else "\0" for item in items)
    _check_text("".join(pieces), where, reserved)
    return {"role": role, "content": items}


def _item(item: Any, where: str, sources: bool, version: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise TypeError(f"{where} must be a dict, got {type(item).__name__}")
    kinds = {_KEYS[key] for key in _KEYS if item.get(key) is not None}
    named = item.get("type")
    if named is not None and named not in _KEYS:
        raise ValueError(
            f"{where}['type'] must be text, image, image_url, video or video_url, got {named!r}"
        )
    kinds |= {_KEYS[named]} if named else set()
    if len(kinds) != 1:
        found = f"{', '.join(sorted(kinds))} together" if kinds else f"the keys {sorted(item)}"
        raise ValueError(f"{where} must be one of text, image or video, got {found}")
    kind = kinds.pop()
    if kind == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"{where}['text'] must be a string, got {item.get('text')!r}")
    checked = checked_item(item, kind, where, version)
    if sources and kind != "text" and source_of(checked) is None:
        raise ValueError(f"{where} must name its source under {kind!r}, got none")
    return checked


def _check_text(text: str, where: str, reserved: Collection[str]) -> None:
    found = next((token for token in reserved if token in text), None)
    if found is not None:
        raise ValueError(
            f"{where}['content'] must not hold the special token {found!r} in its text; pictures "
            "and videos are items of their own"
        )


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    shown = [
        item if item["type"] == "text" else {"type": item["type"], item["type"]: ""}
        for item in message["content"]
    ]
    return {**message, "content": shown}


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 itself returns an undefined value, which may be printed as nothing.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


def _compile(template: str) -> jinja2.Template:
    """Compile under the settings for which templates on the Hub are written."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
