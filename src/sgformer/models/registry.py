"""The sizes of SG-Former in timm's registry: ``import sgformer`` makes ``timm.create_model("sgformer_s")`` work."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module

from sgformer.models.backbone import (
    HybridScaleAttention,
    MultiScaleAttention,
    PlainAttention,
    SelfGuidedAttention,
    SGFormer,
)
from sgformer.models.checkpoint import fit_to_model
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.layers import PositionTable

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


default_cfgs = generate_default_cfgs({name: _cfg() for name in VARIANTS})


def build(variant: str, config: SGFormerConfig, pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """timm's builder: ``kwargs`` are SGFormerConfig's fields, SGFormer's arguments, and timm's own."""
    out_indices = kwargs.pop("out_indices", tuple(range(len(config.stages))))
    return build_model_with_cfg(
        from_fields,
        variant,
        pretrained,
        base=config,
        pretrained_filter_fn=fit_to_model,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def from_fields(base: SGFormerConfig, **kwargs: Any) -> SGFormer:
    """A network from a config, with some of its fields and SGFormer's own arguments given by name."""
    own = {name: kwargs.pop(name) for name in ("global_pool", "device", "dtype") if name in kwargs}
    return SGFormer(base.replace(**kwargs), **own)


@register_model
def sgformer_n(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former nano, ours: for laptops and tests."""
    return build("sgformer_n", VARIANTS["sgformer_n"], pretrained, **kwargs)


@register_model
def sgformer_t(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former tiny, ours: between nano and the paper's smallest."""
    return build("sgformer_t", VARIANTS["sgformer_t"], pretrained, **kwargs)


@register_model
def sgformer_s(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-S of the paper."""
    return build("sgformer_s", VARIANTS["sgformer_s"], pretrained, **kwargs)


@register_model
def sgformer_m(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-M of the paper."""
    return build("sgformer_m", VARIANTS["sgformer_m"], pretrained, **kwargs)


@register_model
def sgformer_b(pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """SG-Former-B of the paper."""
    return build("sgformer_b", VARIANTS["sgformer_b"], pretrained, **kwargs)
