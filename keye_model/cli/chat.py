"""The conversation of `keye chat`: lines in, answers out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_model.chat import Chat, Reply, write_messages
from keye_model.cli.attachments import image_item, prepare, video_item, vision_tokens
from keye_model.cli.options import ERRORS, attachment_parser, with_flags
from keye_model.cli.terminal import Progress, note, say
from keye_model.inputs.answer import Answer
from keye_model.inputs.request import Request
from keye_model.keye import Stream
from keye_model.processing.chat import vision_items
from keye_model.processing.fetch import describe
from keye_model.processing.processor import KeyeProcessor

_HELP = """\
/image PATH_OR_URL [--max-pixels N] [--min-pixels N] [--exif]
/video PATH_OR_URL [--fps F] [--max-frames N] [--max-pixels N] [--min-pixels N] [--total-pixels N]
            add to the next message; --fps and --max-frames keep a video from being sampled to fit
/undo       remove the last attachment, else the last question and its answer
/reset      forget everything but the system message
/save FILE  write the conversation as JSON
/quit       leave, as do exit, quit and Ctrl-D
Ctrl-C stops an answer. A space before / makes it text."""


@dataclass
class _Turn:
    """What was attached to a question, and the tokens of the context up to its answer's end."""

    attached: list[tuple[dict[str, Any], int]]
    tokens: int


class Conversation:
    """Lines that make up a `Chat`, and the attachments of the next message.

    Args:
        processor: The checkpoint's.
        arguments: The command line's: lengths, thinking, and defaults for videos.
    """

    def __init__(self, processor: KeyeProcessor, arguments: argparse.Namespace) -> None:
        self._chat: Chat | None = None
        self._processor = processor
        self._arguments = arguments
        self._turns: list[_Turn] = []
        self._attached: list[tuple[dict[str, Any], int]] = []
        self._noted: set[str] = set()
        self._saved: set[Path] = set()
        self._interactive = False

    def run(self, chat: Chat) -> int:
        """Read lines until the input ends.

        Args:
            chat: Answers them.

        Returns:
            The exit status: 130 after Ctrl-C (at a terminal, twice); 1 if a script's line failed.
        """
        self._chat = chat
        interactive = self._interactive = sys.stdin.isatty()
        leaving = failed = False
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines with it
            note("/help lists the commands")
        while True:
            try:
                line = _read_line(interactive)
            except EOFError:
                if interactive:
                    note("")
                return int(failed and not interactive)
            except KeyboardInterrupt:
                if leaving or not interactive:
                    return 130
                leaving = True
                note("\nCtrl-C once more leaves, as do Ctrl-D and /quit")
                continue
            leaving = False
            try:
                if self._obey(line):
                    return int(failed and not interactive)
            except KeyboardInterrupt:
                if not interactive:
                    return 130
                note("(stopped)")
            except BrokenPipeError:
                raise
            except ERRORS as error:
                failed = True
                note(f"keye: error: {with_flags(str(error))}")

    def attach(self, kind: str, source: str, options: argparse.Namespace) -> None:
        """Check a picture or video alone and keep it for the next message.

        Raises:
            ValueError, TypeError, OSError, RuntimeError: It cannot be shown, or does not fit.
        """
        make = image_item if kind == "image" else video_item
        item = make(source, options, self._processor)
        used = self._turns[-1].tokens if self._turns else 0
        used += sum(tokens for _, tokens in self._attached)
        # In 1.5 only decoding tells which frames are slow, so counting shapes is not enough.
        header = kind == "video" and not self._processor.config.variant.timestamped_frames
        tokens = self._count(item, used, shapes_only=header)
        self._attached.append((item, tokens))
        note(f"attached, {tokens:,} tokens")

    def _obey(self, line: str) -> bool:
        """Carry out one line; return whether to leave."""
        command, rest = [*line.split(maxsplit=1), "", ""][:2] if line.startswith("/") else ("", "")
        if command in ("/quit", "/exit") or line.strip() in ("quit", "exit"):
            return True
        if command in ("/image", "/video"):
            self._attach_words(command[1:], _words(rest.strip()))
        elif command == "/undo":
            self._undo()
        elif command == "/reset":
            while self._turns:
                self._forget()
            self._attached = []
        elif command == "/save":
            self._save(_words(rest.strip()))
        elif command == "/help":
            note(_HELP)
        elif line.startswith("/"):
            raise ValueError(f"unknown command {command}; /help lists the commands")
        elif line.strip():
            try:
                self._ask(line.strip())
            except (KeyboardInterrupt, *ERRORS):
                if self._attached:
                    note("attachments are kept for the next message; /undo drops the last one")
                elif self._turns:
                    note(
                        "the message is forgotten; /undo forgets the last question too, /reset all"
                    )
                raise
        return False

    def _attach_words(self, kind: str, words: list[str]) -> None:
        parser = attachment_parser(kind)
        if kind == "video":
            names = ("fps", "max_frames", "min_pixels", "max_pixels", "total_pixels")
            parser.set_defaults(**{name: getattr(self._arguments, name) for name in names})
        options = parser.parse_args(words)
        self.attach(kind, options.source, options)

    def _ask(self, text: str) -> None:
        attached = [item for item, _ in self._attached]
        question = {"role": "user", "content": [*attached, {"type": "text", "text": text}]}
        with Progress() as progress:
            try:
                request = self._prepare([*self._chat.messages, question], progress)
            except ERRORS:
                self._drop_broken()
                raise
            with closing(self._chat.reply_to(question, request, progress=progress)) as stream:
                pieces: list[str] = []
                try:
                    write_answer(stream, progress, pieces)
                except BaseException as error:
                    stopped = isinstance(error, KeyboardInterrupt) and self._interactive
                    if not (stopped and pieces):
                        stream.forget()
                        raise
                    note("(stopped)")
        tokens, answer = request.input_ids.numel(), stream.answer
        if answer is None:  # stopped
            tokens += len(self._processor.tokenizer.encode("".join(pieces)).ids)
        else:
            tokens += answer.usage.new_tokens
        self._turns.append(_Turn(self._attached, tokens))
        self._attached = []
        if answer is not None and (cut := why_cut(answer, self._processor)):
            note(cut)

    def _prepare(
        self,
        messages: list[dict[str, Any]],
        progress: Progress,
        used: int = 0,
        shapes_only: bool = False,
    ) -> Request:
        return prepare(
            self._processor,
            messages,
            self._arguments.max_new_tokens,
            thinking=self._arguments.thinking,
            used=used,
            shapes_only=shapes_only,
            note=self._note_once,
            progress=progress,
        )

    def _count(self, item: dict[str, Any], used: int = 0, shapes_only: bool = False) -> int:
        """Tokens of one picture or video; raises if it cannot be processed."""
        messages = [{"role": "user", "content": [item]}]
        with Progress() as progress:
            request = self._prepare(messages, progress, used, shapes_only)
        return vision_tokens(request, self._processor)

    def _drop_broken(self) -> None:
        """Drop the attachments that cannot be processed: with them every message would fail."""
        kept = []
        for item, tokens in self._attached:
            try:
                self._count(item)
            except ERRORS:
                note(f"{_name(item)} is dropped")
            else:
                kept.append((item, tokens))
        self._attached = kept

    def _undo(self) -> None:
        if self._attached:
            item, _ = self._attached.pop()
            note(f"{_name(item)} is dropped")
        elif self._turns:
            self._attached = self._forget()
            waits = "; its attachments go to the next message" if self._attached else ""
            note(f"the last question and its answer are forgotten{waits}")
        else:
            raise ValueError("there is nothing to undo")

    def _forget(self) -> list[tuple[dict[str, Any], int]]:
        """Forget the last turn; returns what was attached to it."""
        self._chat.undo()
        return self._turns.pop().attached

    def _save(self, words: list[str]) -> None:
        if len(words) != 1:
            raise ValueError(f"/save must be followed by one file, got {len(words)}")
        path = Path(words[0]).expanduser().resolve()
        if path.exists() and path not in self._saved:
            raise ValueError(f"/save must name a new file, got {words[0]}, which exists")
        messages = self._chat.messages
        for item in vision_items(messages, "image"):
            if not isinstance(item["image"], str):  # turned by --exif
                item["image"] = item["image"].filename
        write_messages(path, messages, self._processor.rules)
        self._saved.add(path)
        note(f"saved {len(messages)} messages to {words[0]}")

    def _note_once(self, text: str) -> None:
        """Print how a video was sampled, once, even if the room left in the prompt has changed."""
        change = text.partition(", to fit")[0]
        if change not in self._noted:
            self._noted.add(change)
            note(text)


def why_cut(answer: Answer, processor: KeyeProcessor) -> str | None:
    """Say in a line why an answer was cut off; None if it ended by itself."""
    if answer.finish_reason != "length":
        return None
    usage, context = answer.usage, processor.config.text_config.max_position_embeddings
    number = f"{usage.new_tokens} token{'s' if usage.new_tokens > 1 else ''}"
    if usage.prompt_tokens + usage.new_tokens >= context:
        return f"[cut at {number}; the context of {context} tokens is full]"
    return f"[cut at {number}; --max-new-tokens]"


def write_answer(stream: Stream | Reply, progress: Progress, pieces: list[str]) -> None:
    """Write an answer to standard output as it is made; add what was written to ``pieces``."""
    try:
        for piece in stream:
            progress.close()
            pieces.append(piece)
            say(piece, end="")
    finally:
        if pieces:
            say("")


def _read_line(interactive: bool) -> str:
    prompt = "> " if interactive else ""
    if interactive and not sys.stdout.isatty():  # input() would write the prompt to it
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt).removeprefix("\ufeff").rstrip("\r")


def _words(rest: str) -> list[str]:
    """Split a command's arguments as a shell does; the name of an existing file may have spaces."""
    if os.path.isfile(os.path.expanduser(rest)):
        return [rest]
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"quotes must be closed, got {rest}") from error


def _name(item: dict[str, Any]) -> str:
    source = item[item["type"]]
    return describe(source if isinstance(source, str) else source.filename)
