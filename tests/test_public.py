"""Public names: there when asked for, cheap until then, and in no module's way."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sgformer

SOURCE = Path(sgformer.__file__).parent
OPTIONAL = {  # packages of the extras, whose lack is no fault of a module
    *("lightning", "torchmetrics", "matplotlib", "rich", "fsspec", "skimage", "sklearn", "pycocotools", "onnx"),
    *("onnxruntime", "openvino", "nicegui", "webdataset", "triton"),
}


def test_every_public_name_has_a_home_and_is_known_to_type_checkers():
    assert sgformer.VARIANTS["sgformer_n"].num_classes == 1000  # not in __all__, but in docs/interop.md
    eager = {"SGFormerConfig", "StageConfig", "UserError", "__version__"}
    assert set(sgformer.__all__) == set(sgformer._HOMES) | eager
    assert set(sgformer.__all__) <= set(dir(sgformer))
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    assert {alias.name: line.module for line in block.body for alias in line.names} == sgformer._HOMES
    with pytest.raises(AttributeError, match="nothing_like_that"):
        sgformer.nothing_like_that  # noqa: B018


def test_no_module_stands_in_the_place_of_a_public_name():
    here = {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py")}
    assert not here & set(sgformer.__all__)


def test_public_functions_stay_callable_after_every_module_was_imported(tmp_path):
    before = {name: getattr(sgformer, name) for name in sgformer.__all__}
    for module in pkgutil.walk_packages(sgformer.__path__, "sgformer."):
        if module.name == "sgformer.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert str(error.name).partition(".")[0] in OPTIONAL, f"{module.name}: {error}"
    for name, thing in before.items():
        assert getattr(sgformer, name) is thing
        assert name == "__version__" or (callable(thing) and not inspect.ismodule(thing)), name

    model = sgformer.create_model("sgformer_n", num_classes=2)
    sgformer.save_model(model, tmp_path / "n.safetensors")
    again = sgformer.load_model(tmp_path / "n.safetensors")
    assert isinstance(again, sgformer.SGFormer) and again.config.num_classes == 2
    assert sgformer.optimize(again, native=False).config == model.config
    missing = tmp_path / "none.safetensors"
    for function in (sgformer.load_model, sgformer.load_released):
        with pytest.raises(sgformer.UserError):
            function(missing)
    for function, more in ((sgformer.predict, "none.png"), (sgformer.evaluate, tmp_path), (sgformer.export, "n.onnx")):
        with pytest.raises(sgformer.UserError):
            function(missing, more)
    with pytest.raises(sgformer.UserError):
        list(sgformer.explain(missing, "none.png"))
    with pytest.raises(sgformer.UserError):
        sgformer.train("classify", epochs=-1)


def test_importing_the_package_imports_neither_torch_nor_timm_nor_numpy():
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        "import sgformer; sgformer.SGFormerConfig, sgformer.StageConfig, sgformer.UserError, dir(sgformer)\n"
        "foreign = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(*sorted({m for m in foreign if not m.startswith('_')} - {'sitecustomize', 'usercustomize'}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sgformer"]


def test_without_torch_a_public_name_says_what_to_install():
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        "for module in ('torch', 'torchvision', 'timm', 'safetensors'):\n"
        "    sys.modules[module] = None\n"
        "import sgformer, sgformer.exporting.onnx_predict\n"
        "for name in sgformer._HOMES:\n"
        "    try:\n"
        "        getattr(sgformer, name)\n"
        "    except ImportError as error:\n"
        "        assert str(error).startswith(f'sgformer.{name} needs torch and timm, which are not'), error\n"
        "        print(name)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    # The first of these serves exported files, the others need no network to add to a table.
    light = {"sgformer.tasks.api", "sgformer.heads.registry", "sgformer.exporting.formats"}
    needing = [name for name, home in sgformer._HOMES.items() if home not in light]
    assert done.stdout.split() == needing, done.stderr
