"""Image classification: network, loss, optimiser, metrics. Runs inside any Lightning `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from timm.data.mixup import Mixup, mixup_target
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from sgformer.core.errors import UserError, first_line
from sgformer.core.names import quoted
from sgformer.data.identity import indices_in, names_in
from sgformer.data.preparing import Normalization
from sgformer.models.config import VARIANTS
from sgformer.models.load import Weights, build_model, build_network, size_option, take_rows
from sgformer.models.pretrained import FOLDER
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.classify.metrics import Evaluation, balanced_accuracy
from sgformer.tasks.classify.teacher import StepShare, Teacher, open_teacher
from sgformer.training.optimizer import check_optimizer, create_optimizer
from sgformer.training.task import Splits
from sgformer.training.task_module import ScheduledModule

log = logging.getLogger("sgformer")


class ClassificationModule(ScheduledModule):
    """Trains `model` on batches that begin with (images, targets).

    Args:
        model: (B, 3, H, W) -> (B, classes), with `num_classes`; optimiser groups follow timm's `no_weight_decay` and
            `group_matcher` where it has them.
        config: rates, schedule, mixing. `config.batch_size` is the number of images per update over all devices: the
            learning rate is scaled by it.
        steps_per_epoch: updates per epoch; by default taken from the trainer.
        class_names: one per class; by default the indices.
        class_counts: training images of each class, for `config.balance` "weights".
        teacher: a network whose answers are learned beside the labels, see `config.teacher_weight`; neither trained nor
            saved.

    Validation runs `eval_model` (the network itself unless a callback puts averaged weights there) and leaves
    `confusion`, (classes, classes) counts with true classes in rows, besides the logged `val_loss`, `top1`, `top5`,
    `balanced_accuracy` (fractions; with fewer than five classes `top5` counts the best of all).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        config: ClassifyConfig | None = None,
        steps_per_epoch: int | None = None,
        class_names: Sequence[str] | None = None,
        teacher: Teacher | None = None,
        class_counts: Sequence[int] | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = (config or ClassifyConfig()).resolved()
        self.steps_per_epoch = steps_per_epoch
        check_optimizer(self.config.opt)
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        self.class_names = list(class_names or map(str, range(self.num_classes)))
        self.confusion: np.ndarray | None = None
        # Selects the best weights: what a balanced training is after.
        self.monitor = "top1" if self.config.balance == "none" else "balanced_accuracy"
        weights = None
        if self.config.balance == "weights" and class_counts is not None:
            weights = balanced_weights(class_counts)
        self.register_buffer("class_weights", weights, persistent=False)
        self.frozen = {"teacher": teacher} if teacher else {}
        self.teacher_time = StepShare()

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

    def loss(self, images: Tensor, targets: Tensor) -> Tensor | dict[str, Any]:
        images, targets = self.mix(images, targets)
        logits = self.model(images).float()
        # With probabilities as targets the mean is over images, not over weights: it does not depend on how the batch
        # is split.
        label_loss = F.cross_entropy(logits, targets, weight=self.class_weights)
        if not self.frozen:
            return label_loss
        config, hard = self.config, self.config.teacher_labels == "hard"
        temperature = 1.0 if hard else config.teacher_temperature
        with self.teacher_time.part(self.device):
            answers = self.frozen["teacher"](images, temperature)
        best = answers.argmax(1)
        if hard:
            teacher_loss = F.cross_entropy(logits, best)
        else:  # times the temperature squared, so that it does not change the size of the gradients
            log_shares = (logits / temperature).log_softmax(1)
            teacher_loss = temperature**2 * F.kl_div(log_shares, answers, reduction="batchmean")
        return {
            "loss": (1 - config.teacher_weight) * label_loss + config.teacher_weight * teacher_loss,
            "parts": {
                "label_loss": label_loss.detach(),
                "teacher_loss": teacher_loss.detach(),
                "teacher_top1": (best == targets.argmax(1)).float().mean(),  # at chance if the classes are mixed up
            },
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.frozen:
            self.teacher_time.start(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = self.teacher_time.steps
        self.teacher_time.stop(self.device)
        if before < 3 == self.teacher_time.steps and self.trainer.is_global_zero:
            log.info(f"the teacher takes {self._teacher_share()}")

    def _teacher_share(self) -> str:
        share = self.teacher_time.share
        return "an unknown part of a training step" if share is None else f"{100 * share:.0f} % of a training step"

    def facts(self) -> dict[str, str]:
        return {"Teacher": f"{self.config.teacher}, {self._teacher_share()}"} if self.frozen else {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.frozen:
            checkpoint["teacher"] = self.frozen["teacher"].checksum

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.frozen and checkpoint.get("teacher") != self.frozen["teacher"].checksum:
            raise UserError(
                f"--teacher {self.config.teacher} has changed since this run began (its weights, or which classes of "
                "the data it knows as which): bring the former one back, or start a new run"
            )

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
        values["balanced_accuracy"] = balanced_accuracy(self.confusion)
        # Each value is already over all processes: synchronising again would change nothing.
        self.log_dict(values, rank_zero_only=False, sync_dist=False)

    def evaluation(self, skipped: Sequence[str]) -> Evaluation:
        top1, top5, loss = (float(self.trainer.callback_metrics[name]) for name in ("top1", "top5", "val_loss"))
        assert self.confusion is not None
        return Evaluation(top1, top5, loss, self.confusion, tuple(self.class_names), tuple(skipped))

    @property
    def warmup_updates(self) -> int:
        return self.config.warmup_updates(self.steps_per_epoch or 0)

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = create_optimizer(
            self.model,
            opt=config.opt,
            lr=config.scaled(config.lr),
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
        steps = self.steps_per_epoch
        if steps is None:
            steps = -(-int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1))
        warmup = config.warmup_updates(steps)
        # The cosine begins where the warm-up ends, at the full rate: otherwise the rate would drop there.
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(2, round(config.epochs * steps) - warmup),  # timm warns of 1
            lr_min=config.scaled(config.min_lr),
            warmup_t=warmup,
            warmup_lr_init=config.scaled(config.warmup_lr),
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """A weight for each class, inversely proportional to its number of images, with a mean of 1 over the images.

    Args:
        counts: training images of each class; classes without any get 0.

    Returns:
        (classes,) float32.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    present = images > 0
    return torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0).float()


def build(config: ClassifyConfig, splits: Splits, weights: Weights | None) -> ClassificationModule:
    """See `Task.module`."""
    classes = splits.metadata["classes"]
    model = new_classifier(config, len(classes), weights, classifier_rows(weights, classes) if weights else None)
    teacher, notes = None, []
    if config.teacher:  # after the network, whose initial weights then do not depend on it
        teacher, about = open_teacher(
            config.teacher, config.teacher_classes, classes, Normalization.of(splits.metadata)
        )
        kind = "hard labels" if config.teacher_labels == "hard" else f"temperature {config.teacher_temperature:g}"
        notes = [f"{about}; {config.teacher_weight:g} of the loss, {kind}"]
    counts = splits.train.listing.counts()
    module = ClassificationModule(model, config, int(splits.steps_per_pass), classes, teacher, counts)
    module.notes = [*(f"note: {line}" for line in (classifier_notes(weights, classes) if weights else ())), *notes]
    return module


def classifier_rows(weights: Weights, classes: Sequence[str]) -> list[int | None] | None:
    """Which row of the classifier in some weights each of these classes takes: that of the class of its name, or None
    for a fresh one. None as a whole: the rows are in order, or their classes unknown."""
    names = names_in(weights.metadata) if weights.architecture is None else []
    rows = indices_in(weights.metadata, classes)
    return None if not names or (len(names) == len(rows) and rows == list(range(len(rows)))) else rows


def classifier_notes(weights: Weights, classes: Sequence[str]) -> list[str]:
    """What the user has to know of the classifier in some weights, on data with these classes."""
    rows = classifier_rows(weights, classes)
    if rows is not None:
        fresh = [name for name, row in zip(classes, rows, strict=True) if row is None]
        if not fresh:
            return [f"the classifier of {weights.path} is kept, its classes matched by name"]
        if len(fresh) < len(classes):
            known = len(classes) - len(fresh)
            kept = "1 class is" if known == 1 else f"{known} classes are"
            return [f"of the classifier of {weights.path}, {kept} kept; afresh: {quoted(fresh)}"]
        if weights.path.parent == FOLDER:  # the package's is never the user's
            return []
        return [f"the classifier starts afresh: no class of the data is among those of {weights.path}"]
    stored = weights.config.num_classes if weights.config and not weights.architecture else 0
    if stored and stored != len(classes):
        return [f"the classifier starts afresh: {weights.path} has {stored} classes, the data {len(classes)}"]
    return []


@contextmanager
def refused_size(name: str, size: tuple[int, int]) -> Iterator[None]:
    """Turn what a network of one size says to another into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, KeyError) as error:
        raise UserError(f"{name} does not take images of {size[0]} x {size[1]} pixels ({first_line(error)})") from error


def new_classifier(
    config: ClassifyConfig,
    num_classes: int,
    weights: Weights | None = None,
    rows: Sequence[int | None] | None = None,
) -> nn.Module:
    """The network to train: fresh, or from some weights, with their classifier kept if the number of classes fits, or
    those rows of it that `rows` names (see `classifier_rows`)."""
    options: dict[str, Any] = {"drop_path_rate": config.drop_path}
    if config.model in VARIANTS:
        options |= {"coarse": config.coarse, "img_size": config.image_hw, **config.guidance}
    elif not config.drop_path:
        options = {}  # not every network of timm takes drop_path_rate
    options |= size_option(config.model, config.image_hw)
    of_one_size = config.model not in VARIANTS and bool(options.get("img_size"))
    with refused_size(config.model, config.image_hw) if of_one_size else nullcontext():
        if weights is None:
            model = build_model(config.model, num_classes, **options)
        else:
            model = build_network(weights, num_classes=num_classes, partial=True, **options)
            if rows is not None:
                take_rows(model, weights, rows)
        if of_one_size:  # what a size lacks shows when it is used
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, *config.image_hw))
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model.train()
