"""The plain model of benchmarks/plain.py computes what ours computes: else comparing their times would say nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch

import sgformer

path = Path(__file__).parents[2] / "benchmarks" / "plain.py"
spec = importlib.util.spec_from_file_location("plain", path)
plain_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain_module)


@pytest.mark.parametrize(
    "size,coarse,checkpointing",
    [
        ((224, 224), "global", False),
        ((75, 130), "global", False),
        ((75, 130), "window", False),
        ((250, 64), "window", True),
    ],
)
def test_plain_equals_ours_forward_and_backward(size, coarse, checkpointing):
    torch.manual_seed(0)
    ours = sgformer.create_model("sgformer_n", coarse=coarse, drop_path_rate=0.0, dtype=torch.float64).train()
    plain = plain_module.from_ours(ours)
    assert plain.training and set(dict(plain.named_parameters())) == set(sgformer.models.released.to_released(ours))
    plain.set_grad_checkpointing(checkpointing)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    logits = [model(image) for model in (ours, plain)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-12)
    for out in logits:
        out.square().sum().backward()
    # Our gradients under the released names, through the same adapter that carries the weights.
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(parameter.grad)
    for name, gradient in sgformer.models.released.to_released(ours).items():
        torch.testing.assert_close(dict(plain.named_parameters())[name].grad, gradient, rtol=1e-7, atol=1e-9)
