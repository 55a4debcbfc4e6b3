"""Explain what a trained network attended to, whatever it was trained for.

An :class:`Explainer` joins a network with what it takes to explain an image: how the image is read for it, one forward
pass that keeps every map, and the result as a picture. Each task has one, made from the class here.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.data.image import list_images, open_image
from sgformer.data.preparing import IMAGENET, Normalization, denormalize
from sgformer.models.backbone import GuidedBlock, Inspection, SGFormer
from sgformer.models.significance import make_source
from sgformer.results import Explanation

#: An image as people have it: a file, a PIL image, a (H, W, 3) uint8 array, or a tensor as the network takes it.
Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def explain_batch(model: SGFormer, x: Tensor, normalization: Normalization = IMAGENET) -> list[Explanation]:
    """One forward pass, turned into what can be drawn.

    Args:
        model: in the mode it is to run in; it is not changed.
        x: (B, 3, H, W), normalised.
        normalization: of x.

    Returns:
        One :class:`~sgformer.results.Explanation` per image, read from the pass's own maps and indices.
    """
    with torch.no_grad():
        seen = model.inspect(x)
    assert seen.logits is not None
    images, logits = pixels(x, normalization), seen.logits.float().cpu().numpy()
    return [
        dataclasses.replace(one, logits=said)
        for one, said in zip(explanations(model, seen, images), logits, strict=True)
    ]


def pixels(x: Tensor, normalization: Normalization = IMAGENET) -> np.ndarray:
    """(B, C, H, W) normalised -> (B, H, W, 3) uint8; other than three channels come out as their mean, in grey."""
    if x.shape[1] == 3:
        shown = denormalize(x, normalization)
    else:
        grey = x.float().cpu().mean(1, keepdim=True)
        low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
        shown = ((grey - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)
    return (shown.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def explanations(model: SGFormer, seen: Inspection, images: np.ndarray) -> list[Explanation]:
    """What an inspected pass over a batch saw, image by image; images (B, H, W, 3) uint8 as the network got them."""
    regions = {key: groups.region_map().cpu().numpy() for key, groups in seen.tokens.items()}
    tokens = {key: groups.token_map().cpu().numpy() for key, groups in seen.tokens.items()}
    rates = {key: [r.rate for r in model.config.stages[int(key.split(".")[0]) - 1].regions] for key in seen.tokens}

    def of(maps: Mapping[str, Any], i: int) -> dict[str, np.ndarray]:
        return {key: m[i] if isinstance(m, np.ndarray) else m[i].float().cpu().numpy() for key, m in maps.items()}

    return [
        Explanation(
            image=image,
            title="",
            significance=of(seen.significance, i),
            coarse=of(seen.coarse, i),
            fine=of(seen.fine, i),
            regions=of(regions, i),
            tokens=of(tokens, i),
            rates=rates,
        )
        for i, image in enumerate(images)
    ]


class Explainer(ABC):
    """Explains images by one kind of network.

    Args:
        model: the network; it runs in evaluation mode, and is left in the mode it was in.
        metadata: of its weights: `classes`, `image_size` and so on, as far as known.

    Raises:
        UserError: another network than SG-Former, which has no significance.
    """

    #: What is less certain is left out, where a network is certain of single things.
    score = 0.0

    def __init__(self, model: Any, metadata: Mapping[str, Any] | None = None):
        self.model, self.metadata = model, dict(metadata or {})
        self.names = [str(name) for name in self.metadata.get("classes") or []]
        self.normalization = Normalization.of(self.metadata)
        if not isinstance(self.network, SGFormer):
            held = self.metadata.get("model") or type(self.network).__name__
            raise UserError(f"{held} is another network than SG-Former and has no significance to show")

    @property
    def network(self) -> Any:
        """The SG-Former in the model."""
        return self.model.backbone.network

    @abstractmethod
    def read(self, image: Image.Image) -> Tensor:
        """An RGB image as the tensor (3, H, W) that `explain` takes: as in validation."""

    def read_mask(self, mask: np.ndarray) -> Tensor:
        """Pixels (H, W) bool of an image as `read` moves them: what `mask` takes."""
        return denormalize(self.read(Image.fromarray(mask).convert("RGB")), self.normalization)[0] > 0.5

    def explain(self, x: Tensor) -> Explanation:
        """One forward pass of one image (3, H, W), and every map of it."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._explain(x.to(next(self.model.parameters()).device))
        finally:
            self.model.train(training)

    @abstractmethod
    def _explain(self, x: Tensor) -> Explanation: ...

    def mask(self, mask: Tensor) -> np.ndarray:
        """A mask (H, W) of an image that `explain` takes, laid on the image that it shows: bool."""
        return mask.bool().cpu().numpy()

    def take_size(self, image_size: int | tuple[int, int]) -> None:
        """Read images at another size than in training.

        Raises:
            UserError: the size is invalid.
        """
        least = image_size if isinstance(image_size, int) else min(image_size)
        if least < 32:
            raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
        self.metadata |= self._sized(image_size)

    def _sized(self, image_size: int | tuple[int, int]) -> dict[str, Any]:
        """What the metadata has to say for another size."""
        return {"image_size": image_size}

    def explain_all(self, pictures: Iterable[Picture]) -> Iterator[Explanation]:
        """Explain images one after the other; the titles begin with the names of files."""
        for picture in pictures:
            seen = self.explain_image(picture)
            name = Path(picture).name if isinstance(picture, str | os.PathLike) else ""
            yield dataclasses.replace(seen, title="\n".join(filter(None, [name, seen.title])))

    def explain_image(self, image: Picture) -> Explanation:
        """Explain an image as people have it.

        Args:
            image: a file, a PIL image, an array (H, W, 3) uint8, or a tensor (3, H, W) as the network takes it
                (normalised; for a detector in 0..1).

        Raises:
            UserError: it cannot be read.
        """
        if isinstance(image, Tensor):
            x = image[0] if image.ndim == 4 and len(image) == 1 else image
            if x.ndim != 3:
                raise UserError(f"an image as a tensor is (3, H, W), got {tuple(image.shape)}")
            return self.explain(x)
        if isinstance(image, np.ndarray):
            colours = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
            if image.dtype != np.uint8 or not colours:
                raise UserError(f"an image as an array is (H, W, 3) uint8, got {image.shape} {image.dtype}")
            image = Image.fromarray(image)
        return self.explain(self.read(open_image(image if isinstance(image, Image.Image) else Path(image))))


def as_pictures(
    images: Picture | Iterable[Picture], limit: int | None = None
) -> list[Path | Image.Image | np.ndarray | Tensor]:
    """One or several images, with folders replaced by the images in them; `limit` spreads evenly.

    Raises:
        UserError: no such file, or no image in a folder.
    """
    single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor)
    pictures: list[Any] = []
    for image in [images] if single else images:  # type: ignore[list-item, union-attr]
        pictures += [image] if isinstance(image, np.ndarray | Tensor) else list_images(image)  # type: ignore[arg-type]
    if limit is not None and len(pictures) > limit:
        pictures = [pictures[i * len(pictures) // limit] for i in range(limit)]
    return pictures


@contextmanager
def ranked_by(network: nn.Module, ranking: str | None) -> Iterator[None]:
    """Within the block, a trained network's tokens are ranked by another source of significance; None: its own."""
    blocks = [module for module in network.modules() if isinstance(module, GuidedBlock)] if ranking else []
    own = [block.source for block in blocks]
    try:
        for block in blocks:
            _replace_source(block, make_source(str(ranking), 0))
        yield
    finally:
        for block, source in zip(blocks, own, strict=True):
            _replace_source(block, source)


def _replace_source(block: GuidedBlock, source: Any) -> None:
    del block.source  # a module's place in its parent takes nothing but modules
    block.source = source
