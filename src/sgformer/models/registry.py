"""The sizes of SG-Former in timm's registry: ``import sgformer`` makes ``timm.create_model("sgformer_s")`` work.

Imported as soon as timm is, see :mod:`sgformer.core.timm_hook`. The backbone itself works without timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, register_notrace_module

from sgformer.models.backbone import (
    HybridScaleAttention,
    MultiScaleAttention,
    PlainAttention,
    SelfGuidedAttention,
    SGFormer,
)
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.layers import PositionTable
from sgformer.models.pretrained import PRETRAINED, TAG, TRAINED_AT, pretrained_file

# Their padding and grouping follow the grid's size, which a symbolic trace cannot know.
for leaf in (PositionTable, HybridScaleAttention, MultiScaleAttention, SelfGuidedAttention, PlainAttention):
    register_notrace_module(leaf)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "SG-Former: Self-guided Transformer with Evolving Token Reallocation",
        "paper_ids": "arXiv:2308.12216",
        **kwargs,
    }


default_cfgs: dict[str, Any] = {}


def _register(variant: str) -> Callable[..., SGFormer]:
    """Add a size to timm's registry under its name; timm looks up functions by name in their module."""

    def build_variant(pretrained: bool = False, **kwargs: Any) -> SGFormer:
        from timm.models import PretrainedCfg

        from sgformer.models.create import build

        if not pretrained and not kwargs.get("pretrained_cfg"):
            kwargs["pretrained_cfg"] = PretrainedCfg(**_cfg())  # 1,000 classes at 224, whatever the weights have
        elif pretrained:
            kwargs.setdefault("img_size", TRAINED_AT.get(variant, (224, 224)))
        return build(variant, VARIANTS[variant], pretrained, **kwargs)

    build_variant.__name__ = build_variant.__qualname__ = variant
    build_variant.__doc__ = f"SG-Former with the stages of ``VARIANTS[{variant!r}]``."
    return register_model(build_variant)


def register_size(name: str, config: SGFormerConfig) -> None:
    """Add a size of SG-Former, by which :func:`sgformer.create_model`, timm and `--model` then know it.

    Args:
        name: begins with "sgformer_".
        config: its stages.

    Raises:
        ValueError: the name is taken by another size, or begins otherwise.
    """
    if not name.startswith("sgformer_"):
        raise ValueError(f"sizes are called sgformer_SOMETHING, got {name!r}")
    if VARIANTS.setdefault(name, config) != config:
        raise ValueError(f"there is a size of the name {name!r} already")
    if name not in globals():
        known: dict[str, Any] = {name: _cfg()}
        if name in PRETRAINED:
            known = {f"{name}.{TAG}": _cfg(file=str(pretrained_file(name)), **PRETRAINED[name])}
        default_cfgs.update(generate_default_cfgs(known))
        globals()[name] = _register(name)


for variant, config in list(VARIANTS.items()):
    register_size(variant, config)
