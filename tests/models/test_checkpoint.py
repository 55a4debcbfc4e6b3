"""Files: ours round-trip to the bit; released ones load exactly, and nothing in them is ever run."""

import argparse
import json
import os
import pickle

import golden_numbers
import pytest
import torch

import sgformer
from sgformer.core.errors import UserError
from sgformer.models.checkpoint import read_header, read_metadata
from sgformer.models.released import convert, load_released, to_released


@pytest.fixture(scope="module")
def released():
    """A complete released-layout state dict of S, float32."""
    return {name: t.float() for name, t in golden_numbers.released_state("s").items()}


def pth(path, **content):
    torch.save({"epoch": 299, "arch": "sgformer_s", "version": 2, "args": argparse.Namespace(lr=1e-3), **content}, path)
    return path


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "size", ["s", pytest.param("m", marks=pytest.mark.slow), pytest.param("b", marks=pytest.mark.slow)]
)
def test_released_layout_goes_in_and_out_unchanged(size):
    state = {name: t.float() for name, t in golden_numbers.released_state(size).items()}
    model = load_released(state)
    assert model.config.replace(drop_path_rate=0) == sgformer.models.config.VARIANTS[f"sgformer_{size}"].replace(
        drop_path_rate=0
    )
    back = to_released(model)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(released, dtype):
    model = load_released({name: t.to(dtype) for name, t in released.items()})
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {
        p.dtype for p in load_released({n: t.to(dtype) for n, t in released.items()}, num_classes=3).parameters()
    } == {dtype}


def test_convert_takes_averaged_weights_unless_raw(released, tmp_path):
    ema = {f"module.{name}": t + 1 for name, t in released.items()}
    source = pth(tmp_path / "released.pth", state_dict=released, state_dict_ema=ema, optimizer={"state": {}})
    for raw, expected in ((False, released["norm4.weight"] + 1), (True, released["norm4.weight"])):
        convert(source, tmp_path / "out.safetensors", raw=raw)
        model = sgformer.load_model(tmp_path / "out.safetensors")
        assert torch.equal(model.stages[3].norm.weight, expected)
    assert read_metadata(tmp_path / "out.safetensors")["source"] == "released.pth"
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "released.pth"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "args": Evil()}, "evil.pth")
    with open("bare.pth", "wb") as f:
        pickle.dump({"state_dict": Evil()}, f, protocol=protocol)
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(UserError) as error:
            load_released(name)
        assert name in one_line(error)
    assert not os.path.exists("pwned")


def test_refusals_are_one_clear_line_and_leave_no_file(released, tmp_path):
    good = pth(tmp_path / "good.pth", state_dict=released)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    foreign = dict(released) | {"cls_token": torch.zeros(1)}
    lacking = {k: v for k, v in released.items() if not k.startswith("block3.5.attn")}
    wrong = released | {"block1.0.mlp.fc1.weight": torch.zeros(3, 3)}
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}
    cases = {
        "missing.pth": "no such file",
        "cut.pth": "truncated or damaged",
        "empty.pth": "truncated or damaged",
        "text.pth": "text.pth",
        pth(tmp_path / "foreign.pth", state_dict=foreign).name: "1 unknown: cls_token",
        pth(tmp_path / "lacking.pth", state_dict=lacking).name: "block3.5.attn",
        pth(tmp_path / "wrong.pth", state_dict=wrong).name: r"(3, 3)",
        pth(tmp_path / "resnet.pth", state_dict=resnet).name: "conv1.weight",
        pth(tmp_path / "none.pth").name: "holds no weights",
    }
    for name, says in cases.items():
        with pytest.raises(UserError) as error:
            convert(tmp_path / name, tmp_path / "out.safetensors")
        assert name in one_line(error) and says in str(error.value), (name, str(error.value))
        assert not (tmp_path / "out.safetensors").exists()


def test_a_model_is_rebuilt_from_its_file_alone(tmp_path):
    config = sgformer.models.config.VARIANTS["sgformer_n"].replace(
        num_classes=4, coarse="window", img_size=(96, 64), in_chans=2
    )
    model = sgformer.create_model(config).eval()
    sgformer.save_model(model, tmp_path / "m.safetensors", {"classes": ["a", "b", "c", "d"], "top1": 0.5})
    again = sgformer.load_model(tmp_path / "m.safetensors")
    assert again.config == config and again.metadata == {"classes": ["a", "b", "c", "d"], "top1": 0.5}
    assert not again.training and all(p.requires_grad for p in again.parameters())
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_load_at_another_size_and_class_count(tmp_path):
    model = sgformer.create_model("sgformer_n", num_classes=4, img_size=64)
    sgformer.save_model(model, tmp_path / "m.safetensors")
    again = sgformer.load_model(tmp_path / "m.safetensors", num_classes=9, img_size=128, drop_path_rate=0.2)
    assert again.stem.position.table.shape[:2] == (32, 32)
    assert again.get_classifier().weight.shape[0] == 9 and again.get_classifier().weight.std() > 0
    assert torch.equal(again.stages[2].blocks[1].attn.kv.weight, model.stages[2].blocks[1].attn.kv.weight)
    headless = sgformer.load_model(tmp_path / "m.safetensors", num_classes=0)
    with torch.no_grad():
        assert headless(torch.zeros(1, 3, 64, 64)).shape == (1, headless.num_features)
    with pytest.raises(UserError, match="colour"):
        sgformer.load_model(tmp_path / "m.safetensors", colour="red")


def test_damaged_files_of_ours_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=2), path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 64, whole.replace(b'\\"dim\\": 64', b'\\"dim\\": 56')):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            sgformer.load_model(path)
        assert "m.safetensors" in one_line(error)
    with pytest.raises(UserError, match="no such file"):
        sgformer.load_model(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        sgformer.save_model(sgformer.create_model("sgformer_n"), tmp_path / "no" / "m.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=2), path)
    whole = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sgformer.models.checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=3), path)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["m.safetensors"]


def test_metadata_never_hold_a_bare_nan(tmp_path):
    """Other programs' JSON readers refuse it."""
    metadata = {"metrics": {"miou": float("nan"), "macc": 0.5}}
    sgformer.save_model(sgformer.create_model("sgformer_n"), tmp_path / "w.safetensors", metadata)
    header = read_header(tmp_path / "w.safetensors")["metadata"]
    assert json.loads(header, parse_constant=pytest.fail) == {"metrics": {"miou": None, "macc": 0.5}}


def test_a_state_dict_in_memory_may_be_without_values():
    """As tools make it that plan where tensors go; files may not."""
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=64)
    state = {name: value.to("meta") for name, value in to_released(model).items()}
    assert next(load_released(state).parameters()).is_meta
