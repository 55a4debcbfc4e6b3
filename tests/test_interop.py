"""Every snippet of docs/interop.md runs against the real library; without the library it is skipped."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "interop.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def libraries(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def told_apart(code):
    """The libraries beside those of every snippet."""
    return "-".join(sorted(set(libraries(code)) - {"sgformer", "torch", "json", "PIL"}))


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS, ids=told_apart)
def test_snippet_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in libraries(code):
        pytest.importorskip(library)
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})


def test_the_page_has_them_all():
    found = {library for code in SNIPPETS for library in libraries(code)}
    assert found >= {
        "timm",
        "segmentation_models_pytorch",
        "torchvision",
        "transformers",
        "huggingface_hub",
        "lightning",
    }
    assert found >= {"captum", "pycocotools"}


def test_the_runner_for_a_fresh_environment_runs_them_all_and_tells_failures(tmp_path):
    """`make interop` must not pass because it found nothing to run."""
    runner = PAGE.with_name("snippets.py")
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## One\n\n```python\n1 + 1\n```\n\n## Two\n\n```python\n1 / 0\n```\n")
    done = subprocess.run([sys.executable, runner, page], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[:2] == ["ok      One", "failed  Two"]
    assert "ZeroDivisionError" in done.stderr and "1 of 2 snippets" in done.stdout
    page.write_text("# Page\n")
    assert subprocess.run([sys.executable, runner, page], capture_output=True).returncode == 1
