"""Chat templates: where a checkpoint keeps them, what they read, and how they are run.

A checkpoint's template is somebody else's program, so it runs in jinja2's sandbox, on messages that
were checked and reduced to plain data. It is given what transformers gives templates.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from keye_model.checkpoint.checkpoint import Checkpoint

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


def read_template(checkpoint: Checkpoint) -> str | dict[str, str]:
    """The checkpoint's chat template, or the published one if it has none.

    `chat_template.json` goes before `chat_template.jinja`, as in transformers: the first is the
    processor's alone, while a tokenizer that was saved beside it leaves its text-only template in
    the second. With templates in the folder `additional_chat_templates`, or several in the JSON
    file, all are returned by name; "default" is the one that is taken unless another is named. The
    template inside `tokenizer_config.json` is not used: it knows no pictures.

    Raises:
        ValueError: `chat_template.json` holds something else.
    """
    found = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(checkpoint.directory.glob("additional_chat_templates/*.jinja"))
    }
    path = checkpoint.directory / "chat_template.jinja"
    raw = checkpoint.json("chat_template.json", required=False)
    if raw is not None:
        found |= _named(raw.get("chat_template"))
    elif path.is_file():
        found["default"] = path.read_text(encoding="utf-8")
    elif not found:
        return DEFAULT_TEMPLATE
    return found["default"] if found.keys() == {"default"} else found


def choose_template(templates: str | Mapping[str, str], wanted: str | None) -> str:
    """The template to run: the default, one of several by its name, or ``wanted`` itself.

    Raises:
        TypeError: ``wanted`` is no string.
        ValueError: There are several, none is called "default" and none is named.
    """
    if wanted is not None and not isinstance(wanted, str):
        raise TypeError(f"chat_template must be a name or a template, got {type(wanted).__name__}")
    named = {"default": templates} if isinstance(templates, str) else templates
    if wanted is None and "default" not in named:
        raise ValueError(f"chat_template must be one of {', '.join(named)}, got None")
    return named.get(wanted or "default", wanted)


def template_reads(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a template looks up by name, among them the keys of messages; and the words that it
    compares with, among them their roles.

    Raises:
        ValueError: The template is broken.
    """
    compiled = _compiled(template)
    return compiled.keys, compiled.words


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Run a chat template on normalised messages.

    Of a picture or video the template sees only that it is there: methods of the user's objects
    (say, saving a PIL image) are nothing a checkpoint should be able to call.

    Args:
        add_generation_prompt: Open the assistant's turn at the end.
        continue_final_message: End within the last message, so that the model goes on with it.
        special_tokens: Variables such as ``eos_token``.
        variables: Others, which the template must read, plain data: ``tools``, ``documents`` and
            its own. They go before ``special_tokens``.

    Raises:
        TypeError: The template does not read a variable.
        ValueError: The template is broken, refuses the messages, or reaches for Python internals;
            or the last message is none to continue.
        NotImplementedError: Something else than the content is to be continued.
    """
    compiled = _compiled(template)
    asked = {"tools": None, "documents": None, **(variables or {})}
    for name, value in asked.items():
        if name not in compiled.variables and value not in (None, []):
            given = {"messages", "add_generation_prompt", *(special_tokens or ())}
            known = ", ".join(sorted(compiled.variables - given))
            raise TypeError(
                f"unknown keyword {name!r}, which the chat template does not read; it reads "
                f"{known or 'none'}"
            )
    shown = [_without_sources(message) for message in messages]
    if continue_final_message not in (True, False, "content"):
        raise NotImplementedError(
            f"continue_final_message must be True or False, got {continue_final_message!r}"
        )
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError(
                "continue_final_message must be False with add_generation_prompt, which opens "
                "another message, got True"
            )
        final = _mark_end(shown)
    try:
        text = compiled.template.render(
            messages=shown,
            add_generation_prompt=add_generation_prompt,
            **{**(special_tokens or {}), **asked},
        )
    except SecurityError as error:
        raise ValueError(f"chat template must not reach into Python: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template could not be rendered: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"chat template could not be rendered: {type(error).__name__}: {error}"
        ) from error
    return _until_mark(text, final) if continue_final_message else text


_END = "CONTINUE_FINAL_MESSAGE_TAG "  # its space shows whether a template trims what it shows


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Put the mark behind the last message's last text, in place; returns that text."""
    message = messages[-1]
    if isinstance(message["content"], str):
        text = message["content"]
        message["content"] = text + _END
        return text
    for item in reversed(message["content"]):
        if item["type"] == "text":
            text = item["text"]
            item["text"] = text + _END
            return text
    raise ValueError(
        "continue_final_message must find a text in the last message to go on with, got none"
    )


def _until_mark(text: str, final: str) -> str:
    """The prompt up to the mark; without the white space before it if the template trims."""
    mark = _END.strip()
    place = text.rfind(mark)
    if place < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message must find the last message in the prompt, but the chat "
            "template leaves it out or changes it"
        )
    kept = text[:place]
    return kept if text.startswith(_END, place) else kept.rstrip()


def _named(value: Any) -> dict[str, str]:
    """Templates by name, of a string, an object of them, or a list of ``{"name", "template"}``."""
    found = {"default": value} if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        found = {one.get("name"): one.get("template") for one in value}
    if not isinstance(found, dict) or not all(
        isinstance(one, str) for pair in found.items() for one in pair
    ):
        raise ValueError(
            "chat_template.json must hold the string 'chat_template', got "
            f"{type(value).__name__} (or templates by name)"
        )
    return found


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return dict(message)
    shown = [
        dict(item) if item["type"] == "text" else _without_source(item)
        for item in message["content"]
    ]
    return {**message, "content": shown}


def _without_source(item: dict[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    return {"type": kind, kind: ""} if kind in item else {"type": kind}


@dataclass(frozen=True)
class _Compiled:
    template: jinja2.Template
    keys: frozenset[str]
    words: frozenset[str]
    variables: frozenset[str]  # that it reads and does not set


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 itself returns an undefined value, which may be printed as nothing.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``, which mark the assistant's words."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> _Compiled:
    """Compile under the settings for which templates on the Hub are written."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        tree = environment.parse(template)
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template could not be rendered: {error}") from error
    words = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    variables = jinja2.meta.find_undeclared_variables(tree) - environment.globals.keys()
    return _Compiled(
        compiled,
        frozenset(_looked_up(tree)),
        frozenset(word for word in words if word.isidentifier()),
        frozenset(variables),
    )


def _looked_up(tree: nodes.Template) -> Iterator[str]:
    """Names after a dot, in brackets, before ``in``, and in calls of ``get`` and of filters."""
    own = {"loop"} | {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.node, nodes.Call) and getattr(node.node.node, "name", "") == "namespace"
    }
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Call)):
        if getattr(getattr(node, "node", None), "name", None) in own:
            continue
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node, nodes.Getitem):
            yield from _strings([node.arg])
        elif isinstance(node, nodes.Compare):
            if node.ops[0].op in ("in", "notin"):
                yield from _strings([node.expr])
        elif getattr(node.node, "attr", None) == "get":
            yield from _strings(node.args[:1])
    for node in tree.find_all(nodes.Filter):
        yield from _strings([*node.args, *(pair.value for pair in node.kwargs)])


def _strings(found: Sequence[nodes.Node]) -> Iterator[str]:
    return (node.value for node in found if isinstance(getattr(node, "value", None), str))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
