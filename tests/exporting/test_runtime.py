"""`pip install ./runtime`: an environment without torch, in which exported files are predicted with."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_export import small

import sgformer
from sgformer.exporting import export as exporting
from sgformer.tasks.registry import TASKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())
MODULES = set(PROJECT["tool"]["setuptools"]["py-modules"])


def source(module: str) -> Path:
    path = ROOT / "src" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str, is_global: bool) -> set[str]:
    """Modules of this package that one imports: when it is imported itself, or in its functions, too."""
    tree = ast.parse(source(module).read_text())
    nodes = list(ast.walk(tree)) if is_global else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sgformer":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {s for s in submodules if source(s).exists()} or {node.module}
    return found


def test_the_list_of_modules_is_what_prediction_imports():
    """All that the files name at their head is there, and nothing is there that nobody names."""
    needed, todo = set(), ["sgformer", "sgformer.__main__", "sgformer.exporting.onnx_predict", "sgformer.cli.predict"]
    todo += ["sgformer.tasks.api", "sgformer.data.image"]
    todo += [f"sgformer.tasks.{name}{part}" for name in TASKS for part in ("", ".predict_onnx", ".show")]
    while todo:
        module = todo.pop()
        needed.add(module)
        # Pictures are drawn, and what weights need is imported, only when it comes to that.
        now = imported(module, is_global=module.endswith(".show"))
        todo += [m for m in now if m not in needed]
    assert {m for m in needed if source(m).name != "__init__.py"} | {"sgformer._version"} == MODULES


def test_bounds_are_those_of_the_whole_package():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*whole["dependencies"], *(line for extra in whole["optional-dependencies"].values() for line in extra)}
    mine = PROJECT["project"]
    for line in (*mine["dependencies"], *mine["optional-dependencies"]["pictures"]):
        assert line in known


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements need, as they are installed here."""
    from packaging.requirements import Requirement

    found, todo = set(), [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
        if name not in found or requirement.extras:
            found.add(name)
            todo += [(Requirement(line), each) for line in lines for each in requirement.extras or {""}]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel, and of all else only what the wheel says that it needs."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("runtime")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*pip, "-w", folder, ROOT / "runtime"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("sgformer_runtime-*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    for name in closure(PROJECT["project"]["dependencies"]):
        for top in {Path(str(file)).parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            there = Path(str(distribution(name).locate_file(top)))
            if there.exists() and not (site / top).exists():
                (site / top).symlink_to(there)
    return folder / "env" / "bin" / "python"


def run(python, *words, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run([python, *words], cwd=cwd, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links")
def test_prediction_without_torch_in_an_environment_of_its_own(python, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECKED", ((1, 64, 96),))
    about = {"task": "classify", "classes": list("abcde"), "image_size": 64, "crop_pct": 0.9}
    sgformer.save_model(small().float(), tmp_path / "c.safetensors", about)
    sgformer.export(tmp_path / "c.safetensors", tmp_path / "c.onnx")
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")

    where = run(python, "-c", "import sgformer; print(sgformer.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(python.parents[1])), where.stderr
    assert run(python, "-c", "import torch", cwd=tmp_path).returncode == 1
    refused = run(python, "-c", "import sgformer; sgformer.create_model", cwd=tmp_path)
    assert "ImportError: sgformer.create_model needs torch and timm, which are not installed" in refused.stderr
    said = run(python, "-c", "import sgformer; print(sgformer.predict('c.onnx', 'cat.png')[0].labels)", cwd=tmp_path)
    assert said.stdout.startswith("(('"), said.stderr
    done = run(python, "-m", "sgformer", "predict", "c.onnx", "cat.png", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (mine,), (theirs,) = json.loads(done.stdout), sgformer.predict(tmp_path / "c.safetensors", tmp_path / "cat.png")
    for label, (name, share) in zip(mine["labels"], theirs.labels, strict=True):
        assert label["class"] == name and abs(label["probability"] - share) < 1e-4

    overview = run(python, "-m", "sgformer", "--help", cwd=tmp_path).stdout
    assert re.findall(r"^  (\w+) ", overview, re.M) == ["predict"]
    for words in (["train", "classify"], ["predict", "c.safetensors", "cat.png"], ["predict", "c.onnx", "none.png"]):
        refused = run(python, "-m", "sgformer", *words, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert ("sgformer-runtime" in refused.stderr) == ("none.png" not in words)
