"""Distillation: a trained network whose probabilities a classifier learns beside the labels.

By hand: timm's distillation tasks (`timm.task`) belong to its own training script; they neither enlarge images for the
teacher nor translate between lists of classes.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.core.names import some
from sgformer.core.parse import MAX_SMALL, read_bytes
from sgformer.data.identity import names_in
from sgformer.data.preparing import Normalization, preprocessing
from sgformer.models.checkpoint import checksum
from sgformer.models.load import build_network, build_pretrained, network_name, read_weights, refuse_large
from sgformer.models.pretrained import SUFFIXES, pretrained_file

FILE_HELP = "--teacher-classes FILE (lines of CLASS, a tab, the teacher's index)"


class Teacher(nn.Module):
    """A frozen classifier that answers in the classes of the data.

    Args:
        network: (B, 3, H, W) -> (B, teacher's classes).
        reading: its preprocessing, as weights remember it.
        indices: for each class of the data, those of the teacher's classes that it stands for; no index twice.
        normalization: that of the images it will get.

    Attributes:
        checksum: over its weights and `indices`.
    """

    scale: Tensor
    shift: Tensor
    columns: Tensor
    groups: Tensor

    def __init__(
        self,
        network: nn.Module,
        reading: Mapping[str, Any],
        indices: Sequence[Sequence[int]],
        normalization: Normalization,
    ):
        super().__init__()
        self.network = network.float().requires_grad_(False)
        self.eval()
        own = preprocessing(reading)
        self.size: tuple[int, int] = own["image_size"]
        self.interpolation = "bilinear" if own["interpolation"] == "bilinear" else "bicubic"
        # One affine map from the images' normalisation to the teacher's.
        (mean, std), (given_mean, given_std) = (
            [torch.tensor(values).view(3, 1, 1) for values in pair] for pair in (own["normalization"], normalization)
        )
        groups = torch.zeros(sum(map(len, indices)), len(indices))
        groups[range(len(groups)), [k for k, group in enumerate(indices) for _ in group]] = 1
        tensors = {
            "scale": given_std / std,
            "shift": (given_mean - mean) / std,
            "columns": torch.tensor([i for group in indices for i in group]),
            "groups": groups,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.checksum = checksum(network.state_dict(), {"indices": json.dumps([list(group) for group in indices])})

    @torch.no_grad()
    def forward(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        """Probabilities of the data's classes, as if there were no others.

        Args:
            images: (B, 3, H, W) float, normalised as for the student; resized here to the teacher's size.
            temperature: divides the logits.

        Returns:
            (B, classes) float32; each row sums to 1.
        """
        images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.interpolation, antialias=True)
        logits = self.network(images).float()[:, self.columns]
        with torch.autocast(images.device.type, enabled=False):
            return (logits / temperature).softmax(1) @ self.groups


def open_teacher(
    source: str, classes_file: str | None, classes: Sequence[str], normalization: Normalization
) -> tuple[Teacher, str]:
    """The teacher of `--teacher`, and a line about it.

    Args:
        source: a run folder, a weights file, NAME=FILE with the file of a plain state dict, or a timm network's name.
        classes_file: see `read_indices`; None: classes are found by name.
        classes: of the data.
        normalization: of the data's images.

    Raises:
        UserError: there is no such network, it is no classifier, or a class of the data is not among its classes.
    """
    network, reading = read_network(source)
    count = int(getattr(network, "num_classes", 0))
    if not count:
        raise UserError(f"--teacher {source}: holds no classifier, only a backbone")
    given = read_indices(classes_file, classes, count) if classes_file else {}
    indices = find_indices(classes, class_names(network, reading), given, source)
    teacher = Teacher(network, reading, indices, normalization)
    parameters = sum(p.numel() for p in network.parameters())
    used = len(teacher.columns)
    return teacher, (
        f"teacher {network_name(network)}, {parameters / 1e6:.1f} M parameters, at "
        f"{'x'.join(map(str, teacher.size))}, {'all' if used == count else f'{used} of'} its {count} classes"
    )


def read_network(source: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The teacher's network with its classifier, and its metadata."""
    name, equals, file = source.partition("=")
    try:
        if Path(source).exists() or pretrained_file(source) or (Path(source).suffix in SUFFIXES and not equals):
            weights = read_weights(source).in_full()
        elif equals:
            weights = read_weights(file, name).in_full()
        else:
            network = build_pretrained(source)
            return network, network.metadata  # type: ignore[return-value]
        if weights.architecture is not None:
            raise UserError(f"{weights.path} holds a network for {weights.task}, not a classifier")
        refuse_large(weights, advice="")
        return build_network(weights), weights.metadata
    except UserError as error:
        hint = "; for a plain state dict, --teacher NAME=FILE" if "pass --model" in str(error) else ""
        raise UserError(f"--teacher {source}: {str(error).partition('; pass --model')[0]}{hint}") from None


def class_names(network: nn.Module, metadata: Mapping[str, Any]) -> list[tuple[str, ...]] | None:
    """The names that each class of a network goes by; None if they are unknown.

    Names come from the weights, or else are those of the ImageNet list of this length: the WordNet ID, as ImageNet's
    folders are called, and every synonym.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    stored = names_in(metadata)
    if stored and len(stored) == network.num_classes:
        return stored
    subset = infer_imagenet_subset(network)
    if subset is None:
        return None
    known = ImageNetInfo(subset)
    pairs = zip(known.label_names(), known.label_descriptions(), strict=True)
    return [(label, text, *text.split(", ")) for label, text in pairs]


def find_indices(
    classes: Sequence[str], names: Sequence[Sequence[str]] | None, given: Mapping[str, Sequence[int]], source: str
) -> list[list[int]]:
    """For each class of the data the indices of the teacher's: those given, else the one of the same name.

    A name counts as the same as written or, if none is, whatever its case and whether words are joined by spaces,
    hyphens or underscores.

    Raises:
        UserError: a class is unknown to the teacher, fits several of its classes, or shares one with another class.
    """
    exact, loose = defaultdict(set), defaultdict(set)
    for index, aliases in enumerate(names or ()):
        for alias in aliases:
            exact[alias].add(index)
            loose[_loose(alias)].add(index)
    found = {name: sorted(given.get(name) or exact.get(name) or loose.get(_loose(name)) or ()) for name in classes}
    unknown = [repr(name) for name, indices in found.items() if not indices]
    several = [f"{name!r} ({some(list(map(str, i)))})" for name, i in found.items() if len(i) > 1 and name not in given]
    owners = Counter(index for indices in found.values() for index in indices)
    shared = [
        f"class {index} ({' and '.join(repr(name) for name, indices in found.items() if index in indices)})"
        for index, count in owners.items()
        if count > 1
    ]
    problems = [
        f"it has no class for {some(unknown)} ({len(unknown)} of {len(classes)})" if unknown and names else "",
        f"its classes have no names, so that {some(unknown)} cannot be found" if unknown and not names else "",
        f"several of its classes fit {some(several)}" if several else "",
        f"more than one class of the data is its {some(shared)}" if shared and not several else "",
    ]
    if any(problems):
        raise UserError(f"--teacher {source}: {'; '.join(filter(None, problems))}: pass {FILE_HELP}")
    return list(found.values())


def _loose(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def read_indices(path: str, classes: Sequence[str], count: int) -> dict[str, list[int]]:
    """Read a file of lines `CLASS<TAB>INDEX`, or `CLASS<TAB>INDEX,INDEX,...` for a class that joins several.

    Args:
        path: the file; it need not list classes that the teacher knows by name.
        classes: of the data.
        count: of the teacher's classes; indices start at 0.

    Raises:
        UserError: the file is unreadable, or a line of it is invalid.
    """
    try:
        lines = read_bytes(path, MAX_SMALL).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, text = line.partition("\t")
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and len(part) < 10 for part in parts):
            raise UserError(f"{path}: line {number}: expected CLASS, a tab, INDEX or INDEX,INDEX,..., got {line!r}")
        indices = [int(part) for part in parts]
        if name not in classes:
            raise UserError(f"{path}: line {number}: the data has no class {name!r} (classes: {some(classes)})")
        if name in found or len(set(indices)) < len(indices):
            raise UserError(f"{path}: line {number}: {name!r} or an index of it is listed twice")
        if max(indices) >= count:
            raise UserError(f"{path}: line {number}: the teacher has classes 0 to {count - 1}, got {max(indices)}")
        found[name] = indices
    return found


class StepShare:
    """The share of training steps' time that a part of them takes.

    Measured on the second to fourth step and on every twentieth, as it synchronises the device. Not at round numbers,
    where checkpoints and rows of the log are written.
    """

    def __init__(self) -> None:
        self.steps = 0  # measured
        self._number = -1
        self._part = self._whole = 0.0
        self._start: float | None = None

    @property
    def share(self) -> float | None:
        """From 0 to 1; None before the first measurement."""
        return self._part / self._whole if self.steps else None

    def start(self, device: torch.device) -> None:
        """A step begins."""
        self._number += 1
        self._start = _now(device) if 1 <= self._number <= 3 or self._number % 20 == 7 else None

    @contextmanager
    def part(self, device: torch.device) -> Iterator[None]:
        """The part of a step to measure."""
        start = None if self._start is None else _now(device)
        yield
        if start is not None:
            self._part += _now(device) - start

    def stop(self, device: torch.device) -> None:
        """A step ends."""
        if self._start is not None:
            self._whole += _now(device) - self._start
            self._start = None
            self.steps += 1


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
