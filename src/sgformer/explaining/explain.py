"""Ask a trained network where it looked, whatever it was trained for.

A :class:`Explainer` joins a network with what it takes to ask it: how images are read for it, one forward pass that
keeps all it saw, and the answer as a picture. There is one for each task.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.data.transforms import denormalize, eval_transform, preprocessing
from sgformer.models.backbone import GuidedBlock, Inspection, SGFormer
from sgformer.models.load import load_weights, read_metadata
from sgformer.models.significance import make_source
from sgformer.results import find_images, open_image
from sgformer.viz.significance import Explanation

#: An image as people have it: a file, a PIL image, a (H, W, 3) uint8 array, or a tensor as the network takes it.
Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


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
    assert seen.logits is not None
    images, logits = _pixels(x), seen.logits.float().cpu().numpy()
    return [
        dataclasses.replace(one, logits=said)
        for one, said in zip(_explanations(model, seen, images), logits, strict=True)
    ]


def _pixels(x: Tensor) -> np.ndarray:
    """(B, C, H, W) normalised -> (B, H, W, 3) uint8; other than three channels come out as their mean, in grey."""
    if x.shape[1] == 3:
        shown = denormalize(x)
    else:
        grey = x.float().cpu().mean(1, keepdim=True)
        low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
        shown = ((grey - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1)
    return (shown.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def _explanations(model: SGFormer, seen: Inspection, images: np.ndarray) -> list[Explanation]:
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


# -- one for each task ------------------------------------------------------------------------------------------------


class Explainer:
    """Asks an image classifier, or a bare backbone.

    Args:
        model: the network; it is asked in evaluation mode, and left in the mode it was in.
        metadata: of its weights: `classes`, `image_size` and so on, as far as known.
    """

    def __init__(self, model: Any, metadata: Mapping[str, Any] | None = None):
        self.model, self.metadata = model, dict(metadata or {})
        self.names = [str(name) for name in self.metadata.get("classes") or []]
        if not isinstance(self.network, SGFormer):
            held = self.metadata.get("model") or type(self.network).__name__
            raise UserError(f"{held} is another network than SG-Former and has no significance to show")

    @property
    def network(self) -> Any:
        """The SG-Former in the model."""
        return self.model

    def read(self, image: Image.Image) -> Tensor:
        """An RGB image as the tensor (3, H, W) that `see` takes: as in validation, or as it is if nothing is known."""
        if "image_size" not in self.metadata:
            return eval_transform((image.height, image.width), 1.0)(image)
        return eval_transform(**preprocessing(self.metadata))(image)

    def read_mask(self, mask: np.ndarray) -> Tensor:
        """Pixels (H, W) bool of an image as `read` moves them: what `mask` takes."""
        return denormalize(self.read(Image.fromarray(mask).convert("RGB")))[0] > 0.5

    def see(self, x: Tensor) -> Explanation:
        """One forward pass of one image (3, H, W), and what it saw."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._see(x.to(next(self.model.parameters()).device))
        finally:
            self.model.train(training)

    def _see(self, x: Tensor) -> Explanation:
        (seen,) = explain_batch(self.model, x[None])
        return dataclasses.replace(seen, title=self._say(seen.logits))

    def mask(self, mask: Tensor) -> np.ndarray:
        """A mask (H, W) of an image that `see` takes, laid on the image that it shows: bool."""
        return mask.bool().cpu().numpy()

    def _say(self, logits: np.ndarray | None) -> str:
        """`cat 97 %`, or nothing for a network that names no classes."""
        if logits is None or logits.ndim != 1 or len(self.names) != len(logits):
            return ""
        shares = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return f"{self.names[best]}  {100 * shares[best] / shares.sum():.0f} %"


class SegmentExplainer(Explainer):
    """Asks a semantic segmentation."""

    @property
    def network(self) -> Any:
        return self.model.backbone.network

    def read(self, image: Image.Image) -> Tensor:
        return eval_transform((image.height, image.width), 1.0)(image)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        from sgformer.data.image import fit_size

        return fit_size(height, width, int(self.metadata.get("short_side", min(height, width))))

    def _see(self, x: Tensor) -> Explanation:
        from sgformer.heads.common import resize
        from sgformer.viz.segmentation import blend

        size = self._size(x.shape[-2], x.shape[-1])
        x = x[None]
        if size != tuple(x.shape[-2:]):  # as in validation
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        seen = self.network.inspect(x)
        labels = resize(self.model.head(seen.features).float(), x)[0].argmax(0).cpu().numpy()
        (one,) = _explanations(self.network, seen, _pixels(x))
        names = self.names or [str(i) for i in range(self.model.num_classes)]
        counts = np.bincount(labels.ravel(), minlength=len(names))
        most = [i for i in np.argsort(-counts, kind="stable")[:3] if counts[i]]
        title = ", ".join(f"{names[i]} {100 * counts[i] / labels.size:.0f} %" for i in most)
        overlay = (blend(one.image, labels, names) * 255).round().astype(np.uint8)
        return dataclasses.replace(one, title=title, overlay=overlay, answer={"labels": labels})

    def mask(self, mask: Tensor) -> np.ndarray:
        size = self._size(*mask.shape)
        return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].bool().cpu().numpy()


class DetectExplainer(Explainer):
    """Asks a detector; only what it is half sure of is drawn."""

    score = 0.5

    @property
    def network(self) -> Any:
        return self.model.backbone.network

    def read(self, image: Image.Image) -> Tensor:
        from sgformer.data.detection_transforms import eval_transform

        return eval_transform(self.metadata.get("image_size", (min(image.size), max(image.size))))(image)

    def read_mask(self, mask: np.ndarray) -> Tensor:
        return self.read(Image.fromarray(mask).convert("RGB"))[0] > 0.5

    def _see(self, x: Tensor) -> Explanation:
        from sgformer.heads.mask_rcnn import paste_masks
        from sgformer.viz.detection import Objects, overlay

        batch, size = self.model.batch([x]), (x.shape[-2], x.shape[-1])
        seen = self.network.inspect(batch)
        (found,), _ = self.model.heads(seen.features, batch, [size], None)
        found = {name: value[found["scores"] >= self.score].cpu() for name, value in found.items()}
        (one,) = _explanations(self.network, seen, _pixels(batch))
        names = self.names or [str(i) for i in range(self.model.num_classes)]
        shown = (one.image.shape[0], one.image.shape[1])
        answer = {
            "boxes": found["boxes"].numpy(),
            "labels": found["labels"].numpy() - 1,
            "scores": found["scores"].numpy(),
        }
        if "masks" in found:
            masks = [m.numpy() for m in paste_masks(found["masks"], found["boxes"], shown)]
            answer["masks"] = np.stack(masks) if masks else np.zeros((0, *shown), bool)
        things = Objects(answer["boxes"], answer["labels"], answer["scores"], answer.get("masks"))
        count = len(things.boxes)
        title = f"{count} object{'s' if count != 1 else ''} from {self.score:g} up"
        return dataclasses.replace(one, title=title, overlay=overlay(one.image, things, names), answer=answer)

    def mask(self, mask: Tensor) -> np.ndarray:
        from sgformer.tasks.detect.module import PAD_TO

        height, width = mask.shape  # as `Detector.batch` pads
        return F.pad(mask.bool(), (0, -width % PAD_TO, 0, -height % PAD_TO)).cpu().numpy()


def explainer_for(model: nn.Module, metadata: Mapping[str, Any] | None = None) -> Explainer:
    """The right one for a network: an `SGFormer`, a `Segmenter` or a `Detector`.

    Raises:
        UserError: another network, which has no significance.
    """
    if metadata is None:
        metadata = getattr(model, "metadata", None)
    kinds = {"Segmenter": SegmentExplainer, "Detector": DetectExplainer}  # by name: they may not be installed
    return kinds.get(type(model).__name__, Explainer)(model, metadata)


def load_explainer(weights: str | os.PathLike[str], device: str = "auto", **metadata: Any) -> Explainer:
    """The right one for weights of any task.

    Args:
        weights: a run folder, a weights file, or a released `.pth`.
        device: "auto", "cpu", "cuda" ...
        metadata: entries that differ from those of the weights.

    Raises:
        UserError: unreadable, or weights of another network than SG-Former.
    """
    where = find_device(device)
    model: Any
    task = read_metadata(weights).get("task", "classify")
    if task == "segment":
        from sgformer.tasks.segment.module import Segmenter

        model, about = Segmenter.load(weights)
    elif task == "detect":
        from sgformer.tasks.detect.module import Detector

        model, about = Detector.load(weights)
    else:
        model, about = load_weights(weights)
        about.setdefault("image_size", 224)
    try:
        return explainer_for(model.eval().to(where), {**about, **metadata})
    except UserError as error:
        raise UserError(f"{weights}: holds {error}") from None


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


# -- asking -----------------------------------------------------------------------------------------------------------


def explain_image(model: nn.Module, image: Picture, image_size: int | tuple[int, int] | None = None) -> Explanation:
    """Where a network looked on one image; what ``model.explain(image)`` calls.

    Args:
        model: an `SGFormer`, a `Segmenter` or a `Detector`; asked in evaluation mode, left in the mode it was in.
        image: a file, a PIL image, an array (H, W, 3) uint8, or a tensor (3, H, W) as the network takes it (normalised;
            for a detector in 0..1).
        image_size: pixels, as in validation (classification: height and width; segmentation: the short side; detection:
            short side, or short and longest); by default as trained or, where weights do not say, the image's own.

    Raises:
        UserError: the image cannot be read, or the network is another than SG-Former.
    """
    asked = explainer_for(model)
    if image_size is not None:
        asked.metadata |= sized(asked, image_size)
    if isinstance(image, Tensor):
        x = image[0] if image.ndim == 4 and len(image) == 1 else image
        if x.ndim != 3:
            raise UserError(f"an image as a tensor is (3, H, W), got {tuple(image.shape)}")
    else:
        if isinstance(image, np.ndarray):
            if (
                image.dtype != np.uint8
                or image.ndim not in (2, 3)
                or (image.ndim == 3 and image.shape[2] not in (3, 4))
            ):
                raise UserError(f"an image as an array is (H, W, 3) uint8, got {image.shape} {image.dtype}")
            image = Image.fromarray(image)
        x = asked.read(open_image(image if isinstance(image, Image.Image) else Path(image)))
    return asked.see(x)


def sized(asked: Explainer, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """What a explainer's metadata has to say for another size; UserError where it does not do."""
    least = image_size if isinstance(image_size, int) else min(image_size)
    if least < 32:
        raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
    if not isinstance(asked, SegmentExplainer):
        return {"image_size": image_size}
    if not isinstance(image_size, int):
        raise UserError(f"--image-size is one number, the short side, for segmentation; got {image_size}")
    return {"short_side": image_size}


def explain(
    weights: str | os.PathLike[str],
    images: Picture | Sequence[Picture],
    *,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> Iterator[Explanation]:
    """Where a trained network looked on images, one after the other.

    Args:
        weights: of any task: a run folder, a weights file, or a released `.pth`.
        images: one or several files, folders (searched for images, also nested), PIL images or (H, W, 3) uint8 arrays.
        image_size: pixels; by default as trained. See :func:`explain_image`.
        limit: so many images at most, spread evenly over those given.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: weights or an image cannot be read, or the weights are of another network than SG-Former.
    """
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
        images = [images]
    given = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    sources = list(find_images(given))  # type: ignore[arg-type]
    if limit is not None and len(sources) > limit:
        sources = [sources[i * len(sources) // limit] for i in range(limit)]
    asked = load_explainer(weights, device)
    if image_size is not None:
        asked.metadata |= sized(asked, image_size)
    for source in sources:
        seen = asked.see(asked.read(open_image(source)))
        name = "" if isinstance(source, Image.Image) else source.name
        yield dataclasses.replace(seen, title="\n".join(filter(None, [name, seen.title])))
