"""The settings of a run for keypoints; see `sgformer.training.config`."""

from __future__ import annotations

from dataclasses import dataclass

from sgformer.tasks.detect.config import ObjectsConfig
from sgformer.training.config import option


@dataclass(frozen=True)
class KeypointsConfig(ObjectsConfig):
    """Keypoints of objects."""

    sigmas: float | tuple[float, ...] | None = option(
        None, "Data", "of each keypoint, or of all, how far off still counts in OKS [COCO's for its persons, else .05]"
    )
    hflip: float | None = option(
        None, "Augmentation", "probability of a horizontal flip [.5 if keypoints have sides, else 0]"
    )
    flip_pairs: tuple[str, ...] = option(
        (), "Augmentation", "keypoints that change places in it, [A:B,...]; default: by left and right in names"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigmas", "flip_pairs"):
            if isinstance(value := getattr(self, name), list):  # YAML and JSON have no tuples
                object.__setattr__(self, name, tuple(value))
        self._check("hflip", lambda v: 0 <= v <= 1, "must be in [0, 1]")
        many = self.sigmas if isinstance(self.sigmas, tuple) else (self.sigmas or 0.0,)
        self._check("sigmas", lambda _: all(0 < v <= 1 for v in many), "must be above 0 and at most 1")


Config = KeypointsConfig
