"""The commands of the command line; `keye_model.cli` parses their options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import keye_kernels
from keye_kernels import __main__ as tuning
from keye_model import demo as demonstration
from keye_model.checkpoint.config import KeyeConfig
from keye_model.checkpoint.generation import GenerationDefaults
from keye_model.cli import attachments
from keye_model.cli.chat import Conversation, why_cut, write_answer
from keye_model.cli.terminal import Progress, note, say
from keye_model.conditional_generation import KeyeForConditionalGeneration, resolve_device
from keye_model.engine.cuda_graph import GRAPH_BYTES, why_no_graphs
from keye_model.engine.detokenizer import Detokenizer
from keye_model.engine.memory import Limits, kept_feature_bytes
from keye_model.engine.plan import Costs
from keye_model.engine.plan import plan as count
from keye_model.engine.sampling import sampling_params
from keye_model.inputs.answer import Answer
from keye_model.inputs.options import SamplingOptions
from keye_model.keye import Keye, check_backend
from keye_model.processing.processor import KeyeProcessor
from keye_model.processing.source_cache import MAX_BYTES


def generate(arguments: argparse.Namespace) -> int:
    """Answer one question."""
    processor, options = _checked(arguments)
    with Progress() as progress:
        started = time.perf_counter()
        request = attachments.prepare(
            processor,
            _messages(arguments, processor),
            arguments.max_new_tokens,
            thinking=arguments.thinking,
            progress=progress,
        )
        processing = time.perf_counter() - started
    keye = _load(arguments, processor)
    with Progress() as progress:
        stream = keye.stream(request, progress=progress, **options)
        if arguments.json:
            for _ in stream:
                progress.close()
        else:
            write_answer(stream, progress, [])
    if arguments.json:
        say(json.dumps(dataclasses.asdict(_with_processing(stream.answer, processing))))
    elif cut := why_cut(stream.answer, processor):
        note(cut)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk until the input ends."""
    processor, options = _checked(arguments)
    conversation = Conversation(processor, arguments)
    for kind in ("image", "video"):
        for source in getattr(arguments, kind):
            conversation.attach(kind, source, arguments)
    keye = _load(arguments, processor)
    return conversation.run(keye.chat(arguments.system or None, **options))


def demo(arguments: argparse.Namespace) -> int:
    """Show the stack at work."""
    demonstration.run(arguments.model, max_new_tokens=arguments.max_new_tokens)
    return 0


def tune(arguments: argparse.Namespace) -> int:
    """Prove and time the kernels, or show or clear what was found."""
    return tuning.run(arguments)


def info(arguments: argparse.Namespace) -> int:
    """Print versions, the backend of each op, and a checkpoint's facts."""
    cuda = torch.cuda.is_available()
    say(f"keye-kernels  {keye_kernels.__version__}")
    say(f"python        {platform.python_version()}")
    for package in ("torch", "triton", "av", "tokenizers"):
        say(f"{package:13} {_version(package)}")
    say(f"device        {torch.cuda.get_device_name() if cuda else 'CPU'}")
    say(f"csrc          {keye_kernels.describe_extension()}")
    say(demonstration.describe_backends())
    why_not = why_no_graphs(torch.device("cuda" if cuda else "cpu"))
    say(f"cuda graphs   {f'no: {why_not}' if why_not else 'yes'}")
    if arguments.model:
        config = KeyeConfig.from_pretrained(arguments.model)
        weight_bytes = Costs.of(config).weight_bytes
        say(f"model         {config.variant.name}")
        say(f"parameters    {weight_bytes // config.dtype.itemsize:,}")
        say(f"dtype         {str(config.dtype).removeprefix('torch.')}")
        say(f"context       {config.text_config.max_position_embeddings:,} tokens")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Print what a request will cost."""
    processor, batch = _processor(arguments), arguments.batch
    config, new_tokens = processor.config, arguments.max_new_tokens
    with Progress() as progress:
        request = attachments.prepare(
            processor,
            _messages(arguments, processor),
            new_tokens,
            strict=False,
            shapes_only=True,
            progress=progress,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = count(config, [request] * batch, new_tokens)
    seconds = counts.floor_seconds(arguments.matmul * 1e12, arguments.copy * 1e12)
    context = config.text_config.max_position_embeddings
    # Only decoding tells which frames of a video are slow and which are fast.
    at_most = "at most " * bool(config.variant.timestamped_frames and counts.video_tokens)
    tokens = f"{at_most}{counts.prompt_tokens[0]:,} tokens each"
    if counts.prompt_tokens[0] >= context:
        tokens += ", TOO LONG"
    say(f"prompt        {batch} x {tokens}, context {context:,}")
    say(
        f"vision        {counts.image_tokens:,} image tokens, {at_most}{counts.video_tokens:,} "
        f"video tokens, {counts.patches:,} patches, longest segment {counts.longest_segment:,}"
    )
    say(f"weights       {counts.weight_bytes / 1e9:.2f} GB")
    say(
        f"cache         {counts.cache_bytes / 1e9:.3f} GB with {new_tokens} new tokens each; kept "
        f"to be found again: pages of {counts.kept_cache_bytes / 1e9:.3f} GB with these, features "
        f"of {kept_feature_bytes(Limits(), device) / 1e9:.3f} GB, patches of sources of "
        f"{MAX_BYTES / 1e9:.3f} GB at most"
    )
    if device == "cuda":
        say(f"graphs        {GRAPH_BYTES / 1e9:.3f} GB at most")
    say(f"activations   {counts.activation_bytes / 1e9:.3f} GB at most")
    say(f"pixels        {counts.pixel_bytes / 1e9:.3f} GB")
    say(
        f"arithmetic    vision {counts.vision_flops / 1e12:.3f} TFLOP, prefill "
        f"{counts.prefill_flops / 1e12:.3f} TFLOP, last decode step "
        f"{counts.decode_step_bytes / 1e9:.3f} GB"
    )
    say(
        f"least time    vision {1e3 * seconds['vision']:.2f} ms, prefill "
        f"{1e3 * seconds['prefill']:.2f} ms, decode step {1e3 * seconds['decode_step']:.2f} ms"
    )
    say(
        f"              at {arguments.matmul:g} TFLOP/s and {arguments.copy:g} TB/s: a floor by "
        "arithmetic, not a measurement"
    )
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[KeyeProcessor, dict[str, Any]]:
    """Load the processor and check the options of an answer, before weights are read."""
    options = SamplingOptions(
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(SamplingOptions)
        }
    )
    check_backend(arguments.backend, resolve_device("device", arguments.device))
    processor = _processor(arguments)
    sampling_params(options, GenerationDefaults.from_pretrained(arguments.model), 1)
    Detokenizer(processor.tokenizer, options.stop_strings)
    return processor, dataclasses.asdict(options)


def _processor(arguments: argparse.Namespace) -> KeyeProcessor:
    return KeyeProcessor.from_pretrained(
        arguments.model, min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels
    )


def _load(arguments: argparse.Namespace, processor: KeyeProcessor) -> Keye:
    model = KeyeForConditionalGeneration.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        device_map=resolve_device("device", arguments.device),
    )
    return Keye(model, processor, backend=arguments.backend)


def _messages(arguments: argparse.Namespace, processor: KeyeProcessor) -> list[dict[str, Any]]:
    content = attachments.items(arguments, processor)
    if arguments.text:
        content.append({"type": "text", "text": arguments.text})
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, {"role": "user", "content": content}]


def _with_processing(answer: Answer, seconds: float) -> Answer:
    """Add ``seconds`` to an answer: its request was processed before the model was loaded."""
    t = answer.timings
    t = dataclasses.replace(
        t, processing=t.processing + seconds, first_token=t.first_token + seconds
    )
    return dataclasses.replace(answer, timings=t)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
