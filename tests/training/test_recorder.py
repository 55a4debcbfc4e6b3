"""What --record-significance leaves behind, in every task."""

import csv

import numpy as np
import pytest
from photos import QUICK, make_photos
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.scenes import make_scenes
from sgformer.tasks.api import train
from sgformer.training.recorder import rank_correlation

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")


def rows_of(run):
    with (run / "significance" / "evolution.csv").open() as file:
        return list(csv.DictReader(file))


def test_rank_correlation():
    a = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert rank_correlation(a, a**3) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 2, 2, 3]), np.array([1, 3, 3, 4])) == pytest.approx(1)  # ties share a rank
    assert np.isnan(rank_correlation(a, np.ones((2, 2))))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    data = make_scenes(folder / "scenes", 20, 10, image_size=32)
    options = {**QUICK, "epochs": 2, "record_significance": 2, "crop_pct": 1.0}
    return train("classify", data=str(data), run=str(folder / "run"), **options).path


def test_first_every_k_th_and_last_epoch_are_recorded(run):
    kept = run / "significance"
    assert sorted(p.name for p in kept.iterdir() if p.is_dir()) == ["0001", "0002"]
    assert sorted(p.name for p in (kept / "0002").iterdir()) == [f"0{i}.{e}" for i in range(4) for e in ("npz", "png")]
    assert {p.name for p in kept.iterdir() if p.is_file()} == {
        *(f"0{i}.{e}" for i in range(4) for e in ("gif", "png")),
        *("evolution.csv", "evolution.png"),
    }
    with Image.open(kept / "00.gif") as animation:
        assert animation.n_frames == 2
    assert "significance/evolution.png" in (run / "report.md").read_text()


def test_the_numbers_of_every_record(run):
    rows = rows_of(run)
    assert [int(row["epoch"]) for row in rows] == [1, 2] and rows[0]["rank_correlation"] == ""
    for row in rows:
        assert 0 <= float(row["salient_energy"]) <= 1 and 0 < float(row["object_area"]) < 1
    for row in rows[1:]:
        assert -1 <= float(row["rank_correlation"]) <= 1
    assert {"rank_correlation_stage1", "salient_energy_stage3"} <= set(rows[0])


def test_recording_changes_nothing_and_survives_a_stop(tmp_path):
    photos = make_photos(tmp_path / "photos", val=1, classes=("ant", "bee"))
    options = {**QUICK, "data": str(photos)}
    plain = train("classify", run=str(tmp_path / "plain"), **options)
    half = train("classify", run=str(tmp_path / "half"), record_significance=1, max_steps=3, **options)
    assert len(rows_of(half.path)) == 1
    whole = train("classify", resume=half.path, max_steps=1000)
    assert [int(row["epoch"]) for row in rows_of(whole.path)] == [1, 2]
    assert rows_of(whole.path)[0]["salient_energy"] == ""  # nobody knows where the objects of photos are
    losses = []
    for folder in (plain, whole):
        with (folder.path / "metrics.csv").open() as file:
            losses.append([row["val_loss"] for row in csv.DictReader(file) if row.get("val_loss")])
    assert losses[0][-1] == losses[1][-1]


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_tasks_record_too(task, tmp_path):
    common = {"model": "sgformer_n", "workers": 0, "record_significance": 1, "run": str(tmp_path / "run")}
    if task == "segment":
        from sgformer.tasks.api import train

        data = make_scenes(tmp_path / "data", 4, 3, image_size=48, layout="ade20k")
        train(
            "segment",
            data=str(data),
            head="semantic-fpn",
            head_width=16,
            image_size=48,
            steps=4,
            val_every=2,
            batch_size=2,
            **common,
        )
    else:
        from sgformer.tasks.api import train

        data = make_scenes(tmp_path / "data", 4, 3, image_size=48, layout="coco")
        train("detect", data=str(data), image_size=48, epochs=2, batch_size=2, head_width=16, rois=16, **common)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and all(0 < float(row["object_area"]) < 1 for row in rows)
    assert (tmp_path / "run" / "significance" / "02.gif").exists()
    assert not (tmp_path / "run" / "significance" / "03.gif").exists()  # there are three images


def test_only_networks_that_reallocate_can_be_recorded():
    for options in ({"model": "pvt_v2_b0"}, {"model": "sgformer_n", "pairs": "single"}):
        with pytest.raises(UserError, match="self-guided"):
            train("classify", data="photos", record_significance=1, **options)
