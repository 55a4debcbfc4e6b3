"""`sgformer train TASK`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgformer.cli.parser import Option, Parser, config_options
from sgformer.core.errors import Interrupted, UserError
from sgformer.core.terminal import say
from sgformer.tasks.registry import get_task
from sgformer.training.config import AUTO, RunConfig, read_yaml, refuse_remote

FILES = [
    Option("config", str | None, None, "recipe: a YAML file of options; the command line overrides it", "Run"),
    Option("resume", str | None, None, "resume this run at the exact step it reached", "Run"),
]


def train(name: str, arguments: Sequence[str]) -> int:
    """Train a network for a task, with the options of its config."""
    task = get_task(name)
    command = f"train {name}"
    options = config_options(task.Config)
    run = next(i for i, o in enumerate(options) if o.name == "run")
    options = [*options[: run + 1], *FILES, *options[run + 1 :]]
    parser = Parser(command, task.description, options, [f"sgformer {command} {task.example}"])
    config, resume = read_options(parser, arguments, task.Config)

    from sgformer.tasks import api

    try:
        api.train(name, config, resume=resume)
    except Interrupted as stop:
        from sgformer.training.run_folder import resume_command

        say(f"{stop}; resume with: {resume_command(name, stop.run, config)}")
        return 128 + stop.signum
    return 0


def overruled(given: dict[str, Any]) -> tuple[str, ...]:
    """The lines of a recipe that the command line overrules under another name: its --minutes or its number of epochs
    or steps take the place of the recipe's."""
    lengths = [name for name in ("minutes", "steps", "epochs") if given.get(name) not in (None, AUTO)]
    return tuple(name for name in ("minutes", "steps", "epochs") if lengths and name not in lengths)


def read_options(
    parser: Parser, arguments: Sequence[str], config_class: type[RunConfig]
) -> tuple[RunConfig, str | None]:
    """Merge recipe and command line into the config, and the run to resume if any.

    The recipe's number of epochs or steps gives way to --minutes on the command line, and the other way round.

    Raises:
        UserError: both --config and --resume, an unknown key or option, or an invalid value.
    """
    given: dict[str, Any] = parser.parse(arguments)
    recipe, resume = given["config"], given["resume"]
    if recipe and resume:
        raise UserError("--resume uses the run's own settings: leave out --config")
    source = recipe
    if resume:
        from sgformer.training.run_folder import RunFolder

        folder = RunFolder.open(resume)
        folder.check()
        source = folder.path / "config.yaml"
    if source:
        try:
            stored = read_yaml(source, config_class)
            refuse_remote(source, config_class, stored, given, downloads=bool(resume))
            if recipe:
                stored = {name: value for name, value in stored.items() if name not in overruled(given)}
            given = parser.parse(arguments, stored)
        except UserError as error:
            raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    if resume and given["minutes"] is not None:
        raise UserError("--minutes plans a new run; --epochs or --max-steps change the length of a resumed one")
    values = {name: value for name, value in given.items() if name not in ("config", "resume")}
    return config_class(**values), resume
