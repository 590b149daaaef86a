"""Keye checkpoints through the Auto classes, also when their files point to code of their own."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from keye_model import KeyeForConditionalGeneration, KeyeProcessor
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from keye_model.integrations import transformers as integration

integration.register()
integration.register()  # again is no harm

NAMES = {PREVIEW.name: "Keye", V1_5.name: "KeyeVL1_5"}


CODE = "raise AssertionError('a checkpoint has run its own code')"


@pytest.fixture(params=[PREVIEW, V1_5], ids=lambda variant: variant.name)
def checkpoint(request, tmp_path):
    """With what published files say of their own code, and code that must not run."""
    directory, name = build(tmp_path, request.param), NAMES[request.param.name]
    for kind in ("configuration", "modeling", "processing"):
        (directory / f"{kind}_keye.py").write_text(CODE)
    for file, more in (
        ("config.json", {
            "auto_map": {
                "AutoConfig": f"configuration_keye.{name}Config",
                "AutoModel": f"modeling_keye.{name}ForConditionalGeneration",
                "AutoModelForCausalLM": f"modeling_keye.{name}ForConditionalGeneration",
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


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_every_auto_class_and_no_code_of_a_checkpoint(checkpoint, auto, trust):
    model = auto.from_pretrained(checkpoint, **trust)
    assert type(model) is KeyeForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(checkpoint, **trust)) is KeyeProcessor
    assert isinstance(AutoConfig.from_pretrained(checkpoint, **trust), integration._AutoConfig)


@pytest.mark.parametrize("named", [{}, {"tokenizer_class": "Qwen2Tokenizer"}], ids=str)
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=str)
def test_tokenizer(checkpoint, named, trust):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **trust)
    ours = KeyeProcessor.from_pretrained(checkpoint)
    text = "<|im_start|>user\nDescribe this image.<|im_end|>"
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text).ids
    assert tokenizer.eos_token_id == ours.eos_token_id
    assert tokenizer.pad_token_id == ours.pad_token_id


def test_a_public_program(checkpoint):
    """The lines that every program written for Keye has."""
    model = AutoModel.from_pretrained(
        checkpoint,
        torch_dtype="auto",
        trust_remote_code=True,
        attn_implementation="flash_attention_2",
        device_map="auto",
        low_cpu_mem_usage=True,
    ).eval()
    processor = AutoProcessor.from_pretrained(
        checkpoint, trust_remote_code=True, use_fast=True, padding_side="left"
    )
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (84, 56), (9, 90, 160))},
                {"type": "text", "text": "Describe this image."},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, video_kwargs = keye_vl_utils(processor)(messages)
    batch = processor(
        text=[text],
        images=images,
        videos=videos,
        padding=True,
        truncation=False,
        return_tensors="pt",
        **video_kwargs,
    ).to(model.device)
    greedy = model.generate(**batch, max_new_tokens=4, do_sample=False)
    for sampling in (
        {"temperature": 0, "top_p": 0.001, "top_k": 1},
        {"temperature": None, "top_p": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": None, "top_k": None, "repetition_penalty": 1.0},
    ):
        found = model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
            return_dict_in_generate=False,
            **sampling,
        )
        assert torch.equal(found[:, : greedy.shape[1]], greedy[:, : found.shape[1]])
    trimmed = [row[len(ids) :] for ids, row in zip(batch.input_ids, greedy, strict=True)]
    decoded = processor.batch_decode(
        trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert len(decoded) == 1


def keye_vl_utils(processor):
    """`process_vision_info`, as a program for either line calls it."""

    def call(messages):
        images, videos, *rest = processor.process_vision_info(messages, return_video_kwargs=True)
        return images, videos, rest[0]

    return call


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

    monkeypatch.setattr("keye_model.checkpoint.hub.snapshot_download", fetch)
    integration.KeyeProcessor.from_pretrained("owner/name", revision="abc", _from_auto=True)
    (name, options), *rest = asked
    assert (name, options["revision"], rest) == ("owner/name", "abc", [])
    assert "*.safetensors" not in options["allow_patterns"]
    assert not any("py" in pattern for pattern in options["allow_patterns"])


def test_weights_are_of_the_same_revision(tmp_path, monkeypatch):
    directory, asked = build(tmp_path, PREVIEW), []

    def fetch(_, **options):
        asked.append((options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str(directory)

    monkeypatch.setattr("keye_model.checkpoint.hub.snapshot_download", fetch)
    integration._Model.from_pretrained("owner/name", revision="abc", token=None)
    assert asked == [("abc", False), ("abc", True)]
