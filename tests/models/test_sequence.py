"""Self-guided attention of sequences: any significance, any aggregation, and a task that it solves."""

import sys
from pathlib import Path

import pytest
import torch

import sgformer
from sgformer import SelfGuidedAttention1d
from sgformer.models.config import AGGREGATION
from sgformer.models.sequence import NEED_HYBRID

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.mark.parametrize("aggregation", AGGREGATION)
@pytest.mark.parametrize("significance", ["learned", "feature-norm", "uniform", "random", None, lambda x: x[..., 0]])
def test_every_source_and_aggregation_trains(significance, aggregation):
    module = SelfGuidedAttention1d(16, 4, [(0.5, 8), (0.5, 3)], significance, aggregation)
    x = torch.randn(2, 37, 16)
    out = module(x, torch.rand(2, 37) if significance is None else None)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert module.tokens.region_map().shape == module.tokens.token_map().shape == (2, 37)
    assert len(module.tokens) == -(-19 // 8) + -(-18 // 3)
    assert module.tokens.token_map().unique().numel() == len(module.tokens)


def test_a_caller_s_significance_decides_who_is_salient():
    module = SelfGuidedAttention1d(8, 2, [(0.75, 4), (0.25, 1)], None)
    significance = torch.zeros(1, 20)
    significance[0, 5:10] = 1
    module(torch.randn(1, 20, 8), significance)
    assert module.tokens.region_map()[0].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_it_is_the_image_module_on_a_grid_of_one_row():
    """With the middle row of its 3 x 3 convolution, the image's module sees what the sequence's sees."""
    from sgformer.models.backbone import SelfGuidedAttention
    from sgformer.models.config import Region

    line = SelfGuidedAttention1d(8, 2, [(1.0, 3)], None).double()
    image = SelfGuidedAttention(8, 2, [Region(1.0, 3)]).double()
    state = line.attn.state_dict()
    wide = torch.zeros(8, 1, 3, 3, dtype=torch.float64)
    wide[:, :, 1] = state["local.weight"]
    image.load_state_dict({**state, "local.weight": wide})
    x, significance = torch.randn(2, 14, 8, dtype=torch.float64), torch.rand(2, 14)
    torch.testing.assert_close(line(x, significance), image(x[:, None], significance[:, None])[0][:, 0])


@pytest.mark.parametrize(
    "options",
    [{"significance": name} for name in NEED_HYBRID]
    + [{"aggregation": "max"}, {"regions": [(0.5, 2)]}, {"heads": 3}, {"attention": "none"}],
)
def test_options_that_make_no_sense_are_named(options):
    with pytest.raises(ValueError, match="got"):
        SelfGuidedAttention1d(**{"dim": 16, "heads": 4, **options})


def test_significance_has_to_be_given_and_to_fit():
    with pytest.raises(ValueError, match="has no source"):
        SelfGuidedAttention1d(16, 4, significance=None)(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match="one number per token"):
        SelfGuidedAttention1d(16, 4)(torch.randn(1, 9, 16), torch.zeros(1, 8))


@pytest.mark.slow
def test_the_example_learns():
    from chirps import train

    accuracy, hits = train(steps=90)
    assert accuracy > 0.8 and hits > 0.2  # chance: 0.5 and 0.125
    assert "SelfGuidedAttention1d" in sgformer.__all__
