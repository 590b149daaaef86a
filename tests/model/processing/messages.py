"""Messages, pictures and videos for the tests of the processor."""

import numpy as np
import torch
from PIL import Image

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.processing.patches import VideoPatches

LINES = {"preview": PREVIEW, "1.5": V1_5}


class Films:
    """Stands for the video processor: a message item holds patches that were made beforehand."""

    def patches_of_items(self, items, **_):
        return [item["video"] for item in items]


def film_of(*frames, seconds=0.5, value=0):
    count = sum(frame.rows * frame.columns for frame in frames)
    return VideoPatches(torch.full((count, 3, 14, 14), value, dtype=torch.uint8), frames, seconds)


def picture(height=56, width=84, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image(*size, **keys):
    return {"type": "image", "image": picture(*size), **keys}


def unpatchify(patches, grid_thw):
    """Undo `patchify`: [t * h * w, 3, patch, patch] → [t, 3, h * patch, w * patch]."""
    t, h, w = grid_thw
    _, channels, size, _ = patches.shape
    cut = patches.reshape(t, h, w, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(t, channels, h * size, w * size)


def text_item(text):
    return {"type": "text", "text": text}


def user(*content):
    return [user_turn(*content)]


def string(processor, ids):
    return processor.decode(ids, skip_special_tokens=False)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def user_turn(*content):
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "string": [{"role": "user", "content": "Hi"}],
    "own_system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "late_system": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}],
    "items": [
        user_turn(
            {"type": "image"}, text_item("a"), {"type": "video"}, {"type": "image"}, text_item("b")
        )
    ],
    "untyped": [
        user_turn({"image": "x.png"}, {"image_url": {"url": "y"}}, {"video": "z"}, {"text": "t"})
    ],
    "turns": [
        user_turn({"type": "image"}, text_item("One?")),
        {"role": "assistant", "content": [text_item("Yes.")]},
        user_turn({"type": "image"}, {"type": "video"}),
    ],
    "white_space": [user_turn(text_item("  a\n\n"), text_item("\tb "))],
    "template_syntax": [user_turn(text_item("{{ 7 * 7 }}{% raw %}"))],
}
