"""Every recipe of classification starts; those of the dense tasks are in their own tests."""

from pathlib import Path

import pytest
import yaml
from photos import make_photos

from sgformer.cli import main

pytest.importorskip("lightning")
DENSE = ("detect_", "keypoints_", "segment_")
RECIPES = sorted(p for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if not p.name.startswith(DENSE))
SMALL = ["--image-size", "32", "--batch-size", "2", "--max-steps", "1", "--workers", "0", "--precision", "fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_starts(recipe, tmp_path):
    photos = make_photos(tmp_path / "photos", train=1, val=1)
    arguments = ["--config", str(recipe), "--data", str(photos), "--run", str(tmp_path / "run"), *SMALL]
    if "384" in recipe.stem:
        import sgformer

        model = sgformer.create_model(recipe.stem.replace("imagenet", "sgformer").removesuffix("_384"))
        sgformer.save_model(model, tmp_path / "weights.safetensors")
        arguments += ["--weights", str(tmp_path / "weights.safetensors")]
    assert main(["train", "classify", *arguments]) == 0
    assert (tmp_path / "run" / "report.md").exists()


def test_recipes_of_a_size_with_weights_say_what_they_start_from():
    from sgformer.models.pretrained import PRETRAINED

    recipes = {p.name: yaml.safe_load(p.read_text()) for p in RECIPES[0].parent.glob("*.yaml")}
    assert [name for name, keys in recipes.items() if keys.get("model") in PRETRAINED and "weights" not in keys] == []
