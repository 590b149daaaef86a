"""Keye-VL (8B-Preview and 1.5) on `keye_kernels`: messages in, text out. Forward only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keye_model.chat import Chat
    from keye_model.checkpoint.config import KeyeConfig, KeyeTextConfig, KeyeVisionConfig
    from keye_model.conditional_generation import KeyeForConditionalGeneration
    from keye_model.engine.memory import Limits
    from keye_model.inputs.answer import Answer
    from keye_model.keye import Keye
    from keye_model.network.model import KeyeModel
    from keye_model.network.text import KeyeTextModel
    from keye_model.network.vision import KeyeVisionModel
    from keye_model.processing.image_processor import KeyeImageProcessor
    from keye_model.processing.processor import KeyeProcessor
    from keye_model.processing.video_processor import KeyeVideoProcessor
    from keye_model.processing.vision_info import process_vision_info

__all__ = [
    "Answer",
    "Chat",
    "Keye",
    "KeyeConfig",
    "KeyeForConditionalGeneration",
    "KeyeImageProcessor",
    "KeyeModel",
    "KeyeProcessor",
    "KeyeTextConfig",
    "KeyeTextModel",
    "KeyeVideoProcessor",
    "KeyeVisionConfig",
    "KeyeVisionModel",
    "Limits",
    "process_vision_info",
]

# A name is imported when it is first asked for: torch takes seconds to import, which neither
# `keye --help` nor a Ctrl-C should wait for.
_NAMES = {
    "conditional_generation": "KeyeForConditionalGeneration",
    "checkpoint.config": "KeyeConfig KeyeTextConfig KeyeVisionConfig",
    "inputs.answer": "Answer",
    "chat": "Chat",
    "keye": "Keye",
    "network.model": "KeyeModel",
    "engine.memory": "Limits",
    "processing.image_processor": "KeyeImageProcessor",
    "processing.processor": "KeyeProcessor",
    "processing.video_processor": "KeyeVideoProcessor",
    "processing.vision_info": "process_vision_info",
    "network.text": "KeyeTextModel",
    "network.vision": "KeyeVisionModel",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
