"""Files that are well formed and say what nobody should believe: a line each, and no memory that their size does not
bear out. `make torture` tries more of them.
"""

import copy
import io
import json
import math
import socket
import zipfile
from itertools import islice

import numpy as np
import pytest
import strangers
import timm
import torch
from hostile import refused, weights, within
from PIL import Image
from strangers import described, sealed, small_picture

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.models.load import build_network, read_weights
from sgformer.models.released import load_released
from sgformer.tasks.api import load_explainer
from sgformer.tasks.classify.teacher import read_network

pytest.importorskip("pycocotools")

SPARE = 200  # MiB that a file of less than one may take, once the libraries are imported


def said(kind: str, **changes):
    """The tensors of a kind of weights and what its file says, with changes: `part__key__key=value`."""
    tensors, says = described()[kind]
    says = copy.deepcopy(says)
    for path, value in changes.items():
        *places, last = path.split("__")
        at = says
        for place in places:
            at = at[int(place) if place.isdecimal() else place]
        if value is None and last.startswith("no_"):
            del at[last.removeprefix("no_")]
        else:
            at[int(last) if last.isdecimal() else last] = value
    return dict(tensors), says


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Everything imported and cached that a first file would be blamed for."""
    folder = tmp_path_factory.mktemp("warm")
    for kind in described():
        assert strangers.try_meaning(f"whole_{kind}.safetensors", sealed(*said(kind)), folder) == "accepted"
    return folder


@pytest.fixture
def lookups(monkeypatch):
    """The hosts that anything asked for; nothing is told."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args[:1])
        raise OSError("no name is resolved here")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_weights_with_a_right_checksum(warm):
    outcomes = set()
    with within(SPARE):
        for name, data in islice(strangers.mutated_meanings(1), 80):
            outcomes.add(strangers.try_meaning(name, data, warm))
    assert outcomes == {"accepted", "refused"}


@pytest.mark.filterwarnings("ignore")
def test_exported_files(warm):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, about = strangers.exported()
    model = copy.deepcopy(model)
    model.metadata_props.add(key="sgformer", value=json.dumps(about))
    assert strangers.try_export("whole.onnx", model.SerializeToString(), warm) == "accepted"
    with within(SPARE):
        outcomes = {strangers.try_export(*one, warm) for one in islice(strangers.mutated_exports(1), 150)}
    assert outcomes == {"accepted", "refused"}


def test_an_exported_file_reads_none_outside_its_folder(warm):
    """Whatever its weights say about where they are."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    (warm / "near.bin").write_bytes(bytes(36))
    for place in ("../near.bin", "../../../../../etc/hostname", "/etc/hostname", "/dev/zero", "gone.bin"):
        model, about = copy.deepcopy(strangers.exported())
        model.metadata_props.add(key="sgformer", value=json.dumps(about))
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", "0"), ("length", "36")):
            weight.external_data.add(key=key, value=value)
        (warm / "e").mkdir(exist_ok=True)
        (warm / "e/e.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=r"e\.onnx: not an ONNX file that onnxruntime can run"):
            sgformer.predict(warm / "e/e.onnx", [small_picture()])


@pytest.mark.filterwarnings("ignore")
def test_small_checkpoints_of_large_tensors(warm):
    assert strangers.try_archive("whole.pth", weights()[1], warm) == "accepted"
    outcomes = {}
    with within(SPARE):
        for name, data in islice(strangers.mutated_archives(1), 40):
            outcome = strangers.try_archive(name, data, warm)
            outcomes.setdefault(name.partition("_")[2].partition(".")[0], set()).add(outcome)
    for what in ("sparse", "meta", "quantized", "deep", "compress"):
        assert outcomes.get(what, {"refused"}) == {"refused"}, what


@pytest.mark.filterwarnings("ignore")
def test_texts_of_large_values(warm):
    outcomes = {}
    step = next(n for n in (3, 4, 5, 7) if math.gcd(n, len(strangers.READERS)) == 1)  # else it would pass some over
    with within(SPARE):
        for reader, data in islice(strangers.mutated_texts(), 0, len(strangers.TEXTS) * len(strangers.READERS), step):
            outcomes.setdefault(reader, set()).add(strangers.try_text(reader, data, warm))
    assert set(outcomes) == set(strangers.READERS)
    assert all("refused" in found for reader, found in outcomes.items() if reader != "environment")


# -- each -------------------------------------------------------------------------------------------------------------

ONE = {
    "classify": [
        ({"config__stages__0__depth": 400}, "400 blocks in stage 1, the tensors 2"),
        ({"config__stages__0__depth": 10**9}, "depth must be at most 512"),
        ({"config__stages__0__dim": 8000}, "position table of"),
        ({"config__stages__1__dim": 8000}, "another shape"),
        ({"config__stages__1__dim": "16"}, "dim must be a whole number"),
        ({"config__stages__1__dim": 10**30}, "more than 10.18"),
        ({"config__stages__0__heads": 16}, "multiple of heads"),
        ({"config__stages__0__reduction": 400}, "another shape"),
        ({"config__stages__0__regions": [[0.5, 10**9], [0.5, 1]]}, "rate must be at most"),
        ({"config__stages__0__regions": [[0.01, 1]] * 100}, "regions must be at most 16"),
        ({"config__stages__0__regions": "ab"}, "regions must be a list"),
        ({"config__stages": {"a": 1}}, "stages must be a list"),
        ({"config__img_size": [16_000, 16_000]}, "position table of"),
        ({"config__img_size": [64, 64, 64]}, "img_size must be"),
        ({"config__window": 100_000}, "window must be at most"),
        ({"config__window": 300, "config__coarse": "window"}, "window x reduction"),
        ({"config__mlp_ratio": 1e300}, "mlp_ratio is too"),
        ({"config__mlp_ratio": float("nan")}, "mlp_ratio must be a finite number"),
        ({"config__num_classes": 10**6}, "1000000 classes, the tensors 3"),
        ({"config__in_chans": 10**4}, "another shape"),
        ({"config__significance": ["hybrid"]}, "significance must be one of"),
        ({"config__pairs": "single"}, "blocks in stage 1"),
        ({"config__drop_rate": "0"}, "drop_rate must be a finite number"),
        ({"metadata__image_size": 10**6}, "image_size must be a side"),
        ({"metadata__image_size": [64, "64"]}, "image_size must be a side"),
        ({"metadata__image_size": [64]}, "image_size must be a side"),
        ({"metadata__image_size": 3}, "image_size must be a side"),
        ({"metadata__crop_pct": 1e-9}, "crop_pct must be a number"),
        ({"metadata__crop_pct": "1"}, "crop_pct must be a number"),
        ({"metadata__classes": "abc"}, "classes must be a list of names"),
        ({"metadata__classes": ["a", "b"]}, "holds 3 classes, and its metadata name 2"),
        ({"metadata__classes": [1, 2, 3]}, "classes must be a list of names"),
        ({"metadata__interpolation": "random"}, "interpolation must be one of"),
        ({"metadata__mean": [0.5]}, "mean must be three numbers"),
        ({"metadata__std": [0.5, 0, 0.5]}, "std must be three numbers above 0"),
        ({"metadata__wordnet": ["n1"]}, "wordnet must be as many as the classes"),
        ({"metadata__task": ["classify"]}, "task must be a name"),
        ({"metadata__task": "detect"}, "lack category_ids"),
        ({"metadata": []}, "metadata are no mapping"),
        ({"metadata": "[" * 5000}, "malformed JSON"),
        ({"config": "{"}, "config cannot be read"),
        ({"no_config": None}, "no 'config'"),
    ],
    "detect": [
        ({"metadata__architecture__width": 10**6}, "width must be a number from 1 to"),
        ({"metadata__architecture__width": 8000}, "another shape"),
        ({"metadata__architecture__num_classes": 10**6}, "another shape"),
        ({"metadata__architecture__head": "nobody"}, "no detector named 'nobody'"),
        ({"metadata__architecture__head": ["mask-rcnn"]}, "head must be a name"),
        ({"metadata__architecture__no_head": None}, "KeyError: 'head'"),
        ({"metadata__architecture__backbone": "x"}, "names no backbone"),
        ({"metadata__architecture__backbone__config__stages__2__depth": 500}, "500 blocks in stage 3"),
        ({"metadata__architecture__backbone__no_config": None}, "unknown model 'sgformer'"),
        ({"metadata__no_architecture": None}, "no 'architecture'"),
        ({"metadata__category_ids": [1]}, "category_ids must be as many as the classes"),
        ({"metadata__no_image_size": None}, "lack image_size"),
        ({"metadata__no_task": None}, "holds no classifier, only a backbone"),
    ],
    "keypoints": [
        ({"metadata__keypoints": ["l"]}, "sigmas must be as many as the keypoints"),
        ({"metadata__keypoints": ["l", 2]}, "keypoints must be a list of names"),
        ({"metadata__skeleton": [[1, 3]]}, "skeleton must be pairs of numbers of keypoints"),
        ({"metadata__skeleton": [[0, 1]]}, "skeleton must be pairs of numbers from 1"),
        ({"metadata__sigmas": [0.1, 0]}, "sigmas must be numbers above 0"),
        ({"metadata__keypoints": ["a", "b", "c"], "metadata__sigmas": [1, 1, 1]}, "names 3 keypoints, but its network"),
        ({"metadata__no_keypoints": None, "metadata__no_skeleton": None}, "sigmas must be as many|lack keypoints"),
        ({"metadata__architecture__keypoints": 10**6}, "another shape"),
        ({"metadata__architecture__keypoints": "2"}, "keypoints must be a number from 1"),
        ({"metadata__task": "detect"}, "KeyError: 'head'"),
    ],
    "segment": [
        ({"metadata__short_side": 10**6}, "short_side must be"),
        ({"metadata__no_short_side": None}, "lack short_side"),
        ({"metadata__reduce_zero_label": 7}, "reduce_zero_label must be true or false"),
        ({"metadata__architecture__head": "upernet"}, "do not fit"),
        ({"metadata__classes": ["a"]}, "holds 3 classes, and its metadata name 1"),
    ],
    "timm": [
        ({"metadata__timm_model": "eva_giant_patch14_560"}, "do not fit|small part"),
        ({"metadata__timm_model": "test_resnet.nobody"}, "unknown model"),
        ({"metadata__timm_model": "nobody\n\x1b[31m"}, r"unknown model 'nobody\\\\n"),
        ({"metadata__num_classes": 10**6}, None),
        ({"metadata__num_classes": 10**9}, "num_classes must be a number"),
        ({"metadata__image_size": [33, 4000]}, None),
        (
            {"metadata__image_size": [4096, 4096]},
            "an image size of 4096 x 4096 pixels, at which it would take some 3.9 GiB",
        ),
    ],
}


@pytest.mark.parametrize("kind, changes, says", [(kind, *case) for kind, cases in ONE.items() for case in cases])
def test_one_line_names_what_is_wrong(warm, kind, changes, says):
    path = warm / "w.safetensors"
    path.write_bytes(sealed(*said(kind, **changes)))

    def predict():
        sgformer.load_model(path)
        if says is not None:
            sgformer.predict(path, [small_picture()])

    with within(SPARE):
        if says is None:  # which the tensors bear out
            predict()
            return
        with pytest.raises(UserError, match=says):
            predict()
    assert refused("w.safetensors", predict) == "refused"


def call(command: str, path, folder, **options):
    """One of the ways in which the image size that a file names is used."""
    if command == "predict":
        sgformer.predict(path, [small_picture()], **options)
    elif command == "explain":
        list(sgformer.explain(path, [small_picture()], **options))
    elif command == "embed":
        sgformer.embed(path, [small_picture()], **options)
    elif command == "export":
        sgformer.export(path, folder / "w.onnx", **options)
    else:
        load_explainer(path, **options)  # of the page and of `localization`


@pytest.mark.parametrize("command", ["predict", "explain", "embed", "export", "page"])
@pytest.mark.parametrize("kind, key, size", [("classify", "image_size", 4096), ("segment", "short_side", 2000),
                                             ("detect", "image_size", [1500, 2000])])  # fmt: skip
def test_an_image_size_out_of_proportion_is_not_taken_from_a_file(warm, kind, key, size, command):
    path = warm / "w.safetensors"
    path.write_bytes(sealed(*said(kind, **{f"metadata__{key}": size})))
    with within(SPARE), pytest.raises(UserError, match=r"w\.safetensors: names an image size of .* --image-size"):
        call(command, path, warm)
    if command in ("predict", "explain", "page"):
        call(command, path, warm, image_size=64)  # by the user's own word


def test_a_teacher_names_its_image_size_in_proportion(warm):
    path = warm / "w.safetensors"
    path.write_bytes(sealed(*said("classify", metadata__image_size=4096)))
    with within(SPARE), pytest.raises(UserError, match=r"--teacher .*w\.safetensors: names an image size .* GiB$"):
        read_network(str(path))


def test_the_largest_image_size_of_a_small_file_stays_small(warm):
    path = warm / "w.safetensors"
    path.write_bytes(sealed(*said("classify", metadata__image_size=1408)))
    with within(700):
        sgformer.predict(path, [small_picture()])


def test_a_backbone_of_others_may_lack_its_last_layers_only(warm):
    """Below heads, timm's networks have no classifier; nor may a file hold nothing of them."""
    path = warm / "w.safetensors"
    tensors, says = said("detect")
    says["metadata"]["architecture"]["backbone"] = {"model": "eva_giant_patch14_560"}
    few = {name: value for name, value in tensors.items() if not name.startswith("backbone.")}
    path.write_bytes(sealed(few, says))
    with within(SPARE), pytest.raises(UserError, match="small part of eva_giant"):
        build_network(read_weights(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_predict_and_explain(warm, dtype):
    tensors, says = said("classify")
    path, exact = warm / "half.safetensors", warm / "exact.safetensors"
    exact.write_bytes(sealed(tensors, says))
    path.write_bytes(sealed({name: value.to(dtype) for name, value in tensors.items()}, says))
    assert next(sgformer.load_model(path).parameters()).dtype == dtype
    (a,), (b,) = (sgformer.predict(file, [small_picture()]) for file in (path, exact))
    assert [name for name, _ in a.labels] == [name for name, _ in b.labels]
    assert max(abs(x - y) for (_, x), (_, y) in zip(a.labels, b.labels, strict=True)) < 0.02
    assert sgformer.explain(path, [small_picture()])


def test_integers_and_odd_numbers_are_no_weights(warm):
    tensors, says = said("classify")
    name = "stages.0.blocks.0.norm1.weight"
    for kind, words in ((torch.int64, "hold no floats"), (torch.complex64, "holds complex64"),
                        (torch.float8_e4m3fn, "holds float8_e4m3fn")):  # fmt: skip
        (warm / "w.safetensors").write_bytes(sealed({**tensors, name: tensors[name].to(kind)}, says))
        with pytest.raises(UserError, match=words):
            sgformer.load_model(warm / "w.safetensors")


def test_a_backbone_alone_predicts_nothing(warm):
    sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=0), warm / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: holds no classifier, only a backbone"):
        sgformer.predict(warm / "b.safetensors", [small_picture()])


def test_a_folder_for_the_hub_is_checked_before_it_is_built(warm):
    pytest.importorskip("huggingface_hub")
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=64)
    path = sgformer.save_model(
        model, warm / "h.safetensors", {"task": "classify", "classes": list("abc"), "image_size": 64}
    )
    sgformer.export(path, warm / "hub", format="hub")
    config = json.loads((warm / "hub/config.json").read_text())
    for changes, words in (
        ({"img_size": [8000, 8000]}, "position table"),
        ({"stages": [{**stage, "depth": 400} for stage in config["model_args"]["stages"]]}, "400 blocks"),
        ({"window": 10**9}, "window must be at most"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a finite number"),
    ):
        changed = {**config, "model_args": {**config["model_args"], **changes}}
        (warm / "hub/config.json").write_text(json.dumps(changed))
        with within(SPARE), pytest.raises(ValueError, match=words):
            timm.create_model(f"local-dir:{warm / 'hub'}", pretrained=True)
    (warm / "hub/config.json").write_text(json.dumps(config))
    assert timm.create_model(f"local-dir:{warm / 'hub'}", pretrained=True)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_checkpoint_of_repeated_numbers(warm):
    path, state = warm / "w.pth", {"head.weight": torch.zeros(1).expand(10**6, 10**6)}
    for new in (True, False):
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=new)
        with within(SPARE), pytest.raises(UserError, match=r"w\.pth: rejected: its tensors are larger than the file"):
            load_released(path)
        torch.save([torch.zeros(1000)] * 100, path, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=r"w\.pth: rejected: its tensors are larger than the file"):
            load_released(path)


def bare(path, pickle, compression=zipfile.ZIP_STORED):
    """An archive of torch.save's form around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
    return path


DOUBLED = b"c_codecs\nencode\nh\x00X\x03\0\0\0hex\x86Rq\x00a"
CALLS = {
    "builtins.bytearray": b"cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R",
    "_codecs.encode": b"]c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86Rq\x00a" + DOUBLED * 30,
    "torch.FloatTensor": b"ctorch\nFloatTensor\nJ\0\0\0\x7f\x85R",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R",
    "__builtin__.bytearray": b"c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R",
    "posix.system": b"cposix\nsystem\nX\x01\0\0\0x\x85R",
}


@pytest.mark.parametrize("name", CALLS)
def test_what_makes_much_of_little_is_not_called(name, warm):
    """torch's restricted unpickler would: a few hundred bytes become a gigabyte."""
    pickle = b"\x80\x02" + CALLS[name] + b"."
    bare(warm / "zip.pth", pickle)
    (warm / "old.pth").write_bytes(pickle)
    for file in ("zip.pth", "old.pth"):
        with within(SPARE), pytest.raises(UserError, match=rf"{file}: rejected, .* would run code \({name}\)"):
            load_released(warm / file)


def test_values_without_tensors_are_counted(warm):
    bare(warm / "w.pth", b"\x80\x02" + b"\x8f" * 2**21 + b".")  # an empty set each, of 216 bytes
    with within(SPARE), pytest.raises(UserError, match=r"w\.pth: rejected: it holds more than"):
        load_released(warm / "w.pth")


def test_an_archive_has_one_end(warm):
    """torch's reader looks for it in another way than Python's, and might unpack what nobody has checked."""
    path, plain = warm / "w.pth", io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(10)}}, plain)
    data = plain.getvalue()
    packed = bare(warm / "packed.pth", b"\x80\x02}.", zipfile.ZIP_DEFLATED).read_bytes()
    locator = data.rindex(b"PK\6\7")
    with pytest.raises(UserError, match=r"packed\.pth: rejected: its entry .* is compressed"):
        load_released(warm / "packed.pth")
    for changed in (
        packed + b"PK\5\6",
        packed + b"PK\5\6" + bytes(18),
        data + b"\0",
        data + data[-22:],
        packed + data,
        data[:4] + b"\0" + data[4:],
        data[: locator + 8] + bytes(8) + data[locator + 16 :],
    ):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"w\.pth: truncated or damaged \(no ZIP archive as"):
            load_released(path)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"not the network's name|known size"):
        load_released(path)


def test_keys_of_a_checkpoint_that_would_take_years_to_hash(warm):
    """Thirty tuples, each of which holds the one below it twice."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    bomb = b"\x80\x02}K\x01\x85q\x00" + pairs + b"K\x01s."
    (warm / "bare.pth").write_bytes(bomb)
    bare(warm / "zip.pth", bomb)
    for name in ("bare.pth", "zip.pth"):
        with pytest.raises(UserError, match=rf"{name}: rejected: its tuples are nested deeper"):
            load_released(warm / name)


# -- names ------------------------------------------------------------------------------------------------------------

NAMES = (
    *("hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "HF-HUB:a/b", "test_resnet.hf-hub:a/b"),
    *("local-dir:/tmp", "timm/test_resnet", "http://127.0.0.1/x", "test_resnet\\x"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_file_leads_nowhere(warm, lookups, name):
    path = warm / "w.safetensors"
    for kind, changes in (
        ("timm", {"metadata__timm_model": name}),
        ("detect", {"metadata__architecture__backbone": {"model": name}}),
        ("segment", {"metadata__architecture__backbone": {"model": name}}),
    ):
        path.write_bytes(sealed(*said(kind, **changes)))
        with pytest.raises(UserError, match=r"w\.safetensors: its config cannot be read \(unknown model"):
            sgformer.load_model(path)
    torch.save({"arch": name, "state_dict": {"x": torch.zeros(1)}}, warm / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: unknown model"):
        sgformer.load_model(warm / "w.pth")
    for kind, changes in (("classify", {"metadata__model": name}), ("timm", {"metadata__model": name})):
        path.write_bytes(sealed(*said(kind, **changes)))  # a word for people
        sgformer.predict(path, [small_picture()])
        with pytest.raises(UserError):
            sgformer.export(path, warm / "x" / "y.onnx", format="nothing")
    assert not lookups


def test_nothing_is_looked_up_on_the_network(warm, lookups, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    from sgformer.app.networks import Networks

    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "data/val" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / f"data/val/{name}/1.png")
    for kind in described():
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(sealed(*said(kind)))
        assert main(["predict", str(path), str(tmp_path / "data/val")]) == 0
        if kind in ("classify", "timm"):
            assert main(["eval", str(path), "--data", str(tmp_path / "data"), "--workers", "0"]) == 0
        if kind != "timm":
            assert main(["explain", str(path), str(tmp_path / "data/val/a"), "--out", str(tmp_path / kind)]) == 0
            networks, file = Networks([str(path)], "cpu"), io.BytesIO()
            small_picture().save(file, "PNG")
            networks.explain(networks.describe()[0].name, file.getvalue())
    assert not lookups


def test_lookups_are_seen(lookups):
    with pytest.raises(OSError):
        socket.getaddrinfo("localhost", 80)
    assert lookups == [("localhost",)]


def test_the_training_state_of_others_is_checked_like_their_weights(tmp_path):
    pytest.importorskip("lightning")
    from sgformer.training.state_file import StateIO, read_step

    path = tmp_path / "last.ckpt"
    for state, says in (
        ({"global_step": 3, "state_dict": {"a": torch.zeros(4)}}, None),
        (
            {"global_step": 3, "state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}},
            "tensors are larger than the file",
        ),
        ({"global_step": "x"}, "invalid literal"),
        ({"global_step": [3]}, "int"),
        ({}, "global_step"),
        ([3], "list indices"),
    ):
        StateIO().save_checkpoint(state, path)  # with a right checksum
        if says is None:
            assert read_step(path) == 3
            continue
        with pytest.raises(UserError, match=rf"last\.ckpt: not a readable checkpoint \(.*{says}"):
            read_step(path)
