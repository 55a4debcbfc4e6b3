"""A small network with all kinds of blocks, for tests of graphs and exported files."""

import torch

import sgformer
from sgformer.models.config import Region, SGFormerConfig, StageConfig

SMALL = SGFormerConfig(
    (
        StageConfig(8, 2, 2, 8, (Region(1 / 4, 196), Region(1 / 2, 56), Region(1 / 4, 28))),
        StageConfig(16, 2, 2, 4, (Region(1 / 4, 49), Region(1 / 2, 14), Region(1 / 4, 7))),
        StageConfig(16, 2, 2, 2, (Region(1 / 2, 2), Region(1 / 2, 1))),
        StageConfig(16, 2, 1),
    ),
    num_classes=5,
)


def small(**changes):
    torch.manual_seed(0)
    model = sgformer.create_model(SMALL.replace(**changes), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
