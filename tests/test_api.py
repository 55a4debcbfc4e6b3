"""Public names and command line options change on purpose only: `make api` writes `tests/api.txt` anew."""

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest

import sgformer

FROZEN = Path(__file__).with_name("api.txt")


def parameters(function) -> str:
    """Names and defaults of a function's parameters."""
    found = []
    for name, p in inspect.signature(function).parameters.items():
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        found.append(f"{star}{name}" + ("" if p.default is p.empty else f"={p.default!r}"))
    return ", ".join(found)


def api() -> list[str]:
    """A line for every public name and for every option of every command."""
    from sgformer.cli import COMMANDS
    from sgformer.cli.parser import REQUIRED, config_options, function_options
    from sgformer.cli.train import FILES
    from sgformer.tasks.registry import TASKS, get_task

    lines = []
    for name in sgformer.__all__:
        thing = getattr(sgformer, name)
        if inspect.isclass(thing):
            public = [n for n in vars(thing) if not n.startswith("_") and callable(getattr(thing, n))]
            lines.append(f"sgformer.{name}: class")
            if dataclasses.is_dataclass(thing):
                lines += [f"sgformer.{name}.{field.name}" for field in dataclasses.fields(thing)]
            lines += [f"sgformer.{name}.{n}({parameters(getattr(thing, n))})" for n in public]
        elif callable(thing):
            lines.append(f"sgformer.{name}({parameters(thing)})")
        else:
            lines.append(f"sgformer.{name}: {type(thing).__name__}")
    configs = {name: get_task(name).Config for name in TASKS}
    for command, (module, function, _) in COMMANDS.items():
        task = command.removeprefix("train ")
        if task in configs:
            options = [*config_options(configs[task]), *FILES]
        else:
            options = function_options(getattr(__import__(module, fromlist=[function]), function))
        for o in options:
            place, default = o.positional, "" if o.default is REQUIRED else f" {o.default!r}"
            lines.append(f"sgformer {command} {o.name if place else '--' + o.name.replace('_', '-')}{default}")
    return lines


def test_the_public_names_and_options_are_the_frozen_ones():
    pytest.importorskip("lightning")
    frozen, now = FROZEN.read_text().splitlines(), sorted(api())
    gone, new = sorted(set(frozen) - set(now)), sorted(set(now) - set(frozen))
    assert not gone and not new, f"gone: {gone}; new: {new}; if that is meant: make api, and a line in CHANGELOG.md"


if __name__ == "__main__":
    FROZEN.write_text("\n".join(sorted(api())) + "\n")
    print(f"{FROZEN}: {len(api())} lines", file=sys.stderr)
