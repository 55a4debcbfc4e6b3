"""The settings."""

from dataclasses import dataclass

from sgformer.training.config import RunConfig, option


@dataclass(frozen=True)
class Config(RunConfig):
    """Regression."""

    scale: float = option(1.0, "Optimiser", "of the loss")
