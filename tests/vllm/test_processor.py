"""What becomes of a request's pictures and videos before the engine, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from keye_model.inputs.positions import rope_positions
from keye_model.integrations._vllm_model import KeyeForConditionalGeneration
from keye_model.integrations._vllm_processor import (
    KeyeMultiModalProcessor,
    KeyeProcessingInfo,
    KeyeProcessor,
)
from tests.vllm.engine import clip, picture

METADATA = {"fps": 10.0, "frames_indices": [0, 7, 14, 20]}
TIMES = [0.0, 0.7, 1.4, 2.0]


@pytest.fixture(scope="module", params=[PREVIEW, V1_5], ids=["8B-Preview", "1.5"])
def processor(request, tmp_path_factory):
    return KeyeProcessor.from_pretrained(build(tmp_path_factory.mktemp("tiny"), request.param))


def of_messages(processor, **item):
    """What `keye_model` makes of the same video in a message."""
    content = [{"type": "video", **item}]
    return processor.inner.request([{"role": "user", "content": content}])


def test_pictures_are_bytes(processor):
    data = processor([picture(1, 84, 56), picture(2, 61, 90)])
    assert data["pixel_values"].dtype == torch.uint8
    assert data["image_grid_thw"].tolist()[0] == [1, 4, 6]
    assert len(data["pixel_values"]) == data["image_grid_thw"].prod(1).sum()


def test_decoded_videos_have_their_times(processor):
    films = [clip(3, 4, 56, 84), np.zeros((4, 56, 56, 3), np.uint8)]  # the second one stands still
    data = processor(videos=[(film, METADATA) for film in films])
    requests = [of_messages(processor, video=film, timestamps=TIMES) for film in films]
    pixels = torch.cat([request.pixel_values_videos for request in requests])
    assert torch.equal(data["pixel_values_videos"], pixels)
    rows = [[list(row) for row in request.video_grid_thw] for request in requests]
    assert data["video_grid_thw"].tolist() == rows[0] + rows[1]
    assert data["num_rows"].tolist() == [len(rows[0]), len(rows[1])]
    if processor.inner.config.variant == PREVIEW:
        seconds = data["seconds_bits"].view(torch.float32).tolist()
        assert seconds == [pytest.approx(2 / 3), pytest.approx(2 / 3)]
    else:
        assert len(rows[1]) == 2  # one slow frame, then fast ones
    for ids, request in zip(
        data["video_ids"].split(data["num_ids"].tolist()), requests, strict=True
    ):
        prompt = request.input_ids.tolist()
        start = prompt.index(ids[0])
        assert prompt[start : start + len(ids)] == ids.tolist()


@pytest.mark.parametrize("metadata", [{}, {"fps": 10.0, "frames_indices": [0]}, {"fps": 0.0}])
def test_videos_without_times_take_the_default(processor, metadata):
    film = clip(4, 4, 56, 56)
    [plain] = processor.inner.video_processor.patches_of_each(
        [torch.from_numpy(film).permute(0, 3, 1, 2)]
    )
    data = processor(videos=[(film, metadata)])
    assert torch.equal(data["pixel_values_videos"], plain.pixels)
    assert data["video_grid_thw"].tolist() == [list(row) for row in plain.grid_thw]


def test_unknown_option(processor):
    with pytest.raises(TypeError, match=r"mm_processor_kwargs must be among .*, got crop"):
        processor([picture(1, 56, 56)], crop=True)


def test_options_of_the_videos_not_seen_before():
    options = {"fps": [1.0, 2.0, 3.0], "timestamps": [[0.0], [1.0], [2.0]], "max_pixels": 50176}
    inputs = SimpleNamespace(hf_processor_mm_kwargs=options | {"frame_types": [0]})
    cached = {"video": [True, False, True], "image": [False]}
    found = KeyeMultiModalProcessor._get_cache_missing_processor_kwargs(None, inputs, cached)
    assert found == {
        "fps": [2.0],
        "timestamps": [[1.0]],
        "max_pixels": 50176,
        "frame_types": [0],
    }


def test_largest_grid(processor):
    info = SimpleNamespace(get_hf_processor=lambda: processor)
    assert KeyeProcessingInfo.largest_grid(info, "image") == (32, 40)  # 1280 tokens
    most = 1280 if processor.inner.config.variant == PREVIEW else 768
    rows, columns = KeyeProcessingInfo.largest_grid(info, "video")
    assert most - rows < rows * columns <= most


def test_positions(processor):
    """As `keye_model`'s, and a placeholder's id in the text is text."""
    config = processor.inner.config
    request = of_messages(processor, video=clip(5, 4, 56, 84), timestamps=TIMES)
    ids = request.input_ids
    where = (ids == config.video_token_id).nonzero().flatten()
    place = PlaceholderRange(
        offset=int(where[0]),
        length=int(where[-1] - where[0]) + 1,
        is_embed=ids[where[0] : where[-1] + 1] == config.video_token_id,
    )
    seconds = torch.tensor(request.second_per_grid_ts or [0.5])
    data = {
        "video_grid_thw": SimpleNamespace(data=torch.tensor(request.video_grid_thw)),
        "seconds_bits": SimpleNamespace(data=seconds.view(torch.int32)),
    }
    feature = SimpleNamespace(data=data, modality="video", mm_position=place)
    model = SimpleNamespace(keye_config=config)
    stray = torch.tensor([config.image_token_id, config.video_token_id])

    got, delta = KeyeForConditionalGeneration.get_mrope_input_positions(
        model, torch.cat([ids, stray]).tolist(), [feature]
    )
    text = torch.cat([ids, torch.zeros_like(stray)])
    want, next_position = rope_positions(
        text, (), request.video_grid_thw, request.second_per_grid_ts, config
    )
    assert torch.equal(got, want)
    assert delta == next_position - len(text)

    feature.data = None
    with pytest.raises(ValueError, match="mm_features must have their data"):
        KeyeForConditionalGeneration.get_mrope_input_positions(model, ids.tolist(), [feature])


def test_placeholder_string():
    string = KeyeForConditionalGeneration.get_placeholder_str("video", 1)
    assert string == "<|vision_start|><|video_pad|><|vision_end|>"
    with pytest.raises(ValueError, match="modality must be 'image' or 'video', got 'audio'"):
        KeyeForConditionalGeneration.get_placeholder_str("audio", 1)
