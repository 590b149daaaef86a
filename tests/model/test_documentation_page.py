"""What the public documentation of Keye-VL shows, with only its import lines changed.

Source: the Keye-VL page written for transformers: an image, a video through the chat template, a
video through process_vision_info, the mixed conversation with its expected prompt, and the classes.
"""

import pytest
import torch
from PIL import Image

import keye_model
from keye_model import KeyeForConditionalGeneration, process_vision_info
from keye_model import KeyeProcessor as AutoProcessor
from keye_model.checkpoint.config import PREVIEW, V1_5

MIXED = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Hello, how are you?"}],
    },
    {"role": "assistant", "content": "I'm doing well, thank you for asking."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Can you describe these images and video?"},
            {"type": "image"},
            {"type": "image"},
            {"type": "video"},
            {"type": "text", "text": "These are from my vacation."},
        ],
    },
    {"role": "assistant", "content": "I'd be happy to describe them."},
    {"role": "user", "content": "It was a trip to the mountains."},
]
MIXED_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hello, how are you?<|im_end|>\n"
    "<|im_start|>assistant\nI'm doing well, thank you for asking.<|im_end|>\n"
    "<|im_start|>user\nCan you describe these images and video?"
    "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    "<|vision_start|><|video_pad|><|vision_end|>These are from my vacation.<|im_end|>\n"
    "<|im_start|>assistant\nI'd be happy to describe them.<|im_end|>\n"
    "<|im_start|>user\nIt was a trip to the mountains.<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module", params=[PREVIEW.name, V1_5.name])
def loaded(request, checkpoints):
    directory = checkpoints[request.param]
    model = KeyeForConditionalGeneration.from_pretrained(
        directory, torch_dtype=torch.float32, device_map="auto"
    )
    return model, AutoProcessor.from_pretrained(directory)


def trimmed_text(processor, inputs, generated_ids, clean_up):
    trimmed = [
        out_ids[len(in_ids) :]
        for in_ids, out_ids in zip(inputs.input_ids, generated_ids, strict=True)
    ]
    return processor.batch_decode(
        trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up
    )


def test_image(loaded, media):
    model, processor = loaded
    question = {"type": "text", "text": "Describe this image."}
    picture = {"type": "image", "image": str(media["picture"])}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [picture, question]}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated_ids = model.generate(**inputs, max_new_tokens=4)
    assert generated_ids.shape[1] <= inputs.input_ids.shape[1] + 4
    [text] = trimmed_text(processor, inputs, generated_ids, False)
    assert text


def video_messages(media):
    question = {"type": "text", "text": "What happened in the video?"}
    video = {"type": "video", "video": str(media["video"])}
    return [{"role": "user", "content": [video, question]}]


def test_video_through_the_chat_template(loaded, media):
    model, processor = loaded
    inputs = processor.apply_chat_template(
        video_messages(media),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output_ids = model.generate(**inputs, max_new_tokens=4)
    assert trimmed_text(processor, inputs, output_ids, True)[0]


def test_video_through_process_vision_info(loaded, media):
    model, processor = loaded
    messages = video_messages(media)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image_inputs, video_inputs, video_kwargs = process_vision_info(
        messages, return_video_kwargs=True, version=processor.config.variant.video_version
    )
    inputs = processor(
        text=[text],
        images=image_inputs,
        videos=video_inputs,
        padding=True,
        return_tensors="pt",
        **video_kwargs,
    ).to(model.device)
    whole = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert set(inputs) == set(whole)
    for name, value in whole.items():
        assert torch.equal(inputs[name].cpu(), value), name
    greedy = {"max_new_tokens": 4, "do_sample": False}
    output_ids = model.generate(**inputs, **greedy)
    assert torch.equal(output_ids.cpu(), model.generate(**whole, **greedy).cpu())
    assert trimmed_text(processor, inputs, output_ids, True)[0]


def test_mixed_conversation(loaded):
    _, processor = loaded
    assert processor.apply_chat_template(MIXED, add_generation_prompt=True) == MIXED_PROMPT


def test_mixed_conversation_with_pictures(loaded, media):
    model, processor = loaded
    prompt = processor.apply_chat_template(MIXED, add_generation_prompt=True)
    images = [Image.new("RGB", size) for size in ((64, 64), (90, 40), (30, 100))]
    messages = video_messages(media)
    version = processor.config.variant.video_version
    _, videos, kwargs = process_vision_info(messages, return_video_kwargs=True, version=version)
    inputs = processor(text=prompt, images=images, videos=videos, **kwargs)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 1


def test_every_listed_class_exists():
    listed = """KeyeConfig KeyeProcessor KeyeForConditionalGeneration KeyeModel KeyeTextConfig
    KeyeTextModel KeyeVisionModel KeyeVideoProcessor"""
    for name in listed.split():
        assert name in keye_model.__all__
        assert getattr(keye_model, name).__doc__
