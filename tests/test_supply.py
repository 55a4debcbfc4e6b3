"""What is installed by name: this package's own name, which is not registered, never; others in the versions tested."""

import re
import subprocess
from pathlib import Path

import pytest

from sgformer.core.errors import how_to_install

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", name.strip())[0]).lower()


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {plain(line) for line in lines if "==" in line}


def test_no_text_installs_this_package_by_its_name():
    """Only docs/install.md and `core.errors` say how it is installed; other texts name extras."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    found, endings = [], (".md", ".py", ".toml", ".yaml", ".yml", ".sh", "")
    by_name = re.compile(r"pip install (?:-\S+ (?:\w\S* )?)*['\"]?sgformer\b(?!-)")
    for name in listed.split():
        path = ROOT / name
        if path.suffix in endings and path.is_file() and "corpus" not in name:
            found += [name for _ in by_name.finditer(path.read_text(encoding="utf-8", errors="ignore"))]
    assert found == []
    assert "sgformer" not in how_to_install("app").partition(" in ")[0] and "'.[app]'" in how_to_install("app")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.M)) == set(extras) - {"docs", "fuzz"}


def test_every_dependency_has_its_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    assert {plain(line) for line in lines} - {"sgformer"} <= pinned()


@pytest.mark.parametrize("file", ["Makefile", ".ci/run"])
def test_what_is_installed_by_name_is_pinned(file):
    text = (ROOT / file).read_text()
    for variable in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert re.search(rf"^export\b.*\b{variable}\b ?:?= ?constraints\.txt", text, re.M)
    commands = re.findall(r"^.*\bpip install\b.*$", text, re.M)
    assert commands
    for command in commands:
        words = command.partition("pip install")[2].split()
        options = {"--python", "--resolution", "--build-constraints"}
        names = [word for before, word in zip(["", *words], words, strict=False) if before not in options]
        names = [word for word in names if not word.startswith(("-", ".", "'."))]
        assert {plain(name) for name in names} <= pinned(), command
        unpinned = [word for word in command.split() if word.startswith("PIP_CONSTRAINT=")]
        assert not unpinned or ".venv-newest" in command  # which is there to try what is newer
