"""How each line treats pictures, videos and their place in the prompt: `of` has its `Rules`."""

from __future__ import annotations

from keye_model.processing.rules.base import Rules
from keye_model.processing.rules.preview import PREVIEW
from keye_model.processing.rules.v1_5 import V1_5

LINES = {rules.version: rules for rules in (PREVIEW, V1_5)}
VIDEO_KEYWORDS = PREVIEW.video_keywords | V1_5.video_keywords


def of(version: str) -> Rules:
    """The rules of a release of keye-vl-utils.

    Raises:
        ValueError: There is no such release.
    """
    if version not in LINES:
        raise ValueError(f"version must be '1.0' or '1.5', got {version!r}")
    return LINES[version]
