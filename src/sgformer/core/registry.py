"""Things that are found by name: heads, detectors, export formats. A new one is a file, here or a plugin's.

    HEADS = Registry("head", "sgformer.heads", "register_head")     # and in sgformer/heads/upernet.py:
                                                                    # @register_head("upernet")
                                                                    # class UPerNet(nn.Module): ...

Help texts and settings need the names alone, so a file of the package is not imported before its thing is asked for:
the names are read off the lines that register them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.names import nearest


class Registry:
    """Names and what they stand for.

    Args:
        what: a word for messages, e.g. "head".
        package: whose files register what comes with this package.
        decorator: as it stands there at the beginning of a line: ``@DECORATOR("NAME"...``.
    """

    def __init__(self, what: str, package: str, decorator: str):
        self.what, self.package, self.decorator = what, package, decorator
        self.added: dict[str, Any] = {}

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """Name -> the module of the package that registers it. Nothing is imported but the package itself."""
        line = re.compile(rf'^@{self.decorator}\("([^"]+)"', re.MULTILINE)
        found = {}
        for file in pkgutil.iter_modules(importlib.import_module(self.package).__path__, f"{self.package}."):
            spec = file.module_finder.find_spec(file.name, None)  # type: ignore[call-arg]
            text = spec.loader.get_source(file.name) if spec and spec.loader else None  # type: ignore[attr-defined]
            found.update(dict.fromkeys(line.findall(text or ""), file.name))
        return found

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator: add a thing under a name.

        Raises:
            ValueError: the name is taken by another thing.
        """

        def add(thing: Any) -> Any:
            held = self.added.get(name)
            theirs = self.files.get(name, thing.__module__)
            if theirs != thing.__module__ or (held is not None and held.__qualname__ != thing.__qualname__):
                raise ValueError(f"there is a {self.what} of the name {name!r} already")
            self.added[name] = thing
            return thing

        return add

    def names(self) -> list[str]:
        """What there is, in alphabetical order but for plugins, which come last."""
        return [*sorted(self.files), *(name for name in self.added if name not in self.files)]

    def check(self, name: Any, option: str) -> None:
        """Raise UserError unless there is something of this name; `option` is what named it, e.g. "--head"."""
        known = self.names()
        if name not in known:
            raise UserError(f"{option} is one of {', '.join(known)}, got {name}{nearest(str(name), known)}")

    def get(self, name: str, source: Any = None) -> Any:
        """What a name stands for; its file is imported.

        Args:
            name: one of `names`.
            source: of the name, for the message.

        Raises:
            UserError: there is nothing of this name.
        """
        if name not in self.added:
            if name not in self.files:
                known = self.names()
                where = "" if source is None else f"{source}: "
                raise UserError(
                    f"{where}no {self.what} named {name!r}{nearest(str(name), known)}; there are {', '.join(known)}, "
                    "and those of the files given with --plugin"
                )
            importlib.import_module(self.files[name])
        return self.added[name]
