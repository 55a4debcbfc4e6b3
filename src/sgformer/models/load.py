"""Weights of any origin: a run folder, a safetensors file of any task, a released checkpoint, a checkpoint of timm's
`train.py`, a bare state dict. A file is read once; networks can be built from it any number of times.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgformer.core.errors import UserError, first_line, first_sentence
from sgformer.core.files import distrust_run, to_json
from sgformer.core.names import nearest, printable, some
from sgformer.models import checkpoint
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.metadata import check_architecture, parse_config, parse_metadata
from sgformer.models.pretrained import FOLDER, PRETRAINED, SUFFIXES, pretrained_file
from sgformer.models.released import adapt, is_released, pick_weights, read_pickle
from sgformer.models.significance import set_token_budget

TIMM = "timm"  # the "format" of files with another model of timm's registry
DENSE = "sgformer-dense"  # the "format" of files with a backbone and its heads
BACKBONE = "backbone.network."  # the backbone's prefix in those
# What the image size that a file names may take: half a GiB, or 64 times the bytes of its weights if that is more.
MOST_NAMED, PER_BYTE = 2**29, 64
SPARE = 2**22  # parameters of layers after the last feature map that a backbone below heads may lack, besides its own

Source = str | os.PathLike[str]
log = logging.getLogger("sgformer")


@dataclass(frozen=True)
class Weights:
    """Tensors in memory, and the description in their file.

    Attributes:
        path: the file.
        tensors: by name.
        metadata: `task`, `model`, `classes`, `image_size` and so on, as far as stored; empty for foreign files.
        model: the network's name in timm's registry; None for an SG-Former of no registered size.
        config: the config of an SG-Former, with or without heads; None for other networks.
        architecture: the dict that a backbone with heads is built from; None for a backbone alone.
        token_budget: that networks built from these weights get; not stored.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    config: SGFormerConfig | None = None
    architecture: Mapping[str, Any] | None = None
    token_budget: float = 1.0

    @property
    def task(self) -> str:
        """The network's task; "classify" for a backbone alone."""
        return str(self.metadata.get("task", "classify"))

    def in_full(self) -> Weights:
        """The weights in float32, in which images come; `self` if all are."""
        if all(t.dtype == torch.float32 or not t.is_floating_point() for t in self.tensors.values()):
            return self
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def backbone(self) -> Weights:
        """The weights without heads; `self` if there are none."""
        if self.architecture is None:
            return self
        tensors = {n.removeprefix(BACKBONE): t for n, t in self.tensors.items() if n.startswith(BACKBONE)}
        about = {key: self.metadata[key] for key in ("model", "mean", "std") if key in self.metadata}
        return dataclasses.replace(self, tensors=tensors, metadata=about, architecture=None)


def find_weights(source: Source) -> Path:
    """Resolve a WEIGHTS argument to a file: itself, a run's `best.safetensors` or else `last.safetensors`, or the
    package's own of a name (`sgformer_n`). A path that exists comes before a name.

    Raises:
        UserError: the file does not exist or is of another kind, or the run has no weights yet.
    """
    path = Path(source)
    distrust_run(path)
    if path.is_dir():
        for name in ("best.safetensors", "last.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: holds no best.safetensors; is it the folder of a run that finished an epoch?")
    if not path.exists() and (packaged := pretrained_file(str(source))):
        return packaged
    if not path.is_file():
        known = f"; of the sizes, {', '.join(PRETRAINED)} comes with weights" if str(source) in VARIANTS else ""
        raise UserError(f"{path}: no such file or run folder{known}")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: weights must be a run folder, a .safetensors file or a checkpoint ({', '.join(SUFFIXES[1:])})"
        )
    return path


def read_metadata(source: Source) -> dict[str, Any]:
    """Read the metadata without the weights; empty for foreign files."""
    path = find_weights(source)
    return checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}


def read_weights(source: Source, model: str | None = None) -> Weights:
    """Read a WEIGHTS argument.

    Args:
        source: see `find_weights`.
        model: the network's name, required if the file does not state it; must match if it does.

    Raises:
        UserError: the file is unreadable, or holds NaN, infinity, an unknown network or another one than `model`.
    """
    path = find_weights(source)
    if path.suffix == ".safetensors":
        tensors, header = checkpoint.read_safetensors(path)
        if path.parent == FOLDER:  # stored in half precision to be small; computing is done in full
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        weights = _of_file(path, tensors, header) or _of_state_dict(path, tensors, model)
    else:
        loaded = read_pickle(path)
        arch = loaded.get("arch") if isinstance(loaded, Mapping) else None  # written by timm's train.py
        weights = _of_state_dict(
            path, pick_weights(loaded, False, str(path)), model, arch if isinstance(arch, str) else None
        )
    if model is not None and weights.model not in (None, model):
        raise UserError(f"{source} holds {weights.model}, not --model {model}")
    if model is not None and weights.model is None and not model.startswith("sgformer"):
        raise UserError(f"{source} holds an SG-Former, not --model {model}")
    _refuse_broken(weights)
    return weights


def _refuse_broken(weights: Weights) -> None:
    """Raise UserError for weights with which every result means nothing."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    broken = [
        name
        for name, t in weights.tensors.items()
        # The sum is a third of the work, and finite unless values are very large.
        if t.dtype in floats and not t.sum(dtype=torch.float32).isfinite() and not t.isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{weights.path}: NaN or infinite values in {some(broken, 3)}: its training diverged, or the file is "
            "damaged; take the weights of an earlier step"
        )


def refuse_large(weights: Weights, advice: str = "; if that is meant, say so with --image-size") -> None:
    """Raise UserError if the image size that a file names needs far more memory than a network of its size should: a
    stranger may have written it. To be called where no other size is given.

    The need is an estimate from peaks measured with N, S and B at 768 to 1,536 pixels: 4 bytes for each channel of a
    block and its MLP at the stage's resolution, four times over, and 250 bytes a pixel at least.
    """
    named = weights.metadata.get("short_side", weights.metadata.get("image_size"))
    if named is None:
        return
    sides = [named, named] if isinstance(named, int) else list(named)
    config = weights.config
    widest = max(s.dim / 4**i for i, s in enumerate(config.stages)) * (1 + config.mlp_ratio) if config else 0
    needed = sides[0] * sides[1] * max(250.0, widest)
    stored = sum(t.numel() * t.element_size() for t in weights.tensors.values())
    if needed > max(MOST_NAMED, PER_BYTE * stored):
        raise UserError(
            f"{weights.path}: names an image size of {sides[0]} x {sides[1]} pixels, at which it would take some "
            f"{needed / 2**30:.1f} GiB{advice}"
        )


def _of_file(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Weights | None:
    """Weights from a file of this package; None for files of other programs."""
    kind = header.get("format")
    if kind not in (checkpoint.FORMAT, TIMM, DENSE):
        return None
    metadata = parse_metadata(header.get("metadata", "{}"), path)
    try:
        if kind == TIMM:
            return Weights(path, tensors, metadata, registered(metadata["timm_model"]))
        if kind == checkpoint.FORMAT:
            config = parse_config(header["config"])
            checkpoint.check_config(config, {name: tuple(t.shape) for name, t in tensors.items()})
            return Weights(path, tensors, metadata, _name(metadata.get("model"), config), config)
        architecture = metadata["architecture"]
        backbone, name = check_architecture(architecture), architecture["backbone"]["model"]
        if backbone is not None:
            inner = {n.removeprefix(BACKBONE): tuple(t.shape) for n, t in tensors.items() if n.startswith(BACKBONE)}
            checkpoint.check_config(backbone, inner)
        name = _name(name, backbone) if backbone else registered(name)
        return Weights(path, tensors, metadata, name, backbone, architecture)
    except (ValueError, KeyError) as error:
        lacks = isinstance(error, KeyError)
        raise UserError(f"{path}: its config cannot be read ({'no ' * lacks}{first_line(error)})") from None


def _of_state_dict(path: Path, tensors: dict[str, Tensor], model: str | None, arch: str | None = None) -> Weights:
    """Weights of other programs, identified by `arch`, `model` or the names of their tensors."""
    if is_released(tensors):
        config, adapted = adapt(tensors, str(path))
        return Weights(path, adapted, {}, size_name(config), config)
    name = arch or model or _sgformer_name(tensors)
    if name is None:
        raise UserError(
            f"{path}: holds {len(tensors)} tensors ({checkpoint.shown(tensors)}) but not the network's name; "
            "pass --model (a name from timm.list_models(), or sgformer_{n,t,s,m,b})"
        )
    if name in VARIANTS:
        table, head = tensors.get(checkpoint.POSITION), tensors.get(checkpoint.CLASSIFIER[0])
        config = VARIANTS[name]
        with _named(path):
            config = config.replace(num_classes=0 if head is None or not head.ndim else head.shape[0])
            if table is not None and table.ndim == 3:
                config = config.replace(img_size=(4 * table.shape[0], 4 * table.shape[1]))
        return Weights(path, tensors, {"model": name}, name, config)
    with _named(path):
        name = registered(name)
    return Weights(path, tensors, {"model": name, **_preprocessing(name)}, name)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn a ValueError into a UserError that names a file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def registered(name: str) -> str:
    """A name, if it is one of timm's registry, `sgformer_*` included, with or without a tag that it knows.

    A file may hold any name: to timm, `hf-hub:...` is to be downloaded, and `local-dir:...` another folder.

    Raises:
        UserError: it is none (suggests the nearest one).
    """
    import timm  # not at the head: our own networks do without, which saves seconds

    if timm.is_model(name) and not set(name) & set(":/\\"):
        with suppress(RuntimeError):  # an unknown tag
            timm.get_pretrained_cfg(name, allow_unregistered=True)
            return name
    raise UserError(f"unknown model {printable(name)[:80]!r}{nearest(name[:80], timm.list_models())}")


def _sgformer_name(tensors: Mapping[str, Tensor]) -> str | None:
    """The registered size that matches a state dict's widths and depths, or None."""
    for name, config in VARIANTS.items():
        last = [f"stages.{i}.blocks.{stage.depth - 1}.norm1.weight" for i, stage in enumerate(config.stages)]
        beyond = [f"stages.{i}.blocks.{stage.depth}.norm1.weight" for i, stage in enumerate(config.stages)]
        widths = [tensors[n].shape[0] if n in tensors and tensors[n].ndim else 0 for n in last]
        if widths == [stage.dim for stage in config.stages] and not any(n in tensors for n in beyond):
            return name
    return None


def _preprocessing(name: str) -> dict[str, Any]:
    """The preprocessing of a timm network's pretrained weights, as metadata."""
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


def build_network(
    weights: Weights, num_classes: int | None = None, *, partial: bool = False, **options: Any
) -> nn.Module:
    """Build the backbone, with its classifier if it has one, in evaluation mode and in the stored dtype.

    Args:
        weights: of a backbone; heads are left out.
        num_classes: if it differs from the stored number, the classifier is freshly initialised.
        partial: SG-Former: tensors that do not fit under the options are freshly initialised, too, and counted in a
            warning; to train further.
        options: for SG-Former, fields of its config (`drop_path_rate`, `coarse`, `img_size`); for other models of timm,
            arguments of `timm.create_model`.

    Raises:
        UserError: the tensors do not fit the network, or it does not take an option.
    """
    backbone = weights.backbone()
    if backbone.config is None:
        return with_budget(_build_timm(backbone, weights.architecture is not None, num_classes, options), weights)
    if num_classes is not None:
        options["num_classes"] = num_classes
    elif weights.architecture is not None:
        options["num_classes"] = 0
    try:
        config = backbone.config.replace(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot load {weights.path} with {options}: {error}") from None
    model = checkpoint.build_from_tensors(config, backbone.tensors, str(weights.path), partial)
    model.metadata = dict(backbone.metadata)  # type: ignore[assignment]
    if backbone.model:
        model.pretrained_cfg = {"architecture": backbone.model}  # type: ignore[assignment]
    return with_budget(model, weights)


def with_budget(model: Any, weights: Weights) -> Any:
    """The network, with the token budget of its weights."""
    if weights.token_budget != 1:
        try:
            set_token_budget(model, weights.token_budget)
        except ValueError as error:
            raise UserError(f"--tokens: {error}") from None
    return model


def _build_timm(weights: Weights, pruned: bool, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    assert weights.model is not None
    if not pruned and "image_size" in weights.metadata:
        options = {**size_option(weights.model, weights.metadata["image_size"]), **options}

    def build(classes: int | None) -> Any:
        """With as many classes as the tensors have."""
        built: Any = build_model(str(weights.model), classes, **options)
        known = (weights.tensors[name] for name in classifier_tensors(built) if name in weights.tensors)
        stored = next((tensor.shape[0] for tensor in known if tensor.ndim), 0)
        if stored != built.num_classes:
            built.reset_classifier(stored)
        return built

    def check(built: nn.Module) -> None:
        expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
        if pruned:  # a backbone below heads has no layers after its last feature map
            lacking = sum(shape.numel() for name, shape in expected.items() if name not in weights.tensors)
            if lacking > sum(tensor.numel() for tensor in weights.tensors.values()) + SPARE:
                raise UserError(f"{weights.path}: the weights are but a small part of {weights.model}")
            expected = {name: shape for name, shape in expected.items() if name in weights.tensors}
        checkpoint.check_fit(str(weights.path), weights.tensors, expected)

    skeleton = on_meta(lambda: build(weights.metadata.get("num_classes")), check, weights)
    stored = getattr(skeleton, "num_classes", None) or None
    with _refused(weights):
        model = build(stored)
    check(model)
    stored = model.num_classes
    model.load_state_dict(dict(weights.tensors), strict=False)
    if num_classes not in (None, stored):
        model.reset_classifier(num_classes)
    model.metadata = dict(weights.metadata)
    return model.eval()


def check_classes(weights: Weights, count: int) -> None:
    """Raise UserError if the metadata name another number of classes than a network has; 0: it has no classifier."""
    names = weights.metadata.get("classes")
    if names and count not in (0, len(names)):
        raise UserError(f"{weights.path}: holds {count} classes, and its metadata name {len(names)}")


def on_meta(build: Callable[[], Any], check: Callable[[Any], None], weights: Weights) -> Any:
    """Build a network without memory and check it: what a file names may be a thousand times larger than the file.

    Returns:
        The network; None if it cannot be built so, because it computes from its weights: then the check comes later.

    Raises:
        UserError: the check fails, or the network cannot be built at all.
    """
    try:
        with torch.device("meta"):
            skeleton = build()
    except Exception as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return None
        raise _refusal(weights, error) from None
    check(skeleton)
    return skeleton


@contextmanager
def _refused(weights: Weights) -> Iterator[None]:
    """Turn what networks of others raise where they are built into a UserError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _refusal(weights, error) from None


def _refusal(weights: Weights, error: Exception) -> UserError:
    why = f"{weights.model} cannot be built as it says ({type(error).__name__}: {printable(first_line(error))})"
    text = str(error) if isinstance(error, UserError) else why
    return UserError(text if str(weights.path) in text else f"{weights.path}: {text}")


def build_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Build a freshly initialised network of timm's registry, `sgformer_*` included.

    Args:
        name: the name in the registry.
        num_classes: number of classes; 0: no classifier; None: the network's default.
        options: arguments of `timm.create_model`.

    Raises:
        UserError: unknown name (suggests the nearest one), or the network does not take an option.
    """
    import timm  # not at the head: our own networks do without, which saves seconds

    registered(name)
    options = options if num_classes is None else {"num_classes": num_classes, **options}
    if name not in VARIANTS and num_classes == 0:
        with suppress(TypeError):  # by default, timm's window transformers accept their training size only
            return timm.create_model(name, strict_img_size=False, **options)
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take {', '.join(options) or 'what timm passes'}: {error}") from None


def build_pretrained(name: str) -> nn.Module:
    """Build a network of timm's registry with its published weights, in evaluation mode; `.metadata` is as in
    `build_network`.

    timm downloads the weights once and keeps them in its cache.

    Raises:
        UserError: unknown name (suggests the nearest one), no published weights, or they cannot be downloaded.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"no such file, run or network of timm{nearest(name, timm.list_models())}")
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"timm has no pretrained weights for it here ({first_sentence(error)})") from None
    model.metadata = {"model": name, **_preprocessing(name)}
    return model.eval()


def size_option(name: str, size: int | Sequence[int]) -> dict[str, Any]:
    """The option of `build_model` that a network of timm's needs for an image size, if it takes one size only."""
    if name in VARIANTS:
        return {}
    import timm

    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    wanted = (size, size) if isinstance(size, int) else tuple(size)
    if known is None or not known.fixed_input_size or tuple(known.input_size[1:]) == wanted:
        return {}
    return {"img_size": wanted}


def load_dense(build: Callable[[Mapping[str, Any]], Any], weights: Weights) -> Any:
    """Build a backbone with heads from its stored architecture and load the weights; in evaluation mode.

    Raises:
        UserError: the tensors do not fit the architecture.
    """
    check_dense(build, weights)
    with _refused(weights):
        model = build(weights.architecture)  # type: ignore[arg-type]
    _check_dense(model, weights)
    model.load_state_dict(dict(weights.tensors))
    model.metadata = dict(weights.metadata)
    return with_budget(model.eval(), weights)


def check_dense(build: Callable[[Mapping[str, Any]], Any], weights: Weights) -> None:
    """Check the tensors of a backbone with heads against its stored architecture, before it is built.

    Raises:
        UserError: they do not fit.
    """
    architecture = weights.architecture
    if architecture is None:
        raise UserError(f"{weights.path}: holds a backbone alone, not a network for {weights.task}")
    on_meta(lambda: build(architecture), lambda model: _check_dense(model, weights), weights)


def _check_dense(model: nn.Module, weights: Weights) -> None:
    checkpoint.check_fit(str(weights.path), weights.tensors, {n: t.shape for n, t in model.state_dict().items()})


def take_rows(model: Any, weights: Weights, rows: Sequence[int | None]) -> None:
    """Initialise a network's classifier anew, and give each class the row of the weights' classifier that `rows` says.

    Args:
        model: built from the weights.
        weights: of a backbone with a classifier, or without one, of which nothing is taken.
        rows: for each class a row, or None.
    """
    model.reset_classifier(len(rows))
    parameters = dict(model.named_parameters())
    for name in classifier_tensors(model):
        own, stored = parameters[name], weights.tensors.get(name)
        if stored is not None and stored.shape[1:] == own.shape[1:]:
            with torch.no_grad():
                for new, old in enumerate(rows):
                    if old is not None:
                        own[new] = stored[old]


def classifier_tensors(model: Any) -> list[str]:
    """The names of the parameters that have a row for each class; of distilled networks, those of both classifiers."""
    layers = model.get_classifier()
    layers = layers if isinstance(layers, tuple) else (layers,)
    found = []
    for name, layer in model.named_modules():
        for inner, module in layer.named_modules() if any(layer is one for one in layers) else ():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim > 1 and weight.shape[0] == model.num_classes:
                place = ".".join(part for part in (name, inner) if part)
                found += [f"{place}.{kind}" for kind, _ in module.named_parameters(recurse=False)]
    return found


def take_fitting(model: Any, weights: Weights, others: Sequence[str] = ()) -> Any:
    """Load those tensors whose name and shape match the model's, and log which do not; returns the model.

    Args:
        model: a backbone with heads, with an `architecture`.
        weights: of such a network.
        others: how the classes differ from those of the weights, if they do: then what there is for each class starts
            afresh.
    """
    own = model.state_dict()
    of_classes = _of_classes(model) if others else set()
    kept = {name: tensor for name, tensor in weights.tensors.items() if name not in of_classes}
    fitting = {name: t for name, t in kept.items() if name in own and own[name].shape == t.shape}
    model.load_state_dict({**own, **fitting})
    if of_classes:
        log.info(f"note: what there is for each class starts afresh: {weights.path} is of others: {'; '.join(others)}")
    own = {name: tensor for name, tensor in own.items() if name not in of_classes}
    for what, names in (
        ("start afresh, as their shape differs or they are new", [name for name in own if name not in fitting]),
        ("are left out, as the network has none of the name", [name for name in kept if name not in own]),
    ):
        if names:
            total = len(own if names[0] in own else kept)
            log.info(f"note: of {weights.path}: {len(names)} of {total} tensors {what}: {checkpoint.shown(names)}")
    return model


def _of_classes(model: Any) -> set[str]:
    """The names of a network's tensors whose shape depends on the number of classes."""
    with torch.random.fork_rng(devices=[]):
        wider = type(model).build({**model.architecture, "num_classes": model.architecture["num_classes"] + 1})
    shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    return {name for name, tensor in model.state_dict().items() if shapes.get(name) != tensor.shape}


def save_weights(model: nn.Module, path: Source, metadata: Mapping[str, Any]) -> None:
    """Write weights and JSON-serialisable metadata (NaN as null) to a safetensors file, atomically.

    A network with an `architecture` is a backbone with heads; the dict is stored, so that `load_dense` can rebuild it.
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
    checkpoint.write_safetensors(tensors, path, {"format": kind, "metadata": to_json(about, None)})


def network_name(network: nn.Module) -> str:
    """The network's name in timm's registry; "sgformer" for an SG-Former of a custom size."""
    known = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if isinstance(network, SGFormer):
        return known or size_name(network.config) or "sgformer"
    return known or type(network).__name__


def _name(stored: str | None, config: SGFormerConfig) -> str | None:
    """The name that a file gives its network, unless the size of that name has other widths, heads or depths."""
    return stored if stored and stored not in VARIANTS else size_name(config)


def size_name(config: SGFormerConfig) -> str | None:
    """The registered size with these widths, heads and depths, or None; regions and scales may differ."""

    def size(one: SGFormerConfig) -> list[tuple[int, int, int]]:
        return [(stage.dim, stage.heads, stage.depth) for stage in one.stages]

    return next((name for name, known in VARIANTS.items() if size(known) == size(config)), None)
