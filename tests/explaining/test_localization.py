"""Where salient tokens land, on cases solved by hand."""

import json

import numpy as np
import pytest
from PIL import Image

import sgformer
from sgformer.cli import main
from sgformer.data.objects import find_objects
from sgformer.data.scenes import make_scenes, scene_objects
from sgformer.explaining.localization import coverage, measure, sign_test
from sgformer.viz.significance import Explanation


def seen(regions):
    """An explanation of a 16 x 16 image with one block of 4 x 4 tokens in two regions."""
    regions = np.asarray(regions)
    return Explanation(
        np.zeros((16, 16, 3), np.uint8), "", {}, {}, {}, {"1.1": regions}, {"1.1": regions}, {"1.1": [2, 1]}
    )


def corner(row, column):
    mask = np.zeros((16, 16), bool)
    mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    return mask


def test_coverage_is_the_share_of_a_token_s_real_pixels():
    mask = np.zeros((10, 6), bool)
    mask[:4, :2] = mask[8:, :] = True
    assert coverage(mask, (3, 2), 4).tolist() == [[0.5, 0], [0, 0], [1, 1]]


def test_tokens_on_their_own_objects_are_found():
    corners = [corner(i // 2 % 2, i % 2) for i in range(24)]
    pairs = [(seen(mask[::4, ::4].astype(int)), mask) for mask in corners]
    block, everything = measure(pairs, permutations=500)
    assert (
        (block.energy_inside, block.area) == (1.0, 0.25) and block.shuffled < 0.25 and block.p == pytest.approx(1 / 501)
    )
    assert (block.more, block.sign_p) == (24, 2.0**-24)
    assert everything.block == "all" and everything.energy_inside == block.energy_inside


def test_what_is_the_same_in_every_image_is_no_evidence():
    """All tokens and all objects in one corner: far above the area, but no map knows its own image."""
    pairs = [(seen(corner(0, 0)[::4, ::4].astype(int)), corner(0, 0)) for _ in range(10)]
    block, _ = measure(pairs, permutations=200)
    assert block.energy_inside == block.shuffled == 1.0 and block.area == 0.25 and block.p == 1.0


def test_tokens_placed_by_chance_are_not_found():
    rng = np.random.default_rng(1)
    pairs = []
    for i in range(60):
        chosen = np.zeros(16, int)
        chosen[rng.permutation(16)[:4]] = 1
        pairs.append((seen(chosen.reshape(4, 4)), corner(i // 2 % 2, i % 2)))
    block, _ = measure(pairs, permutations=500)
    assert abs(block.energy_inside - 0.25) < 0.08 and block.p > 0.05


def test_the_sign_test():
    assert sign_test(3, 0) == 1 / 8 and sign_test(1, 1) == 3 / 4 and sign_test(0, 0) == 1


def test_two_images_of_one_size_are_needed():
    with pytest.raises(sgformer.UserError, match="at least two"):
        measure([(seen(np.eye(4, dtype=int)), corner(0, 0)), (seen(np.eye(4, dtype=int)), corner(0, 0) & False)])


def test_objects_that_fill_all_images_are_told():
    everything = corner(0, 0) | True
    with pytest.raises(sgformer.UserError, match=r"every pixel of all images .* named background, null"):
        measure([(seen(np.eye(4, dtype=int)), everything)] * 2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return {
        layout: make_scenes(root / layout, 10, 10, image_size=48, layout=layout)
        for layout in ("imagenet", "coco", "ade20k")
    }


def test_objects_of_the_layouts_of_one_scene_agree(scenes):
    coco, ade = find_objects(scenes["coco"]), find_objects(scenes["ade20k"])
    assert len(coco) == len(ade) == 10
    for i in range(10):
        assert np.array_equal(coco[i][1], ade[i][1]) and ade[i][1].any() and not ade[i][1].all()


def test_a_scene_composed_again_is_the_one_in_the_file(scenes):
    objects = find_objects(scenes["imagenet"])
    for i in range(len(objects)):
        image, mask = objects[i]
        assert mask.shape == image.size[::-1] and 6 <= mask.sum() < mask.size


def test_another_picture_in_place_of_a_scene_is_noticed(scenes, tmp_path):
    import shutil

    shutil.copytree(scenes["imagenet"], tmp_path / "copy")
    path = sorted((tmp_path / "copy" / "val" / "3").iterdir())[0]
    Image.new("RGB", (48, 48), "red").save(path)
    with pytest.raises(sgformer.UserError, match="differs when recomposed"):
        scene_objects(path)


def test_data_without_known_objects_is_refused(tmp_path):
    with pytest.raises(sgformer.UserError, match="this is another layout"):
        find_objects(tmp_path)


@pytest.mark.slow
def test_from_the_command_line(scenes, tmp_path, capsys):
    model = sgformer.create_model("sgformer_n", num_classes=10, img_size=64)
    weights = sgformer.save_model(
        model, tmp_path / "n.safetensors", {"task": "classify", "image_size": 48, "crop_pct": 1.0}
    )
    for layout in scenes:
        arguments = [
            "localization",
            str(weights),
            "--data",
            str(scenes[layout]),
            "--limit",
            "4",
            "--out",
            str(tmp_path / layout),
        ]
        assert main(arguments) == 0
        assert "all" in capsys.readouterr().out
        told = json.loads((tmp_path / layout / "localization.json").read_text())
        assert [b["block"] for b in told["blocks"]] == ["1.1", "2.1", "3.1", "3.3", "all"]
        assert all(0 < b["area"] < 1 and 0 < b["p"] <= 1 for b in told["blocks"])
        assert (tmp_path / layout / "localization.png").exists()
