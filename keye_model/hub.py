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
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if directory.exists() or not looks_like_id:
        raise FileNotFoundError(
            f"path_or_id must be an existing directory or a Hub id 'owner/name', got {name!r}"
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
        raise FileNotFoundError(f"path_or_id {name!r} is no repository on the Hub") from error
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"path_or_id {name!r} could not be fetched from the Hub: {error}"
        ) from error


def read_json(directory: Path, filename: str, *, required: bool = True) -> dict[str, Any] | None:
    """Read one JSON object of a checkpoint; None if it is absent and not ``required``.

    Raises:
        FileNotFoundError: The file is required and absent.
        ValueError: The file is not a JSON object.
    """
    path = directory / filename
    if not path.is_file():
        if required:
            raise FileNotFoundError(f"checkpoint must contain {filename}, {directory} does not")
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be valid JSON, got an error at {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value
