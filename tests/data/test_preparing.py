"""The evaluation transform is timm's, without timm."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import InterpolationMode

from sgformer.data.preparing import IMAGENET, Normalization, denormalize, eval_transform, preprocessing


@pytest.mark.parametrize("normalization", [IMAGENET, Normalization((0.5,) * 3, (0.5,) * 3)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (224, 224), (75, 130)])
def test_it_is_timms(size, crop_pct, interpolation, normalization):
    theirs = create_transform(
        (3, *size), interpolation=interpolation, crop_pct=crop_pct, mean=normalization.mean, std=normalization.std
    )
    for step in theirs.transforms:
        if isinstance(step, ResizeKeepRatio):  # of sides that differ; older versions of timm resize these bilinearly
            step.interpolation = InterpolationMode(interpolation)
    mine = eval_transform(size, crop_pct, interpolation, normalization)
    rng = np.random.default_rng(0)
    for height, width in ((50, 90), (120, 64), (64, 64), (301, 200)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        torch.testing.assert_close(mine(image), theirs(image), rtol=0, atol=2e-6)


def test_weights_remember_what_is_not_imagenets():
    half = Normalization((0.5,) * 3, (0.25,) * 3)
    assert IMAGENET.to_metadata() == {} and Normalization.of({}) == IMAGENET
    assert Normalization.of(half.to_metadata()) == half
    assert preprocessing({"image_size": 64, **half.to_metadata()})["normalization"] == half
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    shown = denormalize(half(pixels), half).permute(1, 2, 0)
    torch.testing.assert_close(shown, torch.from_numpy(pixels) / 255, rtol=0, atol=1e-6)
