"""Shards give the folder's images in the folder's order, from anywhere; what is broken is named."""

import contextlib
import functools
import http.server
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import threading

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import known_implementations
from photos import make_photos
from torch.utils.data import DataLoader

from sgformer.cli import main
from sgformer.core.errors import StalledError, UserError
from sgformer.data.check import check_imagefolder
from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate, scan, scan_splits
from sgformer.data.sharding import index_shards, make_shards
from sgformer.data.shards import INDEX, Index, open_split, open_splits


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = make_photos(tmp_path_factory.mktemp("photos"), train=7, val=4)
    odd = root / "train" / "ant" / "deep.er"
    odd.mkdir()
    shutil.copy(root / "train/ant/0.png", odd / "with two.dots & é.PNG")
    (root / "train/bee/broken.jpg").write_bytes(b"no image")
    (root / "train/notes.txt").touch()
    return root


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    """Shards of about four images: every split has several, the last one shorter."""
    import sgformer.data.sharding as sharding

    out = tmp_path_factory.mktemp("packed") / "shards"
    write = sharding._write_split
    with pytest.MonkeyPatch.context() as patch:  # sizes are given in MB, which these images never fill
        patch.setattr(sharding, "_write_split", lambda listing, folder, size: write(listing, folder, 0.03))
        return make_shards(photos, out)


@pytest.fixture
def shards(packed, tmp_path):
    """A copy to break."""
    return shutil.copytree(packed, tmp_path / "shards")


@pytest.fixture
def at_memory(packed):
    fsspec.filesystem("memory").put(str(packed), "/packed", recursive=True)
    yield "memory://packed"
    fsspec.filesystem("memory").rm("/packed", recursive=True)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, which the standard library's server does not do."""

    def do_GET(self):
        path = self.translate_path(self.path)
        if "Range" not in self.headers or not os.path.isfile(path):
            return super().do_GET()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:
            data = file.read()
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def at_http(packed):
    handler = functools.partial(Ranges, directory=str(packed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def batches(listing, workers=0):
    """Everything of two epochs, as a training run would see it."""

    def transform(image):
        return torch.tensor([image.size[0], random.random(), np.random.rand(), torch.rand(())])  # noqa: NPY002

    dataset = ImageFolderDataset(listing, transform, seed=3, bad_images="skip")
    sampler = EpochSampler(len(dataset), 4, train=True, seed=3)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    found = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found += [(batch.image.tolist(), batch.index.tolist(), batch.target.tolist()) for batch in loader]
    return found


def test_images_bytes_and_order_are_the_folders(photos, packed):
    for split in ("train", "val"):
        folder, listing = scan(photos, split), open_split(packed, split)
        assert len(listing.shards) > 2
        assert (listing.classes, listing.paths, listing.targets) == (folder.classes, folder.paths, folder.targets)
        assert listing.counts() == folder.counts()
        everything = range(len(folder))
        assert listing.read_bytes(everything) == folder.read_bytes(everything)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_sees_the_same_from_shards_wherever_they_are(photos, packed, at_memory, at_http, workers):
    expected = batches(scan(photos))
    assert len({index for batch in expected for index in batch[1]}) > 15
    for place in (packed, f"file://{packed}", at_memory, at_http):
        assert batches(open_split(place), workers) == expected, place


def test_the_same_folder_gives_the_same_bytes(photos, tmp_path):
    a, b = make_shards(photos, tmp_path / "a"), make_shards(photos, tmp_path / "b")
    files = sorted(path.relative_to(a) for path in a.rglob("*"))
    assert files == sorted(path.relative_to(b) for path in b.rglob("*")) and len(files) == 5
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files if (a / file).is_file())


def test_shards_keep_to_their_size(packed):
    sizes = [shard.bytes for shards in Index.read(packed).splits.values() for shard, _ in shards]
    assert 2 * tarfile.RECORDSIZE <= max(sizes) <= 30_000 and sizes == [
        (packed / shard.file).stat().st_size for shards in Index.read(packed).splits.values() for shard, _ in shards
    ]


def test_webdataset_reads_them(photos, packed):
    webdataset = pytest.importorskip("webdataset")
    names, targets = [], []
    for shard in sorted((packed / "train").iterdir()):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            about = json.loads(sample["json"])
            image = next(value for kind, value in sample.items() if kind in ("png", "jpg"))
            assert image == (photos / "train" / about["name"]).read_bytes()
            names.append(about["name"])
            targets.append(int(sample["cls"]))
    listing = scan(photos)
    assert names != sorted(names)  # a reader from front to back sees the classes mixed
    assert sorted(zip(names, targets, strict=True)) == sorted(zip(listing.paths, listing.targets, strict=True))


def test_scanning_finds_the_index_that_was_written(shards):
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    written = (shards / INDEX).read_bytes()
    (shards / INDEX).unlink()
    with pytest.raises(
        UserError, match=r"shards: tar shards without shards\.json; create it with: sgformer data index"
    ):
        open_splits(shards)
    assert index_shards(shards) == {"samples": {"train": 23, "val": 12}, "classes": 3, "extra": {}}
    assert (shards / INDEX).read_bytes() == written


def test_an_index_can_be_made_at_an_address(at_memory, packed):
    system = fsspec.filesystem("memory")
    system.rm(f"/packed/{INDEX}")
    index_shards(at_memory)
    assert open_split(at_memory).classes == ("0", "1", "2")
    assert open_split(at_memory).paths == open_split(packed).paths


def test_shards_made_by_webdataset(photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    data = (photos / "val/cat/1.png").read_bytes()
    for split, shift in (("train", 0), ("val", 1)):
        (tmp_path / split).mkdir()
        for number in range(2):
            with webdataset.TarWriter(str(tmp_path / split / f"photos-{number:04}.tar")) as tar:
                for i in range(3):
                    tar.write({"__key__": f"a/{i + shift}", "png": data, "cls": i % 2, "txt": "a caption"})
    assert index_shards(tmp_path) == {"samples": {"train": 6, "val": 6}, "classes": 2, "extra": {".txt": 12}}
    train, val = open_splits(tmp_path)
    assert train.targets == (0, 0, 0, 0, 1, 1) and val.classes == ("0", "1")
    assert train.read_bytes(range(6)) == [data] * 6


def test_a_listing_goes_to_other_processes(packed, at_memory):
    for place in (packed, at_memory):
        listing = open_split(place, "val")
        first = listing.read_bytes([0])
        assert pickle.loads(pickle.dumps(listing)).read_bytes([0]) == first


def test_more_shards_than_may_be_open(packed, monkeypatch):
    monkeypatch.setattr("sgformer.data.store.MAX_OPEN", 2)
    listing = open_split(packed)
    expected = listing.read_bytes(range(len(listing)))
    assert listing.read_bytes(range(len(listing))) == expected
    assert not any(isinstance(data, UserError) for data in expected) and len(listing.store._files) == 2


# -- classes ----------------------------------------------------------------------------------------------------------


def test_classes_of_a_trained_model_give_the_indices(packed):
    assert set(open_split(packed, "val", ["cat", "dog", "bee", "ant"]).targets) == {0, 2, 3}
    with pytest.raises(UserError, match=r"val: classes unknown to training \(1\): cat"):
        open_split(packed, "val", ["ant", "bee"])


def test_a_class_without_training_images_is_an_error(shards):
    content = json.loads((shards / INDEX).read_text())
    content["classes"].append("dog")
    (shards / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"train: classes without images \(1\): dog"):
        open_splits(shards)


# -- what is broken ---------------------------------------------------------------------------------------------------


def refused(match, *arguments):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert main(list(map(str, arguments))) == 2
    assert match in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()


def test_missing_and_cut_shards_are_named_before_training(shards):
    os.truncate(shards / "train/000001.tar", 5000)
    refused("train/000001.tar: 5000 bytes instead of", "train", "classify", "--data", shards, "--run", shards / "run")
    (shards / "train/000001.tar").unlink()
    refused("train/000001.tar: no such file", "train", "classify", "--data", shards, "--run", shards / "run")
    assert not (shards / "run").exists()
    report = check_imagefolder(shards)
    assert any("train/000001.tar: no such file" in problem for problem in report.problems)


def test_a_changed_byte_is_found(shards):
    listing = open_split(shards)
    shard, start, size, _ = listing.places[5].tolist()
    with open(shards / listing.shards[shard].file, "r+b") as file:
        file.seek(start + size // 2)
        old = file.read(1)
        file.seek(start + size // 2)
        file.write(bytes([old[0] ^ 1]))
    dataset = ImageFolderDataset(listing)
    with pytest.raises(UserError, match=r"00000\d\.tar:ant/5\.png: damaged: its checksum .*--bad-images skip"):
        dataset[5]
    assert "checksum" in ImageFolderDataset(listing, bad_images="skip")[5].skipped
    report = check_imagefolder(shards)
    assert f"{shards}/{listing.shards[shard].file}: damaged: its checksum does not match shards.json" in report.problems
    assert "checksum" in report.splits["train"].unreadable["train/ant/5.png"]


def test_what_is_unreadable_in_the_folder_is_unreadable_here(packed):
    listing = open_split(packed)
    with pytest.raises(UserError, match=r"\.tar:bee/broken\.jpg: not an image.*--bad-images skip"):
        ImageFolderDataset(listing)[listing.paths.index("bee/broken.jpg")]


def test_a_shard_that_goes_away_stops_a_run_that_skips_bad_images(shards):
    dataset = ImageFolderDataset(open_split(shards), bad_images="skip")
    shutil.rmtree(shards / "train")
    with pytest.raises(StalledError, match=r"shards/train/0000\d\d\.tar: no such file$"):
        dataset[0]


def test_a_server_that_goes_away_is_an_error_of_a_line(packed):
    handler = functools.partial(Ranges, directory=str(packed))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listing = open_split(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    with pytest.raises(StalledError, match=r"http://127.0.0.1:\d+/train/0000\d\d\.tar: cannot be read \("):
        ImageFolderDataset(listing, bad_images="skip")[0]


def test_a_server_without_ranges_is_named(packed):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(packed))
    with pytest.MonkeyPatch.context() as patch, http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        patch.setattr(handler.func, "log_message", lambda *_: None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listing = open_split(f"http://127.0.0.1:{server.server_port}")
        (found,) = listing.read_bytes([0])
        server.shutdown()
    assert "does the server support range requests?" in str(found)


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("nonsense://bucket/x", "fsspec cannot open this URL (Protocol not known: nonsense)"),
        ("memory://empty", "memory://empty/shards.json: no such file; convert a folder with"),
        ("simplecache::nonsense://x", "fsspec cannot open this URL"),
    ],
)
def test_addresses_that_do_not_do(address, match):
    refused(match, "data", "check", address)
    refused(match, "train", "classify", "--data", address)


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(known_implementations, "far", {"class": "no_such.Far", "err": "Install farfs"})
    refused("far://x: far:// needs another package: Install farfs", "data", "check", "far://x")


@pytest.mark.parametrize("file", ["../outside.tar", "/etc/x.tar", "a/b.tar", "..", "C:x.tar", "x\0.tar", ".x.tar", "x"])
def test_an_index_does_not_lead_out_of_its_folder(shards, file):
    content = json.loads((shards / INDEX).read_text())
    content["splits"]["train"][0]["file"] = file
    (shards / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"shards\.json: train, shard 0: file is not the bare name of a \.tar"):
        open_splits(shards)


def shard_of(folder, members):
    """A tar file of (name, bytes), or of whole members."""
    (folder / "train").mkdir(exist_ok=True)
    with tarfile.open(folder / "train/0.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder / "train/0.tar"


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"0")], "sample a has no cls"),
        ([("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"0")], "sample a has no image"),
        ([("a.txt", b"1")], "sample a has no image and no .cls"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "sample a has two images, .jpg and .png"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls does not hold a class index"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "a.cls does not hold a class index"),
        (
            [("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"1"), ("a.json", b"{}")],
            "the members of sample a are not adjacent",
        ),
        ([], "holds no samples"),
    ],
)
def test_samples_that_are_not_as_expected(tmp_path, members, match):
    shard_of(tmp_path, members)
    refused(f"train/0.tar: {match}", "data", "index", tmp_path)
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("left", [3, 600, 1024, 2048, 4096 + 100])
def test_a_tar_file_that_was_cut_short_gets_no_index(tmp_path, left):
    path = shard_of(tmp_path, [member for i in range(3) for member in ((f"{i}.jpg", b"1" * 999), (f"{i}.cls", b"1"))])
    os.truncate(path, left)
    refused("train/0.tar: not a", "data", "index", tmp_path)


def test_links_and_folders_in_a_tar_file_are_left_out(tmp_path):
    path = shard_of(tmp_path, [("a.jpg", b"x"), ("a.cls", b"0")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("b.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert index_shards(tmp_path)["extra"] == {"b.jpg": 1}


# -- converting -------------------------------------------------------------------------------------------------------


def test_from_the_command_line(photos, tmp_path, capsys):
    assert main(["data", "shards", str(photos), str(tmp_path / "out")]) == 0
    assert "23 images in 1 shards of train" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out")]) == 1
    assert "bee/broken.jpg: not an image" in capsys.readouterr().out


def test_what_the_check_says_of_shards_is_what_it_says_of_the_folder(photos, packed):
    folder, found = check_imagefolder(photos), check_imagefolder(packed, workers=2)
    for split in ("train", "val"):
        folder.splits[split].ignored = {}
        assert found.splits[split] == folder.splits[split]
    assert (found.duplicates, found.conflicts, found.problems) == (
        folder.duplicates,
        folder.conflicts,
        folder.problems,
    )
    assert found.problems


def test_what_the_shards_leave_out_is_said(photos, tmp_path, caplog):
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "train/ant/1.heic").touch()
    make_shards(source, tmp_path / "out")
    assert any("1 .heic (HEIC needs pip install pillow-heif)" in line for line in caplog.messages)


def test_a_folder_that_is_not_empty_is_left_alone(photos, packed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    refused("out: not an empty folder", "data", "shards", photos, tmp_path / "out")
    refused("local folder", "data", "shards", photos, "s3://bucket/out")
    refused("already exists", "data", "index", packed)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_conversion_that_stops(photos, tmp_path, monkeypatch, error):
    read, calls = type(photos).read_bytes, []

    def stop(path):
        calls.append(path)
        if len(calls) > 10:
            raise error
        return read(path)

    monkeypatch.setattr(type(photos), "read_bytes", stop)
    with pytest.raises(error):
        make_shards(photos, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_still_open_as_folders(photos):
    assert open_splits(photos) == scan_splits(photos)


def test_tars_that_a_folder_was_unpacked_from_do_no_harm(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "train" / "ant.tar").write_bytes(b"")
    assert len(open_splits(root)[0]) == len(scan(root, "train"))
    assert len(open_split(root, "val")) == len(scan(root, "val"))


def test_shards_go_into_the_folder_one_is_in(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards(photos, ".")
    assert len(open_split(tmp_path, "val")) == len(scan(photos, "val"))


def test_a_class_index_beyond_reason_is_refused_before_names_are_made(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("a.jpg", b"no matter what"), ("a.cls", b"999999999")):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    with pytest.raises(UserError, match=r"999999999.*classes\.txt"):
        index_shards(tmp_path)
