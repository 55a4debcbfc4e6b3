"""Semantic segmentation: backbone, head, loss, inference, metric. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import PolyLRScheduler
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.data.image import fit_size
from sgformer.heads.common import resize
from sgformer.heads.semantic_fpn import SemanticFPN
from sgformer.heads.upernet import UPerNet
from sgformer.models.pyramid import Pyramid, decay_groups, is_dense, load_dense, pyramid_backbone, save_dense
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.tasks.segment.metrics import SegmentationEvaluation
from sgformer.training.config import nearest
from sgformer.training.task_module import NetworkTask

HEADS: dict[str, type[nn.Module]] = {"semantic-fpn": SemanticFPN, "upernet": UPerNet}
#: The factors of multi-scale evaluation.
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class Segmenter(nn.Module):
    """A backbone with a segmentation head.

    Args:
        backbone: four feature maps.
        head: "semantic-fpn" or "upernet".
        num_classes: of the logits.
        width: of the head; None: 128 for semantic-fpn, 512 for upernet, the standard.

    Attributes:
        architecture: a plain dict from which `Segmenter.build` makes the same network.
    """

    metadata: dict[str, Any]  # of the file it was loaded from

    def __init__(self, backbone: Pyramid, head: str, num_classes: int, width: int | None = None):
        super().__init__()
        self.architecture = {
            "backbone": backbone.architecture,
            "head": head,
            "num_classes": num_classes,
            "width": width,
        }
        self.num_classes = num_classes
        self.backbone = backbone
        standard = {} if width is None else {"dim": width}
        self.head = HEADS[head](backbone.channels, backbone.strides, num_classes, **standard)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"out": logits (B, num_classes, H, W)}; in training also "aux" if the head has one."""
        features = self.backbone(images)
        outputs = {"out": self.head(features)}
        if self.training and hasattr(self.head, "auxiliary"):
            outputs["aux"] = self.head.auxiliary(features)  # type: ignore[operator]
        return {name: resize(logits, images) for name, logits in outputs.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, besides norms and biases."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write weights and metadata to a safetensors file, whole or not at all."""
        save_dense(self, path, {**metadata, "task": "segment"})

    @classmethod
    def build(cls, architecture: Mapping[str, Any]) -> Segmenter:
        """A network with fresh weights from an `architecture`."""
        backbone = pyramid_backbone(architecture["backbone"])
        return cls(backbone, architecture["head"], architecture["num_classes"], architecture["width"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Segmenter, dict[str, Any]]:
        """The network of a run folder or weights file, in evaluation mode, and its metadata.

        Raises:
            UserError: unreadable, or weights of something else.
        """
        tensors, metadata = load_dense(path, "segment")
        model = cls.build(metadata["architecture"])
        model.load_state_dict(tensors)
        model.metadata = metadata
        return model.eval(), metadata

    def explain(self, image: Any, image_size: int | None = None) -> Any:
        """Where the backbone looked on an image, and what was found; see `sgformer.explaining.explain_image`."""
        from sgformer.explaining.explain import explain_image

        return explain_image(self, image, image_size)


@dataclass(frozen=True)
class Inference:
    """How an image of any size goes through the network.

    Attributes:
        short_side: images are resized to this short side (long side at most 4 times that), in pixels.
        window: (height, width) of a sliding window, moved by two thirds of itself; None: the whole image at once.
        scales: factors on the short side; the class probabilities are averaged over them.
        flip: also average over the mirror image.
    """

    short_side: int = 512
    window: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


@torch.no_grad()
def class_probabilities(model: nn.Module, images: Tensor, how: Inference) -> Tensor:
    """Normalised images (B, 3, H, W) of any size -> class probabilities (B, num_classes, H, W), float32."""
    size = images.shape[-2:]
    total: Tensor | None = None
    for factor in how.scales:
        target = fit_size(size[0], size[1], how.short_side, factor)
        scaled = images
        if target != tuple(size):
            scaled = F.interpolate(images, target, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if how.flip else (False,):
            x = scaled.flip(-1) if mirrored else scaled
            logits = (model(x)["out"] if how.window is None else slide(model, x, how.window)).float()
            probabilities = resize(logits.flip(-1) if mirrored else logits, images).softmax(1)
            total = probabilities if total is None else total + probabilities
    assert total is not None
    return total / (len(how.scales) * (1 + how.flip))


def slide(model: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits (B, num_classes, H, W) of (B, 3, H, W), averaged over overlapping windows that cover the image."""
    spans = [_spans(length, side) for length, side in zip(images.shape[-2:], window, strict=True)]
    total, count = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, bottom in spans[0]:
        for left, right in spans[1]:
            logits = model(images[..., top:bottom, left:right])["out"].float()
            if total.ndim == 0:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[..., top:bottom, left:right] += logits
            count[top:bottom, left:right] += 1
    return total / count


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Starts and ends of windows of `side` pixels over `length`, two thirds apart, the last one flush with the end."""
    side = min(side, length)
    starts = [*range(0, length - side, max(1, side * 2 // 3)), length - side]
    return [(start, start + side) for start in starts]


class SegmentationTask(NetworkTask):
    """Trains a `Segmenter` on batches that begin with (images, class indices).

    Args:
        model: the network.
        config: rates, schedule, evaluation size. `config.batch_size` is the number of images per update over all
            devices: the learning rate is scaled by it.
        total_steps: updates of the whole schedule; by default `config.steps`.
        class_names: one per class; by default the indices.
        ignore: the index of pixels that have no class.
        inference: how validation looks at images; by default whole, at `config.short`.

    Validation runs `eval_model` on images of any size (a list of (3, H, W), or (B, 3, H, W)) and counts pixels at the
    size of their labels. It leaves `result`, and `by_image` (pixel accuracy by index, of this process), and logs
    `val_loss`, `miou`, `macc` and `pixel_accuracy` (fractions).
    """

    monitor = "miou"  # what makes weights the best ones

    def __init__(
        self,
        model: Segmenter,
        config: SegmentConfig | None = None,
        total_steps: int | None = None,
        class_names: Sequence[str] | None = None,
        ignore: int = 255,
        inference: Inference | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = config or SegmentConfig()
        self.total_steps = total_steps or self.config.steps
        self.class_names = tuple(class_names or map(str, range(model.num_classes)))
        self.ignore = ignore
        self.inference = inference or Inference(self.config.short)
        self.result: SegmentationEvaluation | None = None
        self.by_image: dict[int, float] = {}
        if self.config.opt.lower() not in list_optimizers():
            raise UserError(f"unknown --opt {self.config.opt}{nearest(self.config.opt, map(str, list_optimizers()))}")
        if model.num_classes < 2:
            raise UserError("segmentation needs two classes or more; for one, label everything else as a second class")
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(
            model.num_classes, ignore_index=ignore, validate_args=False
        )
        self.val_loss = torchmetrics.MeanMetric()
        self.images = torchmetrics.SumMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of a batch: the batch."""
        return images, targets

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch[:2]
        if not len(targets):
            raise UserError(f"not one image of this batch could be read; the first: {batch[3][0]}")
        outputs = self.model(images)
        loss = self.pixel_loss(outputs["out"], targets)
        if "aux" in outputs:
            loss = loss + self.config.auxiliary * self.pixel_loss(outputs["aux"], targets)
        return loss

    def pixel_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the pixels that have a class; 0 if none has."""
        total = F.cross_entropy(logits.float(), targets, ignore_index=self.ignore, reduction="sum")
        return total / (targets != self.ignore).sum().clamp(min=1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch[:2]
        by_size: dict[Any, list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        for places in by_size.values():  # one pass for all images of a size
            shares = class_probabilities(self.eval_model, torch.stack([images[i] for i in places]), self.inference)
            truth = torch.stack([targets[i] for i in places])
            pixels = (truth != self.ignore).sum()
            if pixels:
                loss = F.nll_loss(shares.clamp(min=1e-12).log(), truth, ignore_index=self.ignore)
                self.val_loss.update(loss, weight=pixels)
            guess = shares.argmax(1)
            self.confusion.update(guess, truth)
            known = (truth != self.ignore).flatten(1).sum(1)
            hits = ((guess == truth) & (truth != self.ignore)).flatten(1).sum(1)
            for i, share in zip(places, (hits / known.clamp(min=1)).tolist(), strict=True):
                self.by_image[int(batch[2][i])] = share
            self.images.update(len(places))

    def on_validation_epoch_start(self) -> None:
        self.by_image = {}

    def on_validation_epoch_end(self) -> None:
        loss, images, counts = self.val_loss.compute(), self.images.compute(), self.confusion.compute()
        result = SegmentationEvaluation(counts.cpu().numpy(), float(loss), int(images), self.class_names)
        self.result = result
        values = {"val_loss": result.loss, "miou": result.miou, "macc": result.macc}
        # Each value is already over all processes: synchronising again would change nothing.
        self.log_dict({**values, "pixel_accuracy": result.pixel_accuracy}, rank_zero_only=False, sync_dist=False)
        for metric in (self.val_loss, self.images, self.confusion):
            metric.reset()

    def configure_optimizers(self) -> Any:
        config = self.config
        rate = config.scaled(config.lr)
        groups = decay_groups(self.model, config.weight_decay)
        optimizer = create_optimizer_v2(groups, opt=config.opt, lr=rate, weight_decay=config.weight_decay)
        scheduler = PolyLRScheduler(
            optimizer,
            t_initial=self.total_steps,
            power=config.power,
            warmup_t=config.warmup_steps,
            warmup_lr_init=1e-6 * rate,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_train_start(self) -> None:
        # The rate is a function of the step and of this run's settings: also on resuming with more of them.
        self.lr_schedulers().step_update(self.global_step)  # type: ignore[union-attr]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []


def new_segmenter(config: SegmentConfig, num_classes: int) -> Segmenter:
    """The network to train: fresh, on the backbone of `config.weights`, or all of a segmentation run's weights."""
    whole = config.weights is not None and is_dense(config.weights, "segment")
    tensors: dict[str, Tensor] = {}
    source: Any = config.model
    if whole:
        tensors, metadata = load_dense(config.weights, "segment")  # type: ignore[arg-type]
        held = metadata["architecture"]
        source = held["backbone"]
        if (source["model"], held["head"], held["width"]) != (config.model, config.head, config.head_width):
            raise UserError(
                f"{config.weights} holds {source['model']} with {held['head']} of width {held['width'] or 'standard'}, "
                f"not --model {config.model} --head {config.head} --head-width {config.head_width or 'standard'}"
            )
    backbone = pyramid_backbone(
        source,
        weights=None if whole else config.weights,
        drop_path=config.drop_path,
        coarse=config.coarse,
        guidance=config.guidance,
        grad_checkpointing=config.grad_checkpointing,
    )
    model = Segmenter(backbone, config.head, num_classes, config.head_width)
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if tensor.shape == own[name].shape}
    model.load_state_dict(own | fitting)  # another number of classes leaves the classifiers fresh
    return model
