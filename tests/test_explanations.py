"""What is drawn is what the forward pass used; sheets, arrays and the page come out for any size."""

import numpy as np
import pytest
import torch
from PIL import Image

import sgformer
from sgformer.cli import main
from sgformer.explanations import explain, explain_batch
from sgformer.viz.significance import draw_explanation, hybrid_of, provenance


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "n.safetensors"
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=64)
    about = {"task": "classify", "model": "sgformer_n", "classes": ["ant", "bee", "cat"], "image_size": [64, 96]}
    return sgformer.save_model(model, path, about)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_arrays_are_the_pass_s_own(weights):
    model = sgformer.load_model(weights)
    x = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        seen = model.inspect(x)
    for i, one in enumerate(explain_batch(model, x)):
        assert one.image.shape == (75, 64, 3) and one.image.dtype == np.uint8
        assert set(one.tokens) == set(seen.tokens) and set(one.significance) == set(seen.significance)
        for key, values in one.significance.items():
            torch.testing.assert_close(torch.from_numpy(values), seen.significance[key][i])
        for key, groups in seen.tokens.items():
            for region, index in enumerate(groups.indices):
                assert (one.regions[key].ravel()[index[i].numpy().ravel()] == region).mean() > 0.5
            # Regions follow significance: no salient token is less significant than a dull one.
            ranked = one.significance[hybrid_of(key)]
            for dull, salient in zip(range(len(groups.indices)), range(1, len(groups.indices)), strict=False):
                assert ranked[one.regions[key] == dull].max() <= ranked[one.regions[key] == salient].min()
            # What is spent on all places together is the number of key/value tokens.
            assert round(one.density(key).sum()) == len(np.unique(one.tokens[key])) <= len(groups)


def test_provenance_marks_one_token_of_each_region(weights):
    (seen,) = explain_batch(sgformer.load_model(weights), torch.randn(1, 3, 64, 64))
    key = next(iter(seen.tokens))
    picture = provenance(seen, key)
    coloured = picture[(picture.max(2) != picture.min(2))]
    assert picture.shape == seen.image.shape
    assert len(np.unique(coloured, axis=0)) == len(seen.rates[key])


@pytest.mark.parametrize("size", [(64, 64), (45, 160)])
def test_a_sheet_of_any_size_is_drawn(weights, tmp_path, size):
    (seen,) = explain_batch(sgformer.load_model(weights), torch.randn(1, 3, *size))
    draw_explanation(seen, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 300


def test_from_python_with_an_array(weights):
    (seen,) = explain(weights, Image.new("RGB", (50, 40)))
    assert seen.image.shape == (64, 96, 3) and seen.title.split()[0] in ("ant", "bee", "cat")


def test_from_the_command_line(weights, photo, tmp_path, capsys):
    out = tmp_path / "sheets"
    assert main(["explain", str(weights), str(photo.parent), "--out", str(out), "--arrays"]) == 0
    assert {p.name for p in out.iterdir()} == {"0000.png", "0000.npz", "index.html"}
    page = (out / "index.html").read_text()
    assert "photo.png" in page and 'src="0000.png"' in page and "http" not in page
    with np.load(out / "0000.npz") as arrays:
        assert arrays["significance/1.0"].shape == (16, 24) and arrays["tokens/1.1"].shape == (16, 24)
    assert "photo.png" in capsys.readouterr().out


def test_limit_spreads_over_the_folder(weights, tmp_path):
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    titles = [seen.title.split()[0] for seen in explain(weights, tmp_path, limit=3)]
    assert titles == ["0.png", "2.png", "4.png"]


@pytest.mark.parametrize("arguments", [["none.safetensors", "{photo}"], ["{weights}", "none.png"]])
def test_bad_paths_are_one_line(weights, photo, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [a.format(photo=photo, weights=weights) for a in arguments]
    assert main(["explain", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none" in error
    assert not (tmp_path / "explained").exists()


def test_another_network_has_nothing_to_show(tmp_path, photo):
    import timm

    from sgformer.training.weights import save_weights

    other = timm.create_model("resnet10t", num_classes=3)
    save_weights(other, tmp_path / "r.safetensors", {"model": "resnet10t", "image_size": 64})
    with pytest.raises(sgformer.UserError, match="resnet10t"):
        list(explain(tmp_path / "r.safetensors", photo))
