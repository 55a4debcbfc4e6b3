"""SG-Former: the self-guided vision transformer, with its token reallocation made visible.

``import sgformer`` is quick, as it imports neither torch nor timm: a name of ``__all__`` brings its module when it is
first asked for. timm knows the sizes all the same, see :mod:`sgformer.core.timm_hook`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sgformer._version import __version__
from sgformer.core import terminal as terminal  # the log loses what does not print
from sgformer.core import timm_hook
from sgformer.core.errors import UserError, how_to_install
from sgformer.models.config import VARIANTS as VARIANTS  # as docs/interop.md has it
from sgformer.models.config import SGFormerConfig, StageConfig

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from sgformer.backends.native_autograd import accelerate
    from sgformer.backends.optimize import optimize
    from sgformer.data.formats import register_format
    from sgformer.exporting.formats import register_export
    from sgformer.heads.registry import register_detector, register_head
    from sgformer.models.backbone import Inspection, SGFormer
    from sgformer.models.checkpoint import save_model
    from sgformer.models.create import create_model
    from sgformer.models.registry import register_size
    from sgformer.models.released import load_released
    from sgformer.models.significance import register_significance, set_token_budget
    from sgformer.sequence import SelfGuidedAttention1d, SGFormer1d, Stem1d
    from sgformer.tasks.api import embed, evaluate, explain, export, load_model, predict, train

__all__ = [
    "Inspection",
    "SGFormer",
    "SGFormer1d",
    "SGFormerConfig",
    "SelfGuidedAttention1d",
    "StageConfig",
    "Stem1d",
    "UserError",
    "__version__",
    "accelerate",
    "create_model",
    "embed",
    "evaluate",
    "explain",
    "export",
    "load_model",
    "load_released",
    "optimize",
    "predict",
    "register_detector",
    "register_export",
    "register_format",
    "register_head",
    "register_significance",
    "register_size",
    "save_model",
    "set_token_budget",
    "train",
]

# Public name -> the module it comes from. No package in this folder may have such a name: once imported, it would stand
# in the name's place.
_HOMES = {
    "Inspection": "sgformer.models.backbone",
    "SGFormer": "sgformer.models.backbone",
    "SGFormer1d": "sgformer.sequence",
    "SelfGuidedAttention1d": "sgformer.sequence",
    "Stem1d": "sgformer.sequence",
    "accelerate": "sgformer.backends.native_autograd",
    "create_model": "sgformer.models.create",
    "embed": "sgformer.tasks.api",
    "evaluate": "sgformer.tasks.api",
    "explain": "sgformer.tasks.api",
    "export": "sgformer.tasks.api",
    "load_model": "sgformer.tasks.api",
    "load_released": "sgformer.models.released",
    "optimize": "sgformer.backends.optimize",
    "predict": "sgformer.tasks.api",
    "register_detector": "sgformer.heads.registry",
    "register_export": "sgformer.exporting.formats",
    "register_format": "sgformer.data.formats",
    "register_head": "sgformer.heads.registry",
    "register_significance": "sgformer.models.significance",
    "register_size": "sgformer.models.registry",
    "save_model": "sgformer.models.checkpoint",
    "set_token_budget": "sgformer.models.significance",
    "train": "sgformer.tasks.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sgformer' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:  # to predict with an exported file, none of these is needed
        missing = str(error.name)
        if missing.split(".")[0] not in ("torch", "torchvision", "timm", "safetensors", "sgformer"):
            raise
        raise ImportError(
            f"sgformer.{name} needs torch and timm, which are not installed: {how_to_install()}"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


timm_hook.install()
