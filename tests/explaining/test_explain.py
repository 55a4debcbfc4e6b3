"""What is drawn is what the forward pass used; sheets, arrays and the page come out for any size."""

import numpy as np
import pytest
import torch
from PIL import Image

import sgformer
from sgformer import explain
from sgformer.cli import main
from sgformer.explaining.base import explain_batch
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
            # Regions follow significance: no salient token is less significant than one of low significance.
            ranked = one.significance[hybrid_of(key)]
            for low, salient in zip(range(len(groups.indices)), range(1, len(groups.indices)), strict=False):
                assert ranked[one.regions[key] == low].max() <= ranked[one.regions[key] == salient].min()
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


@pytest.mark.slow
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

    from sgformer.models.load import save_weights

    other = timm.create_model("resnet10t", num_classes=3)
    save_weights(other, tmp_path / "r.safetensors", {"model": "resnet10t", "image_size": 64})
    with pytest.raises(sgformer.UserError, match="resnet10t"):
        list(explain(tmp_path / "r.safetensors", photo))


# -- every task, from anything ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    from sgformer.models.pyramid import pyramid_backbone
    from sgformer.tasks.segment.network import Segmenter

    path = tmp_path_factory.mktemp("weights") / "s.safetensors"
    names = ["background", "tree", "house"]
    Segmenter(pyramid_backbone("sgformer_n"), "semantic-fpn", 3, 16).save(
        path, {"model": "sgformer_n", "classes": names, "image_size": 64, "short_side": 48, "reduce_zero_label": False}
    )
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    from sgformer.models.pyramid import pyramid_backbone
    from sgformer.tasks.detect.network import Detector

    path = tmp_path_factory.mktemp("weights") / "d.safetensors"
    about = {"model": "sgformer_n", "classes": ["tree", "house"], "category_ids": [1, 2], "image_size": [64, 96]}
    Detector(pyramid_backbone("sgformer_n"), 2, masks=True, width=16).save(path, about)
    return path


def test_a_segmentation_is_asked_as_it_is_validated(segmenter, photo, tmp_path):
    (seen,) = explain(segmenter, photo)
    assert seen.image.shape == (48, 60, 3) and seen.prediction["labels"].shape == (48, 60) and seen.overlay is not None
    assert "%" in seen.title and "photo.png" in seen.title
    said = sgformer.predict(segmenter, photo)[0].labels  # the same result, at the photo's own size
    assert (said[1::5, 1::5][:16, :20] == seen.prediction["labels"][1::3, 1::3][:16, :20]).mean() > 0.9
    draw_explanation(seen, tmp_path / "sheet.png")
    seen.save_arrays(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert arrays["prediction/labels"].shape == (48, 60) and arrays["density/1.1"].shape == (12, 15)


@pytest.mark.slow
def test_a_detection_is_asked_with_its_boxes(detector, photo, tmp_path):
    from sgformer.tasks.api import load_explainer

    explainer = load_explainer(detector)
    explainer.score = 0.0
    x = explainer.read(Image.open(photo).convert("RGB"))
    seen = explainer.explain(x)
    assert seen.image.shape == (64, 96, 3)  # padded to multiples of 32, as the network gets it
    assert len(seen.prediction["boxes"]) == len(seen.prediction["scores"]) == len(seen.prediction["masks"]) > 0
    with torch.no_grad():
        (found,) = explainer.model([x])
    np.testing.assert_allclose(seen.prediction["boxes"], found["boxes"].numpy(), rtol=1e-4, atol=1e-3)
    assert np.array_equal(seen.prediction["labels"], found["labels"].numpy())
    assert explainer.mask(torch.ones(x.shape[-2:])).shape == seen.image.shape[:2]
    draw_explanation(seen, tmp_path / "sheet.png")


def test_a_model_explains_an_image_given_as_anything(weights, photo):
    model = sgformer.load_model(weights).train()
    array = np.asarray(Image.open(photo).convert("RGB"))
    first, *others = (next(explain(model, given)) for given in (photo, str(photo), Image.open(photo), array))
    assert model.training and first.image.shape == (64, 96, 3)
    for other in others:
        assert np.array_equal(other.significance["3.0"], first.significance["3.0"])
    assert next(explain(model, array, image_size=(96, 40))).image.shape == (96, 40, 3)
    assert next(explain(model, torch.randn(3, 75, 64))).significance["1.0"].shape == (19, 16)


def test_a_model_that_knows_nothing_takes_an_image_at_its_own_size(photo):
    seen = next(explain(sgformer.create_model("sgformer_n", num_classes=0), photo))
    assert seen.image.shape == (80, 100, 3) and seen.title == "photo.png"


def test_other_channels_are_shown_in_grey():
    seen = next(explain(sgformer.create_model("sgformer_n", in_chans=5, num_classes=2), torch.randn(5, 64, 64)))
    assert seen.image.shape == (64, 64, 3)


@pytest.mark.parametrize("given", [np.zeros((4, 4, 3), int), np.zeros((3, 40, 44), np.uint8), torch.zeros(4, 4)])
def test_an_array_that_is_no_image_is_named(given):
    with pytest.raises(sgformer.UserError, match="got"):
        next(explain(sgformer.create_model("sgformer_n", num_classes=2), given))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"significance": "random", "aggregation": "merge"}, {"pairs": "single"}])
def test_sheets_of_other_guidance(options, tmp_path):
    model = sgformer.create_model("sgformer_n", num_classes=2, **options)
    seen = next(explain(model, torch.randn(3, 64, 96)))
    draw_explanation(seen, tmp_path / "sheet.png")
    assert bool(seen.tokens) == ("pairs" not in options)
