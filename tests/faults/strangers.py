"""Files of strangers, well formed, that say what nobody should believe: weights whose checksum is right but whose
config, metadata or tensors say something else, small archives and texts of large values. Used as `hostile` is.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import functools
import gzip
import io
import json
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import small_export
from hostile import CONFIGS, Inputs, mutate, refused, seeds, spoil, weights

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.coco import read_coco
from sgformer.data.converting import convert
from sgformer.data.identity import read_contents
from sgformer.data.shards import INDEX, Index
from sgformer.data.splitting import kept_by
from sgformer.models.checkpoint import checksum, read_metadata
from sgformer.models.pyramid import Pyramid
from sgformer.models.released import load_released
from sgformer.tasks.detect.network import Detector
from sgformer.tasks.keypoints.network import KeypointDetector
from sgformer.tasks.segment.network import Segmenter
from sgformer.tasks.sweep import read_ablation
from sgformer.training.run_folder import RunFolder, resumed_config
from sgformer.viz.curves import read_metrics

# -- weights whose checksum is right ----------------------------------------------------------------------------------

ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 32, 33, 64, 1.5, 0.25, 1e-9, 1e308, float("nan"), float("inf")),
    *(97, 512, 4096, 4097, 16385, 65_537, 10**6, 2**31, 2**63, 10**30),
    *("", "x", "64", "a\nb", "\x1b[31m", "\ud800", "a" * 5000, "sgformer_b", "resnet18", "resnet10t.a1_in1k"),
    *(
        "hf-hub:timm/resnet10t.c3_in1k",
        "hf_hub:a/b",
        "local-dir:/tmp",
        "../x",
        "classify",
        "detect",
        "keypoints",
        "segment",
    ),
    *("upernet", "mask-rcnn", "bicubic", "random", "window", "single", "mean", "linear"),
    *([], [[]], {}, [1], [64, 64], [64, 64, 64], [0.5] * 3, [0, 0, 0], ["a", "b"], [[0.5, 10**9], [0.5, 1]]),
    *([[0.01, 1]] * 100, [None], {"a": 1}, [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]),
)


@functools.cache
def described() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Of each kind of weights: the tensors, and what the file says, as values: format, config, metadata."""
    import timm

    torch.manual_seed(0)
    config = small_export.SMALL.replace(num_classes=3, img_size=64)
    model = sgformer.create_model(config)
    about = {"task": "classify", "model": "mine", "classes": ["a", "b", "c"], "image_size": 64, "crop_pct": 0.9}
    about |= {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "metrics": {"top1": 0.5}, "epoch": 3}
    backbone = Pyramid(sgformer.create_model(config.replace(num_classes=0)))
    detector = Detector(backbone, 2, width=8)
    detects = {"task": "detect", "model": "mine", "classes": ["a", "b"], "category_ids": [3, 7], "image_size": [64, 96]}
    pointer = KeypointDetector(Pyramid(sgformer.create_model(config.replace(num_classes=0))), 2, 2, width=8)
    points = {**detects, "task": "keypoints", "keypoints": ["l", "r"], "skeleton": [[1, 2]], "sigmas": [0.1, 0.1]}
    segmenter = Segmenter(Pyramid(sgformer.create_model(config.replace(num_classes=0))), "semantic-fpn", 3, 8)
    segments = {"task": "segment", "model": "mine", "classes": ["a", "b", "c"], "image_size": [64, 64]}
    segments |= {"short_side": 64, "reduce_zero_label": False, "binary": False}
    other = timm.create_model("test_resnet", num_classes=3)
    of_timm = {"timm_model": "test_resnet", "num_classes": 3, **about, "model": "test_resnet"}
    dense = "sgformer-dense"
    kinds = {
        "classify": (model, {"format": "sgformer", "config": model.config.to_dict(), "metadata": about}),
        "detect": (detector, {"format": dense, "metadata": {**detects, "architecture": detector.architecture}}),
        "keypoints": (pointer, {"format": dense, "metadata": {**points, "architecture": pointer.architecture}}),
        "segment": (segmenter, {"format": dense, "metadata": {**segments, "architecture": segmenter.architecture}}),
        "timm": (other, {"format": "timm", "metadata": of_timm}),
    }
    return {
        kind: ({name: value.detach().clone() for name, value in net.state_dict().items()}, json.loads(json.dumps(says)))
        for kind, (net, says) in kinds.items()
    }


def sealed(tensors: dict[str, torch.Tensor], says: dict[str, Any]) -> bytes:
    """A file of weights with a right checksum, whatever it says."""
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in says.items()}
    return save_tensors(tensors, {**header, "checksum": checksum(tensors, header)})


def mutated_meanings(seed: int = 0) -> Inputs:
    """Weights of each kind in turn whose config, metadata or tensors say something else, resealed."""
    rng, number = random.Random(seed), 0
    while True:
        for kind, (whole, says) in described().items():
            tensors, said = dict(whole), copy.deepcopy(says)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                if rng.random() < 0.15:
                    disturb(tensors, rng)
                else:
                    part = rng.choice([key for key in said if isinstance(said[key], (dict, list))] or list(said))
                    spoil(said[part], rng, ODD) if rng.random() < 0.97 else said.update({part: rng.choice(ODD)})
            said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
            if rng.random() < 0.05:
                key = rng.choice(list(said))
                said[key] = rng.choice(TEXTS)
            said = {key: value.encode("utf-8", "replace").decode() for key, value in said.items()}
            yield f"{number}_{kind}.safetensors", sealed(tensors, said)
        number += 1


def disturb(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Leave out, rename, reshape or convert a tensor."""
    name = rng.choice(list(tensors))
    value = tensors.pop(name)
    what = rng.choice(("remove", "rename", "kind", "cut", "empty", "flat", "scalar", "grow", "nan"))
    kinds = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)
    changed = {
        "kind": lambda: value.to(rng.choice(kinds)),
        "cut": lambda: value[: len(value) // 2].clone() if value.ndim else value,
        "empty": lambda: value.new_empty(0, 10**9),
        "flat": lambda: value.reshape(-1).clone(),
        "scalar": lambda: value.reshape(-1)[0].clone() if value.numel() else value,
        "grow": lambda: torch.cat([value, value]) if value.ndim else value,
        "nan": lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value,
    }
    if what == "rename":
        tensors[rng.choice((f"{name}x", "a\nb", "stages.0.blocks.99999.x", "head.fc.weight", "é" * 500))] = value
    elif what != "remove":
        tensors[name] = changed[what]()


def small_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def try_meaning(name: str, data: bytes, folder: Path) -> str:
    """Refused by whatever reads it, or a network that predicts and explains."""
    path = folder / name
    path.write_bytes(data)

    def use() -> None:
        about = read_metadata(path)
        sgformer.load_model(path)
        size = about.get("short_side", about.get("image_size", 64))
        if max(size if isinstance(size, list) else [size]) <= 128:  # larger ones take their time, or are refused
            sgformer.predict(path, [small_picture()])
            if "timm" not in name:
                sgformer.explain(path, [small_picture()])

    try:
        return refused(name, use)
    finally:
        path.unlink()


# -- exported files ---------------------------------------------------------------------------------------------------


@functools.cache
def exported() -> tuple[Any, dict[str, Any]]:
    """A small ONNX file, as a model, and its metadata."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((3, 3), np.float32), "w")
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [logits], [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    about = {"sgformer": "0", "task": "classify", "model": "m", "config": None, "classes": ["a", "b", "c"]}
    about |= {"mean": [0.5] * 3, "std": [0.5] * 3, "outputs": ["logits"], "image_size": 64, "crop_pct": 0.9}
    return model, {**about, "interpolation": "bicubic", "precision": "fp32", "input_size": None, "multiple": 1}


def mutated_exports(seed: int = 0) -> Inputs:
    """ONNX files whose metadata say something else, or whose graph is another."""
    rng, number = random.Random(seed), 0
    while True:
        model, about = copy.deepcopy(exported())
        if rng.random() < 0.1:
            data = mutate(model.SerializeToString(), rng)
        else:
            for _ in range(rng.choice((1, 1, 1, 2))):
                if rng.random() < 0.1:
                    about = {**about, "task": rng.choice(("segment", "detect"))} | rng.choice(
                        (
                            {},
                            {"short_side": 64, "reduce_zero_label": True},
                            {"part": "whole", "category_ids": [1, 2, 3]},
                        )
                    )
                else:
                    spoil(about, rng, ODD)
            if rng.random() < 0.1:
                place = rng.choice((model.graph.input, model.graph.output))
                place[0].name = rng.choice(("x", "image", "boxes"))
            text = rng.choice(TEXTS) if rng.random() < 0.05 else json.dumps(about)
            model.metadata_props.add(key="sgformer", value=text.encode("utf-8", "replace"))
            data = model.SerializeToString()
        yield f"{number}.onnx", data
        number += 1


def try_export(name: str, data: bytes, folder: Path) -> str:
    path = folder / name
    path.write_bytes(data)

    def use() -> None:
        from sgformer.exporting.onnx_predict import ExportedNetwork

        size = ExportedNetwork(path, threads=1).metadata["image_size"]
        if max(size if isinstance(size, list) else [size]) <= 512:
            (found,) = sgformer.predict(path, [small_picture()])
            assert found.labels and abs(sum(share for _, share in found.labels) - 1) < 1e-3

    try:
        return refused(name, use)
    finally:
        path.unlink()


# -- released files with other storages -------------------------------------------------------------------------------


class _Odd:
    """Pickles as a call of something that torch's restricted unpickler allows."""

    def __init__(self, function: Any, *arguments: Any):
        self.parts = function, arguments

    def __reduce__(self) -> Any:
        return self.parts


def mutated_archives(seed: int = 0) -> Inputs:
    """Released checkpoints that are small on the disk and large in memory, or hold what is no weight."""
    rng, number = random.Random(seed), 0
    whole = torch.load(io.BytesIO(weights()[1]), weights_only=True)["state_dict"]
    while True:
        state: dict[Any, Any] = dict(whole)
        name = rng.choice(list(state))
        value = state[name]
        key: Any = ()
        for _ in range(rng.choice((3, 40))):
            key = (key, key)
        shared = torch.zeros(1 << 16)
        what = rng.choice(
            ("expand", "share", "sparse", "meta", "quantized", "keys", "deep", "call", "kind", "compress")
        )
        if what == "expand":
            state[name] = value.reshape(-1)[:1].expand(rng.choice(((10**5, 10**5), tuple(value.shape), (1, 10**9))))
        elif what == "share":
            state = dict.fromkeys((*state, *map(str, range(rng.choice((1, 5000))))), shared)
        elif what == "sparse":
            state[name] = torch.sparse_coo_tensor([[10**6]], [1.0], (10**9,))
        elif what == "meta":
            state[name] = torch.empty(10**6, 10**6, device="meta")
        elif what == "quantized":
            state[name] = torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.quint8)
        elif what == "keys":
            state[rng.choice((7, None, 1.5, "a\nb", "\x1b[31m", "x" * 10_000, (1, 2)))] = value
        elif what == "deep" and len(key):
            state = {"a": value, "args": argparse.Namespace(x=[key])}
        elif what == "call":
            call = rng.choice((torch.Tensor, torch.FloatTensor, bytearray, codecs.encode, set, complex))
            state[name] = _Odd(call, *rng.choice(((10**5, 10**5), (3, 3), (2**30,), (b"a" * 1000, "hex"))))
        elif what == "kind":
            state[name] = value.to(rng.choice((torch.int64, torch.bool, torch.complex64, torch.float16)))
        file = io.BytesIO()
        with contextlib.suppress(RecursionError):
            torch.save(
                {"state_dict": state}, file, _use_new_zipfile_serialization=what == "compress" or rng.random() < 0.7
            )
        data = file.getvalue()
        if what == "compress" and zipfile.is_zipfile(file):
            packed = io.BytesIO()
            with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
                for entry in source.infolist():
                    target.writestr(entry.filename, source.read(entry))
            data = packed.getvalue() + rng.choice((b"", b"PK\5\6", data[-98:], data))
        yield f"{number}_{what}.pth", data
        number += 1


def try_archive(name: str, data: bytes, folder: Path) -> str:
    """Accepted only if it is a model of the original's shapes."""
    path = folder / name
    path.write_bytes(data)

    def load() -> None:
        for model in (load_released(path), sgformer.load_model(path)):
            assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in weights()[2].items()}

    try:
        return refused(name, load)
    finally:
        path.unlink()


# -- small files: recipes, settings of runs, tables, indexes ----------------------------------------------------------


def aliases(levels: int) -> str:
    """A YAML file of some hundred bytes that says 9 ** levels words."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)])


def known_aliases() -> str:
    """The same under keys that a recipe may have."""
    keys = ("model", "weights", "run", "opt", "regions", "scales", "device", "teacher", "image_size")
    text = aliases(len(keys))
    for number, key in enumerate(keys):
        text = text.replace(f"a{number}: ", f"{key}: ")
    return text


# What is legal, and costs what nobody would think.
TEXTS = (
    *(aliases(9), known_aliases(), "&a [*a]", "{a: &a [x], b: *a}", "lr: *x"),
    *("[" * 5000, "[" * 900 + "]" * 900, "{" * 5000, '{"a":' * 900 + "1" + "}" * 900, "- " * 5000 + "a", "? " * 5000),
    *(
        "9" * 5000,
        "-" + "9" * 5000,
        "lr: " + "9" * 5000,
        "0x" + "f" * 5000,
        "1" + ":59" * 5000,
        "." + "9" * 5000,
        "0b_",
    ),
    *("2020-01-01", "lr: 2020-99-99", "!!timestamp 2020-99-99", "!!binary x", "!!set {a}", "!!python/name:os.system"),
    *(
        "a" * 300_000,
        "'" + "a" * 100_000,
        "a: " * 5000,
        "\0",
        "\x1b[31m",
        "\ufeff",
        "%YAML 9.9\n---\na",
        "--- a\n--- b",
    ),
    *("NaN", "-Infinity", "1e999", "null", "true", '"x"', "[]", "{}", "", '{"val": [[[]]]}', '{"val": [{}, null]}'),
    *(
        ",".join("a" * 20_000),
        "epoch,step\n" + "9" * 5000 + ",1\n",
        "a" * 200_000 + "\n",
        '"' + "a\n" * 5000,
        "a,a\n1,2,3",
    ),
)

AROUND = ("{}", "lr: {}", "names: {}", "image_size: '{}'", '{{"val": {}}}', '{{"images": [{}]}}', "a,{}\n")

# What is read, by name: from the file that the text is written to, or the folder that it is in.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("config.yaml", lambda p: [resumed_config(c, p.parent, {}) for c in CONFIGS.values()]),
    "recipe on the command line": ("r.yaml", lambda p: _command(["train", "classify", "--config", str(p)], p)),
    "run": ("config.yaml", lambda p: _command(["train", "classify", "--resume", str(p.parent)], p)),
    "ablation": ("a.yaml", lambda p: read_ablation(p, "nowhere")),
    "data.yaml": ("data.yaml", lambda p: convert(p.parent, p.parent / "out", "coco", "yolo")),
    "labelme": ("a.json", lambda p: convert(p.parent, p.parent / "out", "coco", "labelme")),
    "via": ("a.json", lambda p: convert(p.parent, p.parent / "out", "coco", "via")),
    "csv": ("train.csv", lambda p: convert(p.parent, p.parent / "out", "imagenet", "csv")),
    "coco": ("a.json", lambda p: read_coco(p, p.parent, check_files=False)),
    "shards": (INDEX, lambda p: Index.read(p.parent)),
    "data.json.gz": ("data.json.gz", read_contents),
    "split.json": ("split.json", lambda p: _kept(p)),
    "split of a run": ("split.json", lambda p: RunFolder(p.parent).keep_split({"val": ["a"]})),
    "environment": ("environment.json", lambda p: RunFolder(p.parent).environment()),
    "metrics.csv": ("metrics.csv", read_metrics),
}


def _command(arguments: list[str], path: Path) -> None:
    """The command's line as an error, so that it is judged like the others'."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        status = main([*arguments, "--data", "nowhere"])
    assert status == 2 and err.getvalue().count("\n") == 1, err.getvalue()[-500:]
    raise UserError(err.getvalue().strip() + ("" if str(path) in err.getvalue() else f" ({path})"))


def _kept(path: Path) -> Any:
    for name in ("ant", "bee"):
        (path.parent / "data" / name).mkdir(parents=True, exist_ok=True)
        (path.parent / "data" / name / "1.png").write_bytes(seeds()["RGB.png"])
    return kept_by(path.parent / "w.safetensors", {"val_split": 0.2}, path.parent / "data", "val", "imagenet")


def mutated_texts(seed: int = 0) -> Inputs:
    """(reader, file) of each reader in turn: a text of `TEXTS`, whole, within another or damaged."""
    rng = random.Random(seed)
    for text in TEXTS:
        for reader in READERS:
            yield reader, text.encode("utf-8", "replace")
    while True:
        for reader in READERS:
            text = rng.choice(TEXTS)
            around = rng.choice(
                ("{}", "lr: {}", "names: {}", "image_size: '{}'", '{{"val": {}}}', '{{"images": [{}]}}', "a,{}\n")
            )
            data = around.format(text).encode("utf-8", "replace")
            yield reader, mutate(data, rng) if rng.random() < 0.3 else data


def try_text(name: str, data: bytes, folder: Path) -> str:
    root = Path(tempfile.mkdtemp(dir=folder))
    file, read = READERS[name]
    packed = gzip.compress(data) if file.endswith(".gz") else data
    (root / "a.png").write_bytes(seeds()["RGB.png"])
    (root / file).write_bytes(packed)
    try:
        return refused(str(root), lambda: read(root / file))
    finally:
        shutil.rmtree(root)
