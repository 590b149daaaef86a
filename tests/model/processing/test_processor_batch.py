"""Prompts and pictures → padded batches, and ids → text."""

import pytest
import torch

from keye_model.processing.batch import BatchFeature
from keye_model.processing.image import fetch_image
from keye_model.processing.patches import Frame
from keye_model.processing.vision_info import process_vision_info
from tests.model.processing.messages import (
    LINES,
    assert_equal,
    film_of,
    image,
    picture,
    text_item,
    user,
)


def test_batch_of_the_call(preview):
    pictures = [picture(), picture(112, 56, seed=1)]
    texts = [
        preview.apply_chat_template(user({"type": "image"}, text_item("a" * n))) for n in (1, 40)
    ]
    batch = preview(text=texts, images=pictures, padding=True)
    assert batch.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 4]]
    assert batch.pixel_values.shape == (56, 3, 14, 14)
    assert batch.pixel_values.dtype == torch.float32
    cut = torch.cat([preview.image_processor.patches(one).pixels for one in pictures])
    assert torch.equal(batch.pixel_values, preview.image_processor.normalize(cut))
    for name in ("input_ids", "attention_mask", "image_grid_thw"):
        assert batch[name].dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(preview, side):
    texts = ["a", "a b c 1 2 3"]
    rows = preview(text=texts, return_tensors=None).input_ids
    assert rows == [preview(text=text).input_ids[0].tolist() for text in texts]
    batch = preview(text=texts, padding="longest", padding_side=side)
    for ids, mask, row in zip(batch.input_ids, batch.attention_mask, rows, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert ids[~mask.bool()].tolist() == [preview.token_ids.pad] * (len(ids) - len(row))
    hidden = batch.attention_mask[0] == 0
    assert hidden.sum() == len(rows[1]) - len(rows[0])
    assert hidden[0 if side == "left" else -1]


def test_whole_job_equals_its_parts(processor):
    """apply_chat_template(tokenize=True) is the helper's images and then the call."""
    conversations = [
        user(image(98, 60), text_item("One?")),
        user(text_item("Two"), image(30, 400), image(56, 56, max_pixels=784)),
    ]
    options = {"add_generation_prompt": True}
    images = [
        fetch_image(item, processor.rules)
        for messages in conversations
        for item in messages[0]["content"]
        if item["type"] == "image"
    ]
    prompts = processor.apply_chat_template(conversations, **options)
    parts = processor(text=prompts, images=images, padding=True)
    whole = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, padding=True, **options
    )
    assert_equal(whole, parts)
    ids = processor.apply_chat_template(conversations, tokenize=True, padding=True, **options)
    assert torch.equal(ids, whole.input_ids)
    nested = processor(text=prompts, images=[images[:1], images[1:]], padding=True)
    assert_equal(nested, parts)
    request = processor.request(conversations[0])
    assert request.input_ids.tolist() == whole.input_ids[0][whole.attention_mask[0] == 1].tolist()


def _frames(number, height=56, width=84):
    return [picture(height, width, seed) for seed in range(number)]


def test_preview_videos_of_the_call(preview):
    text = [preview.apply_chat_template(user({"type": "video"}))] * 2
    videos = [_frames(2), torch.zeros(4, 3, 56, 56)]
    batch = preview(text=text, videos=videos, fps=[4.0, 0.7], padding=True)
    assert batch.video_grid_thw.tolist() == [[2, 4, 6], [4, 4, 4]]
    assert batch.second_per_grid_ts.dtype == torch.float32
    assert batch.second_per_grid_ts.tolist() == pytest.approx([0.25, 1 / 0.7])
    first = preview(text="<|image_pad|>" * 2, images=videos[0])
    assert torch.equal(batch.pixel_values_videos[:48], first.pixel_values)
    assert "num_frames" not in batch
    shared = preview(text=text, videos=videos, padding=True)
    assert shared.second_per_grid_ts.tolist() == [0.5, 0.5]


def test_videos_equal_the_helper_and_the_call(processor):
    """The documentation page's way with a video, against the whole job in one call."""
    version = processor.config.variant.video_version
    messages = user(
        image(),
        {"type": "video", "video": _frames(4), "fps": 2.0},
        text_item("and"),
        {"type": "video", "video": _frames(2, 112, 84), "fps": 2.0},
    )
    images, videos, kwargs = process_vision_info(
        messages, return_video_kwargs=True, version=version
    )
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = processor(text=[text], images=images, videos=videos, padding=True, **kwargs)
    whole = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert_equal(whole, parts)
    request = processor.request(messages)
    assert request.input_ids.tolist() == whole.input_ids[0].tolist()
    assert [list(row) for row in request.video_grid_thw] == whole.video_grid_thw.tolist()
    normalized = processor.image_processor.normalize(request.pixel_values_videos)
    assert torch.equal(normalized, whole.pixel_values_videos)


def test_1_5_counts_the_frames_of_each_video(with_films):
    processor = with_films["1.5"]
    slow = Frame(4, 4, 0.0)
    films = [film_of(slow, slow, Frame(2, 2, 1.0, fast=True)), film_of(slow)]
    batch = processor.apply_chat_template(
        [user({"type": "video", "video": film}) for film in films],
        tokenize=True,
        return_dict=True,
        padding=True,
    )
    assert batch.video_grid_thw.tolist() == [[2, 4, 4], [1, 2, 2], [1, 4, 4]]
    assert batch.num_frames.tolist() == [3, 1]
    assert batch.num_frames.dtype == torch.int64
    assert batch.num_frames.sum() == batch.video_grid_thw[:, 0].sum()
    assert "second_per_grid_ts" not in batch


def test_empty_lists_of_the_helper(processor):
    keys = {"preview": {"fps": []}, "1.5": {"height": [], "timestamps": []}}
    for line, kwargs in keys.items():
        if processor.config.variant is LINES[line]:
            assert set(processor(text="a", images=None, videos=None, **kwargs)) == {
                "input_ids",
                "attention_mask",
            }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": "<|image_pad|>"}, ValueError, r"one <\|image_pad\|> for each of 0 images, got 1"),
        (
            {"text": "a", "images": [picture()]},
            ValueError,
            r"one <\|image_pad\|> for each of 1 images, got 0",
        ),
        ({"text": "<|video_pad|>"}, ValueError, r"one <\|video_pad\|> for each of 0 videos, got 1"),
        ({"text": ""}, ValueError, "text must not be empty, got ''"),
        ({"text": []}, ValueError, "text must hold at least one prompt, got none"),
        ({"text": [3]}, TypeError, "text must hold strings, got int"),
        ({"text": "a\ud800"}, ValueError, "text must be valid Unicode, got"),
        ({"text": ["a", "b c"]}, ValueError, r"padding must be True for .* lengths \[1, \d\]"),
        ({"text": "a", "padding": "max"}, ValueError, "padding must be True, False or 'longest'"),
        ({"text": "a", "padding_side": "top"}, ValueError, "padding_side must be 'left' or"),
        ({"text": "a", "return_tensors": "tf"}, ValueError, "return_tensors must be 'pt' or None"),
        (
            {"text": "a", "truncated": True},
            TypeError,
            r"unknown keyword 'truncated'; known: images, text, .* and of videos fps$",
        ),
        (
            {"text": "a", "truncation": True},
            NotImplementedError,
            "truncation must be False or 'do_not_truncate', got True",
        ),
        ({"text": "a", "max_length": 4}, NotImplementedError, "max_length must be left out, got 4"),
        (
            {"text": "a", "padding": "max_length"},
            ValueError,
            "padding must be True, False or 'longest', got 'max_length'",
        ),
        ({"images": picture()}, TypeError, "text must be a prompt or a list of them, got None"),
        ({"images": "ab"}, TypeError, "got None; the order is images, text, videos"),
        ({"images": ["/no/a.png"], "text": "a"}, FileNotFoundError, "existing file, got '/no/a"),
        (
            {"text": "a", "height": [1]},
            TypeError,
            r"for release 1\.0 must be among fps, got height",
        ),
        ({"text": "a", "fps": [2.0]}, ValueError, "fps must have one value for each of 0 videos"),
    ],
    ids=[
        *("no_image", "no_placeholder", "no_video", "empty", "no_text", "kind", "surrogate"),
        *("ragged", "padding", "side", "tensors", "unknown", "truncation", "length", "to_length"),
        *("images_alone", "text_as_images", "two_strings", "keyword", "number_of_keywords"),
    ],
)
def test_bad_calls(preview, arguments, error, message):
    with pytest.raises(error, match=message):
        preview(**arguments)


def test_order_of_hugging_face(preview):
    pictures, text = [picture()], ["<|image_pad|>"]
    named = preview(text=text, images=pictures)
    assert_equal(preview(pictures, text), named)
    assert_equal(preview(text, pictures), named)  # told apart
    assert_equal(preview(picture(), text[0]), named)
    video = _frames(2)
    assert_equal(
        preview(None, ["<|video_pad|>"], [video]), preview(text="<|video_pad|>", videos=[video])
    )


def test_batch_moves_as_one(preview):
    batch = preview(text="<|image_pad|>", images=picture())
    batch["second_per_grid_ts"] = torch.tensor([0.3])
    assert batch.to("cpu", torch.bfloat16) is batch
    assert batch.pixel_values.dtype == torch.bfloat16
    assert batch.second_per_grid_ts.dtype == torch.float32  # rounding would shift positions
    assert batch.input_ids.dtype == torch.int64
    assert batch.to(torch.float16).pixel_values.dtype == torch.float16
    assert batch.to("meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="has no entry 'labels', only input_ids, attention"):
        _ = batch.labels
    with pytest.raises(ValueError, match=r"floating type, got torch\.int64"):
        BatchFeature().to(dtype=torch.int64)


def test_decode(preview):
    ids = preview.request(user(text_item("<think>Hi .</think> it 's"))).input_ids
    assert preview.decode(ids, skip_special_tokens=True).startswith("system\nYou are")
    assert "<think>Hi .</think> it 's" in preview.decode(ids, skip_special_tokens=True)
    assert preview.decode(ids).startswith("<|im_start|>system")
    clean = preview.batch_decode(
        [ids, ids.tolist()], skip_special_tokens=True, clean_up_tokenization_spaces=True
    )
    assert clean[0] == clean[1]
    assert "<think>Hi.</think> it's" in clean[0]
    assert preview.decode(int(ids[1])) == preview.decode(ids[1]) == preview.decode([ids[1]])


def test_decode_leaves_out_ids_without_a_string(preview):
    beyond = preview.tokenizer.get_vocab_size()
    assert preview.decode([*preview(text="ab").input_ids[0], beyond]) == "ab"
    with pytest.raises(ValueError, match="ids must not be negative, got -100"):
        preview.decode([-100])
