"""Fuzzing that looks for new branches (atheris, from the extra `fuzz`): `make fuzz`, or

python tests/faults/fuzz.py TARGET --seconds 60

What opened a new branch is kept in `corpus/TARGET/`, what broke something in `finds/TARGET/`; `test_fuzz.py` replays
both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import hostile
import strangers

HERE = Path(__file__).parent
WORK = Path(tempfile.mkdtemp(prefix="sgformer-fuzz-"))


def checkpoint_adapter(data: bytes) -> None:
    """Names and shapes in any combination: `from_released` refuses what does not fit, without a half-built model."""
    from sgformer.models.released import load_released

    names = hostile.released_names()
    state, place = {}, 0
    if data[:1] == b"!":  # all but what the bytes say
        state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    while place + 3 < len(data):
        index, sides, kind = data[place], data[place + 1], data[place + 2]
        name = list(names)[(index * 7 + kind) % len(names)]
        if kind % 4 == 0:
            state.pop(name, None)
        elif kind % 4 == 1:
            state[data[place : place + 3].decode("latin-1")] = torch.empty(sides % 3, device="meta")
        else:
            shape = tuple(1 + (sides >> (2 * i)) % 4 for i in range(kind % 5))
            state[name] = torch.empty(shape if kind % 4 == 2 else names[name], device="meta")
        place += 3
    hostile.refused("state dict", lambda: load_released(state))


def pickles(data: bytes) -> None:
    """Any bytes as a checkpoint file."""
    from sgformer.models.released import load_released

    path = WORK / "a.pth"
    path.write_bytes(data)
    hostile.refused("a.pth", lambda: load_released(path))


def safetensors_files(data: bytes) -> None:
    from sgformer import load_model

    path = WORK / "a.safetensors"
    path.write_bytes(data)
    hostile.refused("a.safetensors", lambda: load_model(path))


def meanings(data: bytes) -> None:
    """The config or the metadata of each kind of weights as any text, under a right checksum."""
    kinds = list(strangers.described())
    kind, text = kinds[(data[0] if data else 0) % len(kinds)], data[1:].decode("utf-8", "replace")
    tensors, says = strangers.described()[kind]
    part = "config" if data and data[0] >= 128 and "config" in says else "metadata"
    strangers.try_meaning(f"a_{kind}.safetensors", strangers.sealed(tensors, {**says, part: text}), WORK)


def exports(data: bytes) -> None:
    """Any text as the metadata of an ONNX file."""
    model, _ = strangers.exported()
    model = type(model).FromString(model.SerializeToString())
    model.metadata_props.add(key="sgformer", value=data.decode("utf-8", "replace"))
    strangers.try_export("a.onnx", model.SerializeToString(), WORK)


def texts(data: bytes) -> None:
    """Any text as a recipe, a run's settings, a table, an index ..."""
    readers = list(strangers.READERS)
    strangers.try_text(readers[(data[0] if data else 0) % len(readers)], data[1:], WORK)


def coco_files(data: bytes) -> None:
    hostile.try_annotations("a.json", data, WORK)


def label_maps(data: bytes) -> None:
    hostile.try_label_map("a.png", data, WORK)


def configs(data: bytes) -> None:
    hostile.try_yaml(data, WORK)


def settings(data: bytes) -> None:
    hostile.try_settings(data, WORK)


def shown(data: bytes) -> None:
    hostile.try_text(data.decode("utf-8", "surrogateescape"))


TARGETS = {
    f.__name__: f
    for f in (
        *(checkpoint_adapter, pickles, safetensors_files, meanings, exports, texts, coco_files, label_maps, configs),
        *(settings, shown),
    )
}


def seeds(target: str) -> list[bytes]:
    """What to begin with."""
    if target == "checkpoint_adapter":
        return [b"", b"!", b"!abcdef"]
    if target == "pickles":
        file = WORK / "seed.pth"
        found = []
        for packed in (False, True):
            torch.save({"state_dict": {"head.weight": torch.zeros(2, 2)}}, file, _use_new_zipfile_serialization=packed)
            found.append(file.read_bytes())
        return found
    if target == "safetensors_files":
        from safetensors.torch import save

        return [save({"a": torch.zeros(2)}, {"format": "sgformer", "config": "{}", "metadata": "{}"})]
    if target == "meanings":
        told = [(i, says) for i, (_, says) in enumerate(strangers.described().values())]
        configs = [bytes([128 + i]) + json.dumps(says["config"]).encode() for i, says in told if "config" in says]
        return [*(bytes([i]) + json.dumps(says["metadata"]).encode() for i, says in told), *configs]
    if target == "exports":
        return [json.dumps(strangers.exported()[1]).encode()]
    if target == "texts":
        return [bytes([i]) + b"a: 1" for i in range(len(strangers.READERS))]
    if target == "coco_files":
        return [json.dumps(hostile.annotations()).encode()]
    if target == "label_maps":
        return [hostile.seeds()["L.png"], hostile.seeds()["P.png"], hostile.seeds()["1.png"]]
    if target == "settings":
        return [yaml.safe_dump({"data": place, "teacher": place}).encode() for place in hostile.ELSEWHERE]
    if target == "shown":
        return [b"ftp://user:secret@host/x \x1b[31m", b"a|b <b>*c*</b> `d` $e$ www.f ~g~", b"raw\xff\xe2\x80\xae"]
    return [next(hostile.mutated_recipes())[1], b"lr: 1e-3\nimage_size: [32, 64]\n"]


def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    import atheris

    # Only what is ours is watched: the branches of torch and Pillow are not what is looked for.
    with atheris.instrument_imports(include=["sgformer"]):
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgformer"]:
            del sys.modules[name]
        for name in ("hostile", "strangers", "small_export", "coco_scene"):
            del sys.modules[name]
        for name in ("hostile", "strangers"):
            globals()[name] = __import__(name)
    corpus, finds = HERE / "corpus" / asked.target, HERE / "finds" / asked.target
    for folder in (corpus, finds):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(asked.target)):
        (corpus / f"seed{number}").write_bytes(data)
    # The library ends the process by itself; what it finds goes to a folder that is thinned out into the corpus.
    options = [f"-max_total_time={asked.seconds}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={finds}/"]
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", "-print_final_stats=1", str(corpus)], TARGETS[asked.target])
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    run()
