"""Weights, whoever wrote them: a run folder, a safetensors file of any task, a released checkpoint, a checkpoint of
timm's `train.py`, a plain state dict. A file is read once; what it holds is then built as often as needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgformer.core.errors import UserError, first_sentence
from sgformer.core.names import nearest, some
from sgformer.models import checkpoint
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.released import adapt, is_released, pick_weights, read_pickle

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
TIMM = "timm"  # the "format" of files that hold another model of timm's registry
DENSE = "sgformer-dense"  # the "format" of files that hold a backbone with its heads
BACKBONE = "backbone.network."  # where those have the backbone

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Weights:
    """Tensors in memory, and what their file says of them.

    Attributes:
        path: the file.
        tensors: by name.
        metadata: `task`, `model`, `classes`, `image_size` and so on, as far as the file says; empty for foreign files.
        model: the network's name in timm's registry; None for an SG-Former that is none of the registered sizes.
        config: of an SG-Former, by itself or below heads; None for other networks.
        architecture: of a backbone with heads, the plain dict it is built from; None of a backbone alone.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    config: SGFormerConfig | None = None
    architecture: Mapping[str, Any] | None = None

    @property
    def task(self) -> str:
        """What the network does; a backbone alone classifies."""
        return str(self.metadata.get("task", "classify"))

    def backbone(self) -> Weights:
        """The backbone without heads; itself where there are none."""
        if self.architecture is None:
            return self
        tensors = {n.removeprefix(BACKBONE): t for n, t in self.tensors.items() if n.startswith(BACKBONE)}
        about = {key: self.metadata[key] for key in ("model", "mean", "std") if key in self.metadata}
        return dataclasses.replace(self, tensors=tensors, metadata=about, architecture=None)


def find_weights(source: Source) -> Path:
    """The file that a WEIGHTS argument means: itself, or a run's `best.safetensors` (else `last.safetensors`).

    Raises:
        UserError: there is no such file, it is of another kind, or the run has no weights yet.
    """
    path = Path(source)
    if path.is_dir():
        for name in ("best.safetensors", "last.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no best.safetensors in it; is it the folder of a run that finished an epoch?")
    if not path.is_file():
        raise UserError(f"{path}: no such file or run folder")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: weights are a run folder, a .safetensors file or a checkpoint ({', '.join(SUFFIXES[1:])})"
        )
    return path


def read_metadata(source: Source) -> dict[str, Any]:
    """What was saved beside the weights, without reading those; empty for foreign files."""
    path = find_weights(source)
    return checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}


def read_weights(source: Source, model: str | None = None) -> Weights:
    """Read a WEIGHTS argument.

    Args:
        source: see `find_weights`.
        model: the network's name, where the file does not say it; elsewhere it has to be the file's.

    Raises:
        UserError: unreadable, of an unknown network, or of another one than `model`.
    """
    path = find_weights(source)
    if path.suffix == ".safetensors":
        tensors, header = checkpoint.read_safetensors(path)
        found = _of_file(path, tensors, header) or _of_state_dict(path, tensors, model)
    else:
        loaded = read_pickle(path)
        said = loaded.get("arch") if isinstance(loaded, Mapping) else None  # as timm's train.py writes it
        found = _of_state_dict(
            path, pick_weights(loaded, False, str(path)), model, said if isinstance(said, str) else None
        )
    if model is not None and found.model not in (None, model):
        raise UserError(f"{source} holds {found.model}, not --model {model}")
    if model is not None and found.model is None and not model.startswith("sgformer"):
        raise UserError(f"{source} holds an SG-Former, not --model {model}")
    return found


def _of_file(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Weights | None:
    """Weights that this package wrote; None where it did not."""
    kind = header.get("format")
    if kind not in (checkpoint.FORMAT, TIMM, DENSE):
        return None
    try:
        metadata = json.loads(header.get("metadata", "{}"))
        if kind == TIMM:
            return Weights(path, tensors, metadata, str(metadata["timm_model"]))
        if kind == checkpoint.FORMAT:
            config = SGFormerConfig.from_dict(json.loads(header["config"]))
            return Weights(path, tensors, metadata, metadata.get("model") or size_name(config), config)
        architecture = metadata["architecture"]
        stored = architecture["backbone"].get("config")
        return Weights(
            path,
            tensors,
            metadata,
            architecture["backbone"]["model"],
            SGFormerConfig.from_dict(stored) if stored else None,
            architecture,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its config cannot be read ({first_sentence(error)})") from None


def _of_state_dict(path: Path, tensors: dict[str, Tensor], model: str | None, said: str | None = None) -> Weights:
    """Weights of other programs, recognised by the names of their tensors."""
    if is_released(tensors):
        config, adapted = adapt(tensors, str(path))
        return Weights(path, adapted, {}, size_name(config), config)
    name = said or model or _sgformer_name(tensors)
    if name is None:
        raise UserError(
            f"{path}: holds {len(tensors)} tensors ({some(list(tensors), 3)}) but not the network's name; "
            "say it with --model (a name of timm.list_models(), or sgformer_{n,t,s,m,b})"
        )
    if name in VARIANTS:
        table, head = tensors.get(checkpoint.POSITION), tensors.get(checkpoint.CLASSIFIER[0])
        config = VARIANTS[name].replace(num_classes=0 if head is None else head.shape[0])
        if table is not None and table.ndim == 3:
            config = config.replace(img_size=(4 * table.shape[0], 4 * table.shape[1]))
        return Weights(path, tensors, {"model": name}, name, config)
    import timm

    if not timm.is_model(name):
        raise UserError(f"{path}: unknown model {name!r}{nearest(name, timm.list_models())}")
    return Weights(path, tensors, {"model": name, **_preprocessing(name)}, name)


def _sgformer_name(tensors: Mapping[str, Tensor]) -> str | None:
    """The size whose widths and depths a state dict under our names has."""
    for name, config in VARIANTS.items():
        last = [f"stages.{i}.blocks.{stage.depth - 1}.norm1.weight" for i, stage in enumerate(config.stages)]
        beyond = [f"stages.{i}.blocks.{stage.depth}.norm1.weight" for i, stage in enumerate(config.stages)]
        widths = [tensors[n].shape[0] if n in tensors else 0 for n in last]
        if widths == [stage.dim for stage in config.stages] and not any(n in tensors for n in beyond):
            return name
    return None


def _preprocessing(name: str) -> dict[str, Any]:
    """How a network of timm was trained to see images, for its own weights from elsewhere."""
    import timm

    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is None:
        return {}
    size = known.test_input_size or known.input_size
    return {
        "image_size": list(size[1:]),
        "crop_pct": known.test_crop_pct or known.crop_pct,
        "interpolation": known.interpolation,
        "mean": list(known.mean),
        "std": list(known.std),
    }


def build_network(weights: Weights, num_classes: int | None = None, **options: Any) -> nn.Module:
    """The backbone, with its classifier if it has one, in evaluation mode and in the stored dtype.

    Args:
        weights: of a backbone alone, or with heads, which are left out.
        num_classes: another number than the stored one makes a fresh classifier.
        options: for SG-Former, fields of its config (`drop_path_rate`, `coarse`, `img_size`); for other models of timm,
            arguments of `timm.create_model`.

    Raises:
        UserError: tensors that do not fit the network, or an option that it does not take.
    """
    held = weights.backbone()
    if held.config is None:
        return _build_timm(held, weights.architecture is not None, num_classes, options)
    if num_classes is not None:
        options["num_classes"] = num_classes
    elif weights.architecture is not None:
        options["num_classes"] = 0
    try:
        config = held.config.replace(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot load {weights.path} with {options}: {error}") from None
    model = checkpoint.build_from_tensors(config, held.tensors, str(weights.path))
    model.metadata = dict(held.metadata)  # type: ignore[assignment]
    if held.model:
        model.pretrained_cfg = {"architecture": held.model}  # type: ignore[assignment]
    return model


def _build_timm(held: Weights, pruned: bool, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    assert held.model is not None
    model: Any = build_model(held.model, held.metadata.get("num_classes"), **options)
    head = next((name for name, module in model.named_modules() if module is model.get_classifier()), "")
    weight = held.tensors.get(f"{head}.weight")
    stored = 0 if weight is None else weight.shape[0]
    if stored != model.num_classes:
        model.reset_classifier(stored)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if pruned:  # below heads, what comes after the last map is gone
        expected = {name: shape for name, shape in expected.items() if name in held.tensors}
    checkpoint.complain(str(held.path), held.tensors, expected)
    model.load_state_dict(dict(held.tensors), strict=False)
    if num_classes not in (None, stored):
        model.reset_classifier(num_classes)
    model.metadata = dict(held.metadata)
    return model.eval()


def build_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """A network of timm's registry, `sgformer_*` included, with fresh weights.

    Args:
        name: in the registry.
        num_classes: of its classifier; 0: none; None: as many as the network has by default.
        options: arguments of `timm.create_model`.

    Raises:
        UserError: no such name (the nearest one is given), or the network does not take an option.
    """
    import timm  # not at the head: our own networks do without, which saves seconds

    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    options = options if num_classes is None else {"num_classes": num_classes, **options}
    if name not in VARIANTS and num_classes == 0:
        with suppress(TypeError):  # window transformers of timm insist on their training size unless told otherwise
            return timm.create_model(name, strict_img_size=False, **options)
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take {', '.join(options) or 'what timm passes'}: {error}") from None


def load_weights(
    source: Source, num_classes: int | None = None, model: str | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """`read_weights` and `build_network` in one: the network and its metadata."""
    weights = read_weights(source, model)
    return build_network(weights, num_classes, **options), dict(weights.backbone().metadata)


def load_dense(build: Callable[[Mapping[str, Any]], Any], weights: Weights) -> Any:
    """A backbone with heads: what `build` makes of the architecture, with the weights in it, in evaluation mode.

    Raises:
        UserError: the tensors do not fit.
    """
    assert weights.architecture is not None
    model = build(weights.architecture)
    checkpoint.complain(str(weights.path), weights.tensors, {n: t.shape for n, t in model.state_dict().items()})
    model.load_state_dict(dict(weights.tensors))
    model.metadata = dict(weights.metadata)
    return model.eval()


def take_fitting(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The model, with those of the tensors that have the name and shape of one of its own."""
    own = model.state_dict()
    fitting = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    model.load_state_dict({**own, **fitting})
    return model


def save_weights(model: nn.Module, path: Source, metadata: Mapping[str, Any]) -> None:
    """Write weights and JSON-able metadata to a safetensors file, whole or not at all.

    A network with an `architecture` is a backbone with heads; that plain dict, from which it is built again, is stored.
    """
    if isinstance(model, SGFormer):
        checkpoint.save_model(model, path, metadata)
        return
    about = dict(metadata)
    if hasattr(model, "architecture"):
        kind, about["architecture"] = DENSE, model.architecture
    else:
        known: Any = model.pretrained_cfg
        kind, about = TIMM, {"timm_model": known["architecture"], "num_classes": model.num_classes, **about}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    checkpoint.write_safetensors(tensors, path, {"format": kind, "metadata": json.dumps(about)})


def network_name(network: nn.Module) -> str:
    """The network's name in timm's registry; "sgformer" for an SG-Former of a size of one's own."""
    known = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if isinstance(network, SGFormer):
        return known or size_name(network.config) or "sgformer"
    return known or type(network).__name__


def size_name(config: SGFormerConfig) -> str | None:
    """The registered size with these widths, heads and depths; regions and scales may be a user's own."""

    def size(one: SGFormerConfig) -> list[tuple[int, int, int]]:
        return [(stage.dim, stage.heads, stage.depth) for stage in one.stages]

    return next((name for name, known in VARIANTS.items() if size(known) == size(config)), None)
