"""The whole host side: requests, batches, expansion, padding, decoding."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from keye_model.config import PREVIEW, V1_5
from keye_model.inputs import Request
from keye_model.positions import pack
from keye_model.processing.batch import BatchFeature
from keye_model.processing.image import fetch_image
from keye_model.processing.patches import Frame, VideoPatches
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.vision_info import process_vision_info

LINES = {"preview": PREVIEW, "1.5": V1_5}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


class _Films:
    """Stands for the video processor: a message item holds patches that were made beforehand."""

    def patches(self, item):
        return item["video"]


def _film(*frames, seconds=0.5, value=0):
    count = sum(frame.rows * frame.columns for frame in frames)
    return VideoPatches(torch.full((count, 3, 14, 14), value, dtype=torch.uint8), frames, seconds)


@pytest.fixture(scope="session")
def processors(checkpoints):
    return {key: KeyeProcessor.from_pretrained(checkpoints[v.name]) for key, v in LINES.items()}


@pytest.fixture(params=LINES)
def line(request):
    return request.param


@pytest.fixture
def processor(processors, line):
    return processors[line]


@pytest.fixture
def preview(processors):
    return processors["preview"]


@pytest.fixture
def with_films(monkeypatch, processors):
    for processor in processors.values():
        monkeypatch.setattr(processor, "video_processor", _Films())
    return processors


def _picture(height=56, width=84, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _image(*size, **keys):
    return {"type": "image", "image": _picture(*size), **keys}


def _text(text):
    return {"type": "text", "text": text}


def _user(*content):
    return [{"role": "user", "content": list(content)}]


def _string(processor, ids):
    return processor.decode(ids, skip_special_tokens=False)


def _equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


# Prompts


def test_image_request(processor):
    request = processor.request(_user(_image(), _text("Describe this image.")))
    assert request.image_grid_thw == ((1, 4, 6),)
    assert request.pixel_values.dtype == torch.uint8
    assert _string(processor, request.input_ids) == (
        f"{SYSTEM}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>"
        f"Describe this image.<|im_end|>\n{ASSISTANT}"
    )


def test_image_goes_through_both_resizes(preview):
    picture = _picture(98, 200)
    request = preview.request(_user({"type": "image", "image": picture, "max_pixels": 6272}))
    helped = fetch_image({"image": picture, "max_pixels": 6272}, version="1.0")
    expected = preview.image_processor.patches(helped)
    assert request.image_grid_thw == (expected.grid_thw,)
    assert torch.equal(request.pixel_values, expected.pixels)


def test_preview_video_string(with_films):
    processor = with_films["preview"]
    film = _film(*[Frame(40, 72, 0.5 * i) for i in range(8)])
    request = processor.request(_user({"type": "video", "video": film}, _text("Describe it.")))
    assert request.video_grid_thw == ((8, 40, 72),)
    assert request.second_per_grid_ts == (0.5,)
    assert (
        f"<|vision_start|>{'<|video_pad|>' * 5760}<|vision_end|>Describe it.<|im_end|>\n"
    ) in _string(processor, request.input_ids)


def test_1_5_video_string(with_films):
    processor = with_films["1.5"]
    film = _film(Frame(40, 72, 0.0), Frame(22, 38, 0.5, fast=True), Frame(40, 72, 1.0))
    request = processor.request(_user({"type": "video", "video": film}))
    assert request.video_grid_thw == ((1, 40, 72), (1, 22, 38), (1, 40, 72))
    assert request.second_per_grid_ts == ()
    pads = "<|video_pad|>"
    assert _string(processor, request.input_ids) == (
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
    request = processor.request(_user({"type": "video", "video": _film(Frame(2, 2, seconds))}))
    frame = f"<|frame|>{text}<|video_pad|><|vision_end|>"
    assert frame in _string(processor, request.input_ids)


def test_expansion_equals_tokenising_the_expanded_string(with_films, line, checkpoints):
    """Against the transformers tokenizer on a string expanded by plain replacement."""
    processor = with_films[line]
    fast = Frame(2, 2, 0.5, fast=True) if line == "1.5" else Frame(4, 4, 0.5)
    film = _film(Frame(4, 4, 0.0), fast)
    messages = _user(_text("it's "), _image(), _text("42 \n"), {"type": "video", "video": film})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pads = "<|video_pad|>"
    video = pads * 8
    if line == "1.5":
        video = f"<|frame|>0.0{pads * 4}<|frame|>0.5<|fast_start|>{pads}<|fast_end|>"
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 6).replace(pads, video)
    path = checkpoints[LINES[line].name] / "tokenizer.json"
    expected = PreTrainedTokenizerFast(tokenizer_file=str(path))(text).input_ids
    assert processor.request(messages).input_ids.tolist() == expected


def test_mixed_conversation_of_the_documentation(processor):
    messages = [
        *_user({"type": "image"}, _text("Hello, how are you?")),
        {"role": "assistant", "content": "I'm doing well, thank you for asking."},
        *_user(
            _text("Can you describe these images and video?"),
            *({"type": "image"}, {"type": "image"}, {"type": "video"}),
            _text("These are from my vacation."),
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
    messages = _user(_image(), _text("Why?"))
    request = preview.request(
        messages, thinking=False, add_generation_prompt=False, add_vision_id=True
    )
    text = _string(preview, request.input_ids)
    assert text.endswith("<|vision_end|>Why?/no_think<|im_end|>\n")
    assert "<|im_start|>user\nPicture 1: <|vision_start|>" in text
    template = preview.apply_chat_template(messages, thinking=True, add_vision_id=True)
    assert template.endswith("Why?/think<|im_end|>\n")
    assert "Picture 1: " in template


def test_requests(preview):
    conversations = [_user(_text("One")), _user(_image(), _text("Two"))]
    several = preview.requests(conversations, thinking=True)
    alone = [preview.request(one, thinking=True) for one in conversations]
    assert [r.input_ids.tolist() for r in several] == [r.input_ids.tolist() for r in alone]


def test_special_tokens_in_text_are_refused(processor):
    messages = _user(_image(), _text("What is <|image_pad|>?"))
    for tokenize in (True, False):
        with pytest.raises(ValueError, match=r"special token '<\|image_pad\|>' in its text"):
            processor.apply_chat_template(messages, tokenize=tokenize)


def test_marks_of_1_5_are_ordinary_text_to_preview(processors):
    messages = _user(_text("a <|frame|> b"))
    assert "<|frame|>" in _string(
        processors["preview"], processors["preview"].request(messages).input_ids
    )
    with pytest.raises(ValueError, match=r"special token '<\|frame\|>' in its text"):
        processors["1.5"].request(messages)


def test_template_that_loses_a_picture(preview, monkeypatch):
    monkeypatch.setattr(preview, "chat_template", "{{ messages[0].role }}")
    with pytest.raises(ValueError, match=r"one <\|image_pad\|> for each of 1 images, got 0"):
        preview.request(_user(_image()))


@pytest.mark.parametrize("messages", [{"role": "user", "content": "Hi"}, "Hi", None], ids=str)
def test_messages_must_be_a_list(preview, messages):
    for work in (preview.request, preview.apply_chat_template):
        with pytest.raises(TypeError, match="messages must be a list of dicts, got"):
            work(messages)


# Batches


def test_batch_of_the_call(preview):
    pictures = [_picture(), _picture(112, 56, seed=1)]
    texts = [preview.apply_chat_template(_user({"type": "image"}, _text("a" * n))) for n in (1, 40)]
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
        _user(_image(98, 60), _text("One?")),
        _user(_text("Two"), _image(30, 400), _image(56, 56, max_pixels=784)),
    ]
    options = {"add_generation_prompt": True}
    version = processor.config.variant.video_version
    images = [
        fetch_image(item, version=version)
        for messages in conversations
        for item in messages[0]["content"]
        if item["type"] == "image"
    ]
    prompts = processor.apply_chat_template(conversations, **options)
    parts = processor(text=prompts, images=images, padding=True)
    whole = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, padding=True, **options
    )
    _equal(whole, parts)
    ids = processor.apply_chat_template(conversations, tokenize=True, padding=True, **options)
    assert torch.equal(ids, whole.input_ids)
    nested = processor(text=prompts, images=[images[:1], images[1:]], padding=True)
    _equal(nested, parts)
    request = processor.request(conversations[0])
    assert request.input_ids.tolist() == whole.input_ids[0][whole.attention_mask[0] == 1].tolist()


def _frames(number, height=56, width=84):
    return [_picture(height, width, seed) for seed in range(number)]


def test_preview_videos_of_the_call(preview):
    text = [preview.apply_chat_template(_user({"type": "video"}))] * 2
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
    messages = _user(
        _image(),
        {"type": "video", "video": _frames(4), "fps": 2.0},
        _text("and"),
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
    _equal(whole, parts)
    request = processor.request(messages)
    assert request.input_ids.tolist() == whole.input_ids[0].tolist()
    assert [list(row) for row in request.video_grid_thw] == whole.video_grid_thw.tolist()
    normalized = processor.image_processor.normalize(request.pixel_values_videos)
    assert torch.equal(normalized, whole.pixel_values_videos)


def test_1_5_counts_the_rows_of_each_video(with_films):
    processor = with_films["1.5"]
    slow = Frame(4, 4, 0.0)
    films = [_film(slow, slow, Frame(2, 2, 1.0, fast=True)), _film(slow)]
    batch = processor.apply_chat_template(
        [_user({"type": "video", "video": film}) for film in films],
        tokenize=True,
        return_dict=True,
        padding=True,
    )
    assert batch.video_grid_thw.tolist() == [[2, 4, 4], [1, 2, 2], [1, 4, 4]]
    assert batch.num_frames.tolist() == [2, 1]
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
            {"text": "a", "images": [_picture()]},
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
            {"text": "a", "height": [1]},
            TypeError,
            r"for release 1\.0 must be among fps, got height",
        ),
        ({"text": "a", "fps": [2.0]}, ValueError, "fps must have one value for each of 0 videos"),
    ],
    ids=[
        *("no_image", "no_placeholder", "no_video", "empty", "no_text", "kind", "surrogate"),
        *("ragged", "padding", "side", "tensors", "keyword", "number_of_keywords"),
    ],
)
def test_bad_calls(preview, arguments, error, message):
    with pytest.raises(error, match=message):
        preview(**arguments)


def test_batch_moves_as_one(preview):
    batch = preview(text="<|image_pad|>", images=_picture())
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


# Decoding


def test_decode(preview):
    ids = preview.request(_user(_text("<think>Hi .</think> it 's"))).input_ids
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


# Checkpoints


@pytest.fixture
def copied(checkpoints, line, tmp_path):
    """A checkpoint's files without its weights, to be changed."""
    for path in checkpoints[LINES[line].name].iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def _edit(directory, file, **changes):
    values = json.loads((directory / file).read_text()) | changes
    (directory / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_needs_no_weights(copied):
    processor = KeyeProcessor.from_pretrained(copied, min_pixels=784, max_pixels=784)
    assert processor.request(_user(_image(28, 28))).image_grid_thw == ((1, 2, 2),)
    assert processor.token_ids.eos == (
        processor.tokenizer.token_to_id("<|im_end|>"),
        processor.tokenizer.token_to_id("<|endoftext|>"),
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_missing_file(copied, file):
    (copied / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"must contain {file}"):
        KeyeProcessor.from_pretrained(copied)


def test_broken_tokenizer(copied):
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer, got an error"):
        KeyeProcessor.from_pretrained(copied)


def test_tokenizer_of_another_model(copied):
    _edit(copied, "config.json", image_token_id=3)
    with pytest.raises(ValueError, match=r"must give '<\|image_pad\|>' the id 3 of config.json"):
        KeyeProcessor.from_pretrained(copied)


def test_marks_are_needed_by_1_5_alone(checkpoints, tmp_path):
    tokenizer = checkpoints[PREVIEW.name] / "tokenizer.json"
    for path in checkpoints[V1_5.name].glob("*.json"):
        shutil.copy(path, tmp_path)
    shutil.copy(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"must contain the token '<\|frame\|>', it does not"):
        KeyeProcessor.from_pretrained(tmp_path)


def test_patch_size_must_agree(copied):
    _edit(copied, "preprocessor_config.json", patch_size=16)
    with pytest.raises(ValueError, match=r"have patch_size 14 like config\.json, got 16"):
        KeyeProcessor.from_pretrained(copied)


def test_padding_and_end_from_the_tokenizers_file(copied):
    (copied / "generation_config.json").unlink()
    ids = KeyeProcessor.from_pretrained(copied).token_ids
    assert ids.eos == (KeyeProcessor.from_pretrained(copied).tokenizer.token_to_id("<|im_end|>"),)
    _edit(copied, "tokenizer_config.json", pad_token={"content": "<|endoftext|>"})
    assert KeyeProcessor.from_pretrained(copied).token_ids.pad == ids.pad
    _edit(copied, "tokenizer_config.json", pad_token=None)
    with pytest.raises(ValueError, match=r"must name pad_token_id, or tokenizer_config\.json"):
        KeyeProcessor.from_pretrained(copied)


def test_url_is_refused_with_local_files_only(copied):
    processor = KeyeProcessor.from_pretrained(copied, local_files_only=True)
    message = _user({"type": "image", "image": "https://example.org/a.png"})
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only is set"):
        processor.request(message)


# Any conversation

_CONTENT = st.lists(
    st.one_of(
        st.text(max_size=8).map(_text),
        st.sampled_from([(28, 28), (30, 100), (84, 56)]).map(lambda size: _image(*size)),
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
    return {"type": "video", "video": _film(*entry)}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    request = processor.request(messages)
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


# The published tokenizer


@pytest.mark.skipif(
    "KEYE_CHECKPOINT" not in os.environ, reason="KEYE_CHECKPOINT names no real checkpoint"
)
def test_published_ids():
    processor = KeyeProcessor.from_pretrained(os.environ["KEYE_CHECKPOINT"], min_pixels=102400)
    request = processor.request(_user(_image(224, 224), _text("Describe this image.")))
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
