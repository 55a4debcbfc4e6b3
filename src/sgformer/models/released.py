"""Reads and writes checkpoints in the authors' released format: the mapping between their parameters and ours.

Pickles are read with torch's restricted unpickler, so they cannot execute code.
"""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sgformer.core.errors import UserError, first_sentence
from sgformer.core.names import printable
from sgformer.models.backbone import SGFormer
from sgformer.models.checkpoint import POSITION, build_from_tensors, check_kinds, save_model, shown
from sgformer.models.config import VARIANTS, SGFormerConfig

# The released parameters that form one of ours, within a block's attention. Rows are stacked in this order; "name[0]"
# and "name[1]" are the first and second half of a released matrix's rows (keys and values).
HYBRID = {
    "reduce": ["sr"],
    "reduce_norm": ["norm"],
    "kv_coarse": ["kv1"],
    "proj_in": ["q1", "q2", "kv2", "lepe_linear"],
}
GUIDED = {"proj_in": ["q", "lepe_linear"], "kv": ["kv1[0]", "kv2[0]", "kv1[1]", "kv2[1]"]}
PLAIN = {"proj_in": ["q", "kv", "lepe_linear"]}
EVERY = {"local": ["lepe_conv"], "proj": ["proj"]}
# Rows of each released matrix within a stacked one, in units of C / 2; 1 if it is the only one.
ROWS = {"q1": 1, "q2": 1, "kv2": 2, "q": 2, "kv": 4, "lepe_linear": 2}


def released_map(config: SGFormerConfig) -> dict[str, list[str]]:
    """The released modules that form each of ours: {ours: [released, ...]}, without ".weight" and ".bias"."""
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
    """Convert released names to ours, keeping the dtype.

    Raises:
        UserError: tensors are missing or unknown; lists them.
    """
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
    listed = [f"{len(n)} {what}: {shown(n)}" for what, n in (("missing", missing), ("unknown", sorted(unused))) if n]
    if listed:
        raise UserError(f"{source}: not a released SG-Former checkpoint of this size ({'; '.join(listed)})")
    return result


def to_released(model: SGFormer) -> dict[str, Tensor]:
    """Convert the model's weights to the released names and shapes: the inverse of :func:`load_released`.

    Requires a square position table and a classifier, which every released checkpoint has.
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
    """The published size that matches a released state dict's dims and depths, with its number of classes.

    Raises:
        UserError: no published size matches.
    """
    depths = [0] * 4
    for name in state_dict:
        if m := re.match(r"block([1-4])\.(\d+)\.", name):
            depths[int(m[1]) - 1] = max(depths[int(m[1]) - 1], int(m[2]) + 1)
    dims = [_rows(state_dict.get(f"norm{s}.weight"), -1) for s in range(1, 5)]
    for config in VARIANTS.values():
        if [s.dim for s in config.stages] == dims and [s.depth for s in config.stages] == depths:
            stem, head = state_dict.get("patch_embed1.conv.0.c.weight"), state_dict.get("head.weight")
            return config.replace(
                in_chans=3 if stem is None or stem.ndim != 4 else stem.shape[1],
                num_classes=_rows(head, 0),
            )
    held = shown(state_dict)
    raise UserError(f"{source}: not a released SG-Former of a known size (dims {dims}, depths {depths}; holds {held})")


def _rows(tensor: Tensor | None, without: int) -> int:
    return without if tensor is None or not tensor.ndim else tensor.shape[0]


def load_released(source: str | os.PathLike[str] | Mapping[str, Any], raw: bool = False, **overrides: Any) -> SGFormer:
    """Build the model of a released checkpoint; the size is detected from the weights, the dtype is kept.

    Args:
        source: a released .pth file, or its content: a state dict, or a dict with one under "state_dict_ema" or
            "state_dict".
        raw: use "state_dict" even if there are averaged weights ("state_dict_ema", the reported ones).
        overrides: SGFormerConfig fields to change, as in :func:`load_model`.

    Raises:
        UserError: the file is unreadable or would run code, or names or shapes do not fit; lists them.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    state_dict = pick_weights(source if isinstance(source, Mapping) else read_pickle(Path(source)), raw, name)
    stored, tensors = adapt(state_dict, name)
    return build_from_tensors(stored.replace(**overrides), tensors, name)


def is_released(state_dict: Mapping[str, Any]) -> bool:
    """Whether the parameter names are those of the published code."""
    return any(name.startswith(("patch_embed1.", "block1.")) for name in state_dict)


def adapt(state_dict: Mapping[str, Tensor], source: str) -> tuple[SGFormerConfig, dict[str, Tensor]]:
    """Convert a released state dict to a config and tensors under our names.

    Raises:
        UserError: as :func:`load_released`.
    """
    foreign = [name for name, tensor in state_dict.items() if not tensor.is_floating_point()]
    if foreign:
        raise UserError(f"{source}: weights must be floating point ({shown(foreign)})")
    stored = detect_variant(state_dict, source)
    tensors = from_released(state_dict, stored, source)
    rows, columns, _ = tensors[POSITION].shape
    return stored.replace(img_size=(4 * rows, 4 * columns)), tensors


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], raw: bool = False) -> SGFormer:
    """Convert a released checkpoint to a safetensors file; returns the model.

    Raises:
        UserError: as :func:`load_released`; then nothing is written.
    """
    model = load_released(source, raw)
    save_model(model, target, {"source": Path(source).name, "weights": "raw" if raw else "ema where stored"})
    return model


def pick_weights(loaded: Any, raw: bool, source: str) -> dict[str, Tensor]:
    """Extract the tensors of a loaded checkpoint, averaged ones if present unless ``raw``; strips "module.".

    Raises:
        UserError: the checkpoint holds no tensors.
    """
    if not isinstance(loaded, Mapping):
        raise UserError(f"{source}: holds a {type(loaded).__name__}, not a checkpoint")
    keys = ("state_dict",) if raw else ("state_dict_ema", "state_dict")
    inner = next((loaded[k] for k in keys if isinstance(loaded.get(k), Mapping)), loaded)
    tensors = {k.removeprefix("module."): v for k, v in inner.items() if isinstance(v, Tensor) and isinstance(k, str)}
    if not tensors:
        held = shown(k if isinstance(k, str) else type(k).__name__ for k in inner)
        raise UserError(f"{source}: holds no weights (keys: {held})")
    check_kinds(tensors, source)
    return {name: tensor.clone() for name, tensor in tensors.items()}  # of a file that is mapped, and may be replaced


def read_pickle(path: Path) -> Any:
    """Read a file of ``torch.save`` that holds tensors, built-in types and ``argparse.Namespace`` only.

    Raises:
        UserError: the file is missing or damaged, loading it would run code, or it would be larger than the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        archive = check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # released files carry their options under "args"
            # Mapped, no tensor reaches beyond the file, which torch before 2.10 did not check.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        return _within(loaded, path)
    except pickle.UnpicklingError as e:
        if m := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise UserError(f"{path}: rejected, because loading it would run code ({m[1]})") from None
        raise UserError(f"{path}: not a readable checkpoint ({first_sentence(e)})") from None
    except UserError:
        raise
    except Exception as e:  # torch's readers raise many types on broken files
        raise UserError(f"{path}: truncated or damaged ({first_sentence(e)})") from None


def check_archive(path: Path) -> bool:
    """Whether a file of ``torch.save`` is a ZIP archive, as since torch 1.6; its entries and its pickles are checked.

    torch unpacks compressed entries to any size, and skips those marked as folders: their tensors would be
    uninitialised memory.

    Raises:
        UserError: an entry is damaged, compressed or marked as a folder; a pickle would take too long, or calls
            something else than what tensors are made with; or the archive's end is not where torch looks for it.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # which is how torch tells
            file.seek(0)
            for _ in range(5):  # a magic number, a version, the machine, the object, the names of its storages
                _check_pickle(file, path)
            return False
        if not _ends_as_written(file):  # torch's reader might find other entries than Python's
            raise UserError(f"{path}: truncated or damaged (no ZIP archive as torch.save writes it)")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            name = printable(entry.filename)[:80]
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise UserError(f"{path}: rejected: its entry {name} is compressed, as torch.save never does")
            if entry.is_dir() or entry.external_attr & 16:
                raise UserError(f"{path}: damaged: its entry {name} is corrupt")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path}: damaged: its entries overlap")
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"{path}: damaged: its entry {printable(damaged)[:80]} is corrupt")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as file:
                    _check_pickle(file, path)
    return True


END = struct.Struct("<4s4H2LH")  # of a ZIP archive; its last three: the directory's length and place, the comment's
LOCATOR, END_64 = struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")  # before it, of those that torch writes


def _ends_as_written(file: IO[bytes]) -> bool:
    """Whether nothing lies between a ZIP archive's directory, its end and the end of its comment, and all of these are
    where they say. Readers differ in where they look for them otherwise."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2**16 - 128))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + END.size > len(tail):
        return False
    *_, length, place, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail):
        return False
    if (before := at - LOCATOR.size) >= 0 and tail[before : before + 4] == b"PK\6\7":
        found, at = LOCATOR.unpack_from(tail, before)[2], before - END_64.size
        if found != start + at or at < 0 or tail[at : at + 4] != b"PK\6\6":
            return False
        *_, length, place = END_64.unpack_from(tail, at)
    return place + length == start + at


MAX_TUPLES = 16  # in each other; a saved tensor takes three
MAX_OPERATIONS = 2**20  # of a pickle; a thousand tensors, their averages and the state of AdamW take 100,000

#: What pickles of weights may name. torch's restricted unpickler also calls functions that make a gigabyte of a number
#: or of a few letters (bytearray, _codecs.encode), tensors by their size, and copies of repeated numbers.
CALLABLE = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|(__builtin__|builtins) (set|complex)|"
    r"torch (Size|device|[a-z]\w+)|torch(\.cuda)? \w+Storage|torch\.storage (Typed|Untyped)Storage|"
    r"torch\.serialization _get_layout|torch\.nn\.parameter Parameter|"
    r"torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|sparse_tensor|"
    r"parameter_with_state|meta_tensor_no_storage)"
)


def _check_pickle(file: IO[bytes], path: Path) -> None:
    """Check the next pickle in a file before it is loaded.

    Raises:
        UserError: it is none, too long, names something else than `CALLABLE`, or nests tuples deeply: where each holds
            the one below it twice, sixty of them, a few hundred bytes, take longer to hash than the world is old.
    """
    try:
        for number, (operation, argument, level) in enumerate(_levels(file)):
            if operation.name == "GLOBAL" and not CALLABLE.fullmatch(argument):
                name = printable(argument.replace(" ", "."))[:80]
                raise UserError(f"{path}: rejected, because loading it would run code ({name})")
            if level > MAX_TUPLES:
                raise UserError(f"{path}: rejected: its tuples are nested deeper than {MAX_TUPLES} levels")
            if number > MAX_OPERATIONS:
                raise UserError(f"{path}: rejected: it holds more than {MAX_OPERATIONS} values besides its tensors")
    except UserError:
        raise
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: truncated or damaged ({first_sentence(error)})") from None


def _levels(file: IO[bytes]) -> Iterator[tuple[Any, Any, int]]:
    """The operations of a pickle and their arguments; and after each, of the value on top of the stack, how many tuples
    are in each other. Goes through the operations with levels for values."""
    frames: list[list[int]] = [[]]  # of the stack, one for each open mark
    memo: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(file):
        name, top = operation.name, frames[-1]
        if name == "MARK":
            frames.append([])
        elif name == "TUPLE":
            frames[-2].append(1 + max(frames.pop(), default=0))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            top[-int(name[-1]) :] = [1 + max(top[-int(name[-1]) :])]
        elif name in ("APPENDS", "SETITEMS"):
            frames.pop()
        elif name in ("REDUCE", "NEWOBJ"):
            top[-2:] = [0]
        elif name in ("BUILD", "APPEND", "SETITEM"):
            del top[-2 if name == "SETITEM" else -1 :]
        elif name.endswith("GET"):
            top.append(memo.get(argument, 0))
        elif name.endswith("PUT"):
            memo[argument] = top[-1]
        elif name not in ("PROTO", "BINPERSID", "STOP"):  # which leave as many values as they found
            top.append(0)
        yield operation, argument, frames[-1][-1] if frames[-1] else 0


def _within(loaded: Any, path: Path) -> Any:
    """What was loaded, if none of its tensors is larger than its storage, and all together not than the file: strides
    of 0 repeat a number, and many tensors may share one storage, as long as nobody copies them.

    Raises:
        UserError: they are.
    """
    total, left = 0, [loaded]
    seen: set[int] = set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.is_meta:
                raise UserError(f"{path}: rejected: it holds tensors without values")
            if value.layout == torch.strided:
                size = value.numel() * value.element_size()
                total += size
                if size > value.untyped_storage().nbytes() or total > 4 * path.stat().st_size:
                    raise UserError(f"{path}: rejected: its tensors are larger than the file")
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value
    return loaded


def _table_from_released(table: Tensor, source: str) -> Tensor:
    side = round((table.shape[1] if table.ndim == 3 else 0) ** 0.5)
    if table.ndim != 3 or table.shape[0] != 1 or side * side != table.shape[1] or side < 8:
        raise UserError(f"{source}: pos_embed must be (1, side * side, C) with side >= 8 (got {tuple(table.shape)})")
    return table[0].unflatten(0, (side, side))


def _stack(parts: list[Tensor], what: str) -> Tensor:
    if len({p.shape[1:] for p in parts}) > 1:
        raise UserError(f"{what}: shapes do not match (got {', '.join(str(tuple(p.shape)) for p in parts)})")
    return torch.cat(parts) if len(parts) > 1 else parts[0]
