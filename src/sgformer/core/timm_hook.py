"""timm learns the sizes of SG-Former, whichever of the two packages is imported first.

After ``import sgformer``, ``timm.create_model("sgformer_s")`` works. If this package imported timm for that, torch and
all, every program that imports it would pay seconds and a gigabyte, if only to show a help text. So a finder on
``sys.meta_path`` waits until somebody else imports timm. It lets Python find timm where it is, and as soon as timm's
code has run, it imports :mod:`sgformer.models.registry`, whose decorators do the rest.

The registry imports no module of this package that imports timm: it could be one that is only half there, as timm may
be on its way in because that module has just asked for it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # importlib.abc, of which finders and loaders need not be, takes longer than all else here
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY = "sgformer.models.registry"


def install() -> None:
    """Have the sizes registered: now if timm is imported, else when it is."""
    if _finder not in sys.meta_path:  # first of all: another thread may import timm between these lines
        sys.meta_path.insert(0, _finder)
    if sys.modules.get("timm") is not None:  # if only half: the registry's imports wait for the thread that is at it
        _finder.found()


class _Finder:
    """Finds timm as the other finders do, and puts a `_RegisteringLoader` around its loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        finders = list(sys.meta_path)  # those before this one have been asked
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # a folder of that name without __init__.py has none
                    spec.loader = cast("Loader", _RegisteringLoader(spec.loader, self))
                return spec
        return None

    def found(self) -> None:
        """timm is there: import the registry, and have done.

        What that raises is for whoever imports timm to see; at the next attempt it is raised again.
        """
        if importlib.util.find_spec(REGISTRY) is not None:  # sgformer-runtime is without it
            importlib.import_module(REGISTRY)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


class _RegisteringLoader:
    """timm's own loader, but for what follows the execution of timm's code."""

    def __init__(self, loader: Loader, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # get_source, get_code ...: for those who look without importing
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # for importlib.resources, inspect, reload
        self._loader.exec_module(module)
        self._finder.found()


_finder = _Finder()
