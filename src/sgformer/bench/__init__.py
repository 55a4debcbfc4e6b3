"""Benchmarks of networks side by side: the cases, how they are measured, how they are reported."""

from sgformer.bench.cases import BACKENDS, Case, build
from sgformer.bench.run import Result, run

__all__ = ["BACKENDS", "Case", "Result", "build", "run"]
