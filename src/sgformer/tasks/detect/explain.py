"""Explaining what a detector attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sgformer.data.detection_transforms import eval_transform
from sgformer.explaining.base import Explainer, explanations, pixels
from sgformer.heads.mask_rcnn import paste_masks
from sgformer.results import POINT_SHOWN, SHOWN, Explanation
from sgformer.tasks.detect.network import PAD_TO
from sgformer.viz.detection import Instances, overlay, sure_points
from sgformer.viz.segmentation import palette


class DetectExplainer(Explainer):
    """Explains images by a `Detector`; draws detections with a score of at least one half."""

    score = SHOWN

    def read(self, image: Image.Image) -> Tensor:
        return eval_transform(self.metadata.get("image_size", (min(image.size), max(image.size))))(image)

    def read_mask(self, mask: np.ndarray) -> Tensor:
        return self.read(Image.fromarray(mask).convert("RGB"))[0] > 0.5

    def _explain(self, x: Tensor) -> Explanation:
        batch, size = self.model.batch([x]), (x.shape[-2], x.shape[-1])
        inspection = self.network.inspect(batch)
        (found,), _ = self.model.heads(inspection.features, batch, [size], None)
        found = {name: value[found["scores"] >= self.score].cpu() for name, value in found.items()}
        (one,) = explanations(self.network, inspection, pixels(batch, self.normalization))
        names = self.names or [str(i) for i in range(self.model.num_classes)]
        shown = (one.image.shape[0], one.image.shape[1])
        prediction = {
            "boxes": found["boxes"].numpy(),
            "labels": found["labels"].numpy() - 1,
            "scores": found["scores"].numpy(),
        }
        if "masks" in found:
            masks = [m.numpy() for m in paste_masks(found["masks"], found["boxes"], shown)]
            prediction["masks"] = np.stack(masks) if masks else np.zeros((0, *shown), bool)
        points = None
        if "keypoints" in found:
            prediction["keypoints"] = found["keypoints"].numpy()
            points = sure_points(prediction["keypoints"], POINT_SHOWN)
        objects = prediction["boxes"], prediction["labels"], prediction["scores"], prediction.get("masks")
        instances = Instances(*objects, points, self.metadata.get("skeleton", ()))
        count = len(instances.boxes)
        title = f"{count} object{'s' if count != 1 else ''} from {self.score:g} up"
        drawn = overlay(one.image, instances, names)
        return dataclasses.replace(one, title=title, overlay=drawn, prediction=prediction)

    def mask(self, mask: Tensor) -> np.ndarray:
        height, width = mask.shape  # as `Detector.batch` pads
        return F.pad(mask.bool(), (0, -width % PAD_TO, 0, -height % PAD_TO)).cpu().numpy()


def summary(explanation: Explanation, names: Sequence[str]) -> list[dict[str, Any]]:
    """The objects, highest score first; see `Task.summary`."""
    found = explanation.prediction
    names = names or [str(i) for i in range(int(found["labels"].max(initial=-1)) + 1)]
    colours = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in palette(names).tolist()]
    return [
        {"class": names[i], "share": float(score), "colour": colours[i], "box": [round(v, 1) for v in box]}
        for i, score, box in zip(found["labels"], found["scores"], found["boxes"].tolist(), strict=True)
    ]


explainer = DetectExplainer
