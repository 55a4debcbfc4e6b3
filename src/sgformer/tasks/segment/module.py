"""Training semantic segmentation: loss, optimiser, metric. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from timm.scheduler import PolyLRScheduler
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.data.dense_transforms import normalized
from sgformer.data.preparing import IMAGENET, Normalization
from sgformer.models.load import Weights
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.tasks.segment.metrics import SegmentationEvaluation
from sgformer.tasks.segment.network import InferenceSettings, Segmenter, new_segmenter, probabilities_by_rows
from sgformer.training.optimizer import check_optimizer, create_optimizer
from sgformer.training.task import Splits
from sgformer.training.task_module import ScheduledModule, decay_groups

#: Pixels of images of one size that validation runs through the network at once.
AT_ONCE = 2**23


class SegmentationModule(ScheduledModule):
    """Trains a `Segmenter` on batches that begin with (images, class indices).

    Args:
        model: the network.
        config: rates, schedule, evaluation size. `config.batch_size` is the number of images per update over all
            devices: the learning rate is scaled by it.
        total_steps: updates of the whole schedule; by default `config.steps`.
        class_names: one per class; by default the indices.
        ignore: the index of pixels that have no class.
        inference: how validation runs on images; by default whole, at `config.short`.
        normalization: of validation images that are uint8; floats are taken as they are.

    Validation runs `eval_model` on images of any size (a list of (3, H, W), or (B, 3, H, W)) and counts pixels at the
    size of their labels. It leaves `result`, and `by_image` (pixel accuracy by index, of this process; `best_by_image`
    at the last call of `evaluation`), and logs `val_loss`, `miou`, `macc` and `pixel_accuracy` (fractions).
    """

    monitor = "miou"  # selects the best weights

    def __init__(
        self,
        model: Segmenter,
        config: SegmentConfig | None = None,
        total_steps: int | None = None,
        class_names: Sequence[str] | None = None,
        ignore: int = 255,
        inference: InferenceSettings | None = None,
        normalization: Normalization = IMAGENET,
    ):
        super().__init__()
        self.model = model
        self.config = (config or SegmentConfig()).resolved()
        self.total_steps = total_steps or self.config.steps
        self.class_names = tuple(class_names or map(str, range(model.num_classes)))
        self.ignore = ignore
        self.inference = inference or InferenceSettings(self.config.short)
        self.normalization = normalization
        self.result: SegmentationEvaluation | None = None
        self.by_image: dict[int, float] = {}
        self.best_by_image: dict[int, float] = {}
        check_optimizer(self.config.opt)
        if model.num_classes < 2:
            raise UserError("segmentation needs two classes or more; for one, label everything else as a second class")
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(
            model.num_classes, ignore_index=ignore, validate_args=False
        )
        self.val_loss = torchmetrics.MeanMetric()
        self.images = torchmetrics.SumMetric()

    def heads(self) -> list[nn.Module]:
        return [self.model.head]

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
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
        for places in groups_of_a_size(images):  # one pass for all images of a size
            known = hits = torch.zeros(len(places), dtype=torch.int64, device=images[0].device)
            stacked = torch.stack([images[i] for i in places])
            if not stacked.is_floating_point():
                stacked = normalized(stacked, self.normalization)
            labels = torch.stack([targets[i] for i in places])
            for rows, shares in probabilities_by_rows(self.eval_model, stacked, self.inference):
                truth = labels[:, rows].long()
                pixels = (truth != self.ignore).sum()
                if pixels:
                    loss = F.nll_loss(shares.clamp(min=1e-12).log(), truth, ignore_index=self.ignore)
                    self.val_loss.update(loss, weight=pixels)
                guess = shares.argmax(1)
                self.confusion.update(guess, truth)
                known = known + (truth != self.ignore).flatten(1).sum(1)
                hits = hits + ((guess == truth) & (truth != self.ignore)).flatten(1).sum(1)
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

    def evaluation(self, skipped: Sequence[str]) -> SegmentationEvaluation:
        assert self.result is not None
        self.best_by_image = dict(self.by_image)  # called when these weights are the best so far
        return dataclasses.replace(self.result, skipped=tuple(skipped))

    @property
    def warmup_updates(self) -> int:
        return self.config.warmup_steps

    def configure_optimizers(self) -> Any:
        config = self.config
        rate = config.scaled(config.lr)
        groups = decay_groups(self.model, config.weight_decay)
        optimizer = create_optimizer(groups, opt=config.opt, lr=rate, weight_decay=config.weight_decay)
        scheduler = PolyLRScheduler(
            optimizer,
            t_initial=max(1, self.total_steps - config.warmup_steps),
            power=config.power,
            warmup_t=config.warmup_steps,
            warmup_lr_init=1e-6 * rate,
            warmup_prefix=True,  # the decay begins where the warm-up ends, at the full rate
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build(config: SegmentConfig, splits: Splits, weights: Weights | None) -> SegmentationModule:
    """See `Task.module`."""
    listing = splits.train.listing
    model = new_segmenter(config, len(listing.classes), weights, listing.classes)
    return SegmentationModule(
        model,
        config,
        splits.total_steps,
        listing.classes,
        listing.ignore,
        normalization=Normalization.of(splits.metadata),
    )


def groups_of_a_size(images: Sequence[Tensor]) -> list[list[int]]:
    """The positions of images (3, H, W) of the same size, in groups of up to `AT_ONCE` pixels or of one image."""
    by_size: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape[-2:], []).append(i)
    groups = []
    for (height, width), places in by_size.items():
        count = max(1, AT_ONCE // (height * width))
        groups += [places[start : start + count] for start in range(0, len(places), count)]
    return groups
