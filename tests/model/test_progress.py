"""What `Keye.generate` and `Keye.stream` tell of a prompt that is being read."""

import pytest

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.engine.memory import Limits
from keye_model.keye import Keye


@pytest.fixture(params=[PREVIEW, V1_5], ids=lambda variant: variant.name)
def keye(request, checkpoints):
    limits = Limits(max_prefill_tokens=100, max_patches_per_call=100)
    return Keye.from_pretrained(checkpoints[request.param.name], limits=limits, cache=False)


def conversation(media):
    content = [
        {"type": "image", "image": media["picture"]},
        {"type": "video", "video": media["video"], "max_frames": 2},
        {"type": "text", "text": "What is there?"},
    ]
    return [{"role": "user", "content": content}]


def test_progress_of_a_batch(keye, media):
    calls = []
    batch = [conversation(media)] * 2
    answers = keye.generate(
        batch, max_new_tokens=2, seed=0, progress=lambda *state: calls.append(state)
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["frames", "vision", "prefill"]
    vision = sum(one.usage.image_tokens + one.usage.video_tokens for one in answers)
    prompt = sum(one.usage.prompt_tokens for one in answers)
    seen = {stage: [call[1:] for call in calls if call[0] == stage] for stage in stages}
    assert seen["frames"][:2] == [(1, 2), (2, 2)]
    done = [one for one, _ in seen["vision"]]
    assert len(done) > 3  # the start, and each call of the tower
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, vision)
    assert {total for _, total in seen["vision"]} == {vision}
    # A pass is told when it begins: on a GPU it has only been launched when the next one is.
    assert seen["prefill"] == [(start, prompt) for start in range(0, prompt, 100)]


def test_answers_do_not_depend_on_progress(keye, media):
    options = {"max_new_tokens": 4, "seed": 0}
    told = keye.generate(conversation(media), progress=lambda *_: None, **options)
    assert told.token_ids == keye.generate(conversation(media), **options).token_ids
    calls = []
    text = [{"role": "user", "content": "Hello"}]
    list(keye.stream(text, progress=lambda *state: calls.append(state), **options))
    assert [stage for stage, _, _ in calls] == ["prefill"]
