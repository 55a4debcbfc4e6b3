"""Options from dataclass fields or function signatures: one parser for every command, with help that fits a screen."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring

from sgformer.core.errors import UserError
from sgformer.core.names import dashed, nearest
from sgformer.core.terminal import say
from sgformer.training.config import RunConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

WIDTH = 100
TRUTH = ("true", "false", "yes", "no")  # values that a switch accepts


class HelpShown(Exception):
    """`--help` was printed."""


@dataclass
class Option:
    """One option or positional argument.

    Attributes:
        name: as in Python, with underscores.
        kind: the type.
        default: `REQUIRED`: there is none.
        help: a phrase.
        group: its heading in the help.
        main: whether `--help` gives it a line of its own.
        many: whether it takes one or more values.
        positional: whether it is an argument, not an option; always so without a default.
    """

    name: str
    kind: Any
    default: Any
    help: str
    group: str = "Options"
    main: bool = True
    many: bool = False
    positional: bool = False

    def __post_init__(self) -> None:
        self.positional = self.positional or self.default is REQUIRED


REQUIRED = object()


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are neither None nor a switch that is off."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def config_options(config_class: type[RunConfig]) -> list[Option]:
    """The options of a config's fields."""
    kinds = get_type_hints(config_class)
    automatic = config_class.automatic()
    return [
        Option(
            f.name,
            Union[kinds[f.name], Literal["auto"]] if f.name in automatic else kinds[f.name],  # noqa: UP007
            f.default,
            f.metadata["help"],
            f.metadata["group"],
            f.metadata["main"],
        )
        for f in fields(config_class)
    ]


def function_options(function: Callable[..., Any]) -> list[Option]:
    """The options of a function's parameters, with the help of its docstring. A `list` takes one or more values;
    positional are parameters without a default, and a `tuple[str, ...]`, which may be left out."""
    kinds = get_type_hints(function)
    helps = {
        p.arg_name: " ".join((p.description or "").split()) for p in parse_docstring(function.__doc__ or "").params
    }
    result = []
    for name, p in inspect.signature(function).parameters.items():
        default = REQUIRED if p.default is inspect.Parameter.empty else p.default
        kind = kinds[name]
        if get_origin(kind) in (Union, UnionType):  # list[...] | None, which is None if left out
            kind = next((k for k in get_args(kind) if get_origin(k) is list), kind)
        origin = get_origin(kind)
        many = origin in (list, tuple)
        kind = get_args(kind)[0] if many else kind
        result.append(Option(name, kind, default, helps.get(name, ""), many=many, positional=origin is tuple))
    return result


def run_function(function: Callable[..., int], command: str, arguments: Sequence[str]) -> int:
    """Call a command's function with the arguments parsed by its signature.

    Raises:
        UserError, HelpShown: as `Parser.parse`.
    """
    about = parse_docstring(function.__doc__ or "").short_description or ""
    return function(**Parser(command, about, function_options(function)).parse(arguments))


class Parser:
    """Parses the options of one command.

    Args:
        command: e.g. "train classify".
        about: one sentence.
        options: in help order.
        examples: command lines to show.
    """

    def __init__(self, command: str, about: str, options: Sequence[Option], examples: Sequence[str] = ()):
        self.command, self.about, self.options, self.examples = command, about, list(options), examples

    def _argument_parser(self) -> ArgumentParser:
        """The jsonargparse parser; help and unknown options skip it and its slow import."""
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(
            prog=f"sgformer {self.command}", exit_on_error=False, add_help=False, allow_abbrev=False
        )
        for o in self.options:
            extra: dict[str, Any] = (
                {"nargs": "?", "const": True} if o.kind is bool else {"nargs": "+"} if o.many else {}
            )
            if o.positional and o.default is not REQUIRED:
                parser.add_argument(o.name, type=o.kind, nargs="*", default=list(o.default))
            elif o.positional:
                parser.add_argument(o.name, type=o.kind, **extra)
            else:
                parser.add_argument(f"--{dashed(o.name)}", type=o.kind, default=o.default, **extra)
        return parser

    def parse(self, arguments: Sequence[str], values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Values of all options; those on the command line win over `values`, which win over the defaults.

        Raises:
            UserError: an unknown option (the nearest one is named) or a value of the wrong kind.
            HelpShown: help was requested.
        """
        if any(a in ("-h", "--help", "--help-all") for a in arguments):
            say(*self.help(everything="--help-all" in arguments).split("\n"))
            raise HelpShown
        flags = {f"--{dashed(o.name)}" for o in self.options if not o.positional}
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in flags and name != "--":
                raise UserError(f"unknown option {name}{nearest(name, flags)} (sgformer {self.command} --help-all)")
        # A switch consumes the next argument only if that is a truth value: `convert --raw FILE` must keep its file.
        switches = {f"--{dashed(o.name)}" for o in self.options if o.kind is bool}
        arguments = [
            f"{a}=true" if a in switches and after.lower() not in TRUTH else a
            for a, after in pairwise([*arguments, ""])
        ]
        from jsonargparse import ArgumentError

        parser = self._argument_parser()
        try:
            start = parser.parse_object(dict(values)) if values else None
            parsed = parser.parse_args(arguments, namespace=start)
        except ArgumentError as error:
            raise UserError(self._explain(str(error))) from None
        return dict(parsed.as_dict())

    def _explain(self, message: str) -> str:
        """A message of jsonargparse in one line: `--epochs takes an integer, got x`."""
        message = " ".join(message.split())
        for o in self.options:
            flag = o.name.upper() if o.positional else f"--{dashed(o.name)}"
            if message.startswith(f'Parser key "{o.name}"') and (got := re.search(r"(Got|Given) value: (.*)", message)):
                return f"{flag} takes {_kind_name(o.kind)}, got {textwrap.shorten(got[2], 200, placeholder=' ...')}"
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{missing[1].upper()} is missing (sgformer {self.command} --help)"
        if single := re.fullmatch(r"argument (--\S+): expected one argument", message):
            return f"{single[1]} needs a value"
        return message.replace("unrecognized arguments:", "unexpected argument:")

    def help(self, everything: bool = False) -> str:
        """Text within `WIDTH` columns: main options one per line, the others listed with their defaults."""
        positionals = [o for o in self.options if o.positional]
        usage = " ".join(_usage(o) for o in positionals)
        lines = [f"usage: sgformer {self.command} {usage} [options]".replace("  ", " "), ""]
        lines += textwrap.wrap(self.about, WIDTH)
        lines += ["", *(f"  {o.name.upper():<20} {o.help}" for o in positionals)] if positionals else []
        by_group: dict[str, list[Option]] = {}
        for o in self.options:
            if not o.positional:
                by_group.setdefault(o.group, []).append(o)
        for group, options in by_group.items():
            lines += ["", f"{group}:"] if everything or any(o.main for o in options) else []
            for o in (o for o in options if o.main or everything):
                default = (
                    f" [{_text(o.default)}]" if o.default not in (None, False) and not o.help.endswith("]") else ""
                )
                lines += textwrap.wrap(
                    f"--{dashed(o.name):<18} {o.help}{default}", WIDTH, initial_indent="  ", subsequent_indent=" " * 23
                )
            rest = [f"--{dashed(o.name)} {_text(o.default)}" for o in options if not (o.main or everything)]
            if rest:
                indent = "  " if any(o.main for o in options) else f"{group}: "
                start = indent if indent.strip() else "  also: "
                lines += textwrap.wrap(
                    "   ".join(rest), WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
                    break_on_hyphens=False, break_long_words=False,
                )  # fmt: skip
        lines += ["", *(f"  {example}" for example in self.examples)] if self.examples else []
        if any(not o.main for o in self.options) and not everything:
            lines += [
                "",
                "--help-all explains all options; a --config file sets any (`batch_size: 64`); auto: from the data.",
            ]
        return "\n".join(lines)


def _usage(argument: Option) -> str:
    text = argument.name.upper() + ("..." if argument.many else "")
    return text if argument.default is REQUIRED else f"[{text}]"


def _text(value: Any) -> str:
    """A default as `--help` shows it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return {None: "none", False: "off", True: "on"}[value] if value is None or isinstance(value, bool) else str(value)


def _kind_name(kind: Any) -> str:
    """`int | None` -> `an integer`; `Literal["a", "b"]` -> `a or b`."""
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    parts = [a for a in get_args(kind) if a is not type(None)]
    if parts and all(isinstance(a, str) for a in parts):
        return ", ".join(parts[:-1]) + " or " + parts[-1] if len(parts) > 1 else parts[0]
    return " or ".join(_kind_name(a) for a in parts) if parts and str(kind)[:5] != "tuple" else "[HEIGHT,WIDTH]"
