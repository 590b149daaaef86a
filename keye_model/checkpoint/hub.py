"""Where a checkpoint's files are: a local directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

CONFIG_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)


def locate(path_or_id: str | os.PathLike, *, weights: bool, local_files_only: bool = False) -> Path:
    """Return the directory that holds a checkpoint's files, downloading them if they are not here.

    Args:
        path_or_id: A directory, or a Hub id such as ``Kwai-Keye/Keye-VL-8B-Preview``.
        weights: Whether the safetensors files are wanted too, or only configuration and tokenizer.
            Code files are never fetched.
        local_files_only: Never touch the network. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        FileNotFoundError: The directory does not exist, or the Hub (or its cache) has no such
            repository.
        RuntimeError: The Hub could not be read.
        TypeError: ``path_or_id`` is no string or path.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"path_or_id must be a string or a path, got {type(path_or_id).__name__}")
    name = os.fspath(path_or_id)
    if not name:
        raise ValueError("path_or_id must be a directory or a Hub id, got ''")
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if os.path.exists(path) or not looks_like_id:
        hint = ", a file: give the directory that holds it" if os.path.isfile(path) else ""
        raise FileNotFoundError(
            f"path_or_id must be an existing directory or a Hub id 'owner/name', got {name!r}{hint}"
        )
    patterns = CONFIG_FILES + (WEIGHT_FILES if weights else ())
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(patterns), local_files_only=local_files_only
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"path_or_id {name!r} is no directory here, is not in the local Hub cache, and the Hub "
            f"was not reached (offline, or local_files_only)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"path_or_id {name!r} is no repository on the Hub that you may read: {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"path_or_id {name!r} could not be fetched from the Hub: {error}"
        ) from error


def read_json(directory: Path, filename: str, *, required: bool = True) -> dict[str, Any] | None:
    """Read one JSON object of a checkpoint; None if it is absent and not ``required``.

    Raises:
        FileNotFoundError: The file is required and absent, or a link to nothing.
        ValueError: The file is not a JSON object.
    """
    path = directory / filename
    if not required and not os.path.lexists(path):
        return None
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        what = LFS_POINTER if is_lfs_pointer(path) else f"an error at {error}"
        raise ValueError(f"{path} must be valid JSON, got {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def check_file(path: Path) -> None:
    """Refuse a checkpoint without the file ``path``, and say where the checkpoint may be instead.

    Raises:
        FileNotFoundError: There is no such file, or it is a link to nothing.
    """
    if path.is_file():
        return
    name, directory = path.name, path.parent
    if path.is_symlink():
        raise FileNotFoundError(
            f"{path} must be a file, got a link to nothing: its download may have been cut short"
        )
    hint = "" if any(directory.glob("*")) else ", which is empty"
    if (directory / "adapter_config.json").is_file():
        hint = ", which holds an adapter: give the directory of its base model"
    # A clone inside of another folder, or the folder that the Hub's cache has for a repository.
    below = sorted(p for where in ("*", "snapshots/*") for p in directory.glob(f"{where}/{name}"))
    if below:
        hint = f"; there is one in {below[0].parent}"
    raise FileNotFoundError(f"checkpoint must contain {name}, got none in {directory}{hint}")


LFS_POINTER = "a Git LFS pointer instead of the file's content: fetch that with `git lfs pull`"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file only says which large file a clone without Git LFS left out."""
    with open(path, "rb") as file:
        return file.read(23) == b"version https://git-lfs"


def added_tokens(directory: Path) -> dict[str, int]:
    """Ids of the tokens that `tokenizer.json` adds to its vocabulary; empty without the file.

    Raises:
        ValueError: The file's list of them is broken.
    """
    raw = read_json(directory, "tokenizer.json", required=False) or {}
    try:
        return {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / 'tokenizer.json'} must list 'added_tokens' as objects with 'id' and "
            f"'content', got {type(error).__name__}: {error}"
        ) from error


def end_ids(directory: Path) -> tuple[tuple[int, ...], int]:
    """Ids that end an answer, and the id that fills batches up.

    `generation_config.json` decides. What it leaves open has the published values, looked up by
    string in `tokenizer.json`: ``<|im_end|>`` and ``<|endoftext|>`` end, ``<|endoftext|>`` fills.
    Only without these does `config.json` count, which names one end id of the two.

    Raises:
        ValueError: No file names an end id, so that generation would never end by itself; or what
            is named is no id.
    """
    generation = read_json(directory, "generation_config.json", required=False) or {}
    eos, pad = generation.get("eos_token_id"), generation.get("pad_token_id")
    if eos is None or pad is None:
        added = added_tokens(directory)
        config = read_json(directory, "config.json", required=False) or {}
        if eos is None:
            eos = [added[token] for token in ("<|im_end|>", "<|endoftext|>") if token in added]
            eos = eos or config.get("eos_token_id")
        if pad is None:
            pad = added.get("<|endoftext|>", config.get("pad_token_id"))
    if eos is None:
        raise ValueError(
            f"generation_config.json must contain 'eos_token_id', or tokenizer.json the token "
            f"'<|im_end|>', {directory} has neither"
        )
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    pad = ends[-1] if pad is None and ends else pad
    for name, ids, given in (("eos_token_id", ends, eos), ("pad_token_id", (pad,), pad)):
        if not ids or not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError(f"{name} of {directory} must be a token id, got {given!r}")
    return ends, pad
