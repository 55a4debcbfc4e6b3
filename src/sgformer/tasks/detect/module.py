"""Training object detection and instance segmentation: losses, optimiser, AP. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sgformer.models.load import Weights
from sgformer.tasks.detect.config import DetectConfig, ObjectsConfig
from sgformer.tasks.detect.data import coco_metric
from sgformer.tasks.detect.metrics import CocoMetric, DetectionEvaluation
from sgformer.tasks.detect.network import Detector, coco_results, new_detector
from sgformer.training.optimizer import check_optimizer, create_optimizer
from sgformer.training.ranks import broadcast, gather
from sgformer.training.task import Splits
from sgformer.training.task_module import TaskModule, decay_groups


class DetectionModule(TaskModule):
    """Trains a `Detector` on batches of `data.coco.DetectionBatch`.

    Args:
        model: the network.
        config: rates and schedule. `config.batch_size` is the number of images per update over all devices: the
            learning rate is scaled by it.
        steps_per_epoch, total_steps: updates, for the schedule; by default taken from the trainer.
        metric: evaluates the detections of validation; without it validation only collects `results`.
        image_ids: of the validation images, by position in their listing.
        category_ids: written in the results, for each class; detections of classes without one are left out.

    Validation runs `eval_model` and leaves `result`, besides the logged `box_ap`, `box_ap50`, `box_ap75` and, with
    masks or keypoints, `mask_ap` or `keypoints_ap` ... (fractions).
    """

    def __init__(
        self,
        model: Detector,
        config: ObjectsConfig | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        metric: CocoMetric | None = None,
        image_ids: Sequence[Any] = (),
        category_ids: Sequence[Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = (config or DetectConfig()).resolved()
        check_optimizer(self.config.opt)
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.metric = metric
        self.image_ids = image_ids
        self.category_ids = list(range(1, model.num_classes + 1)) if category_ids is None else list(category_ids)
        self.monitor = f"{model.kinds[-1]}_ap"  # selects the best weights
        self.result: DetectionEvaluation | None = None
        self.results: list[dict[str, Any]] = []
        self.seen: list[int] = []  # positions of the images validated

    def heads(self) -> list[nn.Module]:
        return [self.model.heads]

    def forward(self, images: Sequence[Tensor], sizes: Any = None) -> Any:
        return self.model(images, sizes=sizes)

    def loss(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The sum of the losses, and each of them under "parts"."""
        losses = self.model(images, targets)
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
        parts = gather([self.results, self.seen]) if trainer.world_size > 1 else [(self.results, self.seen)]
        if trainer.is_global_zero:
            results = [result for part, _ in parts for result in part]
            images = [self.image_ids[i] for _, positions in parts for i in positions]
            self.result = self.metric.evaluate(results, images)
        if trainer.world_size > 1:  # the others get the metrics, without the many detections
            light = broadcast(self.result.to_json() if self.result else None)
            self.result = self.result if trainer.is_global_zero else DetectionEvaluation.of_json(light)
        self.log_dict(self.result.metrics(), rank_zero_only=False, sync_dist=False)  # type: ignore[union-attr]

    def evaluation(self, skipped: Sequence[str]) -> DetectionEvaluation:
        assert self.result is not None
        return dataclasses.replace(self.result, skipped=tuple(skipped))

    @property
    def warmup_updates(self) -> int:
        return self.config.warmup_updates(self.total_steps or 0)

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = decay_groups(self.model, config.weight_decay)
        return create_optimizer(groups, opt=config.opt, lr=config.scaled(config.lr), weight_decay=config.weight_decay)

    def on_train_start(self) -> None:
        total = int(self.trainer.estimated_stepping_batches)
        self.total_steps = self.total_steps or total
        self.steps_per_epoch = self.steps_per_epoch or -(-total // (self.trainer.max_epochs or 1))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # The rate is a function of the step and of this run's settings, also after resuming: no state to keep.
        share = self.config.rate(self.global_step, self.steps_per_epoch, self.total_steps)  # type: ignore[arg-type]
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.config.scaled(self.config.lr) * share


def build(config: DetectConfig, splits: Splits, weights: Weights | None) -> DetectionModule:
    """See `Task.module`."""
    train = splits.train.listing
    model = new_detector(config, len(train.classes), train.has_masks, weights, train.classes)
    return make_module(model, config, splits, coco_metric(splits.val.listing))


def make_module(model: Detector, config: ObjectsConfig, splits: Splits, metric: CocoMetric) -> DetectionModule:
    """The module that trains a network on the data of a run."""
    val = splits.val.listing
    return DetectionModule(
        model,
        config,
        steps_per_epoch=int(splits.steps_per_pass),
        total_steps=splits.total_steps,
        metric=metric,
        image_ids=[image.id for image in val.images],
        category_ids=val.own_ids,
    )
