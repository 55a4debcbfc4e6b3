"""The house: which room may import which, how many floors there are, and what `import sgformer` may cost.

A room is a folder under `src/sgformer/`, or a module directly in it; imports inside functions count.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sgformer

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "sgformer"

# From the top down; a room imports what is below it, rooms of one floor do not import each other.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"app", "bench"},
    {"tasks"},
    {"training"},
    {"explaining", "exporting", "sequence"},
    {"backends"},
    {"models"},
    {"heads", "data", "viz"},
    {"results"},
    {"ops", "core"},
    {"_version"},
)
# What is narrower than that.
ONLY = {
    "heads": {"core"},  # heads see channels and strides, never a backbone
    "ops": set(),
    "core": set(),
    "models": {"ops", "core"},
    "results": {"core"},
    "sequence": {"ops", "models"},
    "viz": {"core", "results"},
    "data": {"core"},
}
# Without torch, at their heads and in their functions.
LIGHT = (
    *("core/errors.py", "core/files.py", "core/names.py", "core/parse.py", "core/plugins.py", "results.py"),
    *("models/config.py", "models/metadata.py"),
)


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


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
ROOMS = sorted({room(path) for path in FILES})


@cache
def arrows() -> dict[tuple[str, str], str]:
    """(room, room that it imports) -> a file that does."""
    found = {}
    for path in FILES:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "sgformer" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room(path):
                found.setdefault((room(path), parts[1]), str(path.relative_to(SOURCE)))
    return found


def floors() -> int:
    """The longest chain of rooms, each importing the next; fails on a circle."""
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...]) -> int:
        assert name not in above, f"rooms import each other in a circle: {' -> '.join([*above, name])}"
        if name not in heights:
            below = [b for a, b in arrows() if a == name]
            heights[name] = 1 + max((height(b, (*above, name)) for b in below), default=0)
        return heights[name]

    return max(height(name, ()) for name in ROOMS)


def test_every_room_has_its_floor():
    assert sorted(set().union(*FLOORS)) == ROOMS and set(ONLY) <= set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_downwards_only(name):
    level = next(i for i, floor in enumerate(FLOORS) if name in floor)
    allowed = ONLY.get(name, set().union(*FLOORS[level + 1 :]))
    for (here, there), file in arrows().items():
        assert here != name or there in allowed, f"{file} imports {there}"


def test_the_house_stays_small(record_property):
    """No circle, and the counts that docs/tour.md gives."""
    local = [
        node
        for path in FILES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sgformer")
    ]
    counts = {"rooms": len(ROOMS), "floors": floors(), "arrows": len(arrows()), "imports inside functions": len(local)}
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    assert counts["floors"] <= 10
    assert counts["rooms"] <= 20 and counts["arrows"] <= 90


def test_only_tasks_import_heads():
    assert {here for here, there in arrows() if there == "heads"} <= {"tasks"}


def test_nothing_below_the_tasks_names_one():
    """No string that is a task's name where it would decide anything."""
    from sgformer.tasks.registry import TASKS

    entries = {"keypoints"}  # of COCO's files and of results, too: these decide nothing unless it is about tasks
    below = set().union(*FLOORS[FLOORS.index({"tasks"}) + 1 :])
    for path in (path for path in FILES if room(path) in below):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Dict | ast.Set):
                named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                of_tasks = isinstance(node, ast.Compare) and "task" in ast.unparse(node)
                known = set(TASKS) - (set() if of_tasks else entries)
                assert not named & known, f"{path.relative_to(SOURCE)}:{node.lineno} decides by a task's name"


def test_ops_know_torch_only():
    for path in (SOURCE / "ops").glob("*.py"):
        foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"torch", "sgformer"}
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize("file", LIGHT)
def test_what_is_used_without_torch_does_not_name_it(file):
    assert not {n.split(".")[0] for n in imports(SOURCE / file)} & {"torch", "torchvision", "timm"}


@pytest.mark.slow
def test_importing_the_models_needs_no_extra():
    optional = [
        *("lightning", "torchmetrics", "matplotlib", "rich", "skimage", "sklearn", "pycocotools"),
        *("onnxruntime", "openvino", "transformers"),
    ]
    code = "import sgformer, sys; sgformer.SGFormer, sgformer.optimize, sgformer.predict, sgformer.load_model\n"
    code += f"print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_tests_run_on_this_checkout():
    assert Path(sgformer.__file__).parent == SOURCE
