"""Who may import whom (docs/tour.md), and what `import sgformer` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sgformer

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sgformer"

# room -> the rooms of this package it may import
ALLOWED = {
    "errors": set(),
    "config": set(),
    "ops": set(),
    "layers": set(),
    "guidance": {"ops", "config"},
    "intact": {"backbone", "guidance", "layers", "ops"},
    "fused": {"backbone", "guidance", "intact", "layers", "ops"},
    "accelerated": {"backbone", "intact", "layers", "ops"},
    "inference": {"accelerated", "backbone", "exporting", "fused", "intact", "layers", "ops"},
    "backbone": {"ops", "config", "layers", "guidance", "explanations"},  # the last one inside `explain` only
    "checkpoint": {"backbone", "config", "errors", "layers"},
    "timm_models": {"backbone", "checkpoint", "config", "layers"},
    "data": {"errors"},
    "viz": {"errors"},
    "heads": {"errors"},
    "app": {"answers", "api", "data", "errors", "explanations", "plugins", "viz"},
    "plugins": {"errors"},
    "answers": {"data", "errors", "viz"},
    "exported": {"answers", "data", "errors"},  # no torch: it runs where that is not installed
}


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """The room of this package that a dotted name is in, e.g. "sgformer.ops.windows" -> "ops"."""
    parts = name.split(".")
    return None if parts[0] != "sgformer" or len(parts) < 2 else parts[1]


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_import_only_what_they_may(path):
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    there = {r for r in map(room, imports(path)) if r is not None and r != here}
    if here in ALLOWED:
        assert there <= ALLOWED[here], f"{here} imports {there - ALLOWED[here]}"
    if here not in ("cli", "__main__"):
        assert "cli" not in there


def test_ops_know_torch_only():
    for path in (SOURCE / "ops").glob("*.py"):
        foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"torch", "sgformer"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_every_room_named_here_exists():
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in FILES}
    assert set(ALLOWED) <= rooms


@pytest.mark.slow
def test_importing_the_package_needs_no_extra():
    optional = [
        "lightning",
        "torchmetrics",
        "matplotlib",
        "rich",
        "skimage",
        "sklearn",
        "pycocotools",
        "onnxruntime",
        "openvino",
        "transformers",
    ]
    code = f"import sgformer, sys; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_tests_run_on_this_checkout():
    assert Path(sgformer.__file__).parent == SOURCE
