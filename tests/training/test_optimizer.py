"""Optimisers by name, and Muon in a dtype that the processor is quick in."""

import pytest
import timm.optim.muon as muon
import torch

from sgformer.core.errors import UserError
from sgformer.training import optimizer
from sgformer.training.optimizer import check_optimizer, create_optimizer


def step(weight: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    made = create_optimizer([parameter], opt="muon", lr=1.0, weight_decay=0.0)
    parameter.grad = torch.linspace(-1, 1, weight.numel()).sin().view_as(weight)
    made.step()
    return parameter.detach() - weight


@pytest.mark.parametrize("on_cpu", [True, False])
def test_muon_orthogonalises_in_float32_on_a_cpu(monkeypatch, on_cpu):
    monkeypatch.setattr(optimizer, "_on_cpu", lambda _: on_cpu)
    dtypes = []
    usual = optimizer._newton_schulz

    def recorded(gradient, *args, dtype=torch.bfloat16, **options):
        dtypes.append(dtype)
        return usual(gradient, *args, dtype=dtype, **options)

    monkeypatch.setattr(optimizer, "_newton_schulz", recorded)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", recorded)
    update = step(torch.zeros(8, 16))
    assert set(dtypes) == {torch.float32 if on_cpu else torch.bfloat16}
    assert torch.linalg.matrix_norm(update, 2) < 2  # orthogonalised: singular values near 1 times the shape's factor
    assert muon.zeropower_via_newtonschulz is recorded  # nothing of timm stays changed for others


def test_unknown_name():
    with pytest.raises(UserError, match="unknown --opt adamv, did you mean"):
        check_optimizer("adamv")
