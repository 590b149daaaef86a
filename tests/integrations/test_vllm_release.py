"""Which releases of vLLM are taken, shown without vLLM: stand-ins have the names we import."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "keye_kernels" / "integrations" / "vllm.py"


@pytest.fixture
def plugin(monkeypatch):
    """keye_kernels/integrations/vllm.py over stand-ins for vLLM."""
    monkeypatch.setitem(sys.modules, "vllm", MagicMock())
    for node in ast.walk(ast.parse(PLUGIN.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm"):
            module = sys.modules.get(node.module) or ModuleType(node.module)
            for alias in node.names:
                layer = alias.name[0].isupper()
                setattr(module, alias.name, type(alias.name, (), {}) if layer else MagicMock())
            monkeypatch.setitem(sys.modules, node.module, module)
    spec = importlib.util.spec_from_file_location("plugin_over_stand_ins", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("release", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cu130", "0.33.1.dev2"])
def test_releases_that_fit(plugin, monkeypatch, release):
    monkeypatch.setattr(plugin.vllm, "__version__", release, raising=False)
    plugin.check_release()


@pytest.mark.parametrize("release", ["0.31.2", "0.34.0", "0.3.3", "0.330.0", "1.32.0", "dev"])
def test_other_releases_are_refused(plugin, monkeypatch, release):
    monkeypatch.setattr(plugin.vllm, "__version__", release, raising=False)
    told = f"vllm must be release 0.32 or 0.33 for .*, got {re.escape(release)}; VLLM_PLUGINS"
    with pytest.raises(RuntimeError, match=told):
        plugin.check_release()
    with pytest.raises(RuntimeError, match=told), plugin.our_layers():
        pass


def test_extra_and_page_name_the_same_releases(plugin):
    [low, high] = re.search(
        r'"vllm>=0\.(\d+),<0\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    assert [f"0.{minor}" for minor in range(int(low), int(high))] == list(plugin.RELEASES)
    page = (ROOT / "docs" / "integrate.md").read_text()
    assert f"**Releases.** vLLM {' and '.join(plugin.RELEASES)}." in page
