"""Image classification: network, loss, optimiser, metrics. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from timm.data.mixup import Mixup, mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from sgformer.core.errors import UserError, first_line
from sgformer.models.config import VARIANTS
from sgformer.models.load import Weights, build_model, build_network, size_option
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.classify.metrics import Evaluation
from sgformer.training.task import Splits
from sgformer.training.task_module import ScheduledModule, check_optimizer


class ClassificationModule(ScheduledModule):
    """Trains `model` on batches that begin with (images, targets).

    Args:
        model: (B, 3, H, W) -> (B, classes), with `num_classes`; optimiser groups follow timm's `no_weight_decay` and
            `group_matcher` where it has them.
        config: rates, schedule, mixing. `config.batch_size` is the number of images per update over all devices: the
            learning rate is scaled by it.
        steps_per_epoch: updates per epoch; by default taken from the trainer.
        class_names: one per class; by default the indices.

    Validation runs `eval_model` (the network itself unless a callback puts averaged weights there) and leaves
    `confusion`, (classes, classes) counts with true classes in rows, besides the logged `val_loss`, `top1`, `top5`
    (fractions; with fewer than five classes `top5` counts the best of all).
    """

    monitor = "top1"  # selects the best weights

    def __init__(
        self,
        model: nn.Module,
        config: ClassifyConfig | None = None,
        steps_per_epoch: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = config or ClassifyConfig()
        self.steps_per_epoch = steps_per_epoch
        check_optimizer(self.config.opt)
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        self.class_names = list(class_names or map(str, range(self.num_classes)))
        self.confusion: np.ndarray | None = None

        classes: dict[str, Any] = {"num_classes": self.num_classes, "average": "micro"}
        self.top1 = torchmetrics.classification.MulticlassAccuracy(top_k=1, **classes)
        self.top5 = torchmetrics.classification.MulticlassAccuracy(top_k=min(5, self.num_classes), **classes)
        self.val_loss = torchmetrics.MeanMetric()
        self.val_confusion = torchmetrics.classification.MulticlassConfusionMatrix(self.num_classes)
        self.mixup: Mixup | None = None
        if self.config.mixup or self.config.cutmix:
            self.mixup = Mixup(
                mixup_alpha=self.config.mixup,
                cutmix_alpha=self.config.cutmix,
                prob=self.config.mix_prob,
                label_smoothing=self.config.smoothing,
                num_classes=self.num_classes,
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or cutmix and label smoothing: (B, 3, H, W), (B,) int64 -> images, (B, classes) float targets."""
        soft = mixup_target(targets, self.num_classes, smoothing=self.config.smoothing)
        even = len(images) // 2 * 2 if self.mixup else 0  # timm mixes pairs: the last of an odd number stays unmixed
        if self.mixup and even:
            mixed, mixed_targets = self.mixup(images[:even].clone(), targets[:even])
            images, soft = torch.cat([mixed, images[even:]]), torch.cat([mixed_targets, soft[even:]])
        return images, soft

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        images, targets = self.mix(images, targets)
        return F.cross_entropy(self.model(images).float(), targets)

    def on_validation_epoch_start(self) -> None:
        # Outside inference mode, so that `trainer.fit` can update the counts of `trainer.validate`.
        with torch.inference_mode(False):
            for metric in (self.val_loss, self.top1, self.top5, self.val_confusion):
                metric.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch[:2]
        if not len(targets):
            return
        logits = self.eval_model(images).float()
        self.val_loss.update(F.cross_entropy(logits, targets), weight=len(targets))
        for metric in (self.top1, self.top5, self.val_confusion):
            metric.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        values = {name: getattr(self, name).compute() for name in ("val_loss", "top1", "top5")}
        self.confusion = self.val_confusion.compute().cpu().numpy()
        # Each value is already over all processes: synchronising again would change nothing.
        self.log_dict(values, rank_zero_only=False, sync_dist=False)

    def evaluation(self, skipped: Sequence[str]) -> Evaluation:
        top1, top5, loss = (float(self.trainer.callback_metrics[name]) for name in ("top1", "top5", "val_loss"))
        assert self.confusion is not None
        return Evaluation(top1, top5, loss, self.confusion, tuple(self.class_names), tuple(skipped))

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = create_optimizer_v2(
            self.model,
            opt=config.opt,
            lr=config.scaled(config.lr),
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
        steps = self.steps_per_epoch
        if steps is None:
            steps = -(-int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1))
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=config.scaled(config.warmup_lr),
            min_lr=config.scaled(config.min_lr),
            cooldown_epochs=config.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build(config: ClassifyConfig, splits: Splits, weights: Weights | None) -> ClassificationModule:
    """See `Task.module`."""
    classes = splits.metadata["classes"]
    model = new_classifier(config, len(classes), weights)
    return ClassificationModule(model, config, int(splits.steps_per_pass), classes)


@contextmanager
def refused_size(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Turn what a network of one size says to another into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
        raise UserError(f"{name} does not take images of {size[0]} x {size[1]} pixels ({first_line(error)})") from error


def new_classifier(config: ClassifyConfig, num_classes: int, weights: Weights | None = None) -> nn.Module:
    """The network to train: fresh, or from some weights, with their classifier kept if the number of classes fits."""
    options: dict[str, Any] = {"drop_path_rate": config.drop_path}
    if config.model in VARIANTS:
        options |= {"coarse": config.coarse, "img_size": config.image_hw, **config.guidance}
    elif not config.drop_path:
        options = {}  # not every network of timm takes drop_path_rate
    options |= size_option(config.model, config.image_hw)
    with refused_size(config.model, config.image_hw):
        if weights is None:
            model = build_model(config.model, num_classes, **options)
        else:
            model = build_network(weights, num_classes=num_classes, **options)
        if options.get("img_size") and config.model not in VARIANTS:  # what a size lacks shows when it is used
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, *config.image_hw))
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model.train()
