"""Keye in the real vLLM engine on a CPU, against `keye_model`: same tokens, same log-probabilities.

Not shown here, as there is no GPU: CUDA dispatch, CUDA graphs and torch.compile, speed.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="run `make test-vllm`: vLLM has an environment of its own")

from keye_model import KeyeForConditionalGeneration, KeyeProcessor
from keye_model.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from tests.vllm.engine import clip, picture

ROOT = Path(__file__).parent.parent.parent
TOKENS = 4
LOGPROB_ATOL = 1e-4
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

TEXT = {"prompt": "<|im_start|>user\nDescribe what happened.<|im_end|>\n<|im_start|>assistant\n"}
ONE = {"prompt": f"{IMAGE}Describe this image.", "images": [(1, 84, 56)]}
TWO = {  # of different sizes, one of which is resized; packed, so they must not see each other
    "prompt": f"The first: {IMAGE} the second: {IMAGE} Yes",
    "images": [(2, 61, 90), (3, 140, 28)],
}
TIMED = {"prompt": f"{VIDEO}What?", "video": (5, 4, 56, 28), "options": {"fps": 0.7}}
DECODED = {  # as vLLM's video loader hands it on: every fifth frame at 10 per second
    "prompt": f"{VIDEO}What?",
    "video": (6, 4, 56, 56),
    "metadata": {"fps": 10.0, "frames_indices": [0, 5, 10, 15]},
}
SLOW_FAST = {
    "prompt": f"Look: {VIDEO}{IMAGE}Yes",
    "images": [(7, 56, 56)],
    "video": (8, 3, 56, 84),
    "options": {
        "height": 56, "width": 84, "fast_height": 28, "fast_width": 56,
        "timestamps": [[0.0, 0.5, 1.0]], "frame_types": [[0, 1, 0]],
    },
}  # fmt: skip
UNSEEN = {"prompt": f"{IMAGE}Describe this image.", "images": [(4, 84, 56)]}  # in no cache


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Tiny fp32 checkpoints of both lines; 8B-Preview's has the unused table vLLM insists on."""
    root = tmp_path_factory.mktemp("checkpoints")
    preview = build(root / "preview", PREVIEW, dtype=torch.float32)
    name = "visual.vision_model.embeddings.packing_position_embedding.weight"
    save_file({name: torch.zeros(32768, 144)}, preview / "table.safetensors")
    index = json.loads((preview / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "table.safetensors"
    (preview / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"preview": preview, "1.5": build(root / "v1_5", V1_5, dtype=torch.float32)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """Start an engine in a process of its own and return what `tests.vllm.engine` found."""
    root = tmp_path_factory.mktemp("engines")

    def run(plugins: str, model: str, checkpoint: Path, batches: list[dict]) -> dict:
        case = {
            "model": model,
            "checkpoint": str(checkpoint),
            "max_tokens": TOKENS,
            "batches": batches,
        }
        (root / "case.json").write_text(json.dumps(case))
        command = [sys.executable, "-m", "tests.vllm.engine", root / "case.json", root / "out.json"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(root, plugins), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads((root / "out.json").read_text())

    return run


def environment(root: Path, plugins: str | None) -> dict[str, str]:
    changes = {
        "HF_HUB_OFFLINE": "1",
        "KEYE_KERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if plugins is not None:
        changes["VLLM_PLUGINS"] = plugins
    return os.environ | changes


@functools.cache
def loaded(checkpoint: Path):
    return (
        KeyeProcessor.from_pretrained(checkpoint),
        KeyeForConditionalGeneration.from_pretrained(checkpoint),
    )


def check(checkpoint: Path, request: dict, answer: dict) -> None:
    """An engine's answer is `keye_model`'s."""
    inputs, ids, logprobs = expected(checkpoint, request)
    assert answer["prompt_ids"] == inputs
    assert answer["ids"] == ids
    torch.testing.assert_close(
        torch.tensor(answer["logprobs"]), logprobs, rtol=0, atol=LOGPROB_ATOL
    )


def expected(checkpoint: Path, request: dict) -> tuple[list[int], list[int], torch.Tensor]:
    """Ids of the expanded prompt, those generated greedily, and their log-probabilities."""
    processor, model = loaded(checkpoint)
    options = dict(request.get("options", {}))
    videos = None
    if "video" in request:
        videos = [torch.from_numpy(clip(*request["video"])).permute(0, 3, 1, 2)]
        if metadata := request.get("metadata"):
            times = [index / metadata["fps"] for index in metadata["frames_indices"]]
            options["fps"] = (len(times) - 1) / (times[-1] - times[0])
    images = [picture(*image) for image in request.get("images", [])]
    inputs = processor(images, request["prompt"], videos, **options)
    prompt = inputs["input_ids"]
    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    output = model.generate(**inputs, max_new_tokens=TOKENS, **greedy)
    inputs |= {"input_ids": output, "attention_mask": torch.ones_like(output)}
    logits = model(**inputs).logits[0, prompt.shape[1] - 1 : -1].float()
    ids = output[0, prompt.shape[1] :]
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return prompt[0].tolist(), ids.tolist(), logprobs


def test_8b_preview(start, checkpoints):
    requests = [[TEXT], [ONE], [TWO], [ONE, TEXT, TWO], [TIMED], [DECODED]]
    batches = [{"requests": batch} for batch in requests]
    sabotaged = [{"requests": [UNSEEN], "sabotage": "varlen_attention"}, {"requests": [TEXT]}]
    found = start("keye_model", "ours", checkpoints["preview"], batches + sabotaged)

    for batch, result in zip(requests, found["batches"], strict=False):
        for request, answer in zip(batch, result["answers"], strict=True):
            check(checkpoints["preview"], request, answer)
    assert {"Tower", "KeyeEncoderAttention", "KeyeRMSNorm"} <= set(found["classes"])
    assert found["report"] == [
        "MMEncoderAttention -> varlen_attention: 2 of 2 (by triton)",
        "RMSNorm -> rms_norm: 9 of 9 (by triton)",
        "SiluAndMul -> silu_mul: 2 of 2 (by triton)",
        "MRotaryEmbedding -> mrope_: 1 of 1 (by triton)",
    ]
    text, one, two = (batch["launches"] for batch in found["batches"][:3])
    assert text == {"rms_norm": 9 * TOKENS, "silu_mul": 2 * TOKENS, "mrope_": 2 * TOKENS}
    tower = {"patch_embed": 1, "layer_norm": 4, "rope_2d_": 2, "varlen_attention": 2, "gelu": 3}
    assert one == text | tower | {"merge_patches": 1}
    assert two == one  # both images in the same launches

    [image], [again] = (batch["answers"] for batch in found["batches"][-2:])
    _, _, logprobs = expected(checkpoints["preview"], UNSEEN)
    assert abs(image["logprobs"][0] - logprobs[0]) > 100 * LOGPROB_ATOL
    check(checkpoints["preview"], TEXT, again)


def test_1_5(start, checkpoints):
    requests = [TEXT, ONE, SLOW_FAST]
    batches = [{"requests": [request]} for request in requests]
    found = start("keye_model", "ours", checkpoints["1.5"], batches)
    for request, result in zip(requests, found["batches"], strict=True):
        check(checkpoints["1.5"], request, result["answers"][0])


def test_vllms_own_model(start, checkpoints):
    """Without plugins: the comparison itself is sound where both models have the same rules."""
    requests = [TEXT, ONE, TWO]
    found = start("", "vllm's", checkpoints["preview"], [{"requests": requests}])
    for request, answer in zip(requests, found["batches"][0]["answers"], strict=True):
        check(checkpoints["preview"], request, answer)
    assert not [name for name in found["classes"] if name in ("Tower", "KeyeEncoderAttention")]
    assert found["batches"][0]["launches"] == {}


def test_our_layers_in_vllms_model(start, checkpoints):
    batches = [{"requests": [TEXT, ONE, TWO]}]
    batches += [{"requests": [UNSEEN], "sabotage": "varlen_attention"}, {"requests": [TEXT]}]
    found = start("keye_kernels", "vllm's, our layers", checkpoints["preview"], batches)
    for request, answer in zip(batches[0]["requests"], found["batches"][0]["answers"], strict=True):
        check(checkpoints["preview"], request, answer)
    assert "KeyeSiglipVisionModel" in found["classes"]
    assert all(" of " in row and "by triton" in row for row in found["report"])
    launches = found["batches"][0]["launches"]
    assert set(launches) == {"varlen_attention", "rms_norm", "silu_mul", "mrope_"}

    [image], [again] = (batch["answers"] for batch in found["batches"][1:])
    _, _, logprobs = expected(checkpoints["preview"], UNSEEN)
    assert abs(image["logprobs"][0] - logprobs[0]) > 100 * LOGPROB_ATOL
    check(checkpoints["preview"], TEXT, again)
