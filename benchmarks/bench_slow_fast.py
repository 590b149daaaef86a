"""Slow or fast: milliseconds for each 720p frame, from its RGB bytes to the decision.

Counts the reduction to 256 tokens, the HSV conversion and the comparison with the last slow frame;
decoding is not counted.
"""

import pytest
import torch

from keye_model.processing.slow_fast import classify_frames

NUM_FRAMES = 32


def still(noise: torch.Tensor) -> list[torch.Tensor]:
    """One slow frame, the others fast."""
    return [noise[0]] * NUM_FRAMES


def cuts(noise: torch.Tensor) -> list[torch.Tensor]:
    """Every frame slow: a picture is unlike a black frame."""
    return [noise[0], torch.zeros_like(noise[0])] * (NUM_FRAMES // 2)


@pytest.mark.parametrize(("scene", "fast"), [(still, NUM_FRAMES - 1), (cuts, 0)])
def test_classify_720p(benchmark, scene, fast):
    blocks = torch.randint(0, 256, (1, 3, 9, 16), dtype=torch.uint8)
    noise = torch.nn.functional.interpolate(blocks, (720, 1280))
    frames = scene(noise.to(memory_format=torch.channels_last))  # as a decoder delivers them
    kinds = benchmark.pedantic(classify_frames, (frames,), rounds=20, warmup_rounds=1)
    assert kinds.count(True) == fast
    if benchmark.stats:
        seconds = benchmark.stats.stats.median / NUM_FRAMES
        benchmark.extra_info["ms_per_frame"] = round(1e3 * seconds, 2)
        print(f"\n{scene.__name__}: {1e3 * seconds:.2f} ms per 720p frame")
