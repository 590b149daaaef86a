"""The direction of imports: kernels know no model; the model's two wings do not know each other."""

import ast
from pathlib import Path

import keye_kernels

ROOT = Path(__file__).parent.parent
# The doors see both wings.
FACADE = {"__init__", "__main__", "keye", "demo", "demo_checkpoint"}
FACADE |= {"cli", "commands", "chat", "attachments", "options", "terminal"}
LEAVES = {"keye_model.config", "keye_model.hub", "keye_model.inputs"}  # seen by both


def imports(path):
    """(module, name or None) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_kernels_import_no_model():
    for path in (ROOT / "keye_kernels").rglob("*.py"):
        for module, _ in imports(path):
            assert not module.startswith("keye_model"), path


def test_the_model_uses_public_kernel_names():
    for path in (ROOT / "keye_model").rglob("*.py"):
        for module, name in imports(path):
            if module.startswith("keye_kernels.integrations"):
                assert "integrations" in path.parts, path
            elif module.startswith("keye_kernels"):
                assert module == "keye_kernels", path
                assert name is None or name in keye_kernels.__all__, (path, name)


def test_processing_knows_no_model():
    for path in (ROOT / "keye_model" / "processing").glob("*.py"):
        for module, _ in imports(path):
            inside = module.startswith("keye_model.processing") or module in LEAVES
            assert inside or not module.startswith(("keye_model", "keye_kernels")), (path, module)


def test_the_model_knows_no_processing():
    for path in (ROOT / "keye_model").glob("*.py"):
        if path.stem not in FACADE:
            for module, _ in imports(path):
                assert not module.startswith("keye_model.processing"), (path, module)
