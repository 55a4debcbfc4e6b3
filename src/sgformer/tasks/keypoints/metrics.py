"""The COCO metrics of boxes and keypoints: those of detection, which measures whatever is found."""

from sgformer.tasks.detect.metrics import read, report

__all__ = ["read", "report"]
