"""The sizes are in timm's registry in whatever order and way the two packages are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

# The least that the registry takes for timm: imported in no time, with a list of what was registered.
FAKE = {
    "__init__.py": "import time; from .models import names; time.sleep(0.2); ready = True",
    "data.py": "IMAGENET_DEFAULT_MEAN = IMAGENET_DEFAULT_STD = (0, 0, 0)",
    "layers.py": "",
    "models.py": (
        "names = []\n"
        "generate_default_cfgs = dict\n"
        "register_notrace_module = type\n"
        "def register_model(function):\n"
        "    names.append(function.__name__)\n"
        "    return function\n"
    ),
}
SIZES = ["sgformer_n", "sgformer_t", "sgformer_s", "sgformer_m", "sgformer_b"]


def run(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, SOURCE]))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "timm").mkdir()
    for name, text in FAKE.items():
        (tmp_path / "timm" / name).write_text(text)
    return tmp_path


CODES = [
    "import sgformer, timm",
    "import timm, sgformer",
    "import timm.layers, sgformer",
    "import sgformer; from timm.models import names",
    "import timm.layers; import sgformer.models.registry",
    "import sgformer.models.registry",
    "import sgformer.cli; import timm.layers",
    # Asked for without being imported: nothing happens, and what is found is as it would be otherwise.
    "import sgformer, importlib.util; spec = importlib.util.find_spec('timm'); "
    "assert 'timm' not in sys.modules and spec.origin.endswith('__init__.py'); "
    "assert 'sleep' in spec.loader.get_source('timm'); import timm",
    "import importlib, sgformer; importlib.reload(sgformer); import timm; importlib.reload(timm)",
    "import importlib, sgformer, timm; importlib.reload(sgformer); importlib.reload(timm)",
    "import importlib, sgformer.core.timm_hook as h; importlib.reload(h).install(); import timm",
    # While another thread is in the middle of it.
    "import threading; t = threading.Thread(target=__import__, args=['timm']); t.start(); import time; "
    "time.sleep(0.1); assert not hasattr(sys.modules['timm'], 'ready'); import sgformer; t.join()",
    "import sgformer, threading; wanted = ['timm', 'timm.layers', 'timm.models', 'sgformer', 'sgformer.core'] * 4; "
    "threads = [threading.Thread(target=__import__, args=[name]) for name in wanted]; "
    "[t.start() for t in threads]; [t.join() for t in threads]",
]


@pytest.mark.parametrize("code", [*CODES[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in CODES[2:])])
def test_the_sizes_are_registered_once(code, fake):
    look = f"\nimport timm.models\nassert timm.models.names == {SIZES}, timm.models.names\nassert timm.ready"
    # The hook is gone, and timm looks as if it had never been there.
    look += "\nassert not [f for f in sys.meta_path if 'sgformer' in type(f).__module__ and f.find_spec('timm')]"
    look += "\nassert type(timm.__loader__) is type(timm.__spec__.loader) is type(timm.models.__loader__)"
    done = run("import sys; " + code + look, fake)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_timm_an_import_fails_as_ever(tmp_path):
    code = "import sys, sgformer; sys.path = [sys.argv[0]]; sys.path_importer_cache.clear(); import timm"
    done = run(code)
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'timm'")


def test_an_error_of_the_registry_is_told_each_time(fake):
    (fake / "timm" / "models.py").write_text("names = []")  # not a timm that the registry can do with
    code = (
        "import sys, sgformer\n"
        "for module in ('timm', 'timm.layers', 'timm'):\n"
        "    try:\n"
        "        __import__(module)\n"
        "    except ImportError as error:\n"
        "        print(error.name, 'timm' in sys.modules)\n"
    )
    assert run(code, fake).stdout.splitlines() == ["timm.models False"] * 3


def test_an_error_of_timm_is_told_and_not_held_against_it(fake):
    init = fake / "timm" / "__init__.py"
    init.write_text("1 / 0")
    code = (
        "import sgformer, pathlib\n"
        "try:\n"
        "    import timm\n"
        "except ZeroDivisionError:\n"
        f"    pathlib.Path({str(init)!r}).write_text('from . import models  # mended')\n"
        "import timm\n"
        "print(timm.models.names)"
    )
    assert run(code, fake).stdout.strip() == str(SIZES)


def test_a_part_of_the_package_without_the_registry_leaves_timm_alone(fake, tmp_path):
    code = (
        "import importlib.util as u, sys\n"
        "import sgformer.core.timm_hook as hook\n"
        "hook.REGISTRY = 'sgformer.models.gone'\n"
        "import timm; print(timm.ready, timm.names, hook._finder in sys.meta_path)"
    )
    assert run(code, fake).stdout.strip() == "True [] False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import sgformer, timm; timm.create_model('sgformer_n')",
        "import sgformer; from timm.models import create_model; create_model('sgformer_n')",
        "import sgformer.models.backbone, sgformer.models.layers",
        "import sgformer.models.checkpoint",
        "import sgformer; sgformer.SGFormer",
        "import sgformer.models.create",
    ],
)
def test_with_timm_itself(code):
    look = f"\nimport timm; assert set(timm.list_models('sgformer*')) == {set(SIZES)}, timm.list_models('sgformer*')"
    look += "\ntimm.create_model('sgformer_n', features_only=True, out_indices=(1,))"
    done = run(code + look)
    assert done.returncode == 0 and "sgformer" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_spawned_worker_knows_the_sizes_of_a_network_that_it_unpickles(tmp_path):
    (tmp_path / "work.py").write_text(
        "import multiprocessing, pickle, sys\n"
        "def work(blob):\n"
        "    assert 'timm' not in sys.modules and 'sgformer' not in sys.modules\n"
        "    model = pickle.loads(blob)\n"
        "    assert model.config.num_classes == 7\n"
        "    import timm; return timm.list_models('sgformer*')\n"
        "if __name__ == '__main__':\n"
        "    import sgformer\n"
        "    blob = pickle.dumps(sgformer.create_model('sgformer_n', num_classes=7))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(sorted(pool.apply(work, [blob])))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "work.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert done.stdout.strip() == str(sorted(SIZES)), done.stderr
