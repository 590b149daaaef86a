"""Conversations → requests: strings, expansion, any mixture of text, pictures and videos."""

import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from keye_model.inputs.packing import pack
from keye_model.inputs.request import Request
from keye_model.processing.image import fetch_image
from keye_model.processing.patches import Frame
from keye_model.processing.processor import KeyeProcessor
from tests.model.processing.messages import (
    LINES,
    film_of,
    image,
    string,
    text_item,
    user,
)

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


def test_image_request(processor):
    request = processor.request(user(image(), text_item("Describe this image.")))
    assert request.image_grid_thw == ((1, 4, 6),)
    assert request.pixel_values.dtype == torch.uint8
    assert string(processor, request.input_ids) == (
        f"{SYSTEM}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
        f"Describe this image.<|im_end|>\n{ASSISTANT}"
    )


def test_image_goes_through_both_resizes(preview):
    item = image(98, 200, max_pixels=6272)
    request = preview.request(user(item))
    helped = fetch_image(item, preview.rules)
    expected = preview.image_processor.patches(helped)
    assert request.image_grid_thw == (expected.grid_thw,)
    assert torch.equal(request.pixel_values, expected.pixels)


def test_preview_video_string(with_films):
    processor = with_films["preview"]
    film = film_of(*[Frame(40, 72, 0.5 * i) for i in range(8)])
    request = processor.request(user({"type": "video", "video": film}, text_item("Describe it.")))
    assert request.video_grid_thw == ((8, 40, 72),)
    assert request.second_per_grid_ts == (0.5,)
    assert (
        f"<|vision_start|>{'<|video_pad|>' * 5760}<|vision_end|>Describe it.<|im_end|>\n"
    ) in string(processor, request.input_ids)


def test_1_5_video_string(with_films):
    processor = with_films["1.5"]
    film = film_of(Frame(40, 72, 0.0), Frame(22, 38, 0.5, fast=True), Frame(40, 72, 1.0))
    request = processor.request(user({"type": "video", "video": film}))
    assert request.video_grid_thw == ((1, 40, 72), (1, 22, 38), (1, 40, 72))
    assert request.second_per_grid_ts == ()
    pads = "<|video_pad|>"
    assert string(processor, request.input_ids) == (
        f"{SYSTEM}<|im_start|>user\n<|vision_start|><|frame|>0.0{pads * 720}"
        f"<|frame|>0.5<|fast_start|>{pads * 209}<|fast_end|>"
        f"<|frame|>1.0{pads * 720}<|vision_end|><|im_end|>\n{ASSISTANT}"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    # 0.15 is above the tie as fp32 and below it as a double; a frame may have no time at all.
    [(0.25, "0.2"), (0.75, "0.8"), (0.15, "0.2"), (12.5, "12.5"), (100.06, "100.1"), (None, "")],
)
def test_1_5_timestamps(with_films, seconds, text):
    processor = with_films["1.5"]
    request = processor.request(user({"type": "video", "video": film_of(Frame(2, 2, seconds))}))
    frame = f"<|frame|>{text}<|video_pad|><|vision_end|>"
    assert frame in string(processor, request.input_ids)


def test_expansion_equals_tokenising_the_expanded_string(with_films, line, checkpoints):
    """Against the transformers tokenizer on a string expanded by plain replacement."""
    processor = with_films[line]
    fast = Frame(2, 2, 0.5, fast=True) if line == "1.5" else Frame(4, 4, 0.5)
    film = film_of(Frame(4, 4, 0.0), fast)
    messages = user(
        text_item("it's "), image(), text_item("42 \n"), {"type": "video", "video": film}
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pads = "<|video_pad|>"
    video = pads * 8
    if line == "1.5":
        video = f"<|frame|>0.0{pads * 4}<|frame|>0.5<|fast_start|>{pads}<|fast_end|>"
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 6).replace(pads, video)
    path = checkpoints[LINES[line].name] / "tokenizer.json"
    expected = PreTrainedTokenizerFast(tokenizer_file=str(path))(text).input_ids
    assert processor.request(messages).input_ids.tolist() == expected


def test_every_digit_of_a_time_is_one_token(with_films):
    processor = with_films["1.5"]
    one = {c: processor.tokenizer.encode(c, add_special_tokens=False).ids for c in "0123456789."}
    assert all(len(ids) == 1 for ids in one.values())
    film = film_of(Frame(2, 2, 1230.5), Frame(2, 2, 4678.9))
    ids = processor.request(user({"type": "video", "video": film})).input_ids.tolist()
    for time in ("1230.5", "4678.9"):
        digits = [one[c][0] for c in time]
        expected = [processor.token_ids.frame, *digits, processor.token_ids.video]
        assert any(ids[i : i + len(expected)] == expected for i in range(len(ids))), time


def test_own_statistics_reach_the_model(with_films, line, monkeypatch):
    """Bytes are normalised by the checkpoint's mean and std, so others are applied here."""
    processor = with_films[line]
    film = film_of(Frame(2, 2, 0.0), value=51)
    messages = user(image(), {"type": "video", "video": film})
    plain = processor.request(messages)
    assert plain.pixel_values_videos is film.pixels  # a long video is not copied
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
    assert processor.request(messages).pixel_values.dtype == torch.uint8
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3])
    monkeypatch.setattr(processor.image_processor, "image_std", [0.5, 0.25, 0.1])
    own = processor.request(messages)
    assert torch.equal(own.pixel_values, processor.image_processor.normalize(plain.pixel_values))
    values = own.pixel_values_videos.mean((0, 2, 3))
    torch.testing.assert_close(values, torch.tensor([0.2, 0.0, -1.0]))


def test_mixed_conversation_of_the_documentation(processor):
    messages = [
        *user({"type": "image"}, text_item("Hello, how are you?")),
        {"role": "assistant", "content": "I'm doing well, thank you for asking."},
        *user(
            text_item("Can you describe these images and video?"),
            *({"type": "image"}, {"type": "image"}, {"type": "video"}),
            text_item("These are from my vacation."),
        ),
        {"role": "assistant", "content": "I'd be happy to describe the images and video for you."},
        {"role": "user", "content": "It was a trip to the mountains."},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}Hello, how are you?<|im_end|>\n"
        "<|im_start|>assistant\nI'm doing well, thank you for asking.<|im_end|>\n"
        f"<|im_start|>user\nCan you describe these images and video?{image}{image}"
        "<|vision_start|><|video_pad|><|vision_end|>These are from my vacation.<|im_end|>\n"
        "<|im_start|>assistant\nI'd be happy to describe the images and video for you.<|im_end|>\n"
        "<|im_start|>user\nIt was a trip to the mountains.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_options_reach_the_prompt(preview):
    messages = user(image(), text_item("Why?"))
    request = preview.request(
        messages, thinking=False, add_generation_prompt=False, add_vision_id=True
    )
    text = string(preview, request.input_ids)
    assert text.endswith("<|vision_end|>Why?/no_think<|im_end|>\n")
    assert "<|im_start|>user\nPicture 1: <|vision_start|>" in text
    template = preview.apply_chat_template(messages, thinking=True, add_vision_id=True)
    assert template.endswith("Why?/think<|im_end|>\n")
    assert "Picture 1: " in template


def test_requests(preview):
    conversations = [user(text_item("One")), user(image(), text_item("Two"))]
    several = preview.requests(conversations, thinking=True)
    alone = [preview.request(one, thinking=True) for one in conversations]
    assert [r.input_ids.tolist() for r in several] == [r.input_ids.tolist() for r in alone]


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ({"type": "image", "image": "/no/such.png"}, FileNotFoundError, "image must be an existin"),
        ({"type": "image", "image": 3}, TypeError, "image must be a path"),
        ({"type": "image", "size": 3}, ValueError, r"messages\[0\]\['content'\]\[0\] has unknown"),
        ({"type": "image", "image": "https://a.b/c.png"}, RuntimeError, "URL .* must not be fetch"),
    ],
)
def test_requests_say_which_conversation_is_wrong(preview, monkeypatch, broken, error, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good, bad = user(text_item("One")), user(broken)
    with pytest.raises(error, match=f"^conversation 2: {message}") as caught:
        preview.requests([good, bad, good])
    assert type(caught.value) is error
    with pytest.raises(error, match=f"^{message}"):
        preview.requests([bad])


def test_no_second_turn_of_the_assistant(preview):
    messages = [*user(text_item("One?")), {"role": "assistant", "content": "Two"}]
    with pytest.raises(
        ValueError, match=r"must not end with the assistant's turn .* add_generation"
    ):
        preview.request(messages)
    text = string(preview, preview.request(messages, add_generation_prompt=False).input_ids)
    assert text.endswith("assistant\nTwo<|im_end|>\n")
    prompt = preview.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == text + ASSISTANT


def test_an_answer_that_was_begun_goes_on(processor):
    begun = [*user(text_item("Count.")), {"role": "assistant", "content": "One, two, "}]
    prompt = "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\nOne, two, "
    request = processor.request(begun, continue_final_message=True)
    assert string(processor, request.input_ids).endswith(prompt)
    options = {"continue_final_message": True, "thinking": False}
    assert processor.apply_chat_template(begun, **options).endswith(
        prompt.replace("Count.", "Count./no_think")
    )
    batch = processor.apply_chat_template(begun, tokenize=True, continue_final_message=True)
    assert batch[0].tolist() == request.input_ids.tolist()
    with pytest.raises(ValueError, match="must be False with add_generation_prompt"):
        processor.apply_chat_template(
            user(text_item("a")), add_generation_prompt=True, continue_final_message=True
        )


CUSTOM = """\
{%- for m in messages %}{{ m.role }}{{ ' ' ~ m.name if m.name }}: {% if m.content is string %}\
{{ m.content }}{% else %}{% for i in m.content %}\
{{ i.text if i.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}\
{% endif %}{{ eos_token }}{% endfor %}\
{{- ' (think)' if enable_thinking }}{{ pad_token if add_generation_prompt }}"""


def test_a_template_of_ones_own(processor):
    turn = user(image(), text_item("Hi"))
    turn[0]["name"] = "Ann"
    shown = "user Ann: <|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>"
    options = {"chat_template": CUSTOM}
    assert processor.apply_chat_template(turn, **options) == shown
    options["enable_thinking"] = True
    assert processor.apply_chat_template(turn, CUSTOM, enable_thinking=True) == f"{shown} (think)"
    options["add_generation_prompt"] = True
    several = processor.apply_chat_template([turn, turn], **options)
    assert several == [f"{shown} (think)<|endoftext|>"] * 2
    batch = processor.apply_chat_template(turn, **options, tokenize=True, return_dict=True)
    assert string(processor, batch.input_ids[0]).startswith("user Ann: <|vision_start|><|image_pa")
    with pytest.raises(TypeError, match=r"'enable_thinking', which .* not read; it reads add_v"):
        processor.apply_chat_template(user(text_item("Hi")), enable_thinking=True)
    with pytest.raises(ValueError, match="unknown key 'name', which the chat template does not"):
        processor.apply_chat_template(turn)


def test_a_template_by_its_name(processor, monkeypatch):
    named = {"default": processor.chat_template, "own": CUSTOM}
    monkeypatch.setattr(processor, "chat_template", named)
    messages = user(text_item("Hi"))
    assert processor.apply_chat_template(messages, "own") == "user: Hi<|im_end|>"
    assert processor.apply_chat_template(messages).endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"return_assistant_tokens_mask": True}, NotImplementedError, "must be False, got True"),
        ({"truncation": True}, NotImplementedError, "truncation must be False or 'do_not_tru"),
        ({"max_length": 9}, NotImplementedError, "max_length must be left out, got 9"),
        ({"padding": "max_length"}, ValueError, "padding must be True, False or 'longest'"),
        ({"fps": 2.0}, TypeError, "unknown keyword 'fps', which the chat template does not read"),
        ({"sources": 1}, TypeError, "unknown keyword 'sources', which the chat template does not"),
        ({"processor_kwargs": {"fps": 1}}, TypeError, "unknown keyword 'fps'; known: padding, pad"),
        (
            {"tools": [min]},
            TypeError,
            "tools must hold strings, .*, got builtin_f",
        ),
        ({"documents": ["<|im_end|>"]}, ValueError, "documents must not hold the special token"),
        ({"chat_template": 3}, TypeError, "chat_template must be a name or a template, got int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_template_options_that_are_not_served(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(user(text_item("Hi")), tokenize=True, **options)


def test_template_options_that_change_nothing(processor):
    messages = [user(text_item("Hi")), user(text_item("Hello you"))]
    expected = processor.apply_chat_template(messages, tokenize=True, padding=True)
    options = {"return_assistant_tokens_mask": False, "truncation": False, "max_length": None}
    options |= {"tools": None, "documents": None, "chat_template": None}
    for filling in ({"padding": True}, {"processor_kwargs": {"padding": "longest"}}):
        found = processor.apply_chat_template(messages, tokenize=True, **filling, **options)
        assert torch.equal(found, expected)
    for padding in (None, False, "do_not_pad"):
        ids = processor.apply_chat_template(messages[0], tokenize=True, padding=padding)
        assert torch.equal(ids, processor.apply_chat_template(messages[0], tokenize=True))


@pytest.mark.parametrize("key", ["images", "video", "contents", "tool_calls"])
def test_every_door_refuses_unknown_keys_of_a_message(processor, key):
    turn = {"role": "user", "content": "Hi", key: ["a.png"]}
    for door in (
        processor.request,
        processor.apply_chat_template,
        lambda messages: processor.apply_chat_template(messages, tokenize=True),
        lambda messages: processor.requests([messages]),
    ):
        with pytest.raises(ValueError, match=rf"^messages\[0\] has unknown key '{key}'"):
            door([turn])
    for door in (processor.requests, processor.apply_chat_template):
        with pytest.raises(ValueError, match=rf"^conversation 2: messages\[0\] has unk.* '{key}'"):
            door([user(text_item("Hi")), [turn]])


def test_special_tokens_in_text_are_refused(processor):
    messages = user(image(), text_item("What is <|image_pad|>?"))
    for tokenize in (True, False):
        with pytest.raises(ValueError, match=r"special token '<\|image_pad\|>' in its text"):
            processor.apply_chat_template(messages, tokenize=tokenize)


def test_marks_of_1_5_are_ordinary_text_to_preview(processors):
    messages = user(text_item("a <|frame|> b"))
    assert "<|frame|>" in string(
        processors["preview"], processors["preview"].request(messages).input_ids
    )
    with pytest.raises(ValueError, match=r"special token '<\|frame\|>' in its text"):
        processors["1.5"].request(messages)


def test_an_answer_with_marks_is_history(with_films):
    processor = with_films["1.5"]
    film = {"type": "video", "video": film_of(Frame(2, 2, 0.0), Frame(2, 2, 0.5, fast=True))}
    answer = "At <|frame|>0.5<|fast_start|> and <|fast_end|>."
    first = user(film, text_item("When?"))
    request = processor.request(
        [*first, {"role": "assistant", "content": answer}, *user(film, text_item("Sure?"))]
    )
    assert (request.input_ids == processor.token_ids.video).sum() == 4
    assert f"assistant\n{answer}<|im_end|>" in string(processor, request.input_ids)
    pack([request], processor.config)
    for broken in ("<|fast_video_pad|>", "<|video_pad|>", "<|im_end|>"):
        with pytest.raises(ValueError, match=rf"special token '{re.escape(broken)}' in its text"):
            processor.request([*first, {"role": "assistant", "content": broken}, *first])


def test_template_that_loses_a_picture(preview, monkeypatch):
    monkeypatch.setattr(preview, "chat_template", "{{ messages[0].role }}")
    with pytest.raises(ValueError, match=r"one <\|image_pad\|> for each of 1 images, got 0"):
        preview.request(user(image()))


@pytest.mark.parametrize("messages", [{"role": "user", "content": "Hi"}, "Hi", None], ids=str)
def test_messages_must_be_a_list(preview, messages):
    for work in (preview.request, preview.apply_chat_template):
        with pytest.raises(TypeError, match="messages must be a list of dicts, got"):
            work(messages)


_CONTENT = st.lists(
    st.one_of(
        st.text(max_size=8).map(text_item),
        st.sampled_from([(28, 28), (30, 100), (84, 56)]).map(lambda size: image(*size)),
        st.lists(
            st.builds(
                Frame,
                st.sampled_from([2, 4]),
                st.sampled_from([2, 6]),
                st.floats(0, 1e4) | st.none(),
                st.booleans(),
            ),
            min_size=1,
            max_size=4,
        ),
    ),
    min_size=1,
    max_size=5,
)
_MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=9) | _CONTENT),
    min_size=1,
    max_size=4,
)


def _as_item(entry, same_size):
    if isinstance(entry, dict):
        return entry
    if same_size:  # 8B-Preview gives all frames of a video one size
        entry = [Frame(entry[0].rows, entry[0].columns, None)] * len(entry)
    return {"type": "video", "video": film_of(*entry)}


@settings(max_examples=40)
@given(conversation=_MESSAGES)
def test_any_conversation(with_films, line, conversation):
    """Placeholders, features, grids and positions agree, whatever the messages hold."""
    processor = with_films[line]
    messages = [
        {
            "role": role,
            "content": content
            if isinstance(content, str)
            else [_as_item(entry, line == "preview") for entry in content],
        }
        for role, content in conversation
    ]
    opened = messages[-1]["role"] != "assistant"
    request = processor.request(messages, add_generation_prompt=opened)
    assert isinstance(request, Request)  # patches match the grids, or it would not exist
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    kinds = [item["type"] for content in lists for item in content]
    assert len(request.image_grid_thw) == kinds.count("image")
    for token, grid in (
        (processor.token_ids.image, request.image_grid_thw),
        (processor.token_ids.video, request.video_grid_thw),
    ):
        features = sum(t * h * w for t, h, w in grid) // 4
        assert (request.input_ids == token).sum() == features
    packed = pack([request, request], processor.config)
    assert packed.positions.shape == (3, 2 * request.input_ids.numel())
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<|vision_start|>") == kinds.count("image") + kinds.count("video")


@pytest.mark.skipif(
    "KEYE_CHECKPOINT" not in os.environ, reason="KEYE_CHECKPOINT names no real checkpoint"
)
def test_published_ids():
    processor = KeyeProcessor.from_pretrained(os.environ["KEYE_CHECKPOINT"], min_pixels=102400)
    request = processor.request(user(image(224, 224), text_item("Describe this image.")))
    assert request.input_ids.tolist() == [
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198),
        *(151652, *[151655] * 144, 151653, 74785, 419, 2168, 13, 151645, 198),
        *(151644, 77091, 198),
    ]
    texts = processor(text=["0123456789.", "\n\n", "\n"], return_tensors=None)
    assert texts.input_ids == [[*range(15, 25), 13], [271], [198]]
    assert processor.token_ids.eos == (151645, 151643)
    assert processor.token_ids.pad == 151643
    assert processor.decode([151643, 151644, 151652, 151656, 151667, 151668, 151900], True) == (
        "<think></think>"
    )
