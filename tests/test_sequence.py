"""Self-guided attention of sequences: any significance, any aggregation, and a task that it solves."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgformer
from sgformer import SelfGuidedAttention1d, SGFormer1d, Stem1d, ops
from sgformer.models.config import AGGREGATION, CHOICES, SIGNIFICANCE
from sgformer.sequence import NEED_HYBRID, HybridScaleAttention1d

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


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


# -- unequal lengths --------------------------------------------------------------------------------------------------

LENGTHS = (37, 1, 20, 13, 2, 30)


def lively(module):
    """In float64, with parameters that let every part count."""
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.3)
    return module.eval()


def padded(length=37, dim=16, padding=float("nan")):
    """Sequences of LENGTHS, and what must not be seen after each."""
    x = torch.randn(len(LENGTHS), length, dim, dtype=torch.float64)
    for row, n in zip(x, LENGTHS, strict=True):
        row[n:] = padding
    return x, torch.tensor(LENGTHS)


@pytest.mark.parametrize("attention", CHOICES["attention"])
@pytest.mark.parametrize("aggregation", [a for a in AGGREGATION if a != "merge"])
@pytest.mark.parametrize("significance", [*SIGNIFICANCE, "of-neighbours"])
def test_a_sequence_is_classified_as_it_is_alone(significance, aggregation, attention, monkeypatch):
    def of_neighbours(x, coarse, fine):
        """A source that looks at the whole sequence."""
        return x.sum(-1) - x.sum(-1).mean(1, keepdim=True) + x.shape[1]

    monkeypatch.setitem(SIGNIFICANCE, "of-neighbours", "a test's")
    monkeypatch.setitem(sgformer.models.significance.SOURCES, "of-neighbours", of_neighbours)
    net = lively(SGFormer1d(16, 4, 2, 5, ((0.5, 4), (0.3, 3), (0.2, 1)), 4, 5, significance, aggregation, attention))
    x, lengths = padded()
    seen = net.inspect(x, lengths)
    assert seen.logits.std(0).min() > 1e-3  # the sequences differ
    for i, n in enumerate(LENGTHS):
        alone = net.inspect(x[i : i + 1, :n])
        torch.testing.assert_close(alone.logits[0], seen.logits[i], atol=1e-12, rtol=0)
        for pair in range(2):
            for name in ("significance", "coarse", "fine"):
                torch.testing.assert_close(getattr(alone, name)[pair][0], getattr(seen, name)[pair][i, :n])
            mine, batched = alone.tokens[pair], seen.tokens[pair][i]
            assert len(mine) == len(batched) and torch.equal(mine.token_map(), batched.token_map())
            assert torch.equal(mine.region_map(), batched.region_map())


def test_gradients_ignore_padding_too():
    net = lively(SGFormer1d(16, 4, 1, 3))
    x, lengths = padded()
    x.requires_grad_()
    net(x, lengths).square().sum().backward()
    batched = [p.grad.clone() for p in net.parameters()]
    assert all(not row[n:].any() for row, n in zip(x.grad, LENGTHS, strict=True))
    net.zero_grad()
    for i, n in enumerate(LENGTHS):
        net(x[i : i + 1, :n].detach()).square().sum().backward()
    for one, parameter in zip(batched, net.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize("significance", ["learned", "random", None, lambda x: x.cumsum(1)[..., 0] / x.shape[1]])
def test_the_attention_alone_takes_lengths(significance):
    module = lively(SelfGuidedAttention1d(16, 4, [(0.7, 8), (0.3, 2)], significance))
    x, lengths = padded()
    given = torch.randn(x.shape[:2], dtype=torch.float64) if significance is None else None
    out = module(x, given, lengths)
    tokens = module.tokens
    for i, n in enumerate(LENGTHS):
        alone = module(x[i : i + 1, :n], None if given is None else given[i : i + 1, :n])
        torch.testing.assert_close(alone[0], out[i, :n], atol=1e-12, rtol=0)
        assert not out[i, n:].any() and len(tokens[i]) == len(module.tokens)


def test_samples_become_tokens_by_their_own_length():
    stem = lively(Stem1d(1, 16, (3, 2)))
    x = torch.randn(len(LENGTHS), 37, dtype=torch.float64)
    for row, n in zip(x, LENGTHS, strict=True):
        row[n:] = float("nan")
    tokens, lengths = stem(x, torch.tensor(LENGTHS))
    assert lengths.tolist() == [-(-n // 6) for n in LENGTHS] and tokens.shape[1] == 7
    for i, n in enumerate(LENGTHS):
        alone, none = stem(x[i : i + 1, :n])
        assert none is None
        torch.testing.assert_close(alone[0], tokens[i, : lengths[i]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_of_sequences_are_those_of_each_alone(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    rates = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shares = torch.rand(len(rates), dtype=torch.float64)
    shares = (shares / shares.sum()).tolist()
    order = torch.stack([torch.cat([torch.randperm(n), torch.arange(n, max(lengths))]) for n in lengths])
    groups, valid = ops.group_sequences(order, torch.tensor(lengths), ops.cumulative(shares), rates)
    for i, n in enumerate(lengths):
        alone = ops.group_tokens(order[i : i + 1, :n], shares, rates)
        for region, (mine, real) in enumerate(zip(groups, valid, strict=True)):
            assert torch.equal(mine[i][real[i]], alone[region][0])


def test_masked_linear_attention_is_that_of_the_keys_left():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    valid = torch.arange(7) < torch.tensor([[4], [7]])
    out = ops.attend_linearly(q, k, v, valid)
    torch.testing.assert_close(out[0], ops.attend_linearly(q[:1], k[:1, :, :4], v[:1, :, :4])[0])
    torch.testing.assert_close(out[1], ops.attend_linearly(q[1:], k[1:], v[1:])[0])


@pytest.mark.parametrize("length", [1, 7, 24, 25])
def test_attention_received_sums_to_that_given(length):
    module = lively(HybridScaleAttention1d(16, 4, 4, 6))
    out, coarse, fine = module(torch.randn(2, length, 16, dtype=torch.float64))
    assert out.shape == (2, length, 16)
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(coarse[:, ::4].sum(1), one)  # a query gives 1 in all, and a key's share is its tokens'
    for start in range(0, length, 6):
        torch.testing.assert_close(fine[:, start : start + 6].sum(1), one)


@pytest.mark.parametrize(
    "lengths, said",
    [
        (torch.tensor([3, 9, 1]), "from 1 to 8"),
        (torch.tensor([3, 0, 1]), "from 1 to 8"),
        (torch.tensor([3, 8]), "3 whole numbers"),
        (torch.tensor([3.0, 8.0, 1.0]), "3 whole numbers"),
        (torch.ones(3, 8, dtype=torch.bool), "3 whole numbers"),
    ],
)
def test_lengths_that_make_no_sense_are_named(lengths, said):
    x = torch.randn(3, 8, 16)
    for module in (SGFormer1d(16), Stem1d(16, 16)):
        with pytest.raises(ValueError, match=said):
            module(x, lengths)
    with pytest.raises(ValueError, match=said):
        SelfGuidedAttention1d(16, 4)(x, None, lengths)


def test_merging_takes_no_lengths():
    module = SelfGuidedAttention1d(16, 4, aggregation="merge")
    with pytest.raises(ValueError, match="takes no lengths"):
        module(torch.randn(2, 9, 16), None, torch.tensor([9, 4]))


@pytest.mark.parametrize("options", [{"significance": "none"}, {"heads": 3}, {"reduction": 0}, {"window": 0}])
def test_networks_that_make_no_sense_are_named(options):
    with pytest.raises(ValueError, match="got"):
        SGFormer1d(**{"dim": 16, **options})


# -- examples ---------------------------------------------------------------------------------------------------------


def test_sound_and_text_are_compared_and_drawn(tmp_path, monkeypatch):
    import wave

    import numpy as np
    import sequences

    sound = tmp_path / "recordings"
    sound.mkdir()
    for digit in range(2):
        for number in range(12):
            samples = np.sin(np.arange(900 + 64 * number) * (0.1 + 0.3 * digit)) * 8000
            with wave.open(str(sound / f"{digit}_ann_{number}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(samples.astype("<i2").tobytes())
    lines = ["0 how far is the moon ?", "1 who was she ?", "0 how far is it", "1 who wrote $ this"] * 6
    for name in ("train", "test"):
        (tmp_path / name).write_text("\n".join(lines), encoding="latin-1")
    for kind, data in (("digits", [sound]), ("text", [tmp_path / "train", tmp_path / "test"])):
        out = tmp_path / kind
        command = ["sequences.py", kind, *map(str, data), "--out", str(out), "--seeds", "0", "1", "--epochs", "1"]
        monkeypatch.setattr(sys, "argv", command)
        sequences.main()
        rows = (out / "table.md").read_text().splitlines()
        assert [row.split(" | ")[0] for row in rows[2:]] == ["| guided", "| uniform", "| plain"] and "±" in rows[2]
        costs = [float(row.split(" | ")[2].split()[0]) for row in rows[2:]]
        assert costs[0] == costs[1] and abs(costs[2] / costs[0] - 1) < 0.05
        assert (out / "tokens.png").stat().st_size > 10_000 and len((out / "runs.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize("hertz", [300, 1000, 3000])
def test_a_tone_is_loudest_in_its_own_band(hertz):
    import sequences

    frames = sequences.log_mels(torch.sin(torch.arange(4000) * 2 * torch.pi * hertz / sequences.RATE))
    assert frames.shape == (4000 // sequences.HOP + 1, sequences.MELS)
    at = torch.linspace(0, sequences.RATE / 2, sequences.WINDOW // 2 + 1)
    centres = (sequences.mel_filters() * at[:, None]).sum(0) / sequences.mel_filters().sum(0)
    nearest = (centres - hertz).abs().argmin()
    assert ((frames[10:-10].argmax(1) - nearest).abs() <= 1).all()


@pytest.mark.slow
def test_the_example_learns():
    from chirps import train

    accuracy, hits = train(steps=90)
    assert accuracy > 0.8 and hits > 0.2  # chance: 0.5 and 0.125
    assert "SelfGuidedAttention1d" in sgformer.__all__
