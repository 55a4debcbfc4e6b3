"""Time and memory of networks, side by side: cases, how they are run, what is told about them."""

from sgformer.bench.cases import BACKENDS, Case, build
from sgformer.bench.run import Result, run

__all__ = ["BACKENDS", "Case", "Result", "build", "run"]
