"""Object detection and instance segmentation: backbone, heads, losses, AP. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from sgformer.core.errors import UserError
from sgformer.heads.mask_rcnn import RCNNHeads, paste_masks
from sgformer.models.pyramid import Pyramid, decay_groups, is_dense, load_dense, pyramid_backbone, save_dense
from sgformer.results import coco_result
from sgformer.tasks.detect.config import DetectConfig
from sgformer.tasks.detect.metrics import CocoMetric, DetectionEvaluation
from sgformer.training.task_module import NetworkTask

PAD_TO = 32  # pixels: the batch's sides are multiples of it


class Detector(nn.Module):
    """A backbone with the heads of Mask R-CNN or, without masks, Faster R-CNN.

    Args:
        backbone: four feature maps.
        num_classes: without the background.
        masks: whether it also finds masks.
        width: of the heads; 256 is the standard.
        options: of `RCNNHeads`.

    Attributes:
        architecture: a plain dict from which `Detector.build` makes the same network.
    """

    mean: Tensor
    std: Tensor
    metadata: dict[str, Any]  # of the file it was loaded from

    def __init__(self, backbone: Pyramid, num_classes: int, masks: bool = True, width: int = 256, **options: Any):
        super().__init__()
        self.architecture = {
            "backbone": backbone.architecture,
            "head": "mask-rcnn" if masks else "faster-rcnn",
            "num_classes": num_classes,
            "width": width,
        }
        self.num_classes, self.masks = num_classes, masks
        self.backbone = backbone
        self.heads = RCNNHeads(backbone.channels, backbone.strides, num_classes, masks, width, **options)
        for name, value in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H_i, W_i) floats in 0..1, of any sizes.
            targets: in training mode; see `RCNNHeads.forward`.
            sizes: (height, width) that the detections' pixels refer to, of each image; by default its own.

        Returns:
            The losses by name; or per image `boxes` (N, 4) [x1, y1, x2, y2], `labels` (N,) class indices from 0,
            `scores` (N,) falling, and `masks` (N, 1, 28, 28), to be laid out by `heads.mask_rcnn.paste_masks`.
        """
        own = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch = self.batch(images)
        detections, losses = self.heads(self.backbone(batch), batch, own, targets)
        if self.training:
            return losses
        for found, size, wanted in zip(detections, own, sizes or own, strict=True):
            factors = [wanted[1] / size[1], wanted[0] / size[0]] * 2
            found["boxes"] = found["boxes"] * torch.tensor(factors, device=batch.device)
            found["labels"] = found["labels"] - 1
        return detections

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Normalised images in one (B, 3, H, W), zeros to the right and below, H and W multiples of 32."""
        height, width = (-(-max(image.shape[d] for image in images) // PAD_TO) * PAD_TO for d in (-2, -1))
        return torch.stack(
            [
                F.pad((image - self.mean) / self.std, [0, 0, width - image.shape[-1], height - image.shape[-2]])
                for image in images
            ]
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone; the heads' shapes differ from image to image."""
        self.backbone.compile(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, besides norms."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write weights and metadata to a safetensors file, whole or not at all."""
        save_dense(self, path, {**metadata, "task": "detect"})

    @classmethod
    def build(cls, architecture: Mapping[str, Any]) -> Detector:
        """A network with fresh weights from an `architecture`."""
        backbone = pyramid_backbone(architecture["backbone"])
        masks = architecture["head"] == "mask-rcnn"
        return cls(backbone, architecture["num_classes"], masks, architecture["width"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Detector, dict[str, Any]]:
        """The network of a run folder or weights file, in evaluation mode, and its metadata.

        Raises:
            UserError: unreadable, or weights of something else.
        """
        tensors, metadata = load_dense(path, "detect")
        model = cls.build(metadata["architecture"])
        model.load_state_dict(tensors)
        model.metadata = metadata
        return model.eval(), metadata

    def explain(self, image: Any, image_size: int | tuple[int, int] | None = None) -> Any:
        """Where the backbone looked on an image, and what was found; see `sgformer.explaining.explain_image`."""
        from sgformer.explaining.explain import explain_image

        return explain_image(self, image, image_size)


def new_detector(config: DetectConfig, num_classes: int, masks: bool) -> Detector:
    """The network to train: fresh, on the backbone of `config.weights`, or from a whole detector's weights.

    With the latter, what depends on the number of classes starts fresh if that differs.

    Raises:
        UserError: weights that cannot be read, or of another network.
    """
    whole = config.weights is not None and is_dense(config.weights, "detect")
    tensors: dict[str, Tensor] = {}
    source: Any = config.model
    if whole:
        tensors, metadata = load_dense(config.weights, "detect")  # type: ignore[arg-type]
        source = metadata["architecture"]["backbone"]
        if source["model"] != config.model:
            raise UserError(f"{config.weights} holds {source['model']}, not --model {config.model}")
    backbone = pyramid_backbone(
        source,
        weights=None if whole else config.weights,
        drop_path=config.drop_path,
        coarse=config.coarse,
        guidance=config.guidance,
        freeze_stages=config.freeze_stages,
        grad_checkpointing=config.grad_checkpointing,
    )
    model = Detector(backbone, num_classes, masks, config.head_width, rois=config.rois)
    own = model.state_dict()
    fitting = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    model.load_state_dict({**own, **fitting})
    return model.train()


class DetectionTask(NetworkTask):
    """Trains a `Detector` on batches of `data.coco.DetectionBatch`.

    Args:
        model: the network.
        config: rates and schedule. `config.batch_size` is the number of images per update over all devices: the
            learning rate is scaled by it.
        steps_per_epoch, total_steps: updates, for the schedule; by default found out from the trainer.
        metric: evaluates what validation finds; without it validation only collects `results`.
        image_ids: of the validation images, by position in their listing.
        category_ids: written in the results, for each class; detections of classes without one are left out.

    Validation runs `eval_model` and leaves `result`, besides the logged `box_ap`, `box_ap50`, `box_ap75` and, with
    masks, `mask_ap` ... (fractions).
    """

    def __init__(
        self,
        model: Detector,
        config: DetectConfig | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        metric: CocoMetric | None = None,
        image_ids: Sequence[Any] = (),
        category_ids: Sequence[Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = config or DetectConfig()
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.metric = metric
        self.image_ids = image_ids
        self.category_ids = list(range(1, model.num_classes + 1)) if category_ids is None else list(category_ids)
        self.monitor = "mask_ap" if model.masks else "box_ap"  # what makes weights the best ones
        self.result: DetectionEvaluation | None = None
        self.results: list[dict[str, Any]] = []
        self.seen: list[int] = []  # positions of the images validated

    def forward(self, images: Sequence[Tensor], sizes: Any = None) -> Any:
        return self.model(images, sizes=sizes)

    def mix(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """What the network sees of a batch: the batch."""
        return images, targets

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The sum of the losses, and each of them under "parts"."""
        if not batch.image:
            raise UserError(f"not one image of this batch could be read; the first: {batch.skipped[0]}")
        losses = self.model(batch.image, batch.target)
        return {"loss": sum(losses.values()), "parts": {name: value.detach() for name, value in losses.items()}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not batch.image:
            return
        sizes = [target["size"] for target in batch.target]
        for index, size, found in zip(
            batch.index.tolist(), sizes, self.eval_model(batch.image, sizes=sizes), strict=True
        ):
            self.seen.append(index)
            self.results += coco_results(found, self.image_ids[index], self.category_ids, size)

    def on_validation_epoch_start(self) -> None:
        self.results, self.seen = [], []

    def on_validation_epoch_end(self) -> None:
        if self.metric is None:
            return
        trainer = self.trainer
        parts: list[Any] = [(self.results, self.seen)]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self.results, self.seen))
        if trainer.is_global_zero:
            results = [result for part, _ in parts for result in part]
            images = [self.image_ids[i] for _, seen in parts for i in seen]
            self.result = self.metric.evaluate(results, images)
        if trainer.world_size > 1:  # the others get the numbers, without the many detections
            light = [dataclasses.replace(self.result, results={}) if self.result and trainer.is_global_zero else None]
            torch.distributed.broadcast_object_list(light)
            self.result = self.result if trainer.is_global_zero else light[0]
        self.log_dict(self.result.metrics(), rank_zero_only=False, sync_dist=False)  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = decay_groups(self.model, config.weight_decay)
        return create_optimizer_v2(
            groups, opt=config.opt, lr=config.scaled(config.lr), weight_decay=config.weight_decay
        )

    def on_train_start(self) -> None:
        total = int(self.trainer.estimated_stepping_batches)
        self.total_steps = self.total_steps or total
        self.steps_per_epoch = self.steps_per_epoch or -(-total // (self.trainer.max_epochs or 1))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The rate is a function of the step and of this run's settings, also after resuming: no state to keep.
        share = self.config.rate(self.global_step, self.steps_per_epoch, self.total_steps)  # type: ignore[arg-type]
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.config.scaled(self.config.lr) * share


def coco_results(
    found: Mapping[str, Tensor], image_id: Any, category_ids: Sequence[Any], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format, boxes and, if there are any, masks as RLE.

    Args:
        found: what `Detector` returned for the image.
        image_id: in the results.
        category_ids: by class index; detections of a class with None are left out.
        size: the image's (height, width), to which the boxes refer.
    """
    boxes, labels, scores = (found[name].cpu().tolist() for name in ("boxes", "labels", "scores"))
    masks = paste_masks(found["masks"], found["boxes"], size) if "masks" in found else [None] * len(boxes)
    return [
        coco_result(image_id, category_ids[label], box, score, None if mask is None else mask.numpy())
        for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
        if category_ids[label] is not None
    ]
