"""The exported graphs: those of detection, which output what is found."""

from sgformer.tasks.detect.export import graph

__all__ = ["graph"]
