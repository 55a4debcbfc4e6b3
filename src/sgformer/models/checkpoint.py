"""This package's weight files: safetensors with an embedded config and a checksum over everything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgformer.core.errors import UserError, first_sentence
from sgformer.core.files import replacing, to_json
from sgformer.core.names import printable, some
from sgformer.models.backbone import SGFormer
from sgformer.models.config import SGFormerConfig
from sgformer.models.layers import resize_table
from sgformer.models.metadata import parse_metadata

log = logging.getLogger("sgformer")

FORMAT = "sgformer"
CHECKSUM = "checksum"
POSITION = "stem.position.table"
CLASSIFIER = ("head.fc.weight", "head.fc.bias")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # of counters and index tables


# -- our own files ----------------------------------------------------------------------------------------------------


def save_model(model: SGFormer, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write weights, config and metadata to one safetensors file, atomically.

    Args:
        model: any SGFormer; parameters keep their dtype.
        path: the file to write; an existing file is replaced.
        metadata: JSON-serialisable entries (class names, image size, metrics ...).

    Raises:
        UserError: the folder does not exist or cannot be written.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    header = {"format": FORMAT, "config": json.dumps(model.config.to_dict()), "metadata": to_json(metadata or {}, None)}
    return write_safetensors(tensors, path, header)


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], header: dict[str, str]) -> Path:
    """Write safetensors to a temporary file, fsync it, then rename it to ``path``.

    The header gets a checksum over everything, which :func:`read_safetensors` verifies.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    try:
        with replacing(path, sync=True) as unfinished:
            unfinished.touch()
            mode = unfinished.stat().st_mode  # safetensors makes files that only their owner may read
            save_file(tensors, unfinished, {**header, CHECKSUM: checksum(tensors, header)})
            unfinished.chmod(mode)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from None
    except SafetensorError as e:
        raise UserError(f"{path}: cannot be written ({e})") from None
    return path


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the header of a safetensors file, verifying the checksum if it has one.

    Raises:
        UserError: the file is missing, truncated, damaged, or not a safetensors file.
    """
    with _opened(path) as f:
        tensors, header = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    check_kinds(tensors, path)
    written = header.pop(CHECKSUM, None)
    if written not in (None, checksum(tensors, header)):
        raise UserError(f"{path}: damaged: its checksum does not match its content")
    return tensors, header


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """BLAKE2b over a header and the names, dtypes, shapes and bytes of CPU tensors, independent of their order."""
    digest = hashlib.blake2b(json.dumps(dict(header), sort_keys=True).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b {digest.hexdigest()}"


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header only, without the tensors. Raises as :func:`read_safetensors`."""
    with _opened(path) as f:
        return f.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({first_sentence(e)})") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata that was passed to ``save_model``.

    Raises:
        UserError: as :func:`read_safetensors`, or the metadata are not JSON, or invalid.
    """
    return parse_metadata(read_header(path).get("metadata", "{}"), path)


def check_kinds(tensors: Mapping[str, Tensor], source: Any) -> None:
    """Raise UserError unless all tensors hold floats, whole numbers or truth values, one after the other."""
    for name, tensor in tensors.items():
        odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested
        if odd or tensor.dtype not in (*FLOATS, *WHOLE):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: {printable(name)[:80]} holds {kind}, which no network here has as weights")


def check_config(config: SGFormerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the tensors in a file bear out what its config says, before a network is built from that: as many
    blocks, a position table of that size, as many classes. All else shows in the shapes of the layers.

    Raises:
        ValueError: they do not.
    """
    names = {found[0]: found[1] for name in shapes if (found := re.match(r"stages\.(\d+)\.blocks\.\d+\.", name))}
    blocks = Counter(names.values())
    for i, stage in enumerate(config.stages):
        single = stage.reduction is not None and config.pairs == "single"
        depth = -(-stage.depth // 2) if single else stage.depth
        if blocks[str(i)] != depth:
            raise ValueError(f"it says {depth} blocks in stage {i + 1}, the tensors {blocks[str(i)]}")
    table = (*(-(-side // 4) for side in config.img_size), config.stages[0].dim)
    if tuple(shapes.get(POSITION, ())) != table:
        raise ValueError(f"it says a position table of {table}, the tensors {tuple(shapes.get(POSITION, ()))}")
    classes = (shapes.get(CLASSIFIER[0]) or (0,))[0]
    if classes != config.num_classes:
        raise ValueError(f"it says {config.num_classes} classes, the tensors {classes}")


def build_from_tensors(
    config: SGFormerConfig, tensors: Mapping[str, Tensor], source: str, partial: bool = False
) -> SGFormer:
    """Build a model with these weights; the classifier is freshly initialised if the number of classes differs.

    With `partial`, so is everything else that does not fit, with a warning; at least half of the tensors must.

    Raises:
        UserError: tensors are missing, unknown or of another shape; lists them.
    """
    with torch.device("meta"):
        model = SGFormer(config)
    tensors = fit_to_model(tensors, model)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    fresh = [name for name in CLASSIFIER if name in expected and name not in tensors]
    unfit = [n for n, shape in expected.items() if n not in fresh and (n not in tensors or tensors[n].shape != shape)]
    extra = [name for name in tensors if name not in expected]
    if partial and (unfit or extra) and 2 * len(unfit) < len(expected):
        counted = f"{len(unfit)} of {len(expected)} tensors do not fit this network and start fresh: {shown(unfit)}"
        left = f"{len(extra)} are left out, as it has none of the name: {shown(extra)}"
        said = [line for line, names in ((counted, unfit), (left, extra)) if names]
        log.warning(f"{source}: {'; '.join(said)}")
        whole = SGFormer(config)
        own = whole.state_dict()
        whole.load_state_dict(own | {n: t.to(own[n]) for n, t in tensors.items() if n in own and n not in unfit})
        return whole.eval()
    check_fit(source, tensors, {name: shape for name, shape in expected.items() if name not in fresh})
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise UserError(f"{source}: the weights do not fit the model ({len(odd)} hold no floats: {shown(odd)})")
    if fresh:
        dtype = next(iter(tensors.values())).dtype
        tensors.update({k: torch.empty(expected[k], dtype=dtype) for k in fresh})
    model.load_state_dict(tensors, assign=True)
    if fresh:
        model.reset_classifier(config.num_classes)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def fit_to_model(tensors: Mapping[str, Tensor], model: SGFormer) -> dict[str, Tensor]:
    """Adapt weights to a model: resize the position table, and drop a classifier for another number of classes."""
    tensors = dict(tensors)
    height, width = model.stem.position.table.shape[:2]
    if POSITION in tensors and tensors[POSITION].ndim == 3:
        tensors[POSITION] = resize_table(tensors[POSITION], (height, width)).contiguous()
    head = tensors.get(CLASSIFIER[0])
    if head is not None and head.shape[0] != model.num_classes:
        for name in CLASSIFIER:
            tensors.pop(name, None)
    return tensors


def check_fit(source: str, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise a UserError that lists missing, unknown and misshapen tensors, if there are any."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(t.shape)}, expected {tuple(expected[name])}"
        for name, t in tensors.items()
        if name in expected and t.shape != expected[name]
    ]
    parts = [f"{len(n)} {what}: {shown(n)}" for what, n in (("missing", missing), ("unknown", extra)) if n]
    parts += [f"{len(wrong)} of another shape: {shown(wrong)}"] if wrong else []
    if parts:
        raise UserError(f"{source}: the weights do not fit the model ({'; '.join(parts)})")


def shown(names: Iterable[str]) -> str:
    """The first few names of tensors, which a stranger may have chosen, and the number of the others."""
    names = list(names)
    return some([printable(name)[:80] for name in names[:4]] + names[4:], 4)
