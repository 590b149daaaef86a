"""Keye checkpoints through the Auto classes, also when their files point to code of their own."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from keye_model import KeyeForConditionalGeneration, KeyeProcessor
from keye_model.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from keye_model.integrations import transformers as integration

integration.register()
integration.register()  # again is no harm

NAMES = {PREVIEW.name: "Keye", V1_5.name: "KeyeVL1_5"}


@pytest.fixture(params=[PREVIEW, V1_5], ids=lambda variant: variant.name)
def checkpoint(request, tmp_path):
    """With what published files say of their own code, which is not there."""
    directory, name = build(tmp_path, request.param), NAMES[request.param.name]
    for file, more in (
        ("config.json", {
            "auto_map": {
                "AutoConfig": f"configuration_keye.{name}Config",
                "AutoModelForImageTextToText": f"modeling_keye.{name}ForConditionalGeneration",
            },
        }),
        ("preprocessor_config.json", {
            "auto_map": {"AutoProcessor": f"processing_keye.{name}Processor"},
            "processor_class": f"{name}Processor",
        }),
    ):  # fmt: skip
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return directory


def inputs(processor: KeyeProcessor) -> dict[str, torch.Tensor]:
    picture = {"type": "image", "image": Image.new("RGB", (84, 56), (9, 90, 160))}
    text = {"type": "text", "text": "Describe this image."}
    return processor.apply_chat_template(
        [{"role": "user", "content": [picture, text]}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_config(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    raw = json.loads((checkpoint / "config.json").read_text())
    assert config.model_type == raw["model_type"]
    assert config.hidden_size == raw["hidden_size"]
    assert config.vision_config.hidden_size == raw["vision_config"]["hidden_size"]
    assert config.dtype == torch.bfloat16


def test_model_and_processor(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    assert type(model) is KeyeForConditionalGeneration
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert type(processor) is KeyeProcessor

    direct = KeyeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    batch = inputs(processor)
    assert torch.equal(model(**batch).logits, direct(**batch).logits)
    assert torch.equal(
        model.generate(**batch, max_new_tokens=4, do_sample=False),
        direct.generate(**batch, max_new_tokens=4, do_sample=False),
    )


def test_options_reach_the_classes(tmp_path):
    directory = build(tmp_path, PREVIEW)
    assert AutoModelForImageTextToText.from_pretrained(directory).dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(directory, max_pixels=8 * 28 * 28)
    assert processor.image_processor.max_pixels == 8 * 28 * 28
    with pytest.raises(NotImplementedError, match="load_in_8bit must be False, got True"):
        AutoModelForImageTextToText.from_pretrained(directory, load_in_8bit=True)
    with pytest.raises(TypeError, match="unknown keyword 'dtyp'; known: dtype, torch_dtype, "):
        AutoModelForImageTextToText.from_pretrained(directory, dtyp="auto")


def test_converted_layout(tmp_path):
    directory = build(tmp_path, V1_5)
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | {"model_type": "keye_vl_1_5"}
    del raw["architectures"]
    path.write_text(json.dumps(raw))
    model = AutoModelForImageTextToText.from_pretrained(directory)
    assert model.config.variant == V1_5


def test_revision_is_what_is_fetched(tmp_path, monkeypatch):
    directory, asked = build(tmp_path, PREVIEW), []

    def fetch(name, **options):
        asked.append((name, options))
        return str(directory)

    monkeypatch.setattr(integration, "snapshot_download", fetch)
    integration.KeyeProcessor.from_pretrained("owner/name", revision="abc", _from_auto=True)
    (name, options), *rest = asked
    assert (name, options["revision"], rest) == ("owner/name", "abc", [])
    assert "*.safetensors" not in options["allow_patterns"]
    assert not any("py" in pattern for pattern in options["allow_patterns"])
