"""What users get: the contents of sdist and wheel, the metadata, what a failed build says."""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = [".clang-format", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"]
FILES += ["Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"]
FOLDERS = [".ci", "benchmarks", "csrc", "docs", "examples", "keye_kernels", "keye_model"]
FOLDERS += ["testing", "tests"]
# What builds, tests and benchmarks leave behind.
LEFT_BEHIND = ("__pycache__", "*.so", "_not_built.txt", "results", ".*_cache", "*.egg-info")
GENERATED = {"PKG-INFO", "setup.cfg"}
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(kind, source, target):
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, target],
        cwd=source,
        env=os.environ | {"KEYE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The project without what is not part of it, and the names of its files."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder, files_of(folder)


@pytest.fixture(scope="module")
def unpacked(checkout):
    """The sdist of a checkout that was used before, unpacked."""
    folder, _ = checkout
    for name in (
        "tests/__pycache__/test_packaging.cpython-311.pyc",
        "keye_kernels/_C.cpython-311-x86_64-linux-gnu.so",
        "keye_kernels/_not_built.txt",
        "benchmarks/results/cpu/results.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    target = folder.parent / "unpacked"
    sdist = build("sdist", folder, folder.parent)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, target], check=True)
    [inside] = target.iterdir()
    return inside


@pytest.fixture(scope="module")
def wheel(unpacked):
    with zipfile.ZipFile(build("wheel", unpacked, unpacked.parent)) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return email.message_from_string(wheel.read(name).decode())


def test_sdist_is_the_checkout(checkout, unpacked):
    """So its Makefile has all that it uses, and its tests are those of a checkout."""
    _, expected = checkout
    found = {name for name in files_of(unpacked) if ".egg-info/" not in name}
    assert found == expected | GENERATED


def test_wheel_holds_the_packages_only(checkout, wheel):
    _, tracked = checkout
    packages = {name for name in tracked if name.startswith(("keye_kernels/", "keye_model/"))}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == packages | {"keye_kernels/_not_built.txt"}
    assert {name.rpartition(".")[2] for name in packages} == {"py", "typed"}


def test_metadata(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert metadata["Keywords"]
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert links.keys() >= {"Source", "Documentation", "Changelog", "Issues"}
    assert all(link.startswith("https://") for link in links.values())
    classifiers = metadata.get_all("Classifier")
    assert not [one for one in classifiers if one.startswith("License ::")]  # SPDX says it
    pythons = re.findall(r":: Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE)
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]


def test_each_dependency_is_bounded_by_what_was_tested(metadata):
    """Torch and Triton are not: an engine beside us decides."""
    tested = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    unbounded = set()
    for one in map(Requirement, metadata.get_all("Requires-Dist")):
        if not any(part.operator in ("<", "==") for part in one.specifier):
            unbounded.add(one.name)
        for other in tested:
            if canonicalize_name(other.name) == canonicalize_name(one.name):
                assert Version(str(other.specifier).removeprefix("==")) in one.specifier, one
    assert unbounded == {"torch", "triton"}


def test_links_of_the_package_page(metadata):
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    source = next(x for x in metadata.get_all("Project-URL") if x.startswith("Source, "))[8:]
    links = re.findall(r"\]\(([^#)\s][^)\s]*)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    assert links
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(source):
            path = link.removeprefix(f"{source}/blob/main/").partition("#")[0]
            assert (ROOT / path).exists(), link
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.replace(f"{source}/blob/main/", "").strip() == readme.strip()


def test_links_that_are_made_absolute(setup_py, monkeypatch, tmp_path):
    monkeypatch.setitem(setup_py["page"].__globals__, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a-b.md").touch()
    text = "[a](docs/a-b.md), [b](docs/a-b.md#the-end), [c](https://c.example), [d](#d), x[0](y)"
    (tmp_path / "README.md").write_text(text)
    base = "https://github.com/keye-kernels/keye-kernels/blob/main/docs/a-b.md"
    assert setup_py["page"]() == text.replace("docs/a-b.md", base)


def test_old_setuptools_is_told_what_is_needed(tmp_path):
    """Releases before 77 fail at the license, or call the project UNKNOWN."""
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text(
        '__version__ = "65.5.0"\nExtension = object\n\n'
        'def setup(**_):\n    raise SystemExit("setup was called")\n'
    )
    (tmp_path / "setuptools" / "command" / "build_ext.py").write_text("build_ext = object\n")
    done = subprocess.run(
        [sys.executable, ROOT / "setup.py", "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "setuptools must be 77 or newer to build keye-kernels, got 65.5.0: " in done.stderr
    assert "pip install 'setuptools>=77' ninja pybind11" in done.stderr


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, which builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("complaint", "told"),
    [
        ("gcc: No such file or directory\nnvcc fatal   : Failed to preprocess", "gcc: No such"),
        ('x.cu(7): error: identifier "y" is undefined', 'x.cu(7): error: identifier "y"'),
        ("/usr/bin/ld: cannot find -lm\ncollect2: error: ld returned 1", "collect2: error"),
        ("Killed", "see the output of the build"),
    ],
    ids=["compiler", "source", "linker", "killed"],
)
def test_first_error_is_no_command(setup_py, complaint, told):
    command = "/usr/local/cuda/bin/nvcc -O3 -Werror=all-warnings -c x.cu -o x.o"
    output = f"[1/7] {command}\nFAILED: [code=1] x.o\n{command}\n{complaint}\n"
    assert setup_py["first_error"](output).startswith(told)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("", "cannot be run: Exec format error"),
        ("#!/bin/sh\necho 'nvcc fatal   : Unknown option' >&2; exit 1\n", "Unknown option"),
    ],
    ids=["broken", "old"],
)
def test_nvcc_that_does_not_answer(setup_py, tmp_path, script, told):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    with pytest.raises(setup_py["CannotBuild"], match=told):
        setup_py["architectures"](str(nvcc))


def test_a_missing_tool_is_told_with_how_to_get_it(setup_py, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    for find, tool in (("find_ninja", "ninja"), ("find_includes", "pybind11")):
        with pytest.raises(setup_py["CannotBuild"]) as caught:
            setup_py[find]()
        assert f"{tool} is not installed (pip install {tool})" in str(caught.value) or (
            "python3-dev" in str(caught.value)
        )
