"""Freshly initialised networks, by name or from a config, and timm's builder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg
from torch import Tensor

import sgformer.models.registry  # noqa: F401 - registers the sizes with timm
from sgformer.core.errors import UserError
from sgformer.models.backbone import SGFormer
from sgformer.models.checkpoint import check_config, fit_to_model
from sgformer.models.config import VARIANTS, SGFormerConfig


def create_model(name: str | SGFormerConfig, **options: Any) -> SGFormer:
    """Build a freshly initialised network.

    Args:
        name: "sgformer_n", "_t", "_s", "_m" or "_b", or a config of your own.
        options: any field of :class:`SGFormerConfig` (``num_classes``, ``in_chans``, ``img_size``, ``coarse``,
            ``drop_path_rate`` ...), ``global_pool``, ``device`` and ``dtype``; by name also timm's own
            (``features_only``, ``out_indices`` ...), exactly as with ``timm.create_model``.

    Raises:
        UserError: no such size.
        ValueError: the value of an option is invalid; the message has the value.
    """
    if isinstance(name, SGFormerConfig):
        return from_fields(name, **options)
    if name not in VARIANTS:
        close = difflib.get_close_matches(str(name), VARIANTS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no model named {name!r}: {hint}the sizes are {', '.join(VARIANTS)}")
    return timm.create_model(name, **options)  # type: ignore[return-value]


def from_fields(base: SGFormerConfig, **kwargs: Any) -> SGFormer:
    """Build a network from a config, overriding its fields; `kwargs` may also hold SGFormer's own arguments."""
    own = {name: kwargs.pop(name) for name in ("global_pool", "device", "dtype") if name in kwargs}
    return SGFormer(base.replace(**kwargs), **own)


def build(variant: str, config: SGFormerConfig, pretrained: bool = False, **kwargs: Any) -> SGFormer:
    """timm's builder: ``kwargs`` are SGFormerConfig's fields, SGFormer's arguments, and timm's own.

    Raises:
        ValueError: an option is unknown or its value invalid, for instance an ``output_stride`` other than 32.
    """
    if (stride := kwargs.pop("output_stride", 32)) != 32:
        raise ValueError(
            f"SG-Former has no dilated stages: output_stride must be 32 (got {stride}); "
            "for finer maps take those of strides 4, 8 and 16"
        )
    if pretrained:
        _check_folder(kwargs.get("pretrained_cfg"), config, kwargs)
    out_indices = kwargs.pop("out_indices", tuple(range(len(config.stages))))
    return build_model_with_cfg(
        from_fields,
        variant,
        pretrained,
        base=config,
        pretrained_filter_fn=_fit,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter", "flatten_sequential": True},
        **kwargs,
    )


def _check_folder(about: Any, config: SGFormerConfig, options: Mapping[str, Any]) -> None:
    """Check what the `config.json` of a folder (`local-dir:...`) says of the network against the tensors in it.

    Raises:
        ValueError: they are others.
    """
    about = about.to_dict() if hasattr(about, "to_dict") else about
    if not isinstance(about, Mapping) or about.get("source") != "local-dir":
        return
    file = Path(str(about.get("file"))) / "model.safetensors"
    if file.is_file():
        fields = {name: options[name] for name in options if name in SGFormerConfig.__dataclass_fields__}
        try:
            with safe_open(file, framework="pt") as stored:
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            classes = shapes.get("head.fc.weight", (0,))[0]
            check_config(config.replace(**{**fields, "num_classes": classes}), shapes)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file.parent}: its config does not fit its weights: {error}") from None


def _fit(tensors: Mapping[str, Tensor], model: SGFormer) -> dict[str, Tensor]:
    """Files store halves; what timm computes from them, as the sum over input channels, is rounded once."""
    return fit_to_model({n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}, model)
