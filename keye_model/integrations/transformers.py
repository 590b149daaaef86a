"""Keye checkpoints through transformers' Auto classes, without `trust_remote_code`.

    from keye_model.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained("Kwai-Keye/Keye-VL-8B-Preview", torch_dtype="auto")
    processor = AutoProcessor.from_pretrained("Kwai-Keye/Keye-VL-8B-Preview")

The model is a `keye_model.KeyeForConditionalGeneration` and the processor a
`keye_model.KeyeProcessor`. A checkpoint's own code is never run, whatever `trust_remote_code` says.
"""

import os
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import configuration_auto, processing_auto

import keye_model
from keye_model import KeyeForConditionalGeneration
from keye_model.checkpoint.checkpoint import Checkpoint

# Options of the Auto classes that mean nothing for a checkpoint whose code is never run.
_NOT_OURS = (
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
    "code_revision",
    "config",
    "name_or_path",
)
_OLD = transformers.__version__.startswith("4.")
_ROPE = "rope_scaling" if _OLD else "rope_parameters"
# Public programs load Keye by AutoModel, with which the published code registers itself.
_AUTO_MODELS = (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM)
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def _checkpoint(path_or_id: str | os.PathLike, options: dict[str, Any]) -> Checkpoint:
    """Find the checkpoint; removes from ``options`` those that only serve to find it."""
    for name in _NOT_OURS:
        options.pop(name, None)
    given = {name: options.pop(name) for name in _DOWNLOAD if name in options}
    return Checkpoint.at(path_or_id, **{name: value for name, value in given.items() if value})


class _AutoConfig(PretrainedConfig):
    """`config.json` for callers of transformers; the model reads the file itself."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Set all keys as attributes, unchanged; the model checks ``kwargs``."""
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        config = cls()
        for name, value in config_dict.items():
            if name == "vision_config":
                config.vision_config = PretrainedConfig()
                for key, one in value.items():
                    if key != "model_type":
                        setattr(config.vision_config, key, one)
            elif name in ("dtype", "torch_dtype"):
                config.dtype = getattr(torch, str(value).removeprefix("torch."))
            elif name not in ("model_type", "auto_map"):
                setattr(config, _ROPE if name == "rope_scaling" else name, value)
        return (config, kwargs) if wants_unused else config


class KeyeAutoConfig(_AutoConfig):
    """Configuration of a Keye-VL-8B-Preview checkpoint."""

    model_type = "Keye"


class KeyeVL1_5AutoConfig(_AutoConfig):
    """Configuration of a Keye-VL-1.5 checkpoint."""

    model_type = "KeyeVL1_5"


class _ConvertedAutoConfig(_AutoConfig):
    """Configuration of a Keye-VL-1.5 checkpoint in the layout of its transformers port."""

    model_type = "keye_vl_1_5"


class _Model:
    """The method that the Auto classes call on a model class."""

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike, **options: Any
    ) -> KeyeForConditionalGeneration:
        checkpoint = _checkpoint(path_or_id, options)
        return KeyeForConditionalGeneration.from_pretrained(checkpoint, **options)


class KeyeProcessor(keye_model.KeyeProcessor):
    """`keye_model.KeyeProcessor` under the name in a published `preprocessor_config.json`."""

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike, **options: Any
    ) -> keye_model.KeyeProcessor:
        checkpoint = _checkpoint(path_or_id, options)
        return keye_model.KeyeProcessor.from_pretrained(checkpoint, **options)


class KeyeVL1_5Processor(KeyeProcessor):
    """The same under the name in 1.5's files."""


_LINES = (
    (KeyeAutoConfig, KeyeProcessor),
    (KeyeVL1_5AutoConfig, KeyeVL1_5Processor),
    (_ConvertedAutoConfig, KeyeVL1_5Processor),
)


def register() -> None:
    """Let `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoModelForCausalLM`,
    `AutoProcessor` and `AutoTokenizer` load both model lines.

    May be called again. Options of the Auto classes go to `KeyeForConditionalGeneration` and
    `KeyeProcessor`, which refuse those they cannot serve.
    """
    for config, processor in _LINES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        model = type(KeyeForConditionalGeneration.__name__, (_Model,), {"config_class": config})
        for auto in _AUTO_MODELS:
            auto.register(config, model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)
        # A checkpoint whose tokenizer_config.json names a class gets that one.
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    if _OLD:
        for module in (configuration_auto, processing_auto):
            _registered_goes_first(module)


def _registered_goes_first(module: ModuleType) -> None:
    """Prefer our registered classes to a checkpoint's code, as transformers 5 does by itself.

    transformers 4 runs that code if ``trust_remote_code=True``, even for registered classes.
    """
    resolve = module.resolve_trust_remote_code
    if getattr(resolve, "_keeps_keye", False):
        return

    def resolved(trust_remote_code: bool | None, name: str | os.PathLike, *given: Any) -> bool:
        if trust_remote_code:
            try:
                found, _ = PretrainedConfig.get_config_dict(name)
            except OSError:  # no config.json, so not a Keye checkpoint
                found = {}
            if found.get("model_type") in {config.model_type for config, _ in _LINES}:
                return False
        return resolve(trust_remote_code, name, *given)

    resolved._keeps_keye = True
    module.resolve_trust_remote_code = resolved
