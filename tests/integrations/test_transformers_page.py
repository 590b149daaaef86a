"""The page and the examples say what is so, and run."""

import ast
import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from keye_kernels.integrations import transformers as integration
from keye_kernels.integrations._families import families
from tests.integrations import page
from tests.integrations.tiny import CASES, MAJOR

ROOT = Path(__file__).parents[2]
of_5 = pytest.mark.skipif(MAJOR < 5, reason="written for the installed release")


@of_5
@pytest.mark.skipif(
    "patch_embed" not in CASES.get("paddleocr_vl", CASES["qwen3"]).calls,
    reason="written for the installed release",
)
def test_table_is_what_the_tests_run():
    assert page.written() == page.table(), "run python -m tests.integrations.page"


@of_5
def test_every_family_is_tested():
    assert families(5).keys() == CASES.keys()
    for name, case in CASES.items():
        family = families(5)[name]
        ops = {op for row in family.replacements for op in row.ops}
        ops |= {"varlen_attention"} if family.decoder else set()
        assert ops - {"patch_embed"} == case.calls.keys() - {"patch_embed"}


def test_page_names_the_public_functions():
    text = page.PAGE.read_text(encoding="utf-8")
    for name in ("apply", "report", "revert"):
        assert f"{name}(" in text
        assert hasattr(integration, name)


def test_importing_our_packages_imports_no_transformers():
    for package in ("keye_kernels", "keye_model"):
        for path in (ROOT / package).rglob("*.py"):
            if "integrations" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                else:
                    continue
                for name in names:
                    assert not re.match(r"transformers\b|\w+\.integrations\b", name), path


@of_5
@pytest.mark.parametrize("name", ["transformers_patch", "transformers_auto"])
def test_example(name, capsys, monkeypatch, tmp_path):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    if name == "transformers_patch":
        assert "Qwen3VLVisionAttention        varlen_attention  2 of 2" in printed
