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


def locate(
    path_or_id: str | os.PathLike,
    *,
    weights: bool,
    local_files_only: bool = False,
    **download: Any,
) -> Path:
    """Return the directory that holds a checkpoint's files, downloading them if they are not here.

    Args:
        path_or_id: A directory, or a Hub id such as ``Kwai-Keye/Keye-VL-8B-Preview``.
        weights: Whether the safetensors files are wanted too, or only configuration and tokenizer.
            Code files are never fetched.
        local_files_only: Never touch the network. ``HF_HUB_OFFLINE=1`` does the same.
        download: Other options of `huggingface_hub.snapshot_download`, ``revision`` for one.

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
    options = {"allow_patterns": list(patterns), "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(name, **options, **download))
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
