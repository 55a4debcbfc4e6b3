"""Explaining what a network for keypoints attended to: as detection, which draws what is found."""

from sgformer.tasks.detect.explain import explainer, summary

__all__ = ["explainer", "summary"]
