"""Pictures and videos of the command line: message items from options, EXIF turns, fitting."""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageOps

from keye_model.cli import terminal
from keye_model.inputs.request import Progress, Request, num_patches
from keye_model.processing.chat import Thinking
from keye_model.processing.fetch import describe
from keye_model.processing.picture import FETCH_TIMEOUT, MAX_IMAGE_BYTES
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.source import read_source

_ORIENTATION = 0x0112  # the EXIF tag
_HOW_MANY = {"fps", "max_frames"}  # a video with one of these keys is not sampled to fit


def image_item(source: str, options: argparse.Namespace, processor: KeyeProcessor) -> dict:
    """A picture as a message item; ``options.exif`` applies its EXIF turn, else a note names it."""
    item = {"type": "image", "image": source, **_pixels(options, processor)}
    picture = _turned(source, processor, remote=options.exif)
    if picture is not None and options.exif:
        picture.filename = source
        item["image"] = picture
    elif picture is not None:
        terminal.note(
            f"{describe(source)} has an EXIF turn, which the model does not see; --exif applies it"
        )
    return item


def video_item(source: str, options: argparse.Namespace, processor: KeyeProcessor) -> dict:
    """A video as a message item, with its options under the keys of the checkpoint's model line."""
    rules = processor.rules
    if rules.max_frame_pixels is None:  # the image processor's bounds hold for frames too
        _pixels(options, processor)
    settings = {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
        rules.total_pixels_key: options.total_pixels,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    return {"type": "video", "video": source, **given}


def items(arguments: argparse.Namespace, processor: KeyeProcessor) -> list[dict[str, Any]]:
    """The pictures and then the videos that a command line names."""
    pictures = [image_item(source, arguments, processor) for source in arguments.image]
    return pictures + [video_item(source, arguments, processor) for source in arguments.video]


def prepare(
    processor: KeyeProcessor,
    messages: Sequence[dict[str, Any]],
    max_new_tokens: int,
    *,
    thinking: Thinking = "auto",
    used: int = 0,
    strict: bool = True,
    shapes_only: bool = False,
    note: Callable[[str], None] = terminal.note,
    progress: Progress | None = None,
) -> Request:
    """Turn a conversation into a request, with videos sampled to fit the context.

    Room is left for an answer of ``max_new_tokens``, or half the context if that is less. A video
    whose item says how many frames to take is not changed.

    Args:
        used: Tokens of the context that are taken already.
        strict: Refuse a prompt that does not fit.
        shapes_only: As in `KeyeProcessor.request`, which then refuses nothing for its length.
        note: Called with a line for each video that was sampled to fit.
        progress: As in `Keye.stream`.
    """
    content = [item for m in messages if isinstance(m["content"], list) for item in m["content"]]
    fit = any(item["type"] == "video" and not _HOW_MANY & set(item) for item in content)
    context = processor.config.text_config.max_position_embeddings
    room = context - (min(max_new_tokens, context // 2) if fit else 1) - used
    if room < 1:
        raise ValueError(f"the context of {context} tokens must have room left, got {used} in use")
    request = processor.request(
        messages,
        thinking=thinking,
        max_tokens=room,
        fit_videos=note,
        progress=progress,
        shapes_only=shapes_only,
    )
    if strict and (tokens := request.input_ids.numel()) > room:
        raise ValueError(
            f"prompt must have at most {room} tokens, got {tokens}; fewer or smaller frames and "
            "pictures make it shorter (max_pixels, max_frames, fps)"
        )
    return request


def vision_tokens(request: Request, processor: KeyeProcessor) -> int:
    """Tokens of a request's pictures and videos."""
    merge = processor.config.vision_config.spatial_merge_size**2
    return num_patches(request.image_grid_thw + request.video_grid_thw) // merge


def _pixels(options: argparse.Namespace, processor: KeyeProcessor) -> dict[str, int]:
    """The pixel bounds in ``options`` that differ from the image processor's.

    Raises:
        ValueError: A bound lies outside the image processor's, which would resize the picture too.
    """
    least, most = processor.image_processor.min_pixels, processor.image_processor.max_pixels
    given = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    for name, value in given.items():
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"{name} must be in [{least}, {most}], got {value}; "
                f"keye chat --{name.replace('_', '-')} sets the bound"
            )
    own = {"min_pixels": least, "max_pixels": most}
    return {name: value for name, value in given.items() if value not in (None, own[name])}


def _turned(source: str, processor: KeyeProcessor, *, remote: bool) -> Image.Image | None:
    """The picture turned by its EXIF orientation; None if it has none.

    Args:
        remote: Fetch pictures from the web too.
    """
    if not remote and source.strip().lower().startswith(("http:", "https:")):
        return None
    bounds = {"max_bytes": MAX_IMAGE_BYTES, "timeout": FETCH_TIMEOUT}
    try:
        found = read_source(source, "image", local_files_only=processor.local_files_only, **bounds)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(found if isinstance(found, str) else io.BytesIO(found)) as picture:
                if picture.getexif().get(_ORIENTATION) not in range(2, 9):
                    return None
                picture.load()  # Pillow applies a TIFF's orientation here and drops the tag
                if picture.getexif().get(_ORIENTATION) not in range(2, 9):
                    return None
                return ImageOps.exif_transpose(picture)
    except Exception:  # broken, missing or not a picture: the processor raises that
        return None
