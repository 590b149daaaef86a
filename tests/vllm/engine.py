"""One vLLM engine in a process of its own: `python -m tests.vllm.engine <case.json> <out.json>`.

Reads what to run, generates greedily, and writes tokens, log-probabilities, launches of our ops and
the report of replaced layers. In this process, so that it can count and sabotage kernels.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Deterministic noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def clip(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """[frames, height, width, 3] uint8, noise that changes a little from frame to frame."""
    return np.stack([np.roll(picture(seed, width, height), 7 * i, axis=1) for i in range(frames)])


def run(case: dict) -> dict:
    """Start the engine that `case` describes and run its requests, each batch in one call."""
    import vllm

    from keye_kernels import _backends

    launches = _count_launches(_backends._registry)
    if case["model"] == "vllm's":
        _vllms_own_model()
    if case.get("foreign attention"):
        _foreign_attention()
    llm = vllm.LLM(
        case["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=64 << 20,
        limit_mm_per_prompt={"image": 2, "video": 2},
        enable_prefix_caching=False,
        tensor_parallel_size=case.get("processes", 1),
    )
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=case["max_tokens"], logprobs=1, ignore_eos=True
    )
    results = {"batches": []}
    for batch in case["batches"]:
        if op := batch.get("sabotage"):
            _sabotage(_backends, op)
        launches.clear()
        outputs = llm.generate([_prompt(request) for request in batch["requests"]], greedy)
        results["batches"].append(
            {"launches": dict(launches), "answers": [_answer(output) for output in outputs]}
        )
    if "processes" in case:  # the models are elsewhere
        return results
    from keye_kernels.integrations.vllm import report

    [rows] = llm.apply_model(report)
    results["report"] = [str(row) for row in rows]
    [results["classes"]] = llm.apply_model(
        lambda m: sorted({type(x).__name__ for x in m.modules()})
    )
    return results


def _prompt(request: dict) -> dict:
    data = {}
    if "images" in request:
        data["image"] = [picture(*image) for image in request["images"]]
    if "videos" in request:
        films = [clip(*video) for video in request["videos"]]
        if "metadata" in request:
            films = list(zip(films, request["metadata"], strict=True))
        data["video"] = films
    return {
        "prompt": request["prompt"],
        "multi_modal_data": data,
        "mm_processor_kwargs": request.get("options", {}),
    }


def _answer(output) -> dict:
    [answer] = output.outputs
    chosen = zip(answer.logprobs, answer.token_ids, strict=True)
    return {
        "prompt_ids": list(output.prompt_token_ids),
        "ids": list(answer.token_ids),
        "logprobs": [step[token].logprob for step, token in chosen],
    }


def _count_launches(registry: dict) -> Counter:
    """Count the calls of every kernel that is registered for Triton."""
    import dataclasses

    launches: Counter = Counter()
    for op, implementations in registry.items():
        if (triton := implementations.get("triton")) is None:
            continue

        def run(*args, op=op, kernel=triton.run):
            launches[op] += 1
            kernel(*args)

        implementations["triton"] = dataclasses.replace(triton, run=run)
    return launches


def _sabotage(backends, op: str) -> None:
    """Leave the op's outputs as an honest kernel would, but for a factor of two."""
    kernel = backends._registry[op]["triton"].run

    def run(*args):
        kernel(*args)
        for out in (a for a, written in zip(args, _mutated(op), strict=True) if written):
            if out is not None:
                out.mul_(2)

    backends.register(op, "triton", run)


def _mutated(op: str) -> list[bool]:
    import torch

    arguments = getattr(torch.ops.keye, op).default._schema.arguments
    return [bool(a.alias_info and a.alias_info.is_write) for a in arguments]


def _vllms_own_model() -> None:
    """Let vLLM's own Keye model read our checkpoints, with pixels as it expects them."""
    from vllm.model_executor.models.keye import KeyeForConditionalGeneration
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from keye_model.integrations import _vllm_processor as processor
    from keye_model.integrations.vllm import register_checkpoints

    class Normalised(processor.KeyeMultiModalProcessor):
        def _call_hf_processor(self, *args):
            data = super()._call_hf_processor(*args)
            data["pixel_values"] = data["pixel_values"] / 127.5 - 1
            return data

    register_checkpoints()
    MULTIMODAL_REGISTRY.register_processor(
        Normalised,
        info=processor.KeyeProcessingInfo,
        dummy_inputs=processor.KeyeDummyInputsBuilder,
    )(KeyeForConditionalGeneration)


def _foreign_attention() -> None:
    """Another plugin's attention, which is vLLM's own."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import MMEncoderAttention

    @CustomOp.register_oot(name="MMEncoderAttention")
    class Foreign(MMEncoderAttention):
        pass


if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    if os.environ.get("TRITON_INTERPRET") == "1":
        from testing import triton_interpreter

        triton_interpreter.install()
    Path(sys.argv[2]).write_text(json.dumps(run(case)))
