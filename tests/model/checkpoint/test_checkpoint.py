"""A checkpoint is found once for a whole load, and each of its files is read once."""

import json
from collections import Counter
from pathlib import Path

import pytest

from keye_model import (
    Keye,
    KeyeConfig,
    KeyeForConditionalGeneration,
    KeyeImageProcessor,
    KeyeProcessor,
    KeyeVideoProcessor,
)
from keye_model.checkpoint import checkpoint as checkpoint_module
from keye_model.checkpoint.checkpoint import Checkpoint
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.cli import main

DOORS = {
    KeyeConfig: [False],
    KeyeImageProcessor: [False],
    KeyeVideoProcessor: [False],
    KeyeProcessor: [False],
    KeyeForConditionalGeneration: [False, True],
    Keye: [False, True],
}


@pytest.fixture
def visits(monkeypatch):
    """For each visit to the Hub or to a directory: whether it was for the weights."""
    made, real = [], checkpoint_module.locate

    def locate(path_or_id, *, weights, **options):
        made.append(weights)
        return real(path_or_id, weights=weights, **options)

    monkeypatch.setattr(checkpoint_module, "locate", locate)
    return made


@pytest.fixture
def readings(monkeypatch):
    """How often the text of each file was read."""
    counts, real = Counter(), Path.read_text

    def read_text(path, *given, **named):
        counts[path.name] += 1
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    return counts


@pytest.mark.parametrize("name", [PREVIEW.name, V1_5.name])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_each_door_finds_a_checkpoint_and_reads_its_files_once(
    checkpoints, name, door, visits, readings
):
    door.from_pretrained(checkpoints[name])
    assert visits == DOORS[door]
    assert set(readings.values()) == {1}


def test_an_image_processor_reads_its_own_file_alone(preview_checkpoint, readings):
    KeyeImageProcessor.from_pretrained(preview_checkpoint)
    assert set(readings) == {"preprocessor_config.json"}


def test_a_command_finds_its_checkpoint_once(preview_checkpoint, visits, readings):
    options = ["--model", str(preview_checkpoint), "--max-new-tokens", "1", "Hello"]
    assert main(["generate", *options]) == 0
    assert visits == [False, True]
    assert {n for name, n in readings.items() if name.endswith(".json")} == {1}


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_takes_a_checkpoint(preview_checkpoint, door, visits):
    checkpoint = Checkpoint.at(preview_checkpoint, local_files_only=True)
    door.from_pretrained(checkpoint)
    assert visits == [False, *DOORS[door][1:]]


def test_pictures_are_not_fetched_where_the_checkpoint_is_not(preview_checkpoint):
    processor = KeyeProcessor.from_pretrained(
        Checkpoint.at(preview_checkpoint, local_files_only=True)
    )
    parts = (processor, processor.image_processor, processor.video_processor)
    assert all(part.local_files_only for part in parts)


def test_the_weights_are_fetched_from_where_the_configuration_was(monkeypatch, tmp_path):
    asked = []

    def locate(path_or_id, **options):
        asked.append((path_or_id, options))
        return tmp_path

    monkeypatch.setattr(checkpoint_module, "locate", locate)
    options = {"local_files_only": True, "revision": "abc", "token": "secret"}
    checkpoint = Checkpoint.at("owner/name", **options)
    assert checkpoint.fetch_weights() == tmp_path
    assert "secret" not in repr(checkpoint)
    assert asked == [("owner/name", {"weights": found, **options}) for found in (False, True)]


def test_a_file_that_was_absent_is_looked_for_again(tmp_path):
    checkpoint = Checkpoint.at(tmp_path)
    assert checkpoint.json("config.json", required=False) is None
    with pytest.raises(FileNotFoundError, match=r"must contain config\.json"):
        checkpoint.json("config.json")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert checkpoint.json("config.json") == {"a": 1}
    (tmp_path / "config.json").unlink()
    assert checkpoint.json("config.json") == {"a": 1}


def test_added_tokens(tmp_path):
    assert Checkpoint.at(tmp_path).added_tokens == {}
    added = {"added_tokens": [{"content": "<a>", "id": 7}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    assert Checkpoint.at(tmp_path).added_tokens == {"<a>": 7}
