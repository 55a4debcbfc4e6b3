"""Explain what a trained network attends to, for any task.

An :class:`Explainer` combines a network with its preprocessing, a forward pass that keeps every map, and the drawing of
the result. Each task derives its own from the class here.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.data.image import Images, open_image
from sgformer.data.preparing import IMAGENET, Normalization, denormalize
from sgformer.models.backbone import GuidedBlock, Inspection, SGFormer
from sgformer.models.significance import make_source
from sgformer.results import Explanation

#: An image in any form of `data.image.open_image`; a tensor of floats is ready for the network.
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor


def explain_batch(model: SGFormer, x: Tensor, normalization: Normalization = IMAGENET) -> list[Explanation]:
    """Run one forward pass and collect its maps for drawing.

    Args:
        model: used in its current mode, which is not changed.
        x: (B, 3, H, W), normalised.
        normalization: the normalisation of x.

    Returns:
        One :class:`~sgformer.results.Explanation` per image, read from the pass's own maps and indices.
    """
    with torch.no_grad():
        inspection = model.inspect(x)
    assert inspection.logits is not None
    images, logits = pixels(x, normalization), inspection.logits.float().cpu().numpy()
    return [
        dataclasses.replace(explanation, logits=row)
        for explanation, row in zip(explanations(model, inspection, images), logits, strict=True)
    ]


def pixels(x: Tensor, normalization: Normalization = IMAGENET) -> np.ndarray:
    """(B, C, H, W) normalised -> (B, H, W, 3) uint8; if C is not 3, the mean over channels in grey."""
    if x.shape[1] == 3:
        shown = denormalize(x, normalization)
    else:
        grey = x.float().cpu().mean(1, keepdim=True)
        low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
        shown = ((grey - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)
    return (shown.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def explanations(model: SGFormer, inspection: Inspection, images: np.ndarray) -> list[Explanation]:
    """Split the inspection of a batch by image; images are the network's inputs, (B, H, W, 3) uint8."""
    regions = {key: groups.region_map().cpu().numpy() for key, groups in inspection.tokens.items()}
    tokens = {key: groups.token_map().cpu().numpy() for key, groups in inspection.tokens.items()}
    rates = {key: _rates(model, key) for key in tokens}

    def of(maps: Mapping[str, Any], i: int) -> dict[str, np.ndarray]:
        return {key: m[i] if isinstance(m, np.ndarray) else m[i].float().cpu().numpy() for key, m in maps.items()}

    return [
        Explanation(
            image=image,
            title="",
            significance=of(inspection.significance, i),
            coarse=of(inspection.coarse, i),
            fine=of(inspection.fine, i),
            regions=of(regions, i),
            tokens=of(tokens, i),
            rates=rates,
        )
        for i, image in enumerate(images)
    ]


def _rates(model: SGFormer, block: str) -> list[int]:
    """Tokens per key/value token of each region, at the network's token budget."""
    stage, number = map(int, block.split("."))
    guided: Any = model.get_submodule(f"stages.{stage - 1}.blocks.{number}")
    return list(guided.attn.aggregate.rates)


class Explainer(ABC):
    """Explains images by one kind of network.

    Args:
        model: the network; it runs in evaluation mode, and its own mode is restored afterwards.
        metadata: of its weights: `classes`, `image_size` and so on, as far as known.

    Raises:
        UserError: the backbone is not an SG-Former, so there is no significance.
    """

    #: Objects with a lower score are left out; used by detectors.
    score = 0.0

    def __init__(self, model: Any, metadata: Mapping[str, Any] | None = None):
        self.model, self.metadata = model, dict(metadata or {})
        self.names = [str(name) for name in self.metadata.get("classes") or []]
        self.normalization = Normalization.of(self.metadata)
        if not isinstance(self.network, SGFormer):
            name = self.metadata.get("model") or type(self.network).__name__
            raise UserError(f"{name} is not an SG-Former and has no significance to show")

    @property
    def network(self) -> Any:
        """The model's SG-Former backbone."""
        return self.model.backbone.network

    @abstractmethod
    def read(self, image: Image.Image) -> Tensor:
        """Preprocess an RGB image as in validation: the tensor (3, H, W) that `explain` takes."""

    def read_mask(self, mask: np.ndarray) -> Tensor:
        """Apply the geometry of `read` to a mask (H, W) bool: the tensor that `mask` takes."""
        return denormalize(self.read(Image.fromarray(mask).convert("RGB")), self.normalization)[0] > 0.5

    def explain(self, x: Tensor) -> Explanation:
        """Run one forward pass on one image (3, H, W) and return all its maps."""
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
        """A mask (H, W) in the geometry of `explain`'s input, mapped to `Explanation.image`: (H, W) bool."""
        return mask.bool().cpu().numpy()

    def take_size(self, image_size: int | tuple[int, int]) -> None:
        """Use another image size than in training.

        Raises:
            UserError: the size is invalid.
        """
        least = image_size if isinstance(image_size, int) else min(image_size)
        if least < 32:
            raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
        self.metadata |= self._sized(image_size)

    def _sized(self, image_size: int | tuple[int, int]) -> dict[str, Any]:
        """The metadata entries for another image size."""
        return {"image_size": image_size}

    def explain_all(self, images: Images) -> Iterator[Explanation]:
        """Explain images one by one; each title starts with the file name."""
        for name, image in images:
            explanation = self.explain_image(image)
            file = "" if name.isdecimal() else Path(name).name
            yield dataclasses.replace(explanation, title="\n".join(filter(None, [file, explanation.title])))

    def explain_image(self, image: Picture) -> Explanation:
        """Explain an image given in any supported form.

        Args:
            image: see `Picture`; a tensor of floats is (3, H, W), ready for the network (normalised; for a detector in
                [0, 1]).

        Raises:
            UserError: the image cannot be read, or has another shape or dtype.
        """
        opened = open_picture(image)
        return self.explain(opened if isinstance(opened, Tensor) else self.read(opened))


def open_picture(image: Picture, number: int = 0) -> Image.Image | Tensor:
    """An image as RGB, see `open_image`; a tensor of floats as it is, (3, H, W).

    Raises:
        UserError: the image cannot be read, or has another shape or dtype.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return open_image(image, number)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3:
        raise UserError(f"image {number}: a tensor of an image must be (3, H, W), got {tuple(image.shape)}")
    return image


@contextmanager
def ranked_by(network: nn.Module, ranking: str | None) -> Iterator[None]:
    """Rank a trained network's tokens by another source of significance within the block; None keeps its own."""
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
    del block.source  # a name registered as a submodule accepts only modules
    block.source = source
