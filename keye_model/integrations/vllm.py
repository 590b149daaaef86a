"""Keye checkpoints in vLLM: serving, and several GPUs, without `trust_remote_code`.

    vllm serve Kwai-Keye/Keye-VL-8B-Preview --tensor-parallel-size 2

Installing this package is enough: vLLM finds `register` by its entry point and calls it in each of
its processes. Both model lines then run as `_vllm_model.KeyeForConditionalGeneration` does; no
other model changes.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoProcessor, PretrainedConfig, Qwen3Config
from vllm import ModelRegistry, envs
from vllm.logger import init_logger

from keye_kernels.integrations.vllm import check_release
from keye_model.integrations._vllm_processor import KeyeProcessor, KeyeVL1_5Processor

PLUGIN = "keye_model"
# A name: importing the class here would initialise CUDA in processes that still fork.
_MODEL = "keye_model.integrations._vllm_model:KeyeForConditionalGeneration"

logger = init_logger(f"vllm.{__name__}")  # the handler of the logger "vllm" prints it


class KeyeVisionConfig(PretrainedConfig):
    """`vision_config` of a Keye checkpoint."""

    model_type = "keye_vision"


class KeyeConfig(Qwen3Config):
    """`config.json` of Keye-VL-8B-Preview as vLLM reads it: a Qwen3 with a vision tower."""

    model_type = "Keye"
    sub_configs = {"vision_config": KeyeVisionConfig}  # noqa: RUF012 - transformers' shape
    vision_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            vision = {k: v for k, v in self.vision_config.items() if k != "model_type"}
            self.vision_config = KeyeVisionConfig(**vision)
        super().__post_init__(**kwargs)


class KeyeVL1_5Config(KeyeConfig):
    """The same for Keye-VL-1.5."""

    model_type = "KeyeVL1_5"


def register() -> None:
    """Let vLLM load both model lines, with our tower and position rule; may be called again.

    Raises:
        RuntimeError: The release of vLLM is not supported and VLLM_PLUGINS names this plugin. If it
            does not name it, a warning is logged instead.
    """
    try:
        check_release()
    except RuntimeError as error:
        if PLUGIN in (envs.VLLM_PLUGINS or ()):
            raise
        logger.warning("Keye models are left to vLLM itself: %s", error)
        return
    register_checkpoints()
    for architecture in ("KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"):
        ModelRegistry.register_model(architecture, _MODEL)


def register_checkpoints() -> None:
    """Register both lines with transformers' Auto classes, by which vLLM reads checkpoints."""
    for config, processor in ((KeyeConfig, KeyeProcessor), (KeyeVL1_5Config, KeyeVL1_5Processor)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
