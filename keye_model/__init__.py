"""Keye-VL (8B-Preview and 1.5) on `keye_kernels`: messages in, text out. Forward only."""

from keye_model.checkpoint.config import KeyeConfig, KeyeTextConfig, KeyeVisionConfig
from keye_model.conditional_generation import KeyeForConditionalGeneration
from keye_model.engine.plan import Limits
from keye_model.keye import Answer, Keye
from keye_model.network.model import KeyeModel
from keye_model.network.text import KeyeTextModel
from keye_model.network.vision import KeyeVisionModel
from keye_model.processing.image_processor import KeyeImageProcessor
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.video_processor import KeyeVideoProcessor
from keye_model.processing.vision_info import process_vision_info

__all__ = [
    "Answer",
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
