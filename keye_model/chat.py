"""A conversation with a model: questions in, answers out, and what was said so far."""

from __future__ import annotations

import base64
import io
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from keye_model.inputs.answer import Answer
from keye_model.inputs.options import SamplingOptions
from keye_model.inputs.request import Request
from keye_model.processing.chat import Messages, normalize_messages
from keye_model.processing.fetch import describe
from keye_model.processing.items import checked_item, kind_of
from keye_model.processing.picture import load_image
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.rules.base import Rules


class Model(Protocol):
    """What a chat needs of a `Keye`."""

    processor: KeyeProcessor

    def stream(self, messages: Messages | Request, **options: Any) -> Any: ...


class Chat:
    """The turns of a conversation; `Keye.chat` makes one.

    Each turn gives the model all messages so far. What a picture or video of an earlier turn was
    processed into is found in the processor's `SourceCache`. An answer stands in the history as the
    model wrote it, with its thinking; the chat template decides what of it the model sees again.

    A chat is for one thread at a time.

    >>> chat = keye.chat(system="Be brief.")
    >>> print(chat.send("What is this?", images=["photo.jpg"]).text)
    >>> print(chat.send("Which colour is it?").text)
    """

    def __init__(self, keye: Model, system: str | None = None, **options: Any) -> None:
        """Begin a conversation.

        Args:
            keye: Answers.
            system: The system message.
            options: Of `Keye.stream`, for every turn that does not set its own.

        Raises:
            TypeError: An option is unknown.
        """
        others = ("thinking", "progress")
        SamplingOptions.of({name: options[name] for name in options if name not in others}, *others)
        self._keye = keye
        self._options = options
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._last: weakref.ref[Reply] | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation as `Keye.generate` takes it; sources are not copied."""
        return [_copied(message) for message in self._messages]

    def send(self, text: str, images: Any = (), videos: Any = (), **options: Any) -> Answer:
        """Ask, and wait for the whole answer. If that fails, the history stays as it was.

        Args:
            text: The question; it stands behind its pictures and videos.
            images, videos: A source, or a list of them; a source with options is an item, such as
                ``{"image": "photo.jpg", "max_pixels": 200704}``. A video's frames are a list in
                that list. Open files are read again in each turn, so they must be able to seek.
            options: As in `Keye.stream`, for this turn.

        Raises:
            ValueError, TypeError, FileNotFoundError: As `Keye.generate`.
        """
        question = _question(text, images, videos)
        with closing(self._answer(question, None, options)) as stream:
            said = "".join(stream)
        self._join(question, said)
        return stream.answer

    def stream(self, text: str, images: Any = (), videos: Any = (), **options: Any) -> Reply:
        """Ask, and take the answer piece by piece; arguments as in `send`.

        A `Reply` that is still open when the next turn begins, or at `undo`, is closed then.
        """
        return self.reply_to(_question(text, images, videos), **options)

    def reply_to(
        self, question: Mapping[str, Any], request: Request | None = None, **options: Any
    ) -> Reply:
        """As `stream`, with the question as a user's message.

        Args:
            request: What the messages and the question were processed into, if they were.
        """
        question = _copied(question)
        stream = self._answer(question, request, options)
        reply = Reply(stream, lambda said: self._join(question, said))
        self._last = weakref.ref(reply)
        return reply

    def undo(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Forget the last question and its answer; returns both messages.

        Raises:
            ValueError: There is none.
        """
        self._close()
        if not self._messages or self._messages[-1]["role"] == "system":
            raise ValueError("there is nothing to undo")
        answer, question = self._messages.pop(), self._messages.pop()
        return question, answer

    def save(self, path: str | os.PathLike) -> None:
        """Write `messages` as JSON; see `write_messages`."""
        write_messages(path, self.messages, self._keye.processor.rules)

    @classmethod
    def load(cls, keye: Model, path: str | os.PathLike, **options: Any) -> Chat:
        """Go on with a conversation that `save` wrote; ``options`` as for `Chat`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It holds something else, or what ``keye``'s model line does not take.
        """
        chat = cls(keye, None, **options)
        try:
            messages = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_turns(messages)
            if messages:
                normalize_messages(messages, reserved=(), sources=True, rules=keye.processor.rules)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"path must name a conversation saved as JSON, got {describe(path)}: {error}"
            ) from error
        chat._messages = messages
        return chat

    def _answer(
        self, question: Mapping[str, Any], request: Request | None, options: Mapping[str, Any]
    ) -> Any:
        self._close()
        asked = [*self.messages, question] if request is None else request
        return self._keye.stream(asked, **{**self._options, **options})

    def _join(self, question: dict[str, Any], said: str) -> None:
        self._messages += [question, {"role": "assistant", "content": said}]

    def _close(self) -> None:
        if self._last is not None and (reply := self._last()) is not None:
            reply.close()


class Reply(Iterator[str]):
    """The pieces of an answer in a chat, as `Stream` gives them.

    Question and answer join the history with the last piece. A reply that is closed, dropped or
    stopped by Ctrl-C joins it with what was said so far, if anything was. One that fails leaves it
    as it was.
    """

    def __init__(self, stream: Any, join: Callable[[str], None]) -> None:
        self._stream = stream
        self._join: Callable[[str], None] | None = join
        self._pieces: list[str] = []

    @property
    def answer(self) -> Answer | None:
        """The whole `Answer`; None until the last piece was taken."""
        return self._stream.answer

    def __next__(self) -> str:
        try:
            piece = next(self._stream)
        except StopIteration:
            self._end(joins=True)
            raise
        except Exception:
            self.forget()
            raise
        except BaseException:
            self.close()
            raise
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """End the answer where it is."""
        self._stream.close()
        self._end(joins=bool(self._pieces))

    __del__ = close

    def forget(self) -> None:
        """End the answer and leave the history as it was."""
        self._stream.close()
        self._end(joins=False)

    def _end(self, *, joins: bool) -> None:
        join, self._join = self._join, None
        if joins and join is not None:
            join("".join(self._pieces))


def write_messages(path: str | os.PathLike, messages: Messages, rules: Rules) -> None:
    """Write a conversation as a JSON list that `Keye.generate` and `Chat.load` take.

    Paths (relative ones too), URLs and base64 stay as they are. Bytes and open files become data
    URLs; PIL images, arrays and tensors data URLs of the PNG of what the model sees of them.

    Args:
        rules: Of the model line.

    Raises:
        OSError: The file cannot be written.
    """
    saved = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_saved_item(item, rules) for item in content]
        saved.append({**message, "content": content})
    text = json.dumps(saved, ensure_ascii=False, indent=2, default=lambda array: array.tolist())
    # Bytes of a file name that are no UTF-8 are escaped, as JSON does.
    Path(path).write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def _question(text: str, images: Any, videos: Any) -> dict[str, Any]:
    items = [
        {"type": kind, **(source if isinstance(source, Mapping) else {kind: source})}
        for kind, sources in (("image", images), ("video", videos))
        for source in (sources if isinstance(sources, (list, tuple)) else [sources])
    ]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def _copied(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": content if isinstance(content, str) else list(map(dict, content))}


def _check_turns(messages: Any) -> None:
    """Raises ValueError unless these are a system message, if any, and questions with answers."""
    if not isinstance(messages, list):
        raise ValueError("it must be a list of messages")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("a system message may come first, then user and assistant take turns")


def _saved_item(item: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    kind = kind_of(item, "an item")
    item = checked_item(item, kind, "an item", rules)
    return item if kind == "text" else {**item, kind: _saved_source(item[kind], rules)}


def _saved_source(source: Any, rules: Rules) -> Any:
    if isinstance(source, str):
        return source
    if isinstance(source, os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, Mapping):  # a frame with options
        return _saved_item({"type": "image", **source}, rules)
    if isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4:
        return [_saved_source(frame, rules) for frame in source]
    if hasattr(source, "read"):
        source.seek(0)
        source = source.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _data_url("application/octet-stream", source)
    file = io.BytesIO()
    load_image(source, alpha=rules.alpha).save(file, "PNG")
    return _data_url("image/png", file.getvalue())


def _data_url(kind: str, data: bytes | bytearray | memoryview) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
