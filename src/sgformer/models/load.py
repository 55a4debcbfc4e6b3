"""Weights in a file that says how to rebuild the network: SG-Former's own format, and the like for any timm model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

import timm
from torch import nn

from sgformer.core.errors import UserError
from sgformer.models import checkpoint
from sgformer.models.backbone import SGFormer
from sgformer.training.config import nearest

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
TIMM = "timm"  # the "format" of files that hold another model of timm's registry


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The file that a RUN_OR_WEIGHTS argument means: itself, or a run's `best.safetensors`.

    Raises:
        UserError: there is no such file, it is of another kind, or the run has no weights yet.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("best.safetensors", "last.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no best.safetensors in it; is it the folder of a run that finished an epoch?")
    if not path.is_file():
        raise UserError(f"{path}: no such file or run folder")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are a run folder, a .safetensors file or a released .pth")
    return path


def save_weights(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Write weights and JSON-able metadata to a safetensors file, whole or not at all."""
    if hasattr(model, "save"):  # a backbone with its heads
        model.save(path, metadata)  # type: ignore[operator]
        return
    if isinstance(model, SGFormer):
        checkpoint.save_model(model, path, metadata)
        return
    known: Any = model.pretrained_cfg
    about = {"timm_model": known["architecture"], "num_classes": model.num_classes, **metadata}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    checkpoint.write_safetensors(tensors, path, {"format": TIMM, "metadata": dumps(about)})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved beside the weights, without reading those; empty for released files. Path: see `find_weights`."""
    path = find_weights(path)
    return checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network of timm's registry, `sgformer_*` included, with a fresh head for `num_classes`.

    Raises:
        UserError: no such name (the nearest one is given), or the network does not take an option.
    """
    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    try:
        return timm.create_model(name, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take {', '.join(options) or 'what timm passes'}: {error}") from None


def load_weights(
    path: str | os.PathLike[str], num_classes: int | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a network from a run folder, a weights file, or a released `.pth`.

    Args:
        path: see `find_weights`.
        num_classes: another number of classes than the stored one makes a fresh head.
        options: for SG-Former, fields of its config (`drop_path_rate`, `coarse`, `img_size`); for other models of timm,
            arguments of `timm.create_model`.

    Returns:
        The network, in evaluation mode, and its metadata (empty for released files).

    Raises:
        UserError: unreadable, or not weights of a known network.
    """
    path = find_weights(path)
    overrides = options if num_classes is None else {"num_classes": num_classes, **options}
    if path.suffix != ".safetensors":
        return checkpoint.load_released(path, **overrides), {}
    if checkpoint.read_header(path).get("format") != TIMM:
        ours = checkpoint.load_model(path, **overrides)
        return ours, dict(ours.metadata)  # type: ignore[arg-type]
    metadata = checkpoint.read_metadata(path)
    model = timm.create_model(metadata["timm_model"], num_classes=metadata["num_classes"], **options).eval()
    model.load_state_dict(checkpoint.read_safetensors(path)[0])
    if num_classes not in (None, metadata["num_classes"]):
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model, metadata
