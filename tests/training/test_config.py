"""Settings: one source for Python, command line and YAML; wrong ones are named."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from sgformer.core.errors import UserError
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.registry import TASKS, get_task
from sgformer.training.config import RunConfig, make_config, read_yaml, to_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_yaml_round_trip(tmp_path):
    config = ClassifyConfig(data="photos", image_size=(96, 160), lr=3e-5, layer_decay=0.75, auto_augment=None)
    (tmp_path / "config.yaml").write_text(to_yaml(config.to_dict()))
    assert make_config(ClassifyConfig, read_yaml(tmp_path / "config.yaml", ClassifyConfig)) == config


def test_rates_scale_with_the_batch():
    assert ClassifyConfig(batch_size=1024).scaled(1e-3) == 1e-3
    assert ClassifyConfig(batch_size=256).scaled(1e-3) == 2.5e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "--batch-size must be above 0, got 0"),
        ({"lr": -1.0}, "--lr"),
        ({"epochs": float("inf")}, "--epochs must be finite, got inf"),
        ({"epochs": float("nan")}, "--epochs must be above 0, got nan"),
        ({"minutes": 0}, "--minutes must be above 0, got 0"),
        ({"patience": 0}, "--patience must be above 0, got 0"),
        ({"balance": "both"}, "--balance must be none, weights or sampling, got both"),
        ({"workers": -1}, "--workers"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"image_size": 16}, "--image-size must be 32"),
        ({"image_size": (64, 16)}, "--image-size must be 32"),
        ({"smoothing": 1.5}, "--smoothing"),
        ({"batch_size": 10, "accumulate": 4}, "--accumulate 4"),
        ({"seed": 2**40}, "--seed must be below 2\\^32.* got 1099511627776"),
        ({"image_size": 16**5000}, "--image-size is too large a number"),
        ({"image_size": (64, 16**5000)}, "--image-size is too large a number"),
        ({"max_steps": 10**30}, "--max-steps is too large a number"),
        ({"devices": 10**20}, "--devices must be at most 1024"),
        ({"workers": 2**62}, "--workers must be at most 1024"),
        ({"batch_size": 2**62}, "--batch-size must be at most 1048576"),
        ({"seed": 2**64}, "--seed must be below 2\\^32"),
        ({"seed": -1}, "--seed must be 0 or more, got -1"),
        ({"split_seed": -1}, "--split-seed must be 0 or more, got -1"),
        ({"bath_size": 10}, "did you mean batch_size"),
    ],
)
def test_a_value_that_does_not_do_is_named(options, words):
    with pytest.raises(UserError, match=words):
        make_config(ClassifyConfig, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bacth_size: 3", "unknown key 'bacth_size', did you mean batch_size"),
        ("- 1\n- 2", "expected lines of"),
        ("lr: [1", "not a YAML file"),
    ],
)
def test_a_recipe_that_does_not_do_is_named(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_yaml(file, ClassifyConfig)
    assert str(file) in str(error.value)


def test_keys_may_be_spelled_as_on_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("batch-size: 3")
    assert read_yaml(tmp_path / "recipe.yaml", ClassifyConfig) == {"batch_size": 3}


def test_every_field_is_explained():
    for config_class in (RunConfig, ClassifyConfig):
        for field in dataclasses.fields(config_class):
            assert field.metadata["help"] and field.metadata["group"], field.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold(recipe):
    task = recipe.stem.split("_")[0]
    kind = get_task(task if task in TASKS else "classify").Config
    config = make_config(kind, read_yaml(recipe, kind))
    written = yaml.safe_load(recipe.read_text())
    values = config.to_dict()
    assert all(isinstance(values[name], type(value)) for name, value in written.items() if value != "none")
    assert f"recipes/{recipe.name}" in recipe.read_text()  # says how to start it


def test_the_paper_s_recipes():
    facts = {"s": 0.1, "m": 0.2, "b": 0.4}
    for size, drop_path in facts.items():
        folder = Path(__file__).parents[2] / "recipes"
        config = make_config(ClassifyConfig, read_yaml(folder / f"imagenet_{size}.yaml", ClassifyConfig))
        assert (config.epochs, config.warmup_epochs, config.cooldown_epochs) == (300, 20, 10)
        assert config.drop_path == drop_path
        assert [config.scaled(r) for r in (config.lr, config.warmup_lr, config.min_lr)] == [1e-3, 1e-6, 1e-5]
        tuned = make_config(ClassifyConfig, read_yaml(folder / f"imagenet_{size}_384.yaml", ClassifyConfig))
        assert (tuned.image_size, tuned.epochs, tuned.warmup_epochs) == (384, 30, 5)
        assert tuned.scaled(tuned.lr) == pytest.approx(2e-5 * tuned.batch_size / 512)
        assert tuned.scaled(tuned.min_lr) == pytest.approx(2e-7)
        assert tuned.weight_decay == 1e-8


def test_an_option_of_sgformer_is_refused_for_other_networks():
    with pytest.raises(UserError, match="pvt_v2_b0"):
        ClassifyConfig(data="photos", model="pvt_v2_b0", coarse="window")
    assert ClassifyConfig(data="photos", model="sgformer_n", coarse="window").coarse == "window"


@pytest.mark.parametrize("config_class", [get_task(name).Config for name in TASKS])
def test_guidance_is_asked_for_by_name(config_class):
    config = config_class(model="sgformer_n", significance="fine", aggregation="mean", regions="1:9/1:4/1:1")
    assert config.guidance["significance"] == "fine" and config.guidance["stages"][0].regions == ((1.0, 9),)
    assert config_class(model="sgformer_n").guidance == {}
    assert make_config(config_class, config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"significance": "fin"}, "--significance must be one of hybrid.*got fin, did you mean fine"),
        ({"aggregation": "max"}, "--aggregation must be one of linear.*got max"),
        ({"regions": "1:2"}, "3 guided stages"),
        ({"scales": "8;1"}, "scales must be NUMBER"),
        ({"pairs": "single", "significance": "fine"}, "pairs=single has none"),
        ({"model": "pvt_v2_b0", "significance": "fine"}, "--significance is for sgformer models; pvt_v2_b0"),
    ],
)
def test_guidance_that_does_not_do_is_named(options, words):
    with pytest.raises(UserError, match=words):
        ClassifyConfig(**{"model": "sgformer_n", **options})


def test_a_value_of_the_wrong_kind_is_a_line():
    with pytest.raises(UserError, match="wrong type"):
        make_config(ClassifyConfig, {"epochs": "many"})


def test_fp16_on_a_cpu_is_refused():
    """Lightning would take bf16 instead, and config.yaml say otherwise."""
    from sgformer.training.trainer import build_trainer

    with pytest.raises(UserError, match="--precision fp16 runs on GPUs only; on a CPU, use bf16 or fp32"):
        build_trainer(device="cpu", precision="fp16")


@pytest.mark.parametrize(
    ("warmup", "total", "words"),
    [
        (0, 9, ""),
        (4, 9, ", reached after 4 updates"),
        (9, 9, "; not reached: the run ends within 9 updates of warm-up"),
    ],
)
def test_the_rate_is_announced(warmup, total, words):
    from sgformer.training.fit import warmup_words

    assert warmup_words(warmup, total) == words
