"""The files a processor reads: all it needs, and what is wrong with others."""

import json
import shutil

import pytest

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.processing.processor import KeyeProcessor
from tests.model.processing.messages import (
    LINES,
    image,
    user,
)


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
    assert processor.request(user(image(28, 28))).image_grid_thw == ((1, 2, 2),)
    assert processor.token_ids.eos == (
        processor.tokenizer.token_to_id("<|im_end|>"),
        processor.tokenizer.token_to_id("<|endoftext|>"),
    )


def test_keywords_of_published_snippets(copied):
    (copied / "processing_keye.py").write_text("raise SystemExit")
    processor = KeyeProcessor.from_pretrained(copied, trust_remote_code=True)
    assert processor.pad_token_id == processor.token_ids.pad
    assert processor.eos_token_id == processor.tokenizer.token_to_id("<|im_end|>")


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


def test_padding_and_end_without_their_file(copied):
    published = KeyeProcessor.from_pretrained(copied).token_ids
    (copied / "generation_config.json").unlink()
    _edit(copied, "config.json", eos_token_id=published.eos[0])
    assert KeyeProcessor.from_pretrained(copied).token_ids == published
    defaults = GenerationDefaults.from_pretrained(copied)
    assert (defaults.eos_token_ids, defaults.pad_token_id) == (published.eos, published.pad)


def test_ids_around_pictures_may_be_left_out(copied):
    _edit(copied, "config.json", vision_start_token_id=None, vision_end_token_id=None)
    assert KeyeProcessor.from_pretrained(copied).request(user(image(28, 28)))
    _edit(copied, "config.json", vision_end_token_id=3)
    with pytest.raises(ValueError, match=r"must give '<\|vision_end\|>' the id 3 of config.json"):
        KeyeProcessor.from_pretrained(copied)


def test_fast_placeholder_must_agree(checkpoints, tmp_path):
    for path in checkpoints[V1_5.name].glob("*.json"):
        shutil.copy(path, tmp_path)
    processor = KeyeProcessor.from_pretrained(tmp_path)
    found = processor.tokenizer.token_to_id("<|fast_video_pad|>")
    assert processor.config.fast_video_token_id == found
    _edit(tmp_path, "config.json", fast_video_token_id=found + 1)
    with pytest.raises(ValueError, match=rf"must give '<\|fast_video_pad\|>' the id {found + 1}"):
        KeyeProcessor.from_pretrained(tmp_path)


def test_url_is_refused_with_local_files_only(copied):
    processor = KeyeProcessor.from_pretrained(copied, local_files_only=True)
    message = user({"type": "image", "image": "https://example.org/a.png"})
    with pytest.raises(RuntimeError, match="must not be fetched while local_files_only is set"):
        processor.request(message)
