"""What is not given follows from the data, once, and is written down."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from photos import make_photos

from sgformer.core.errors import UserError
from sgformer.data.typical import typical_side
from sgformer.tasks import registry
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.detect.config import DetectConfig, ObjectsConfig
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.training.config import AUTO, OPTIMISERS, DataFacts, make_config, read_yaml
from sgformer.training.run_folder import resumed_config

TASKS = [registry.get_task(name).Config for name in registry.TASKS]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PHOTOS = DataFacts(3000, 144, 10, pretrained=True)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("images", [1, 20, 300, 5000, 1_300_000])
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_stays_open_and_every_schedule_holds(kind, images, pretrained, device):
    config = kind(data="photos").resolved(DataFacts(images, 144, 10, device, pretrained=pretrained))
    assert AUTO not in [getattr(config, name) for name in config.automatic()]
    assert make_config(kind, yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    per_pass = max(1, images // config.batch_size)
    total = config.steps if kind is SegmentConfig else round(per_pass * config.epochs)
    config.check_schedule(total, per_pass)
    if kind is ClassifyConfig:
        assert config.warmup_epochs <= config.epochs / 10
    elif issubclass(kind, ObjectsConfig):
        assert config.warmup_steps <= total / 10 and max(config.lr_drops) < config.epochs
    else:
        assert config.warmup_steps <= total / 10 and config.val_every <= total


@pytest.mark.parametrize("kind", TASKS)
def test_a_given_value_wins(kind):
    given = {"image_size": 96, "batch_size": 6, "lr": 7e-4, "opt": "sgd", "drop_path": 0.3, "clip_grad": None}
    given |= {"coarse": "global", "warmup_epochs" if kind is ClassifyConfig else "warmup_steps": 3}
    config = kind(data="photos", **given).resolved(PHOTOS)
    assert {name: getattr(config, name) for name in given} == given


def test_sizes_follow_the_images_and_the_weights():
    def size(pixels, kind=ClassifyConfig, **more):
        return kind().resolved(dataclasses.replace(PHOTOS, pixels=pixels, **more)).image_size

    assert [size(side) for side in (28, 64, 100, 144, 2000, None)] == [64, 64, 96, 128, 128, 128]
    assert size(2000, device="cuda") == 224 and size(2000, weights_size=224) == 224
    assert size(144, weights_size=224) == 128  # never enlarged beyond what the photographs hold
    assert size(2000, DetectConfig) == 320 and size(2000, SegmentConfig) == 192


def test_few_photographs_are_seen_more_often():
    epochs = [ClassifyConfig().resolved(dataclasses.replace(PHOTOS, images=n)).epochs for n in (100, 300, 3000, 50000)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] == 8
    assert ClassifyConfig().resolved(dataclasses.replace(PHOTOS, pretrained=False)).epochs == 3 * epochs[2]


def test_a_long_run_is_augmented_as_the_recipes_do():
    short, long = (ClassifyConfig(epochs=n).resolved(PHOTOS) for n in (20, 300))
    assert short.mixup == 0 and short.auto_augment is None
    assert long.mixup == 0.8 and long.auto_augment.startswith("rand") and long.warmup_epochs == 5


def test_a_rate_alone_is_one_for_adamw():
    assert ClassifyConfig().resolved(PHOTOS).opt == "muon"
    tuned = ClassifyConfig(lr=1e-4).resolved(PHOTOS)
    assert tuned.opt == "adamw" and tuned.min_lr == pytest.approx(1e-6)
    assert ClassifyConfig(strategy="fsdp").resolved(PHOTOS).opt == "adamw"


@pytest.mark.parametrize("kind", TASKS)
def test_every_optimiser_has_a_rate_of_its_own_or_needs_one(kind):
    rates = {opt: kind(data="photos", opt=opt).resolved(PHOTOS).lr for opt in ("adamw", "nadam", "lion", "sgd", "SGD")}
    assert rates["nadam"] == rates["adamw"] and rates["SGD"] == rates["sgd"]
    assert rates["lion"] == pytest.approx(0.2 * rates["adamw"], rel=0.1)
    assert rates["sgd"] == pytest.approx(25 * rates["adamw"], rel=0.1)
    with pytest.raises(UserError, match=r"--opt kron has no automatic learning rate: give one with --lr$"):
        kind(data="photos", opt="kron").resolved(PHOTOS)
    assert kind(data="photos", opt="kron", lr=0.1).resolved(PHOTOS).lr == 0.1


def test_rates_are_of_optimisers_that_there_are():
    from timm.optim import list_optimizers

    assert {name for names in OPTIMISERS for name in names.split()} <= set(list_optimizers())


def test_the_batch_divides_among_processes():
    for parts in (1, 2, 3, 5, 48):
        config = ClassifyConfig(accumulate=parts).resolved(dataclasses.replace(PHOTOS, parts=parts))
        assert config.batch_size % parts == 0


def test_the_reach_of_coarse_heads_is_that_of_the_weights():
    assert ClassifyConfig().resolved(PHOTOS).coarse == "window"  # at 128 pixels a global term would drown the fine one
    assert ClassifyConfig(image_size=224).resolved(PHOTOS).coarse == "global"
    assert ClassifyConfig().resolved(dataclasses.replace(PHOTOS, weights_coarse="global")).coarse == "global"
    assert ClassifyConfig(model="resnet10t").resolved(PHOTOS).coarse == "global"


def test_a_whole_network_keeps_its_heads():
    held = dataclasses.replace(PHOTOS, architecture={"head": "upernet", "width": 48})
    config = SegmentConfig().resolved(held)
    assert (config.head, config.head_width) == ("upernet", 48)
    assert DetectConfig().resolved(held).head_width == 48


def test_epochs_count_in_segmentation():
    config = SegmentConfig(epochs=2, batch_size=10).resolved(PHOTOS)
    assert config.steps == config.total_steps(3000 / 10) == 600 and config.val_every == 75


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_leave_nothing_open(recipe):
    task = recipe.stem.split("_")[0]
    kind = registry.get_task(task if task in registry.TASKS else "classify").Config
    config = make_config(kind, read_yaml(recipe, kind))
    left = [name for name in config.automatic() if config.is_auto(name)]
    assert not left or (left == ["steps"] and config.epochs)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (ClassifyConfig(epochs=3, warmup_epochs=5), 30),
        (DetectConfig(epochs=1, warmup_steps=50), 10),
        (SegmentConfig(steps=10, warmup_steps=50), 10),
    ],
)
def test_a_warm_up_that_does_not_end_is_refused(config, total):
    with pytest.raises(UserError, match=r"--warmup-\w+ \d+ is not below the \d+ (updates|epochs) of the run"):
        config.resolved(PHOTOS).check_schedule(total, 10)


def test_an_old_run_is_resumed_with_the_values_it_had(tmp_path):
    """A run from before an option existed: nothing is derived from the data now."""
    values = ClassifyConfig(data="photos", model="sgformer_s", epochs=3, warmup_epochs=5).resolved().to_dict()
    for newer in ("freeze", "patience", "minutes", "balance", "crop_pct", "coarse"):
        del values[newer]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    parsed = dataclasses.asdict(ClassifyConfig(**values))  # what the command line makes of it
    for options in ({}, parsed):
        config = resumed_config(ClassifyConfig, tmp_path, options)
        assert (config.epochs, config.warmup_epochs, config.crop_pct, config.coarse) == (3, 5, 0.9, "global")


def test_the_typical_side(tmp_path):
    from sgformer.data.formats import open_data

    root = make_photos(tmp_path, size=40)
    (root / "train/ant/0.png").write_bytes(b"not a picture")
    assert typical_side(open_data("classes", root, "train")) == 40


def test_the_typical_side_of_shards(tmp_path):
    from sgformer.data.formats import open_data
    from sgformer.data.sharding import make_shards

    make_shards(make_photos(tmp_path / "photos", size=48), tmp_path / "shards")
    assert typical_side(open_data("classes", tmp_path / "shards", "train")) == 48


def test_what_is_known_of_the_weights(tmp_path):
    pytest.importorskip("lightning")
    from sgformer.data.formats import open_data
    from sgformer.models.config import VARIANTS
    from sgformer.models.load import Weights
    from sgformer.training.planning import data_facts

    listing = open_data("classes", make_photos(tmp_path), "train")
    config = VARIANTS["sgformer_n"].replace(coarse="window")
    held = Weights(tmp_path, {}, {"task": "classify", "image_size": [192, 256]}, "sgformer_n", config)
    known = data_facts(listing, held, "classify", "cpu", 2)
    assert (known.images, known.pixels, known.classes, known.parts) == (18, 40, 3, 2)
    assert (known.pretrained, known.weights_size, known.weights_coarse) == (True, 192, "window")
    other = data_facts(listing, held, "segment", "cpu", 1)  # the size is of another task
    assert (other.pretrained, other.weights_size, other.weights_coarse) == (True, None, "window")
    assert not data_facts(listing, None, "classify", "cpu", 1).pretrained


def test_a_run_says_and_writes_what_it_chose(tmp_path, caplog):
    pytest.importorskip("lightning")
    from sgformer import train

    photos = make_photos(tmp_path / "photos")
    caplog.set_level("INFO", "sgformer")
    options = {"max_steps": 1, "workers": 0, "opt": "adamw", "weights": "none"}
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), **options).path
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert AUTO not in [written[name] for name in ClassifyConfig.automatic()]
    assert written["model"] == "sgformer_n" and written["image_size"] == 64 and written["epochs"] == 120
    said = caplog.text
    assert "chosen for 18 images of 40 pixels, 3 classes, from scratch, on cpu" in said
    assert "epochs 120" in said and "image-size 64" in said
    assert f"opt {written['opt']}" not in said  # that was given
    again = train("classify", resume=run, max_steps=2).path
    assert yaml.safe_load((again / "config.yaml").read_text()) == {**written, "max_steps": 2}
