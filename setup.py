"""Builds the CUDA extension of `csrc` if nvcc is found; nearly all else is in pyproject.toml.

KEYE_CUDA=1: fail if it cannot be built. KEYE_CUDA=0: do not build it. Unset: build it if possible,
else write the reason to keye_kernels/_not_built.txt for `keye info`.

The build needs no torch and no headers of torch, so a wheel fits every torch.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
BUILD = ROOT / "build" / "csrc"  # kept between builds, so that only changes are compiled
ARCHITECTURES = ("80", "90a", "100a", "120")
FLAGS = "-O3 -std=c++17 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
# Warnings and spilled registers are errors.
FLAGS += " -Werror=all-warnings -Xptxas=-warn-spills,-Werror"


class CannotBuild(Exception):
    """Why there is no extension."""


def check_setuptools() -> None:
    """Require the setuptools of pyproject.toml, which pip checks in an isolated build only."""
    needed = re.search(r'"setuptools>=(\d+)', PROJECT)[1]
    if int(setuptools.__version__.split(".")[0]) < int(needed):
        raise SystemExit(
            f"setuptools must be {needed} or newer to build keye-kernels, got "
            f"{setuptools.__version__}: python -m pip install 'setuptools>={needed}' ninja pybind11"
        )


def page() -> str:
    """The README with absolute links, since a package index shows it without the other files."""
    source = re.search(r'^Source = "(.+)"', PROJECT, re.MULTILINE)[1]

    def link(match: re.Match) -> str:
        path, place = match.groups()
        return f"]({source}/blob/main/{path}{place})" if (ROOT / path).exists() else match[0]

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(([\w./-]+)((?:#[\w-]+)?)\)", link, text)


def find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            nvcc = Path(os.environ[variable], "bin", "nvcc")
            if nvcc.is_file():
                return str(nvcc)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise CannotBuild("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    return nvcc


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        bundled = Path(ninja.BIN_DIR, "ninja")
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja is not installed (pip install ninja)")
    return found


def find_includes() -> list[Path]:
    """Header folders of Python and of pybind11, or of the copy that torch brings."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise CannotBuild(f"the headers of Python are not in {python} (python3-dev has them)")
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / folder
            if (include / "pybind11" / "pybind11.h").is_file():
                return [python, include]
    raise CannotBuild("pybind11 is not installed (pip install pybind11)")


def architectures(nvcc: str) -> list[str]:
    """The ARCHITECTURES that this nvcc supports: 100a and 120 came with CUDA 12.8."""
    try:
        asked = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{nvcc} cannot be run: {error.strerror}") from None
    if asked.returncode:
        raise CannotBuild(f"{nvcc} --list-gpu-code fails: {first_error(asked.stderr)}")
    known = asked.stdout.split()
    return [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]


def first_error(output: str) -> str:
    """The first line with an error, without the commands' own lines, which contain `-Werror`."""
    lines = [line for line in output.splitlines() if " -Werror" not in line]
    found = (line for line in lines if re.search("error|fatal|no such file|not found", line, re.I))
    return next(found, "see the output of the build")


def write_ninja(target: Path) -> None:
    nvcc, (python, pybind11) = find_nvcc(), find_includes()
    names = architectures(nvcc)
    if not names:
        raise CannotBuild(f"{nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}")
    gencode = " ".join(f"-gencode=arch=compute_{name},code=sm_{name}" for name in names)
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc" / "bindings.cpp"]
    up = os.path.relpath(ROOT, BUILD)  # the checkout's own path may have spaces
    nvcc, python, pybind11 = (shlex.quote(str(path)) for path in (nvcc, python, pybind11))
    lines = [
        f"nvcc = {nvcc}",
        f"flags = {FLAGS} -I{up}/csrc/include",
        f"host = -isystem {python} -isystem {pybind11} "
        f"-DKEYE_ARCHITECTURES='\"{' '.join(names)}\"'",
        "rule device",
        f"  command = $nvcc $flags {gencode} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule host",
        "  command = $nvcc $flags $host -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart=static $in -o $out",
    ]
    for source in sources:
        rule = "device" if source.suffix == ".cu" else "host"
        lines.append(f"build {source.stem}.o: {rule} {up}/csrc/{source.name}")
    objects = " ".join(f"{source.stem}.o" for source in sources)
    lines.append(f"build {target.name}: link {objects}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")


def compile_extension(target: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"it is built on Linux only, not on {sys.platform}")
    import fcntl

    ninja = find_ninja()
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build at the same time finds it all done
        write_ninja(target)
        done = subprocess.run(
            [ninja, "-C", str(BUILD)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise CannotBuild(f"nvcc failed: {first_error(done.stdout)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replaced in one step by a new file, so that a process keeps the old one it has loaded.
    fresh = target.with_suffix(f".{os.getpid()}")
    shutil.copy2(BUILD / target.name, fresh)
    fresh.replace(target)


class BuildExtension(build_ext):
    """Builds with nvcc, or writes the reason why not to a file that the package reads."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("keye_kernels._C"))
        reason_file = target.with_name("_not_built.txt")
        wanted = os.environ.get("KEYE_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"KEYE_CUDA must be 0, 1 or unset, got {wanted!r}")
        try:
            if wanted == "0":
                raise CannotBuild("KEYE_CUDA=0 was set at the build")
            compile_extension(target)
            reason_file.unlink(missing_ok=True)
        except CannotBuild as reason:
            if wanted == "1":
                raise SystemExit(f"KEYE_CUDA=1: {reason}") from None
            print(f"the CUDA extension is not built: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)  # it may be of older sources
            reason_file.parent.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(f"{reason}\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


check_setuptools()
setup(
    long_description=page(),
    long_description_content_type="text/markdown",
    # BuildExtension finds the sources; MANIFEST.in puts them into the sdist.
    ext_modules=[Extension("keye_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
