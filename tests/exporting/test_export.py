"""Exported files agree with PyTorch at sizes they were not traced at, say what they are, and are not left if wrong."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from small_export import SMALL, small

import sgformer
from sgformer.backends import traceable
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.exporting import export as exporting
from sgformer.exporting.export import compare, difference
from sgformer.exporting.formats import FORMATS
from sgformer.models.backbone import HybridScaleAttention, SelfGuidedAttention
from sgformer.models.pyramid import pyramid_backbone
from sgformer.models.significance import LinearAggregation
from sgformer.tasks.classify.export import ClassifierGraph
from sgformer.tasks.segment.network import Segmenter

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "five.safetensors"
    about = {"task": "classify", "classes": CLASSES, "image_size": 64, "crop_pct": 0.9, "model": "mine"}
    sgformer.save_model(small().float(), path, about)
    return path


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "segment.safetensors"
    model = Segmenter(pyramid_backbone(small().float()), "upernet", 3, 16)
    model.save(path, {"classes": ["a", "b", "c"], "short_side": 64, "image_size": 64, "reduce_zero_label": True})
    return path


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Fewer and smaller images to compare on, but for the first test."""
    if "any_size" not in request.node.name:
        monkeypatch.setattr(exporting, "CHECKED", ((1, 64, 96),))
        monkeypatch.setattr(exporting, "TRACED", (2, 96, 64))


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


@torch.no_grad()
def test_onnx_takes_any_size_and_says_what_it_is(weights, tmp_path):
    result = sgformer.export(weights, tmp_path / "m.onnx", features=True, significance=True)
    assert result.largest < 1e-4 and len({check.shape for check in result.checks}) == 5
    assert result.fixed is None and list(tmp_path.iterdir()) == result.files == [tmp_path / "m.onnx"]
    model = sgformer.load_model(weights)
    for shape in ((1, 3, 32, 416), (2, 3, 101, 77)):
        image = torch.randn(shape)
        seen, found = model.inspect(image), run(tmp_path / "m.onnx", image)
        assert list(found) == result.outputs
        assert difference(torch.from_numpy(found["logits"]), seen.logits) < 1e-3
        for stride, features in zip((4, 8, 16, 32), seen.features, strict=True):
            assert found[f"stride{stride}"].shape == features.shape
        np.testing.assert_allclose(found["significance_1_0"], seen.significance["1.0"], rtol=1e-3, atol=1e-6)
    about = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert about["classes"] == CLASSES and about["mean"] == [0.485, 0.456, 0.406] and about["task"] == "classify"
    whole = about["sgformer"]
    assert sgformer.SGFormerConfig.from_dict(whole["config"]) == model.config
    assert whole["crop_pct"] == 0.9 and whole["image_size"] == 64 and whole["input_size"] is None


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sgformer_n", "sgformer_s"])
def test_whole_sizes_agree_at_shapes_that_were_not_traced(size, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECKED", ((1, 160, 256), (2, 64, 96)))
    torch.manual_seed(0)
    sgformer.save_model(sgformer.create_model(size, num_classes=5), tmp_path / "w.safetensors", {"task": "classify"})
    result = sgformer.export(tmp_path / "w.safetensors", tmp_path / "m.onnx")
    assert result.largest < 1e-4 and [c.shape for c in result.checks] == [
        (1, 3, 160, 256),
        (2, 3, 64, 96),
        (1, 3, 75, 130),
    ]


@torch.no_grad()
def test_equal_tokens_stay_in_raster_order(weights, tmp_path):
    """On an image of one colour much significance is equal: only a stable order gives the network's answer."""
    sgformer.export(weights, tmp_path / "m.onnx", image_size=96)
    image = torch.full((1, 3, 96, 96), 0.3)
    expected = sgformer.load_model(weights)(image)
    assert difference(torch.from_numpy(run(tmp_path / "m.onnx", image)["logits"]), expected) < 1e-3


def test_a_fixed_size_of_any_multiple_of_32(weights, tmp_path):
    result = sgformer.export(weights, tmp_path / "m.onnx", image_size=(96, 160))
    assert result.input_size == (96, 160) and result.largest < 1e-4
    assert "96 x 160 pixels only" in result.describe()
    assert run(tmp_path / "m.onnx", torch.zeros(3, 3, 96, 160))["logits"].shape == (3, 5)


def test_a_file_of_one_size_has_no_computed_shapes_and_one_operator_per_step(weights, tmp_path):
    """What runtimes fuse and what they stumble over: these operators must not come back."""
    result = sgformer.export(weights, tmp_path / "m.onnx", image_size=224, features=True, significance=True)
    assert result.largest < 1e-4
    graph = onnx.load(tmp_path / "m.onnx").graph
    count = Counter(node.op_type for node in graph.node)
    computed = {"Shape", "Range", "Mod", "Where", "Expand", "ConstantOfShape", "Cast", "Pad"}
    copies = {"Split", "GatherElements", "ScatterElements", "Resize", "ReduceSum", "Sqrt", "Pow"}
    assert not (computed | copies) & count.keys()
    network = sgformer.load_model(weights)
    modules = list(network.modules())
    norms = sum(type(m) is torch.nn.LayerNorm for m in modules)
    guided = sum(type(m) is SelfGuidedAttention for m in modules)
    hybrid = sum(type(m) is HybridScaleAttention for m in modules)
    assert count["LayerNormalization"] == norms and count["TopK"] == guided
    assert count["InstanceNormalization"] == sum(type(m) is torch.nn.GroupNorm for m in modules)
    assert count["Softmax"] == 2 * hybrid + guided + 1 and count["ReduceMean"] == 2 * hybrid
    # A map of rows is one Gemm. Matrix products are attention's two, and the pooling of regions of several tokens.
    pooled = sum(rate > 1 for m in modules if type(m) is LinearAggregation for rate in m.rates)
    assert count["MatMul"] == 2 * count["Softmax"] + pooled


@pytest.mark.parametrize("changes", [{"aggregation": "merge"}, {"aggregation": "weighted"}, {"significance": "random"}])
def test_what_formats_do_not_have_is_refused(changes, tmp_path):
    sgformer.save_model(small(**changes), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="cannot be exported"):
        sgformer.export(tmp_path / "w.safetensors", tmp_path / "m.onnx", image_size=64)


@pytest.mark.slow
def test_segmentation(segmenter, tmp_path):
    result = sgformer.export(segmenter, tmp_path / "s.onnx", significance=True)
    assert result.largest < 1e-4 and result.outputs[0] == "logits" and len(result.outputs) == 4
    assert run(tmp_path / "s.onnx", torch.zeros(1, 3, 70, 33))["logits"].shape == (1, 3, 70, 33)


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_detector_finds_the_same_objects(tmp_path):
    """Untrained, its scores are nearly equal, and rounding may decide which of two boxes stays: most must agree."""
    from sgformer.tasks.detect.export import DetectorGraph
    from sgformer.tasks.detect.network import Detector

    torch.manual_seed(0)
    detector = Detector(pyramid_backbone(small().float()), 2, width=8).eval()
    about = {"image_size": 60, "category_ids": [1, 5], "classes": ["a", "b"]}
    graph, file = DetectorGraph(detector, about).eval(), tmp_path / "d.onnx"
    assert exporting._fixed_size(graph, None) == (64, 64)
    FORMATS.get("onnx")().write(graph, torch.randn(1, 3, 64, 64), (64, 64), graph.about, file)
    image = torch.randn(1, 3, 64, 64)
    found = run(file, image)
    assert list(found) == ["boxes", "labels", "scores", "masks"] and found["masks"].shape[1:] == (1, 28, 28)
    with exporting.ranked(FORMATS.get("onnx")().open(file)(image)[1]):
        boxes, labels, scores, _ = graph(image)
    distance = torch.cdist(torch.from_numpy(found["boxes"]), boxes) + 100 * (
        torch.from_numpy(found["labels"])[:, None] != labels
    )
    distance += 100 * (torch.from_numpy(found["scores"])[:, None] - scores).abs()
    assert len(boxes) > 20 and (distance.min(0).values < 0.01).float().mean() > 0.8


@pytest.mark.slow
def test_openvino(segmenter, tmp_path):
    openvino = pytest.importorskip("openvino")
    result = sgformer.export(segmenter, tmp_path / "s.xml", format="openvino")
    assert result.largest < 1e-4 and sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.xml"]
    about = json.loads(openvino.Core().read_model(tmp_path / "s.xml").get_rt_info(["sgformer"]).astype(str))
    assert about["task"] == "segment" and about["classes"] == ["a", "b", "c"]


@pytest.mark.slow
def test_torch_export(weights, tmp_path):
    result = sgformer.export(weights, tmp_path / "m.pt2", format="torch-export")
    assert result.largest < 1e-4 and result.step == 32
    files = {"sgformer.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=files).module(check_guards=False)
    assert (
        program(torch.zeros(1, 3, 96, 64))[0].shape == (1, 5)
        and json.loads(files["sgformer.json"])["task"] == "classify"
    )


# -- the check --------------------------------------------------------------------------------------------------------


def test_a_mismatch_is_an_error_and_leaves_no_file(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(traceable.Position, "forward", lambda self, x: x)
    with pytest.raises(UserError, match=r"logits differs from PyTorch by .* at 1x3x"):
        sgformer.export(weights, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_ranks_must_be_those_of_significance():
    """A file that sorts otherwise than by significance fails, although PyTorch is given the same order."""
    model = small().float()
    graph = ClassifierGraph(model, {})

    def file_that(changes):
        def run(image):
            with torch.no_grad():
                seen = model.inspect(image)
                maps = (seen.significance[key] for key in ("1.0", "2.0", "3.0"))
                orders = [changes(s.flatten(1).argsort(dim=1, stable=True)) for s in maps]
                with exporting.ranked(orders):
                    return list(graph(image)), orders

        return compare(graph, run, [(1, 64, 64)])[0]

    assert file_that(lambda order: order).largest == 0
    assert file_that(lambda order: order.flip(1)).differences["the order of tokens"] > 1e-4
    twice = file_that(lambda order: order.index_copy(1, torch.tensor([0]), order[:, 1:2]))
    assert twice.differences["the order of tokens"] > 1e-4


def test_differences_of_shape_and_nan_never_pass():
    assert difference(torch.ones(2), torch.ones(3)) == float("inf")
    assert not difference(torch.tensor([float("nan")]), torch.ones(1)) <= 1e-4
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5


@pytest.mark.parametrize("traced", [1, 2])
def test_the_network_itself_as_onnx_takes_any_batch(traced, tmp_path):
    """By torch's own exporter, without `sgformer export`."""
    model, path = small().float(), tmp_path / "bare.onnx"
    names = {"input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}
    torch.onnx.export(model, (torch.randn(traced, 3, 75, 64),), str(path), dynamo=False, **names)
    graph = ClassifierGraph(model, {}).eval()
    checks = compare(graph, FORMATS.get("onnx")().open(path), [(1, 75, 64), (3, 75, 64)])
    assert max(check.largest for check in checks) < 1e-4


# -- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "photos"
    assert main(["export", str(weights), "--format", "hub", "--out", str(folder)]) == 0
    return folder


def test_a_folder_for_the_hub_opens_in_timm_with_the_same_numbers(hub, weights):
    import timm

    assert {path.name for path in hub.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "modeling_sgformer.py"),
    }
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    image = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        assert torch.equal(model(image), sgformer.load_model(weights)(image))
    assert timm.data.resolve_data_config(model=model)["crop_pct"] == 0.9
    card = (hub / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "eel" in card and "64 x 64" in card


PIPELINE = """
import json, sys
{first}
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1], top_k=None{options})
print(json.dumps({{x["label"]: x["score"] for x in classify(sys.argv[2])}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "options"), [("import sgformer", ""), ("", ", trust_remote_code=True")], ids=["import", "trust"]
)
def test_a_folder_for_the_hub_is_served_by_transformers(first, options, hub, weights, tmp_path):
    pytest.importorskip("transformers")
    script = tmp_path / "serve.py"
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(picture)
    script.write_text(PIPELINE.format(first=first, options=options))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, script, hub, picture], capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is not supported" not in done.stderr
    expected = dict(sgformer.predict(weights, [picture], top=5)[0].labels)
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)


def test_what_a_folder_for_the_hub_cannot_be_is_one_line(hub, weights, segmenter, tmp_path, capsys):
    for given, options, message in (
        (weights, ["--out", str(hub)], "exists already"),
        (weights, ["--out", str(tmp_path / "new"), "--image-size", "64"], "takes any"),
        (weights, ["--out", str(tmp_path / "new"), "--features"], "for classifiers"),
        (segmenter, ["--out", str(tmp_path / "new")], "for classifiers"),
    ):
        assert main(["export", str(given), "--format", "hub", *options]) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_card_has_the_scores_that_are_numbers(tmp_path):
    about = {"task": "classify", "classes": CLASSES, "image_size": 64}
    metrics = {"top1": 0.8125, "val_loss": float("nan"), "top5": 1}
    sgformer.save_model(small().float(), tmp_path / "w.safetensors", {**about, "metrics": metrics})
    sgformer.export(tmp_path / "w.safetensors", tmp_path / "hub", format="hub")
    rows = [line for line in (tmp_path / "hub/README.md").read_text().splitlines() if line.startswith("|")]
    assert rows == ["| Metric | Value |", "|---|---|", "| top1 | 0.8125 |", "| top5 | 1 |"]


@pytest.mark.parametrize("name", ["merge", "resnet10t"])
def test_a_folder_holds_networks_that_no_tracer_takes(name, tmp_path):
    import timm

    from sgformer.models.load import save_weights

    torch.manual_seed(0)
    model = small(aggregation=name).float() if name == "merge" else timm.create_model(name, num_classes=5).eval()
    save_weights(model, tmp_path / "w.safetensors", {"task": "classify", "classes": CLASSES, "image_size": 64})
    sgformer.export(tmp_path / "w.safetensors", tmp_path / "hub", format="hub")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        torch.testing.assert_close(again(image), model(image))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "m.pt"], "ends in .onnx"),
        ([], "--out is missing"),
        (["--out", "/dev/null/m.onnx"], "cannot be written (/dev/null is not a directory)"),
        (["--out", "m.onnx", "--image-size", "100"], "multiples of 32"),
        (["--out", "m.xml", "--format", "openvino", "--precision", "int8"], "for --format onnx"),
        (["--out", "m.onnx", "--calibration", "."], "--precision int8"),
        (["--out", "m.onnx", "--format", "tflite"], "--format is one of hub, onnx, openvino, torch-export, got tflite"),
    ],
)
def test_bad_input_is_one_line(arguments, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(weights), *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_other_networks_of_timm_have_no_significance(tmp_path):
    import timm

    from sgformer.models.load import save_weights

    save_weights(timm.create_model("resnet10t", num_classes=3), tmp_path / "r.safetensors", {"task": "classify"})
    with pytest.raises(UserError, match="for SG-Former, got ResNet"):
        sgformer.export(tmp_path / "r.safetensors", tmp_path / "r.onnx", significance=True)
    with pytest.raises(UserError, match="--image-size is needed"):
        sgformer.export(tmp_path / "r.safetensors", tmp_path / "r.onnx")
    assert sgformer.export(tmp_path / "r.safetensors", tmp_path / "r.onnx", image_size=64).largest < 1e-4


def test_a_network_of_one_size_is_exported_at_that_size(tmp_path):
    """Which need not be a multiple of 32."""
    import timm

    from sgformer.models.load import save_weights

    about = {"task": "classify", "classes": ["a", "b"], "image_size": 80}
    model = timm.create_model("test_vit", num_classes=2, img_size=80)
    save_weights(model, tmp_path / "v.safetensors", about)
    with pytest.raises(UserError, match=r"--image-size is needed: .* \(trained at 80x80\)$"):
        sgformer.export(tmp_path / "v.safetensors", tmp_path / "v.onnx")
    with pytest.raises(UserError, match="multiples of 32 pixels, got 48"):
        sgformer.export(tmp_path / "v.safetensors", tmp_path / "v.onnx", image_size=48)
    assert sgformer.export(tmp_path / "v.safetensors", tmp_path / "v.onnx", image_size=80).largest < 1e-4
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    (told,), (expected,) = (sgformer.predict(tmp_path / f"v.{kind}", photo) for kind in ("onnx", "safetensors"))
    assert np.allclose([p for _, p in told.labels], [p for _, p in expected.labels], atol=1e-4)


def test_small_is_the_published_kind():
    assert [stage.regions for stage in SMALL.stages] == [s.regions for s in sgformer.VARIANTS["sgformer_s"].stages]
