"""`sgformer bench`: figures of every combination, failures named and nothing lost, files that say what they hold."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from sgformer.bench import Case, Result, build, run
from sgformer.bench.cases import Unsupported
from sgformer.bench.memory import peak_memory
from sgformer.bench.report import ratio
from sgformer.cli import main
from sgformer.viz.bench import exponent

pytest.importorskip("rich")
QUICK = ["--rounds", "2", "--seconds", "0", "--memory", "false", "--device", "cpu"]


@pytest.mark.slow
def test_table_json_and_plots(tmp_path, capsys):
    models = ["sgformer_n", "plain_n"]
    sizes, modes, backends = ["64", "96"], ["infer", "train"], ["eager", "optimize"]
    options = ["--image-size", *sizes, "--mode", *modes, "--backend", *backends, "--baseline", "plain_n"]
    assert main(["bench", "--models", *models, *options, *QUICK, "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["command"].startswith("sgformer") and told["machine"]["torch"] == torch.__version__
    rows = told["results"]
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        possible = row["backend"] == "eager" or row["model"] == "sgformer_n"
        assert (row["median_s"] is not None) == possible == (row["error"] is None)
        if possible:
            assert len(row["rounds_s"]) == 2 and row["min_s"] <= row["median_s"] <= row["max_s"]
            assert row["images_per_s"] == pytest.approx(row["batch_size"] / row["median_s"])
        if row["model"] == "plain_n" and possible:
            assert row["times_baseline"] == 1
    assert {row["parameters"] for row in rows if row["model"] == "plain_n"} != {None}
    shown = capsys.readouterr().out
    assert "training step, 64 px, batch 1" in shown and "sgformer.accelerate support SG-Former only" in shown
    pictures = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert pictures >= {"growth-infer-batch-1.png", "throughput-train-batch-1-64.png"}


def test_the_reach_of_coarse_heads_is_an_option(tmp_path):
    options = ["--image-size", "32", "--coarse", "window", "global", *QUICK, "--out", str(tmp_path)]
    assert main(["bench", "--models", "sgformer_n", *options]) == 0
    assert [r["coarse"] for r in json.loads((tmp_path / "bench.json").read_text())["results"]] == ["window", "global"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "sgformr_s"], "did you mean sgformer_s"),
        (["--models", "plain_x"], "sgformer has no size 'x'"),
        (["--models", "nowhere.py:net"], "nowhere.py: no such file"),
        (["--image-size", "16"], "--image-size must be 32 or more, got 16"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--baseline", "resnet18"], "not among --models"),
        (["--backend", "tensorrt"], "--backend takes"),
        (["--threads", "0"], "--threads must be above 0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_network_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten())\n"
    )
    (result,) = run([Case(f"{tmp_path}/mine.py:net", 32)], rounds=1, seconds=0, memory=False)
    assert result.error is None and result.parameters == 0 and len(result.seconds) == 1


def test_one_that_fails_loses_none_of_the_others_and_interruption_keeps_what_there_is(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\nclass Broken(torch.nn.Module):\n    def forward(self, x):\n        raise MemoryError\n\n"
        "def broken():\n    return Broken()\n\ndef fine():\n    return torch.nn.Flatten()\n"
    )
    cases = [Case(f"{tmp_path}/mine.py:{name}", 32) for name in ("broken", "fine")]
    broken, fine = run(cases, rounds=1, seconds=0, memory=False)
    assert broken.error == "out of memory" and not broken.seconds and fine.median

    def interrupt(line):
        if line == "round 2 of 2":
            raise KeyboardInterrupt

    results: list[Result] = []
    with pytest.raises(KeyboardInterrupt):
        run(cases[1:], rounds=2, seconds=0, memory=False, results=results, report=interrupt)
    assert len(results) == 1 and len(results[0].seconds) == 1


def test_steps_compute_what_they_say():
    case = Case("sgformer_n", 32, 2)
    out = build(case)()
    assert out.shape == (2, 1000) and not out.requires_grad
    fast = build(Case("sgformer_n", 32, 2, backend="optimize"))()
    torch.testing.assert_close(fast, out, rtol=1e-3, atol=1e-4)
    assert build(Case("sgformer_n", 32, 2, mode="train", grad_checkpointing=True))().ndim == 0
    losses = [build(Case("sgformer_n", 32, 2, mode="train", backend=b))() for b in ("eager", "optimize")]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    with pytest.raises(Unsupported, match="support SG-Former only"):
        build(Case("resnet18", backend="optimize"))
    with pytest.raises(Unsupported, match="in fp32 on the CPU"):
        build(Case("sgformer_n", 32, 2, mode="train", backend="optimize", precision="bf16"))


def test_a_precision_is_that_of_the_kernels_or_not_measured():
    image = Case("sgformer_n", 64, 1)
    for precision in ("bf16", "int8"):
        with contextlib.suppress(Unsupported):  # of processors without it
            got, expected = build(replace(image, backend="optimize", precision=precision))(), build(image)()
            assert got.dtype == torch.float32 and not torch.equal(got, expected)
            assert (got - expected).norm() < 0.05 * expected.norm()
        assert precision in replace(image, precision=precision).label()
    with pytest.raises(Unsupported, match="int8 is measured for inference"):
        build(replace(image, precision="int8"))
    with pytest.raises(Unsupported, match="in fp32 on the CPU"):
        build(replace(image, backend="onnxruntime", precision="int8"))


@pytest.mark.slow
def test_openvino_measures_other_precisions():
    pytest.importorskip("openvino")
    case = Case("resnet18", 64, backend="openvino")
    expected = build(case)()
    for precision in ("bf16", "int8"):
        assert (build(replace(case, precision=precision))() - expected).norm() < 0.3 * expected.norm()


def test_onnxruntime_computes_the_same():
    pytest.importorskip("onnxruntime")
    case = Case("sgformer_n", 224)
    out = build(Case("sgformer_n", 224, backend="onnxruntime"))()
    torch.testing.assert_close(out, build(case)(), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_memory_counts_what_a_step_holds(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\nclass Holds(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x.new_ones(64 << 20).sum() + x\n\ndef net():\n    return Holds()\n"
    )
    assert 256 < peak_memory(Case(f"{tmp_path}/mine.py:net", 32)) / 2**20 < 300
    with pytest.raises(Unsupported, match="support SG-Former only"):
        peak_memory(Case("resnet18", backend="optimize"))


def test_ratio_is_to_the_same_sizes_on_the_same_backend_or_eager():
    results = [
        Result(Case("a"), [2.0]),
        Result(Case("a", batch_size=8), [5.0]),
        Result(Case("b"), [1.0]),
        Result(Case("b", backend="optimize"), [0.5]),
        Result(Case("b", batch_size=4), [1.0]),
    ]
    assert [ratio(r, results, "a") for r in results] == [1, 1, 2, 4, None]


def test_exponent():
    assert exponent([1, 4, 16], [3, 12, 48]) == pytest.approx(1)
    assert exponent([1, 4], [1, 16]) == pytest.approx(2)
    assert exponent([4], [1]) is None
