"""The command line: help that fits a screen, one line for every mistake, every command end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from photos import make_photos

from sgformer.cli import COMMANDS, main
from sgformer.core import plugins

pytest.importorskip("lightning")
ROOT = Path(__file__).parents[2]
STANDARD = {
    *("data", "model", "weights", "run", "config", "resume", "epochs", "max-steps", "batch-size", "image-size", "lr"),
    *("seed", "workers", "precision", "device", "drop-path"),
}
QUICK = ["--model", "sgformer_n", "--image-size", "32", "--batch-size", "4", "--epochs", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "classify", "--data", str(photos), "--run", str(folder), *QUICK]) == 0
    return folder


def flags(text):
    return {word.strip(",.;:").removeprefix("--") for word in text.split() if word.startswith("--")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: sgformer {command}")


def test_one_set_of_option_names(capsys):
    main(["train", "classify", "--help"])
    assert flags(capsys.readouterr().out) >= STANDARD
    shared = {"data", "batch-size", "image-size", "workers", "device", "precision", "bad-images", "seed", "out"}
    train = STANDARD | {"devices", "crop-pct", "bad-images", "help-all", "models"}  # bench takes several models
    for command in COMMANDS:
        main([*command.split(), "--help"])
        for flag in flags(capsys.readouterr().out):
            assert "_" not in flag
            close = {
                name
                for name in train | shared
                if name.replace("-", "").rstrip("s") == flag.replace("-", "").rstrip("s")
            }
            assert not close or flag in train | shared, f"{command}: --{flag} is spelled {close} elsewhere"


def test_help_all_explains_every_option(capsys):
    import dataclasses

    from sgformer.tasks.classify.config import ClassifyConfig

    main(["train", "classify", "--help-all"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(ClassifyConfig):
        assert f"--{field.name.replace('_', '-')} " in text


def test_overview_and_version(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sgformer ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean train"),
        (["train", "clasify"], "did you mean train classify"),
        (["train", "classify"], "--data is missing"),
        (["train", "classify", "--bacth-size", "3"], "did you mean --batch-size"),
        (["train", "classify", "--epochs", "many"], "--epochs takes a number or auto, got many"),
        (["train", "classify", "--epochs", "-1"], "--epochs must be above 0"),
        (["train", "classify", "--image-size", "3,4"], "--image-size takes an integer or [HEIGHT,WIDTH]"),
        (["train", "classify", "--precision", "fp8"], "fp32, bf16 or fp16, got fp8"),
        (["train", "classify", "--lr"], "--lr needs a value"),
        (["train", "classify", "stray"], "unexpected argument: stray"),
        (["train", "classify", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", "classify", "--resume", "nowhere"], "nowhere: not a run folder"),
        (["train", "classify", "--resume", "a", "--config", "b"], "leave out --config"),
        (["train", "classify", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "classify", "--data", "PHOTOS", "--model", "sgformr_s"], "did you mean sgformer_s"),
        (["train", "classify", "--data", "PHOTOS", "--opt", "adamwx"], "did you mean adamw"),
        (["train", "classify", "--data", "PHOTOS", "--auto-augment", "randy"], "--auto-augment randy"),
        (["train", "classify", "--data", "PHOTOS", "--device", "gpu"], "--device must be auto, cpu"),
        (["train", "classify", "--data", "PHOTOS", "--weights", "nowhere"], "nowhere: no such file"),
        (["eval"], "WEIGHTS is missing"),
        (["eval", "nowhere", "--data", "PHOTOS"], "nowhere: no such file or run folder"),
        (["eval", "PHOTOS", "--data", "PHOTOS"], "no best.safetensors"),
        (["eval", "PHOTOS/val/ant/0.png", "--data", "PHOTOS"], "weights must be a run folder"),
        (["predict", "nowhere"], "IMAGES is missing"),
        (["convert", "nowhere.pth", "out.safetensors"], "nowhere.pth: no such file"),
        (["convert", "nowhere.pth", "."], ".: cannot be written (is a folder): name another file"),
        (["data", "check", "nowhere"], "nowhere: no such folder"),
        (["data", "scenes", "PHOTOS"], "not an empty folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([a.replace("PHOTOS", str(photos)) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("sgformer: error: ") and words in shown.err
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err and len(shown.err) < 300
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bacth_size: 3", "did you mean batch_size"),
        ("epochs: many", "--epochs takes a number or auto, got many"),
        ("[", "YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(text, words, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", "classify", "--config", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert words in error and "recipe.yaml" in error and error.count("\n") == 1


def test_the_command_line_wins_over_the_recipe(tmp_path):
    from sgformer.cli.parser import Parser, config_options
    from sgformer.cli.train import FILES, read_options
    from sgformer.tasks.classify.config import ClassifyConfig

    (tmp_path / "recipe.yaml").write_text("lr: 2e-5\nepochs: 7\nauto_augment: null\nimage_size: [64, 96]")
    parser = Parser("train classify", "", [*config_options(ClassifyConfig), *FILES])
    arguments = ["--epochs", "9", "--config", str(tmp_path / "recipe.yaml"), "--compile", "--layer-decay", "0.7"]
    config, _ = read_options(parser, arguments, ClassifyConfig)
    assert (config.lr, config.epochs, config.auto_augment, config.image_size) == (2e-5, 9, None, (64, 96))
    assert config.compile is True and config.layer_decay == 0.7


def test_a_precision_of_the_processor(run, photos, tmp_path, capsys):
    """As many images as before, or one line that says what this processor lacks."""
    picture, out = str(photos / "val/bee/0.png"), str(tmp_path / "eval")
    for command in (
        ["predict", str(run), picture, "--precision", "int8"],
        ["predict", str(run), picture, "--precision", "bf16"],
        ["eval", str(run), "--data", str(photos), "--workers", "0", "--out", out, "--precision", "int8"],
    ):
        status, shown = main(command), capsys.readouterr()
        assert status == 0 or (status == 2 and "is not possible here" in shown.err and shown.err.count("\n") == 1)
        assert (
            status == 2 or "bee" in shown.out or json.loads((tmp_path / "eval/metrics.json").read_text())["images"] == 9
        )
    assert main(["predict", str(run), picture, "--features", str(tmp_path / "f.npz"), "--precision", "int8"]) == 2
    assert "leave out --precision" in capsys.readouterr().err


def test_evaluate_and_predict(run, photos, tmp_path, capsys):
    assert main(["eval", str(run), "--data", str(photos), "--workers", "0", "--out", str(tmp_path / "eval")]) == 0
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {
        *("metrics.json", "classes.csv", "confusion.csv", "confusion.png")
    }
    numbers = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert numbers["images"] == 9 and f"top-1 {100 * numbers['top1']:.2f} %" in capsys.readouterr().out
    images = [str(photos / "val" / "ant"), str(photos / "val/bee/0.png")]
    assert main(["predict", str(run), *images, "--json", "-", "--out", str(tmp_path / "pictures")]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == 4 and answers[3]["image"].endswith("bee/0.png")
    assert sum(label["probability"] for label in answers[0]["labels"]) == pytest.approx(1)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


def test_convert_keeps_the_network(tmp_path, capsys):
    import torch

    import sgformer
    from sgformer.models.released import to_released

    model = sgformer.create_model("sgformer_s", num_classes=3)
    torch.save({"state_dict": to_released(model)}, tmp_path / "released.pth")
    # A switch before a file does not swallow it.
    assert main(["convert", "--raw", str(tmp_path / "released.pth"), str(tmp_path / "out.safetensors")]) == 0
    again = sgformer.load_model(tmp_path / "out.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_data_commands(tmp_path, photos, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    arguments = ["--train", "20", "--val", "10", "--image-size", "32"]
    assert main(["data", "scenes", str(tmp_path / "scenes"), *arguments]) == 0
    assert main(["data", "check", str(tmp_path / "scenes"), "--json"]) == 0
    json.loads(capsys.readouterr().out.split("\n", 1)[1])


def sgformer(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sgformer", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_a_terminal_that_shows_only_what_matters(photos, tmp_path):
    process = sgformer("train", "classify", "--data", photos, "--run", tmp_path / "run", *QUICK, "--workers", 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 1
    assert len(out.splitlines()) <= 13  # five of them say what follows from the data, two what it starts from
    assert not (ROOT / "lightning_logs").exists()


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(photos, tmp_path):
    options = ["--data", photos, "--run", tmp_path / "run", *QUICK, "--epochs", "1000"]
    process = sgformer("train", "classify", *options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in out
    assert (tmp_path / "run/checkpoints/last.ckpt").exists() and not list(tmp_path.rglob("*.tmp"))
    process = sgformer("train", "classify", "--resume", tmp_path / "run", "--epochs", "1", "--max-steps", "1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "nothing left to train" in out


@pytest.mark.slow
def test_two_processes_count_every_image_once(photos, tmp_path, run):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["train", "classify", "--data", photos, "--run", tmp_path / "run", *QUICK, "--device", "cpu"],
        ["eval", tmp_path / "run", "--data", photos, "--device", "cpu", "--workers", "0", "--batch-size", "2"],
    ):
        done = subprocess.run(
            [*torchrun, "-m", "sgformer", "--", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/eval/metrics.json").read_text())["images"] == 9
    assert (
        main(["eval", str(tmp_path / "run"), "--data", str(photos), "--workers", "0", "--out", str(tmp_path / "e")])
        == 0
    )
    both = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("run/eval", "e", "run/validation")]
    assert both[0]["top1"] == both[1]["top1"] and both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-5)


# -- plugins ----------------------------------------------------------------------------------------------------------

PLUGIN = """
import os
import sgformer

@sgformer.register_significance("rows")
def rows(x, coarse, fine):
    "The row of a token."
    return x.new_ones(x.shape[:3]).cumsum(1).float()

with open(os.path.join(os.path.dirname(__file__), "runs.txt"), "a") as file:
    print(os.getpid(), file=file)
"""


@pytest.mark.slow
def test_the_example_of_a_plugin_trains(photos, tmp_path):
    plugin, out = ROOT / "examples" / "swin_nano.py", tmp_path / "run"
    options = ["--data", str(photos), "--run", str(out), "--model", "swin_nano", "--coarse", "global", *QUICK[2:]]
    command = [sys.executable, "-m", "sgformer", "--plugin", str(plugin), "train", "classify", *options]
    subprocess.run(command, check=True)
    assert (out / "report.md").exists()


@pytest.mark.slow
def test_a_plugin_is_run_by_every_process_of_a_command(photos, tmp_path, monkeypatch):
    """`ablate` starts its runs as processes of their own; weights remember the name, not the file."""
    monkeypatch.setenv("SGFORMER_PLUGINS", "")
    plugin, recipe = tmp_path / "mine.py", tmp_path / "ablation.yaml"
    plugin.write_text(PLUGIN)
    options = "model: sgformer_n, image_size: 32, batch_size: 4, epochs: 1, workers: 0"
    recipe.write_text(f"data: {photos}\noptions: {{{options}}}\nvariants: {{rows: {{significance: rows}}}}\n")
    out = tmp_path / "ablation"
    # A process of its own: what is registered stays registered.
    command = [sys.executable, "-m", "sgformer", "--plugin", str(plugin), "ablate", "--config", str(recipe)]
    subprocess.run([*command, "--out", str(out)], check=True)
    assert len(set((tmp_path / "runs.txt").read_text().split())) == 2
    weights = out / "runs" / "rows-0" / "best.safetensors"
    command = [sys.executable, "-m", "sgformer", "predict", str(weights), str(photos / "val")]
    without = subprocess.run(command, capture_output=True, text=True)
    assert (
        without.returncode == 2
        and "significance must be one of" in without.stderr
        and "Traceback" not in without.stderr
    )
    command.insert(3, "--plugin")
    command.insert(4, str(plugin))
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.py", None, "no such file"),
        ("mine.txt", "", "not a Python file"),
        ("mine.py", "x = 1\ny = x / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("mine.py", "x = (\n", "SyntaxError"),
    ],
)
def test_a_bad_plugin_is_a_line(tmp_path, monkeypatch, capsys, name, content, words):
    monkeypatch.setenv("SGFORMER_PLUGINS", "")
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["--plugin", str(tmp_path / name), "convert"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_plugins_of_one_name_are_each_run_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SGFORMER_PLUGINS", "")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"open({str(tmp_path / 'runs.txt')!r}, 'a').write({folder!r})")
        plugins.add(tmp_path / folder / "mine.py")
    plugins.load()
    plugins.load()
    assert (tmp_path / "runs.txt").read_text() == "ab"
