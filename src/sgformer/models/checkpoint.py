"""Weights in files: ours (safetensors with the config inside), and the released ones, in and out.

This is the only room that knows foreign parameter names. Pickles are read with torch's restricted loader, so nothing in
them is ever executed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgformer.core.errors import UserError, first_line
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS, SGFormerConfig
from sgformer.models.layers import resize_table

FORMAT = "sgformer"
CHECKSUM = "checksum"
POSITION = "stem.position.table"
CLASSIFIER = ("head.fc.weight", "head.fc.bias")


# -- our own files ----------------------------------------------------------------------------------------------------


def save_model(model: SGFormer, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write weights, config and metadata to one safetensors file, whole or not at all.

    Args:
        model: any SGFormer; parameters are stored in their own dtype.
        path: the file to write; an existing one is replaced in one step.
        metadata: anything JSON can hold (class names, image size, metrics ...).

    Raises:
        UserError: the folder does not exist or cannot be written.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    header = {"format": FORMAT, "config": json.dumps(model.config.to_dict()), "metadata": json.dumps(metadata or {})}
    return write_safetensors(tensors, path, header)


def write_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike[str], header: dict[str, str]) -> Path:
    """safetensors to a temporary name beside ``path``, flushed to disk, then renamed over it.

    The header gets a checksum of everything, which :func:`read_safetensors` compares.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    try:
        os.close(handle)
        save_file(tensors, temporary, {**header, CHECKSUM: checksum(tensors, header)})
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; weights are meant to be shared
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be written ({e})") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        UserError: the file is missing, cut short, no safetensors file, or not what was written.
    """
    with _opened(path) as f:
        tensors, header = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    written = header.pop(CHECKSUM, None)
    if written not in (None, checksum(tensors, header)):
        raise UserError(f"{path}: damaged: its checksum does not match what is in it")
    return tensors, header


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Of a header and of names, types, shapes and bits of tensors on the CPU, whatever their order."""
    digest = hashlib.blake2b(json.dumps(dict(header), sort_keys=True).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b {digest.hexdigest()}"


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header alone: quick, whatever the file's size. Raises like :func:`read_safetensors`."""
    with _opened(path) as f:
        return f.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({_first_sentence(e)})") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What was given to ``save_model`` as metadata."""
    try:
        return json.loads(read_header(path).get("metadata", "{}"))
    except json.JSONDecodeError:
        raise UserError(f"{path}: its metadata is not readable") from None


def load_model(path: str | os.PathLike[str], **overrides: Any) -> SGFormer:
    """Rebuild a model from a file of ``save_model`` alone, in evaluation mode and in the stored dtype.

    Args:
        path: a safetensors file.
        overrides: SGFormerConfig fields to change. ``num_classes`` other than the stored one gives a fresh classifier;
            ``img_size`` resizes the position table.

    Returns:
        The model; ``model.metadata`` holds the file's metadata.

    Raises:
        UserError: not such a file, damaged, or its tensors do not fit its own config.
    """
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path}: holds no SG-Former config; a released checkpoint is read by `sgformer convert` or load_released"
        )
    try:
        stored = SGFormerConfig.from_dict(json.loads(header["config"]))
        metadata = json.loads(header.get("metadata", "{}"))
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: its config cannot be read ({_first_sentence(e)})") from None
    try:
        config = stored.replace(**overrides)
    except (ValueError, TypeError) as e:
        raise UserError(f"cannot load {path} with {overrides}: {e}") from None
    model = build_from_tensors(config, tensors, str(path))
    model.metadata = metadata
    return model


def build_from_tensors(config: SGFormerConfig, tensors: Mapping[str, Tensor], source: str) -> SGFormer:
    """A model with these weights; a fresh classifier where the class count differs.

    Raises:
        UserError: names missing, left over or of another shape are listed.
    """
    with torch.device("meta"):
        model = SGFormer(config)
    tensors = fit_to_model(tensors, model)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    fresh = [name for name in CLASSIFIER if name in expected and name not in tensors]
    complain(source, tensors, {name: shape for name, shape in expected.items() if name not in fresh})
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
    """Adapt weights to a model that differs in what may differ: the position grid is resized, a classifier for another
    number of classes is left out."""
    tensors = dict(tensors)
    height, width = model.stem.position.table.shape[:2]
    if POSITION in tensors and tensors[POSITION].ndim == 3:
        tensors[POSITION] = resize_table(tensors[POSITION], (height, width)).contiguous()
    head = tensors.get(CLASSIFIER[0])
    if head is not None and head.shape[0] != model.num_classes:
        for name in CLASSIFIER:
            tensors.pop(name, None)
    return tensors


def complain(source: str, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise one UserError that lists what is missing, left over or misshapen; nothing if all fits."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(t.shape)}, expected {tuple(expected[name])}"
        for name, t in tensors.items()
        if name in expected and t.shape != expected[name]
    ]
    parts = [f"{len(n)} {what}: {_some(n)}" for what, n in (("missing", missing), ("unknown", extra)) if n]
    parts += [f"{len(wrong)} of another shape: {_some(wrong)}"] if wrong else []
    if parts:
        raise UserError(f"{source}: the weights do not fit the model ({'; '.join(parts)})")


# -- released checkpoints ---------------------------------------------------------------------------------------------

# How one parameter of ours is put together from released ones, within a block's attention. Rows are stacked in this
# order; "name[0]" and "name[1]" are the first and second half of a released matrix's rows (keys and values).
HYBRID = {
    "reduce": ["sr"],
    "reduce_norm": ["norm"],
    "kv_coarse": ["kv1"],
    "proj_in": ["q1", "q2", "kv2", "lepe_linear"],
}
GUIDED = {"proj_in": ["q", "lepe_linear"], "kv": ["kv1[0]", "kv2[0]", "kv1[1]", "kv2[1]"]}
PLAIN = {"proj_in": ["q", "kv", "lepe_linear"]}
EVERY = {"local": ["lepe_conv"], "proj": ["proj"]}
# Rows of each released matrix inside a stacked one, in halves of C; 1 where only one matrix goes in.
ROWS = {"q1": 1, "q2": 1, "kv2": 2, "q": 2, "kv": 4, "lepe_linear": 2}


def released_map(config: SGFormerConfig) -> dict[str, list[str]]:
    """Our modules and the released ones each is made of: {ours: [released, ...]}, without ".weight" and ".bias"."""
    pairs: dict[str, list[str]] = {"head.fc": ["head"], "stem.norm": ["patch_embed1.norm"]}
    convs = {"stem": ("patch_embed1.conv.{}", {"conv1": 0, "conv2": 2, "conv3": 4})}
    for s in range(2, len(config.stages) + 1):
        convs[f"stages.{s - 1}.downsample"] = (f"patch_embed{s}.conv{{}}", {"expand": 1, "reduce": 2, "mix": 3})
    for ours, (theirs, names) in convs.items():
        for name, number in names.items():
            pairs[f"{ours}.{name}.conv"] = [theirs.format(number) + ".c"]
            pairs[f"{ours}.{name}.norm"] = [theirs.format(number) + ".bn"]
    for s, stage in enumerate(config.stages, start=1):
        pairs[f"stages.{s - 1}.norm"] = [f"norm{s}"]
        for j in range(stage.depth):
            block, released = f"stages.{s - 1}.blocks.{j}", f"block{s}.{j}"
            for name, theirs in (("fc1", "fc1"), ("conv", "dwconv.dwconv"), ("fc2", "fc2")):
                pairs[f"{block}.mlp.{name}"] = [f"{released}.mlp.{theirs}"]
            for name in ("norm1", "norm2"):
                pairs[f"{block}.{name}"] = [f"{released}.{name}"]
            attention = PLAIN if stage.reduction is None else HYBRID if j % 2 == 0 else GUIDED
            for name, sources in (attention | EVERY).items():
                pairs[f"{block}.attn.{name}"] = [f"{released}.attn.{source}" for source in sources]
            if attention is GUIDED:
                for i in range(len(stage.regions)):
                    pairs[f"{block}.attn.aggregate.{i}"] = [f"{released}.attn.f{i + 1}"]
    return pairs


def from_released(state_dict: Mapping[str, Tensor], config: SGFormerConfig, source: str) -> dict[str, Tensor]:
    """Released names to ours, dtype kept. Raises UserError listing what is missing or left over."""
    with torch.device("meta"):
        expected = {name: t.shape for name, t in SGFormer(config).state_dict().items()}
    unused = set(state_dict)
    missing: list[str] = []

    def rows(name: str, leaf: str) -> Tensor | None:
        base, half = (name[:-3], int(name[-2])) if name.endswith("]") else (name, None)
        full = f"{base}.{leaf}"
        if full not in state_dict:
            missing.append(full)
            return None
        unused.discard(full)
        return state_dict[full] if half is None else state_dict[full].chunk(2)[half]

    result: dict[str, Tensor] = {}
    if "pos_embed" in state_dict:
        unused.discard("pos_embed")
        result[POSITION] = _table_from_released(state_dict["pos_embed"], source)
    else:
        missing.append("pos_embed")
    for ours, theirs in released_map(config).items():
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in expected:
                parts = [rows(name, leaf) for name in theirs]
                known = [p for p in parts if p is not None]
                if len(known) == len(parts):
                    result[f"{ours}.{leaf}"] = _stack(known, f"{source}: {theirs[0]}.{leaf}")
    listed = [f"{len(n)} {what}: {_some(n)}" for what, n in (("missing", missing), ("unknown", sorted(unused))) if n]
    if listed:
        raise UserError(f"{source}: not a released SG-Former checkpoint of this size ({'; '.join(listed)})")
    return result


def to_released(model: SGFormer) -> dict[str, Tensor]:
    """The model's weights under the released names and shapes: the inverse of :func:`load_released`.

    Needs the square position table of the released layout and a classifier, as every released checkpoint has them.
    """
    state = model.state_dict()
    result = {"pos_embed": state[POSITION].flatten(0, 1)[None]}
    halves: dict[str, dict[int, Tensor]] = {}
    for ours, theirs in released_map(model.config).items():
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" not in state:
                continue
            tensor = state[f"{ours}.{leaf}"]
            lengths = [ROWS.get(name.rsplit(".", 1)[-1], 1) for name in theirs]
            unit = tensor.shape[0] // sum(lengths)
            for name, part in zip(theirs, tensor.split([n * unit for n in lengths]), strict=True):
                if name.endswith("]"):
                    halves.setdefault(f"{name[:-3]}.{leaf}", {})[int(name[-2])] = part
                else:
                    result[f"{name}.{leaf}"] = part
    result.update({name: torch.cat([parts[0], parts[1]]) for name, parts in halves.items()})
    return {name: t.detach().clone() for name, t in result.items()}


def detect_variant(state_dict: Mapping[str, Tensor], source: str = "checkpoint") -> SGFormerConfig:
    """The published size whose dims and depths a released state dict has, with its number of classes.

    Raises:
        UserError: no such size, or not an SG-Former state dict.
    """
    depths = [0] * 4
    for name in state_dict:
        if m := re.match(r"block([1-4])\.(\d+)\.", name):
            depths[int(m[1]) - 1] = max(depths[int(m[1]) - 1], int(m[2]) + 1)
    norms = [state_dict.get(f"norm{s}.weight") for s in range(1, 5)]
    dims = [-1 if t is None else t.shape[0] for t in norms]
    for config in VARIANTS.values():
        if [s.dim for s in config.stages] == dims and [s.depth for s in config.stages] == depths:
            stem, head = state_dict.get("patch_embed1.conv.0.c.weight"), state_dict.get("head.weight")
            return config.replace(
                in_chans=3 if stem is None or stem.ndim != 4 else stem.shape[1],
                num_classes=0 if head is None else head.shape[0],
            )
    names = _some(list(state_dict))
    raise UserError(f"{source}: not a released SG-Former of a known size (dims {dims}, depths {depths}; holds {names})")


def load_released(source: str | os.PathLike[str] | Mapping[str, Any], raw: bool = False, **overrides: Any) -> SGFormer:
    """Build the model of a released checkpoint; the size is read off the weights, the dtype is kept.

    Args:
        source: a released .pth file, or what ``torch.load`` gave: a state dict, or a dict that holds one under
            "state_dict_ema" or "state_dict".
        raw: take "state_dict" even where there are averaged weights ("state_dict_ema", the reported ones).
        overrides: SGFormerConfig fields to change, as in :func:`load_model`.

    Raises:
        UserError: unreadable, would run code, or names and shapes that do not fit; one line that lists them.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    state_dict = _pick_weights(source if isinstance(source, Mapping) else _read_pickle(Path(source)), raw, name)
    stored = detect_variant(state_dict, name)
    tensors = from_released(state_dict, stored, name)
    table = tensors[POSITION]
    stored = stored.replace(img_size=(4 * table.shape[0], 4 * table.shape[1]))
    return build_from_tensors(stored.replace(**overrides), tensors, name)


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], raw: bool = False) -> SGFormer:
    """Released checkpoint in, safetensors file out; returns the model.

    Raises:
        UserError: as :func:`load_released`; nothing is written then.
    """
    model = load_released(source, raw)
    save_model(model, target, {"source": Path(source).name, "weights": "raw" if raw else "ema where stored"})
    return model


def _pick_weights(loaded: Any, raw: bool, source: str) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise UserError(f"{source}: holds a {type(loaded).__name__}, not a checkpoint")
    keys = ("state_dict",) if raw else ("state_dict_ema", "state_dict")
    inner = next((loaded[k] for k in keys if isinstance(loaded.get(k), Mapping)), loaded)
    tensors = {str(k).removeprefix("module."): v for k, v in inner.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{source}: holds no weights (keys: {_some([str(k) for k in inner])})")
    foreign = [k for k, v in tensors.items() if not v.is_floating_point()]
    if foreign:
        raise UserError(f"{source}: weights must be floating point ({_some(foreign)})")
    return tensors


def _read_pickle(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # What is marked as a folder, torch does not read: its tensors would be whatever was in the memory.
                folders = (entry.filename for entry in archive.infolist() if entry.is_dir() or entry.external_attr & 16)
                damaged = archive.testzip() or next(folders, None)
            if damaged is not None:
                raise UserError(f"{path}: damaged: {damaged} in it is not what was written")
        with torch.serialization.safe_globals([argparse.Namespace]):  # released files carry their options under "args"
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if m := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise UserError(f"{path}: refused, because loading it would run code ({m[1]})") from None
        raise UserError(f"{path}: not a readable checkpoint ({_first_sentence(e)})") from None
    except UserError:
        raise
    except Exception as e:  # torch's readers fail in a zoo of ways on broken files
        raise UserError(f"{path}: cut short or damaged ({_first_sentence(e)})") from None


def _table_from_released(table: Tensor, source: str) -> Tensor:
    side = round((table.shape[1] if table.ndim == 3 else 0) ** 0.5)
    if table.ndim != 3 or table.shape[0] != 1 or side * side != table.shape[1] or side < 8:
        raise UserError(f"{source}: pos_embed must be (1, side * side, C) with side >= 8 (got {tuple(table.shape)})")
    return table[0].unflatten(0, (side, side))


def _stack(parts: list[Tensor], what: str) -> Tensor:
    if len({p.shape[1:] for p in parts}) > 1:
        raise UserError(f"{what}: shapes do not go together (got {', '.join(str(tuple(p.shape)) for p in parts)})")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_sentence(error: BaseException) -> str:
    return first_line(error).split(". ")[0]
