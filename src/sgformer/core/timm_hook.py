"""Registers the SG-Former sizes with timm, whichever of the two packages is imported first.

After ``import sgformer``, ``timm.create_model("sgformer_s")`` works. Importing timm here, and torch with it, would cost
every program seconds and a gigabyte, even to print a help text. Instead a finder on ``sys.meta_path`` waits until timm
is imported elsewhere. It delegates to Python's own finders and, once timm has executed, imports
:mod:`sgformer.models.registry`, whose decorators register the sizes.

The registry must not import any module of this package that imports timm: that module may be only half initialised,
as when it triggered the import of timm.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # importing importlib.abc, whose classes are not needed at run time, would dominate the cost
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY = "sgformer.models.registry"


def install() -> None:
    """Register the sizes: now if timm is imported, otherwise as soon as it is."""
    if _finder not in sys.meta_path:  # first: another thread may import timm between these lines
        sys.meta_path.insert(0, _finder)
    if sys.modules.get("timm") is not None:  # if half imported, the registry's imports wait for the importing thread
        _finder.register()


class _Finder:
    """Finds timm through the other finders and wraps its loader in a `_RegisteringLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        finders = list(sys.meta_path)  # those before this one have been tried
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # a namespace package has none
                    spec.loader = cast("Loader", _RegisteringLoader(spec.loader, self))
                return spec
        return None

    def register(self) -> None:
        """timm is imported: import the registry and remove this finder.

        Errors propagate to the code that imports timm, and recur on the next attempt.
        """
        if importlib.util.find_spec(REGISTRY) is not None:  # sgformer-runtime does not contain it
            importlib.import_module(REGISTRY)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


class _RegisteringLoader:
    """timm's own loader, which registers the sizes after executing timm."""

    def __init__(self, loader: Loader, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # get_source, get_code ...: for inspection without import
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # for importlib.resources, inspect, reload
        self._loader.exec_module(module)
        self._finder.register()


_finder = _Finder()
