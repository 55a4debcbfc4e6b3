"""What README.md promises: its Python runs, its commands and links exist."""

import inspect
import re
from pathlib import Path

import pytest

from sgformer.backends.optimize import optimize
from sgformer.cli import COMMANDS
from sgformer.tasks.classify.config import ClassifyConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page):
    known = {tuple(name.split()) for name in COMMANDS}
    for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page.read_text(), re.S):
        for line in re.findall(r"^(?:\$ )?sgformer ([a-z].*)$", block, re.M):
            words = tuple(line.split()[:2])
            assert words in known or words[:1] in known, f"{page.name}: sgformer {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page.read_text(), re.S):
        for target in re.findall(r"^make ([a-z-]+)", block, re.M):
            assert target in targets, f"{page.name}: make {target}"


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        if "photos" not in block:  # those need data; tests/training does the same with a small folder
            exec(compile(block, "README.md", "exec"), {})


def test_the_options_that_security_names_exist():
    """An option that is not there would be a promise that nobody can keep."""
    text = (ROOT / "SECURITY.md").read_text()
    options = set(re.findall(r"^sgformer .* (--[a-z-]+)", (ROOT / "tests" / "api.txt").read_text(), re.M))
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert found and found <= options | {"--plugin"}, found - options
    assert ClassifyConfig(native="off").native == "off" and "native" in inspect.signature(optimize).parameters
