"""Ask a trained network where it looked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgformer.api import find_images, open_image
from sgformer.backbone import SGFormer
from sgformer.data.transforms import denormalize, eval_transform, preprocessing
from sgformer.errors import UserError
from sgformer.training.device import find_device
from sgformer.training.weights import load_weights
from sgformer.viz.significance import Explanation


def explain_batch(model: SGFormer, x: Tensor) -> list[Explanation]:
    """One forward pass, turned into what can be drawn.

    Args:
        model: in the mode it is to be asked in; it is not changed.
        x: (B, 3, H, W), normalised with ImageNet's mean and deviation.

    Returns:
        One :class:`~sgformer.viz.significance.Explanation` per image, read from the pass's own maps and indices.
    """
    with torch.no_grad():
        seen = model.inspect(x)
    images = (denormalize(x).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    regions = {key: groups.region_map().cpu().numpy() for key, groups in seen.tokens.items()}
    tokens = {key: groups.token_map().cpu().numpy() for key, groups in seen.tokens.items()}
    rates = {key: [len(weight) for weight in groups.weights] for key, groups in seen.tokens.items()}

    def of(maps: Mapping[str, Any], i: int) -> dict[str, np.ndarray]:
        return {key: m[i] if isinstance(m, np.ndarray) else m[i].float().cpu().numpy() for key, m in maps.items()}

    return [
        Explanation(
            image=images[i],
            title="",
            logits=seen.logits[i].float().cpu().numpy(),
            significance=of(seen.significance, i),
            coarse=of(seen.coarse, i),
            fine=of(seen.fine, i),
            regions=of(regions, i),
            tokens=of(tokens, i),
            rates=rates,
        )
        for i in range(len(x))
    ]


def explain(
    weights: str | os.PathLike[str],
    images: str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image],
    *,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> Iterator[Explanation]:
    """Where a trained network looked on images, one after the other.

    Args:
        weights: a run folder, a weights file, or a released `.pth`.
        images: one or several files, folders (searched for images, also nested) or PIL images.
        image_size: pixels; by default as trained.
        limit: so many images at most, spread evenly over those given.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: weights or an image cannot be read, or the weights are of another network than SG-Former.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    sources = list(find_images(images))
    if limit is not None and len(sources) > limit:
        sources = [sources[i * len(sources) // limit] for i in range(limit)]
    model, metadata = load_weights(weights)
    if not isinstance(model, SGFormer):
        raise UserError(
            f"{weights}: holds {metadata.get('model', 'another network')}, which has no significance to show"
        )
    where = find_device(device)
    model.eval().to(where)
    if image_size is not None:
        metadata = {**metadata, "image_size": image_size}
    transform = eval_transform(**preprocessing(metadata))
    for source in sources:
        (seen,) = explain_batch(model, transform(open_image(source))[None].to(where))
        name = "" if isinstance(source, Image.Image) else source.name
        yield dataclasses.replace(seen, title="\n".join(filter(None, [name, _say(seen.logits, metadata)])))


def _say(logits: np.ndarray, metadata: Mapping[str, Any]) -> str:
    """`cat 97 %`, or nothing for a network that names no classes."""
    names = metadata.get("classes") or []
    if logits.ndim != 1 or len(names) != len(logits):
        return ""
    shares = np.exp(logits - logits.max())
    best = int(logits.argmax())
    return f"{names[best]}  {100 * shares[best] / shares.sum():.0f} %"
