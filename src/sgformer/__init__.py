"""SG-Former: the self-guided vision transformer, with its token reallocation made visible."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from sgformer._version import __version__
from sgformer.core.errors import UserError
from sgformer.models.config import VARIANTS, SGFormerConfig, StageConfig

try:
    import timm

    from sgformer.backends.optimize import optimize
    from sgformer.models.backbone import Inspection, SGFormer
    from sgformer.models.checkpoint import save_model
    from sgformer.models.registry import from_fields  # its module registers the sizes with timm
    from sgformer.models.released import load_released
    from sgformer.models.significance import register_significance
except ModuleNotFoundError as error:  # to predict with an exported file, none of this is needed
    if error.name not in ("torch", "torchvision", "timm", "safetensors", "sgformer.models.backbone"):
        raise

__all__ = [
    "Inspection",
    "SGFormer",
    "SGFormerConfig",
    "SelfGuidedAttention1d",
    "StageConfig",
    "UserError",
    "__version__",
    "accelerate",
    "create_model",
    "evaluate",
    "explain",
    "export",
    "load_model",
    "load_released",
    "optimize",
    "predict",
    "register_significance",
    "save_model",
    "train",
]

# Training and what comes with it: imported when first asked for, so that `import sgformer` stays light.
_LATER = {
    "train": "sgformer.tasks.api",
    "evaluate": "sgformer.tasks.api",
    "predict": "sgformer.tasks.api",
    "explain": "sgformer.tasks.api",
    "export": "sgformer.tasks.api",
    "load_model": "sgformer.tasks.api",
    "accelerate": "sgformer.backends.native_autograd",
    "SelfGuidedAttention1d": "sgformer.models.sequence",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        if name in __all__:
            raise ImportError(f"sgformer.{name} needs torch and timm, which are not installed: pip install sgformer")
        raise AttributeError(f"module 'sgformer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def create_model(name: str | SGFormerConfig, **options: Any) -> SGFormer:
    """Build a network with fresh weights.

    Args:
        name: "sgformer_n", "_t", "_s", "_m" or "_b", or a config of your own.
        options: any field of :class:`SGFormerConfig` (``num_classes``, ``in_chans``, ``img_size``, ``coarse``,
            ``drop_path_rate`` ...), ``global_pool``, ``device`` and ``dtype``; by name also timm's own
            (``features_only``, ``out_indices`` ...), exactly as with ``timm.create_model``.

    Raises:
        UserError: no such size.
        ValueError: an option's value makes no sense; the message has the value.
    """
    if isinstance(name, SGFormerConfig):
        return from_fields(name, **options)
    if name not in VARIANTS:
        close = difflib.get_close_matches(str(name), VARIANTS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no model named {name!r}: {hint}the sizes are {', '.join(VARIANTS)}")
    return timm.create_model(name, **options)  # type: ignore[return-value]
