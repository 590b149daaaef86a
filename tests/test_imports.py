"""The direction of imports: downwards only, among the top folders and inside `keye_model`."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import keye_kernels

ROOT = Path(__file__).parent.parent
PACKAGES = ("keye_kernels", "keye_model", "testing", "benchmarks")
# What each top folder may import beside itself. Benchmarks and tests share what lies in `testing`;
# only a test of a benchmark imports benchmarks.
TOP = {
    "keye_kernels": set(),
    "keye_model": {"keye_kernels"},
    "testing": {"keye_kernels"},
    "benchmarks": {"keye_kernels", "keye_model", "testing"},
    "tests": {"keye_kernels", "keye_model", "testing"},
    "tests/benchmarks": {"keye_kernels", "keye_model", "testing", "benchmarks", "tests"},
}
# What each folder of keye_model may import beside itself; the doors at its top may import all.
BELOW = {
    "checkpoint": set(),
    "inputs": {"checkpoint"},
    "processing": {"checkpoint", "inputs"},
    "network": {"checkpoint", "inputs"},
    "engine": {"checkpoint", "inputs", "network"},
}


def module_of(path):
    """The dotted name of a file; a package's own name for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


def imports(path):
    """(module, name or None) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(path):
    """Our own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES or node.module in MODULES:
                    yield inner if inner in MODULES else node.module


@pytest.mark.parametrize("folder", TOP)
def test_a_top_folder_imports_only_what_lies_below_it(folder):
    others = {name for name in TOP if name != folder} - TOP[folder]
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "tests" and path.is_relative_to(ROOT / "tests" / "benchmarks"):
            continue
        for module, _ in imports(path):
            assert module.split(".")[0] not in others, (path, module)


def test_the_model_uses_public_kernel_names():
    for path in (ROOT / "keye_model").rglob("*.py"):
        for module, name in imports(path):
            if module.startswith("keye_kernels.integrations"):
                assert "integrations" in path.parts, path
            elif module.startswith("keye_kernels"):
                assert module == "keye_kernels", path
                public = {None, *keye_kernels.__all__}
                if path.parts[-2:] == ("cli", "commands.py"):  # `keye tune`
                    public.add("__main__")
                assert name in public, (path, name)


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_only_what_lies_below_it(folder):
    allowed = BELOW[folder] | {folder}
    for path in (ROOT / "keye_model" / folder).rglob("*.py"):
        for module, name in imports(path):
            package, *rest = module.split(".")
            if package == "keye_model":
                assert (rest[0] if rest else name) in allowed, (path, module)
            elif package == "keye_kernels":
                assert folder in ("network", "engine"), (path, module)


@pytest.mark.parametrize("folder", ["inputs", "network", "engine"])
def test_no_line_is_asked_for_by_name(folder):
    """They ask the config's `Variant`, so that a line more changes nothing there."""
    for path in (ROOT / "keye_model" / folder).rglob("*.py"):
        assert not {name for _, name in imports(path)} & {"PREVIEW", "V1_5"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package):
    graph = {
        name: {found for found in imported_modules(path) if found != package and found != name}
        for name, path in MODULES.items()
        if name.startswith(package) and name != package
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
