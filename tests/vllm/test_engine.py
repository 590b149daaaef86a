"""Keye in the real vLLM engine on a CPU, against `keye_model`: same tokens, same log-probabilities.

Not shown here, as there is no GPU: CUDA dispatch, CUDA graphs, speed.
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
from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from tests.vllm.engine import clip, picture

ROOT = Path(__file__).parent.parent.parent
CORES = sorted(os.sched_getaffinity(0))
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
TIMED = {"prompt": f"{VIDEO}What?", "videos": [(5, 4, 56, 28)], "options": {"fps": 0.7}}
DECODED = {  # as vLLM's video loader hands it on: every fifth frame at 10 per second
    "prompt": f"{VIDEO}What?",
    "videos": [(6, 4, 56, 56)],
    "metadata": [{"fps": 10.0, "frames_indices": [0, 5, 10, 15]}],
}
SLOW_FAST = {
    "prompt": f"Look: {VIDEO}{IMAGE}Yes{VIDEO}",
    "images": [(7, 56, 56)],
    "videos": [(8, 3, 56, 84), (9, 2, 56, 56)],
    "options": {
        "height": [56, 28], "width": [84, 56], "fast_height": [28, 28], "fast_width": [56, 28],
        "timestamps": [[0.0, 0.5, 1.0], [0.25, 0.75]], "frame_types": [[0, 1, 0], [0, 0]],
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

    def run(plugins: str, checkpoint: Path, batches: list[dict], **case: object) -> dict:
        case |= {"checkpoint": str(checkpoint), "max_tokens": TOKENS, "batches": batches}
        (root / "case.json").write_text(json.dumps(case))
        command = [sys.executable, "-m", "tests.vllm.engine", root / "case.json", root / "out.json"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(root, plugins), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads((root / "out.json").read_text())

    return run


def environment(root: Path, plugins: str) -> dict[str, str]:
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "KEYE_KERNELS_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": plugins,
    }


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
    if "videos" in request:
        films = [torch.from_numpy(clip(*video)) for video in request["videos"]]
        videos = [film.permute(0, 3, 1, 2) for film in films]
        for metadata in request.get("metadata", []):
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
    found = start("keye_model", checkpoints["preview"], batches + sabotaged, model="ours")

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


def test_1_5_with_foreign_attention(start, checkpoints):
    """The attention of another plugin stays, and the tower calls it as it would call ours."""
    requests = [TEXT, ONE, SLOW_FAST]
    batches = [{"requests": [request]} for request in requests]
    case = {"model": "ours", "foreign attention": True}
    found = start("keye_model", checkpoints["1.5"], batches, **case)
    for request, result in zip(requests, found["batches"], strict=True):
        check(checkpoints["1.5"], request, result["answers"][0])
    assert "MMEncoderAttention -> varlen_attention: 0 of 2" in found["report"][0]
    assert "Foreign before" in found["report"][0]
    assert "varlen_attention" not in found["batches"][1]["launches"]
    assert found["batches"][1]["launches"]["rope_2d_"] == 2


@pytest.mark.skipif(len(CORES) < 2, reason="two processes need two cores")
def test_tensor_parallel(start, checkpoints, monkeypatch):
    """Heads and matrices of tower, projector and decoder split between two processes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, CORES[:2])))
    requests = [TEXT, ONE, TWO]
    case = {"model": "ours", "processes": 2}
    found = start("keye_model", checkpoints["preview"], [{"requests": requests}], **case)
    for request, answer in zip(requests, found["batches"][0]["answers"], strict=True):
        check(checkpoints["preview"], request, answer)


def test_vllms_own_model(start, checkpoints):
    """Without plugins: the comparison itself is sound where both models have the same rules."""
    requests = [TEXT, ONE, TWO]
    found = start("", checkpoints["preview"], [{"requests": requests}], model="vllm's")
    for request, answer in zip(requests, found["batches"][0]["answers"], strict=True):
        check(checkpoints["preview"], request, answer)
    assert not [name for name in found["classes"] if name in ("Tower", "KeyeEncoderAttention")]
    assert all(": 0 of " in row and "not asked for" in row for row in found["report"])
    assert found["batches"][0]["launches"] == {}


def test_our_layers_in_vllms_model(start, checkpoints):
    batches = [{"requests": [TEXT, ONE, TWO]}]
    batches += [{"requests": [UNSEEN], "sabotage": "varlen_attention"}, {"requests": [TEXT]}]
    found = start("keye_kernels", checkpoints["preview"], batches, model="vllm's")
    for request, answer in zip(batches[0]["requests"], found["batches"][0]["answers"], strict=True):
        check(checkpoints["preview"], request, answer)
    assert "KeyeSiglipVisionModel" in found["classes"]
    assert all(": 0 of " not in row and "(by triton)" in row for row in found["report"])
    launches = found["batches"][0]["launches"]
    assert set(launches) == {"varlen_attention", "rms_norm", "silu_mul", "mrope_"}

    [image], [again] = (batch["answers"] for batch in found["batches"][1:])
    _, _, logprobs = expected(checkpoints["preview"], UNSEEN)
    assert abs(image["logprobs"][0] - logprobs[0]) > 100 * LOGPROB_ATOL
    check(checkpoints["preview"], TEXT, again)


def test_example(tmp_path, checkpoints):
    """As users have it: plugins found, not named; processes of its own; the decoder compiled."""
    picture(1, 112, 84).save(tmp_path / "photo.png")
    script = ROOT / "examples" / "vllm_chat.py"
    changes = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [sys.executable, script, checkpoints["preview"], tmp_path / "photo.png"],
        env=os.environ | changes,
        capture_output=True,
        text=True,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    assert "MMEncoderAttention -> varlen_attention: 2 of 2 (by reference)" in log
    assert "keye_kernels replaces no layers" in log
    assert len(script.read_text().splitlines()) < 40
