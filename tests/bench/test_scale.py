"""benchmarks/scale.py: what is counted is right, and what is computed from it behaves as it should."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale

MACHINE = scale.Machine(1e15, 5e-6, 14, 330, 450e9, 50e9)


def test_a_training_step_is_three_times_the_forward_pass():
    """Of convolutions in groups, too, which torch's own counter takes for dense ones in the backward pass."""
    with torch.device("meta"):
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 16, 5))
        flops, kernels = scale.count(lambda: [layers(torch.zeros(2, 3, 8, 8, requires_grad=True))])
    forward = 2 * 2 * (36 * 8 * 27 + 16 * 8 * 9 + 5 * 128)
    assert flops == 3 * forward
    assert kernels > 7


def test_the_counts_are_those_of_the_model():
    cost = scale.classification("sgformer_n")
    assert cost.flops == pytest.approx(3 * 2 * 0.56e9, rel=0.02) and cost.parameters == pytest.approx(1.99e6, rel=0.01)


def test_more_gpus_need_less_of_all_but_messages():
    cost = scale.Cost(30e9, 3000, 22_000_000)
    one, eight, many = (scale.step_parts(scale.PLANS[0], cost, gpus, 0.25, MACHINE) for gpus in (1, 8, 64))
    assert one["all-reduce"] == 0 < eight["all-reduce"] < many["all-reduce"]
    for name in ("arithmetic", "decoding"):
        assert one[name] == pytest.approx(8 * eight[name]) == pytest.approx(64 * many[name])
    assert one["kernel starts"] == many["kernel starts"]
