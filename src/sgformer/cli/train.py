"""`sgformer train TASK`."""

from __future__ import annotations

import importlib

from sgformer.cli.parser import Option, Parser, config_options
from sgformer.core.errors import UserError
from sgformer.training.config import RunConfig, read_yaml
from sgformer.training.run_folder import RunFolder

FILES = [
    Option("config", str | None, None, "recipe: a YAML file of options; the command line wins", "Run"),
    Option("resume", str | None, None, "go on with this run, at the very step it had reached", "Run"),
]


def classify(arguments: list[str]) -> int:
    """Train an image classifier."""
    from sgformer.training.config import ClassifyConfig

    return _train(
        arguments,
        "classify",
        ClassifyConfig,
        "Train an image classifier on DATA/train/CLASS/*, validate it on DATA/val/CLASS/*.",
        "--data photos --model sgformer_t --epochs 50 --run runs/photos",
        "sgformer.tasks.classify.api:train_classifier",
    )


def detect(arguments: list[str]) -> int:
    """Train a detector."""
    from sgformer.tasks.detect.config import DetectConfig

    return _train(
        arguments,
        "detect",
        DetectConfig,
        "Train Mask R-CNN, or Faster R-CNN where there are no masks, on a data set in the COCO layout.",
        "--data coco --config recipes/detect_s_1x.yaml --weights runs/imagenet",
        "sgformer.tasks.detect.api:train_detector",
    )


def segment(arguments: list[str]) -> int:
    """Train a semantic segmentation."""
    from sgformer.tasks.segment.config import SegmentConfig

    return _train(
        arguments,
        "segment",
        SegmentConfig,
        "Train a network that tells the class of every pixel, on label maps in the ADE20K layout.",
        "--data photos --model sgformer_t --head semantic-fpn --steps 2000",
        "sgformer.tasks.segment.api:train_segmenter",
    )


def _train(
    arguments: list[str], task: str, config_class: type[RunConfig], about: str, example: str, function: str
) -> int:
    """Parse the options of a config and call `function`, "module:name", with it."""
    command = f"train {task}"
    options = config_options(config_class)
    run = next(i for i, o in enumerate(options) if o.name == "run")
    options = [*options[: run + 1], *FILES, *options[run + 1 :]]
    parser = Parser(command, about, options, [f"sgformer {command} {example}"])
    config, resume = read_options(parser, arguments, config_class)

    module, _, name = function.partition(":")
    train = getattr(importlib.import_module(module), name)
    from sgformer.training.callbacks import Interrupted

    try:
        train(config, resume=resume)
    except Interrupted as stop:
        print(f"{stop}; go on with: sgformer {command} --resume {stop.run}")
        return 128 + stop.signum
    return 0


def read_options(parser: Parser, arguments: list[str], config_class: type[RunConfig]) -> tuple[RunConfig, str | None]:
    """Recipe and command line together: the config, and the run to resume if any.

    Raises:
        UserError: both --config and --resume, an unknown key or option, or a value that does not do.
    """
    asked = parser.parse(arguments)
    recipe, resume = asked["config"], asked["resume"]
    if recipe and resume:
        raise UserError("--resume takes the run's own settings: leave --config out")
    source = RunFolder.open(resume).path / "config.yaml" if resume else recipe
    if source:
        try:
            asked = parser.parse(arguments, read_yaml(source, config_class))
        except UserError as error:
            raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    values = {name: value for name, value in asked.items() if name not in ("config", "resume")}
    return config_class(**values), resume
