"""The checkpoint's tokenizer and the ids that prompts are built from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.checkpoint.hub import LFS_POINTER, check_file, is_lfs_pointer

# What the Hugging Face tokenizers call cleaning up: no space before these.
_CLEAN_UP = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read `tokenizer.json`, without any truncation or padding it may ask for.

    Raises:
        FileNotFoundError: The directory has no such file.
        ValueError: It is not a tokenizer.
    """
    path = directory / "tokenizer.json"
    check_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        what = LFS_POINTER if is_lfs_pointer(path) else f"an error: {error}"
        raise ValueError(f"{path} must be a tokenizer, got {what}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class TokenIds:
    """Ids with a part in the prompt's structure.

    Attributes:
        image, video: The placeholders, one for each merged token.
        pad: Fills batches.
        eos: Ids that end an answer.
        frame, fast_start, fast_end: Marks in a video's text; None for 8B-Preview.
    """

    image: int
    video: int
    pad: int
    eos: tuple[int, ...]
    frame: int | None = None
    fast_start: int | None = None
    fast_end: int | None = None

    @classmethod
    def read(
        cls, tokenizer: Tokenizer, config: KeyeConfig, defaults: GenerationDefaults
    ) -> TokenIds:
        """Look the ids up by string, and hold them against those that `config.json` names.

        Raises:
            ValueError: The tokenizer lacks a token or disagrees with the configuration.
        """
        named = {
            "<|image_pad|>": config.image_token_id,
            "<|video_pad|>": config.video_token_id,
            "<|vision_start|>": config.vision_start_token_id,
            "<|vision_end|>": config.vision_end_token_id,
        }
        if tokenizer.token_to_id("<|fast_video_pad|>") is not None:
            named["<|fast_video_pad|>"] = config.fast_video_token_id
        for token, expected in named.items():
            if expected is not None and tokenizer.token_to_id(token) != expected:
                raise ValueError(
                    f"tokenizer.json must give {token!r} the id {expected} of config.json, got "
                    f"{tokenizer.token_to_id(token)}"
                )
        marks = {}
        if config.variant.timestamped_frames:
            marks = {name: f"<|{name}|>" for name in ("frame", "fast_start", "fast_end")}
        return cls(
            image=config.image_token_id,
            video=config.video_token_id,
            pad=defaults.pad_token_id,
            eos=defaults.eos_token_ids,
            **{name: _id(tokenizer, token) for name, token in marks.items()},
        )


def reserved_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Strings that no message's text may hold: special tokens and every placeholder."""
    added = tokenizer.get_added_tokens_decoder().values()
    return tuple(t.content for t in added if t.special or t.content == "<|fast_video_pad|>")


def special_tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Strings that chat templates know by name, ``eos_token`` for one, as the files name them.

    `tokenizer_config.json` goes before `special_tokens_map.json`. Tokens that only they name, say
    ``image_token``, are among them, and a list ``additional_special_tokens``.
    """
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        raw = checkpoint.json(file, required=False) or {}
        extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens")
        named = {**raw, **(extra if isinstance(extra, dict) else {})}
        for name, token in named.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                found[name] = token
        if isinstance(extra, list):
            tokens = (one.get("content") if isinstance(one, dict) else one for one in extra)
            found["additional_special_tokens"] = [one for one in tokens if isinstance(one, str)]
    return found


def video_marks(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Marks around a video's frames, which stand for no picture; none for 8B-Preview."""
    marks = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")
    return tuple(mark for mark in marks if tokenizer.token_to_id(mark) is not None)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text``, special tokens in it included.

    Raises:
        ValueError: ``text`` holds half of a surrogate pair, which no UTF-8 has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be valid Unicode, got {error}") from error
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(
    tokenizer: Tokenizer,
    ids: int | Iterable[int] | torch.Tensor,
    *,
    skip_special_tokens: bool,
    clean_up: bool,
) -> str:
    """Text of ``ids``; ids without a string (rows that only fill the embedding up) are left out.

    Raises:
        ValueError: An id is negative.
    """
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    ids = [ids] if isinstance(ids, int) else [int(one) for one in ids]
    if ids and min(ids) < 0:
        raise ValueError(f"ids must not be negative, got {min(ids)}")
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    if clean_up:
        text = text.replace(" ' ", "'")
        for piece in _CLEAN_UP:
            text = text.replace(piece, piece[1:])
    return text


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"tokenizer.json must contain the token {token!r}, it does not")
    return found
