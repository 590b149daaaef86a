"""What pictures and videos were processed into, kept for the next turn of a conversation."""

from __future__ import annotations

import hashlib
import numbers
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch

from keye_model.processing.source import read_source, source_of

MAX_BYTES = 512 << 20  # the patches of the longest video of a prompt are 308 MB
_LONGEST_PATH = 1 << 15  # characters; a longer string is base64


class File(NamedTuple):
    """What tells a file from another and from its own earlier content."""

    path: str
    device: int
    inode: int
    size: int
    modified: int  # nanoseconds, as the next
    changed: int

    @classmethod
    def at(cls, path: str) -> File:
        found, path = os.stat(path), os.path.abspath(path)
        return cls(
            path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )


@dataclass(frozen=True)
class SourceKey:
    """What the patches of an item depend on.

    Attributes:
        sources: A file, a URL, or the SHA-256 of bytes; of a list of frames, one for each.
        settings: The item's other keys, and how it is processed.
    """

    sources: tuple[File | str | bytes, ...]
    settings: str


class SourceCache:
    """Patches by the source they were made from; the least recently used are dropped for new ones.

    A file is known by its absolute path, device, inode, size and times: one that changes is read
    again, unless it keeps its size and changes twice within a tick of the file system's clock. A
    URL is known by its text alone: what it brought stands for it until it is dropped. Bytes, data
    URLs and base64 are known by their SHA-256, which takes 0.1 to 1.8 % of the time of processing
    a JPEG or PNG and 0.1 to 0.4 % of that of a film (2 to 4 % if it is 105 Mbit/s of noise). PIL
    images, arrays and tensors are not kept, since hashing their pixels would take 1 to 16 % of it;
    nor are bytearrays and open files.

    What is found is shared with all who found it before, and none of them may write to it. A tensor
    that was written to by an op of PyTorch is not given out again.

    All methods may be called from several threads. A copy of a cache, or of what has one, is empty.

    Args:
        max_bytes: Of all patches together; 0 keeps none.

    Attributes:
        num_bytes: Of the patches that are kept.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[SourceKey, tuple[Any, torch.Tensor, int | None]] = OrderedDict()
        self.num_bytes = 0
        self.max_bytes = max_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceCache, (self._max_bytes,)

    @property
    def max_bytes(self) -> int:
        """The bound, which may be set; 0 switches the cache off."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        if type(value) is not int or value < 0:
            raise ValueError(f"max_bytes must be an integer of at least 0, got {value!r}")
        with self._lock:
            self._max_bytes = value
            self._shrink()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def key(self, item: Mapping[str, Any], settings: Any) -> SourceKey | None:
        """The key of an item that `checked_item` returned; None if it cannot be kept.

        Args:
            settings: What else its patches depend on; its ``repr`` must tell.
        """
        if self._max_bytes == 0:
            return None
        kind = item["type"]
        try:
            sources = tuple(_sources(item[kind], kind))
            own = {name: value for name, value in item.items() if name != kind}
            return SourceKey(sources, f"{_options(own)}{_frames(item[kind])}{settings}")
        except (_Unknown, OSError, ValueError, TypeError, RuntimeError):
            return None  # processing says what is wrong, if anything is

    def get(self, key: SourceKey | None) -> Any:
        """What was put for the key; None if it is not there."""
        with self._lock:
            if key not in self._kept:
                return None
            value, pixels, version = self._kept[key]
            if _version(pixels) != version:
                self._drop(key)
                return None
            self._kept.move_to_end(key)
            return value

    def put(self, key: SourceKey | None, value: Any, pixels: torch.Tensor) -> None:
        """Keep ``value``, unless a file has changed since `key` was asked or it is too large.

        Args:
            pixels: The patches in ``value``.
        """
        if key is None or any(_changed(one) for one in key.sources if isinstance(one, File)):
            return
        with self._lock:
            self._drop(key)
            if pixels.nbytes <= self._max_bytes:
                self._kept[key] = value, pixels, _version(pixels)
                self.num_bytes += pixels.nbytes
                self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: SourceKey) -> None:
        if key in self._kept:
            _, pixels, _ = self._kept.pop(key)
            self.num_bytes -= pixels.nbytes


class _Unknown(Exception):
    """A source or option whose content cannot be told for little."""


def _sources(source: Any, kind: str) -> Iterator[File | str | bytes]:
    if isinstance(source, (list, tuple)):
        for frame in source:
            yield from _sources(source_of(frame) if isinstance(frame, dict) else frame, "image")
        return
    if isinstance(source, str):
        text = source.strip()
        if re.match("https?:", text, re.IGNORECASE):
            yield text
            return
        if len(text) > _LONGEST_PATH or text[:5].lower() == "data:":
            yield hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            return
    elif not isinstance(source, (bytes, os.PathLike)):
        raise _Unknown
    found = read_source(source, kind, max_bytes=0, timeout=0.0, local_files_only=True)
    yield File.at(found) if isinstance(found, str) else hashlib.sha256(found).digest()


def _frames(source: Any) -> str:
    """The options of each frame of a list."""
    if not isinstance(source, (list, tuple)):
        return ""
    return "".join(_options(frame) if isinstance(frame, dict) else "/" for frame in source)


def _options(item: Mapping[str, Any]) -> str:
    named = source_of(item)
    return repr({name: _plain(value) for name, value in item.items() if value is not named})


def _plain(value: Any) -> Any:
    """A value whose ``repr`` tells all of it."""
    if value is None or isinstance(value, (str, numbers.Real)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    raise _Unknown


def _changed(file: File) -> bool:
    try:
        return File.at(file.path) != file
    except OSError:
        return True


def _version(pixels: torch.Tensor) -> int | None:
    """Counts writes by ops; an inference tensor's are not counted."""
    return None if pixels.is_inference() else pixels._version
