"""The README's code runs as it stands, with a tiny checkpoint in the place of the Hub's."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from keye_model.checkpoint.config import PREVIEW
from keye_model.demo import draw_video
from keye_model.demo_checkpoint import build

ROOT = Path(__file__).parent.parent


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with a photo and a clip, and a Hub that serves a tiny checkpoint."""
    checkpoint = build(tmp_path / "checkpoint", PREVIEW)
    monkeypatch.setattr(
        "keye_model.checkpoint.hub.snapshot_download", lambda *_, **__: str(checkpoint)
    )
    Image.new("RGB", (168, 112), (20, 90, 160)).save(tmp_path / "photo.jpg")
    shutil.move(draw_video(tmp_path / "drawn.mp4"), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)


def tiny_qwen3():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))


@pytest.mark.usefixtures("desk")
def test_readme_python(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {"their_model": tiny_qwen3()}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (228, 16, 72)
    assert len(names["answers"]) == 2
    assert capsys.readouterr().out.strip()


def test_readme_names_every_op():
    import keye_kernels

    text = (ROOT / "README.md").read_text()
    ops = keye_kernels.backends()
    assert [op for op in ops if f"`{op}`" not in text] == []


def test_readme_names_every_make_target():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile
