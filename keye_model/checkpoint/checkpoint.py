"""One checkpoint: found once by the door that was asked for it, and handed down from there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from keye_model.checkpoint.hub import locate, read_json


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's files are, and the contents of its small JSON files.

    Each file is read when it is first asked for, and once.

    Attributes:
        path_or_id: The directory or Hub id that was asked for.
        directory: Holds the configuration and the tokenizer.
        options: Of `locate`: ``local_files_only``, ``revision`` and others.
    """

    path_or_id: str | os.PathLike
    directory: Path
    options: dict[str, Any] = field(repr=False)  # may hold a token
    _contents: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def at(
        cls,
        path_or_id: str | os.PathLike | Checkpoint,
        *,
        local_files_only: bool = False,
        **download: Any,
    ) -> Checkpoint:
        """Find a checkpoint and fetch its small files, not its weights; all as for `locate`.

        A `Checkpoint` is returned as it is.
        """
        if isinstance(path_or_id, Checkpoint):
            return path_or_id
        options = {"local_files_only": local_files_only, **download}
        return cls(path_or_id, locate(path_or_id, weights=False, **options), options)

    @property
    def local_files_only(self) -> bool:
        """Never touch the network."""
        return self.options["local_files_only"]

    def json(self, filename: str, *, required: bool = True) -> dict[str, Any] | None:
        """Contents of a JSON file, not to be changed; None or an error as from `read_json`."""
        if self._contents.get(filename) is None:
            self._contents[filename] = read_json(self.directory, filename, required=required)
        return self._contents[filename]

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens that `tokenizer.json` adds to its vocabulary; empty without the file.

        Raises:
            ValueError: The file's list of them is broken.
        """
        raw = read_json(self.directory, "tokenizer.json", required=False) or {}
        try:
            return {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.directory / 'tokenizer.json'} must list 'added_tokens' as objects with "
                f"'id' and 'content', got {type(error).__name__}: {error}"
            ) from error

    def fetch_weights(self) -> Path:
        """Fetch the safetensors files too; returns the directory that holds them."""
        return locate(self.path_or_id, weights=True, **self.options)
