"""Tiny checkpoints of both lines, made once for the whole run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from keye_model.checkpoint.config import PREVIEW, V1_5
from keye_model.demo_checkpoint import build
from keye_model.engine import calls, cuda_graph
from tests.model.tape import Recorder

# A slow machine is no failure, and the same examples on every run are no surprise.
settings.register_profile(
    "keye",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("keye")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directory of a tiny fp32 checkpoint by name of its line."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {v.name: build(folder / v.name, v, dtype=torch.float32) for v in (PREVIEW, V1_5)}


@pytest.fixture(scope="session")
def preview_checkpoint(checkpoints):
    return checkpoints[PREVIEW.name]


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A small picture and a small video on disk."""
    from keye_model.demo import draw_picture, draw_video

    folder = tmp_path_factory.mktemp("media")
    return {
        "picture": draw_picture(folder / "picture.png"),
        "video": draw_video(folder / "video.mp4"),
    }


@pytest.fixture
def recorder(monkeypatch):
    """Steps are captured: on tapes where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(calls, "why_no_graphs", lambda _: "")
        monkeypatch.setattr(cuda_graph, "CudaRecorder", Recorder)
    elif why := cuda_graph.why_no_graphs(torch.device("cuda")):
        pytest.skip(f"steps cannot be captured: {why}")
    Recorder.captures = 0
    return Recorder
